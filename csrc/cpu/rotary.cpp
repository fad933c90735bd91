// Rotary position embedding. Pairs are (i, i + D/2), or (2i, 2i + 1) when interleaved:
//
//   y_a = x_a * cos_a - x_b * sin_a       y_b = x_b * cos_b + x_a * sin_b
//
// The backward is the transpose: the same with sin_a and sin_b swapped and negated. A token's tables are turned into
// floats once and serve all its heads.
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace lemur::cpu::LEMUR_ISA {
namespace {

// A token's tables in scratch memory: of pairs as they lie in a Vec (interleaved), or the a half and then the b half.
struct Angles {
  float* cos;
  float* sin;
};

int64_t half_size(int64_t head_dim) { return scratch_size(head_dim / 2); }

// One row of a table. `swap` exchanges what belongs to a and what belongs to b.
template <typename Table>
void load_row(const RotaryTables& t, const Table* row, bool swap, float sign, float* out) {
  const int64_t half = t.head_dim / 2;
  const bool whole = t.columns == t.head_dim;
  const Vec factor = broadcast(sign);
  if (!t.interleaved) {
    const Table* a = row + (whole && swap ? half : 0);
    const Table* b = row + (whole && !swap ? half : 0);
    for_lanes(half, [&](int64_t i, auto lanes) {
      store_scratch(out + i, mul(load(a + i, lanes), factor));
      store_scratch(out + half_size(t.head_dim) + i, mul(load(b + i, lanes), factor));
    });
    return;
  }
  for_lanes(t.head_dim, [&](int64_t i, auto lanes) {
    Vec v;
    if (whole) {
      v = load(row + i, lanes);
      if (swap) v = Vec{v.odd, v.even};
    } else {
      float pairs[kLanes] = {};
      for (int64_t j = i; j < t.head_dim && j < i + kLanes; ++j) pairs[j - i] = load_one(row + j / 2);
      v = load(static_cast<const float*>(pairs), Full{});
    }
    store_scratch(out + i, mul(v, factor));
  });
}

// A token's heads, a piece of their tables after the other, so that the tables stay in registers.
template <typename X, typename Y>
void rotate(const X* x, int64_t head_stride, Y* y, int64_t heads, const RotaryTables& t, bool streamed,
            const Angles& angles) {
  if (t.interleaved) {
    for_lanes(t.head_dim, streamed, [&](int64_t i, auto lanes) {
      const Vec c = load_scratch(angles.cos + i), s = load_scratch(angles.sin + i);
      for (int64_t head = 0; head < heads; ++head) {
        const Vec v = load(x + head * head_stride + i, lanes);
        const Vec crossed{sub(broadcast_reg(0.f), mul(v.odd, s.even)), mul(v.even, s.odd)};
        store(y + head * t.head_dim + i, fma(v, c, crossed), lanes);
      }
    });
    return;
  }
  const int64_t half = t.head_dim / 2, b = half_size(t.head_dim);
  const Vec minus_one = broadcast(-1.f);
  for_lanes(half, streamed, [&](int64_t i, auto lanes) {
    const Vec cos_a = load_scratch(angles.cos + i), cos_b = load_scratch(angles.cos + b + i);
    const Vec sin_a = mul(minus_one, load_scratch(angles.sin + i)), sin_b = load_scratch(angles.sin + b + i);
    for (int64_t head = 0; head < heads; ++head) {
      const X* from = x + head * head_stride + i;
      Y* to = y + head * t.head_dim + i;
      const Vec x_a = load(from, lanes), x_b = load(from + half, lanes);
      store(to, fma(x_a, cos_a, mul(x_b, sin_a)), lanes);
      store(to + half, fma(x_b, cos_b, mul(x_a, sin_b)), lanes);
    }
  });
}

template <typename X, typename Y>
void tokens(const Rotary* xs, int count, const RotaryTables& t, int64_t begin, int64_t end) {
  const int64_t size = t.interleaved ? scratch_size(t.head_dim) : 2 * half_size(t.head_dim);
  const ThreadScratch scratch(2 * size);
  const Angles angles{scratch.data(), scratch.data() + size};
  for (int64_t token = begin; token < end; ++token) {
    with_type(t.table_dtype, [&](auto type) {
      using Table = typename decltype(type)::type;
      load_row(t, static_cast<const Table*>(t.cos) + token * t.cos_stride, false, 1.f, angles.cos);
      load_row(t, static_cast<const Table*>(t.sin) + token * t.sin_stride, t.backward, t.backward ? -1.f : 1.f,
               angles.sin);
    });
    for (int n = 0; n < count; ++n) {
      const X* x = static_cast<const X*>(xs[n].x) + token * xs[n].token_stride;
      // Half a head is the shortest run of stores.
      const int64_t run = t.interleaved ? t.head_dim : t.head_dim / 2;
      const bool streamed = can_stream(static_cast<const Y*>(xs[n].y), t.tokens * xs[n].heads * t.head_dim / run, run);
      Y* y = static_cast<Y*>(xs[n].y) + token * xs[n].heads * t.head_dim;
      rotate(x, xs[n].head_stride, y, xs[n].heads, t, streamed, angles);
    }
  }
  finish_streams();
}

}  // namespace

void rotary(const Rotary* xs, int count, const RotaryTables& t) {
  int64_t elements = 1;
  for (int n = 0; n < count; ++n) elements += xs[n].heads * t.head_dim;
  with_type(t.x_dtype, [&](auto x_type) {
    with_type(t.y_dtype, [&](auto y_type) {
      using X = typename decltype(x_type)::type;
      using Y = typename decltype(y_type)::type;
      parallel_for(t.tokens, rows_per_grain(elements),
                   [&](int64_t begin, int64_t end) { tokens<X, Y>(xs, count, t, begin, end); });
    });
  });
}

}  // namespace lemur::cpu::LEMUR_ISA
