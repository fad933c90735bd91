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

template <typename X, typename Y>
void rotate(const X* x, Y* y, int64_t head_dim, bool interleaved, bool streamed, const Angles& angles) {
  if (interleaved) {
    for_lanes(head_dim, streamed, [&](int64_t i, auto lanes) {
      const Vec v = load(x + i, lanes), c = load_scratch(angles.cos + i), s = load_scratch(angles.sin + i);
      const Vec crossed{sub(broadcast_reg(0.f), mul(v.odd, s.even)), mul(v.even, s.odd)};
      store(y + i, fma(v, c, crossed), lanes);
    });
    return;
  }
  const int64_t half = head_dim / 2, b = half_size(head_dim);
  const Vec zero = broadcast(0.f);
  for_lanes(half, streamed, [&](int64_t i, auto lanes) {
    const Vec x_a = load(x + i, lanes), x_b = load(x + half + i, lanes);
    const Vec minus = sub(zero, mul(x_b, load_scratch(angles.sin + i)));
    store(y + i, fma(x_a, load_scratch(angles.cos + i), minus), lanes);
    const Vec plus = mul(x_a, load_scratch(angles.sin + b + i));
    store(y + half + i, fma(x_b, load_scratch(angles.cos + b + i), plus), lanes);
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
      for (int64_t head = 0; head < xs[n].heads; ++head) {
        rotate(x + head * xs[n].head_stride, y + head * t.head_dim, t.head_dim, t.interleaved, streamed, angles);
      }
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
