// Rotation of queries and keys by their positions, in one launch; the backward is the same kernel, transposed. The
// formulas stand in csrc/cpu/rotary.cpp.
//
// A thread keeps the angles of its pairs, and rotates them in every head of its token.
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace lemur::cuda {
namespace {

constexpr int kThreads = 256;

// Pairs (i, i + half), or (2 i, 2 i + 1) when interleaved.
template <bool kInterleaved, int kPairs>
struct Pairs {
  float a[kPairs], b[kPairs];

  // Pairs [pair, pair + kPairs) of `row`.
  template <typename T>
  __device__ __forceinline__ void load(const T* row, int pair, int half) {
    if constexpr (kInterleaved && kPairs > 1) {
      const auto pack = load_pack<2 * kPairs>(row + 2 * pair);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        a[i] = to_float(pack.values[2 * i]);
        b[i] = to_float(pack.values[2 * i + 1]);
      }
    } else {
      const auto first = load_pack<kPairs>(kInterleaved ? row + 2 * pair : row + pair);
      const auto second = load_pack<kPairs>(kInterleaved ? row + 2 * pair + 1 : row + half + pair);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        a[i] = to_float(first.values[i]);
        b[i] = to_float(second.values[i]);
      }
    }
  }

  // The same from a table that has one value for both.
  template <typename T>
  __device__ __forceinline__ void load_shared(const T* row, int pair) {
    const auto pack = load_pack<kPairs>(row + pair);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) a[i] = b[i] = to_float(pack.values[i]);
  }

  template <typename T>
  __device__ __forceinline__ void store(T* row, int pair, int half) const {
    if constexpr (kInterleaved && kPairs > 1) {
      float both[2 * kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        both[2 * i] = a[i];
        both[2 * i + 1] = b[i];
      }
      store_pack(row + 2 * pair, pack_of<T>(both));
    } else {
      store_pack(kInterleaved ? row + 2 * pair : row + pair, pack_of<T>(a));
      store_pack(kInterleaved ? row + 2 * pair + 1 : row + half + pair, pack_of<T>(b));
    }
  }
};

template <typename P>
__device__ __forceinline__ P rotated(const P& x, const P& cos, const P& sin) {
  P out;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(x.a) / sizeof(float)); ++i) {
    out.a[i] = x.a[i] * cos.a[i] - x.b[i] * sin.a[i];
    out.b[i] = x.b[i] * cos.b[i] + x.a[i] * sin.b[i];
  }
  return out;
}

// Of a block's threads, `along` take the packs of pairs of a head, `down` the heads of a token, the rest other tokens.
// whole: the tables have an angle for every element, not for every pair.
template <typename X, typename Table, typename Y, bool kInterleaved, int kPairs>
__global__ void __launch_bounds__(kThreads, 2)
    rotary_kernel(const X* __restrict__ q, int64_t q_token, int64_t q_head, Y* __restrict__ q_out, int q_heads,
                  const X* __restrict__ k, int64_t k_token, int64_t k_head, Y* __restrict__ k_out, int k_heads,
                  const Table* __restrict__ cos, int64_t cos_stride, const Table* __restrict__ sin, int64_t sin_stride,
                  bool whole, bool transposed, int64_t tokens, int half, int along, int down) {
  const int place = threadIdx.x / along, first_pair = threadIdx.x % along * kPairs, first_head = place % down;
  const int tokens_each = kThreads / (along * down);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * tokens_each + place / down;
  if (place / down >= tokens_each || token >= tokens) return;
  for (int pair = first_pair; pair < half; pair += along * kPairs) {
    Pairs<kInterleaved, kPairs> c, s;
    if (whole) {
      c.load(cos + token * cos_stride, pair, half);
      s.load(sin + token * sin_stride, pair, half);
    } else {
      c.load_shared(cos + token * cos_stride, pair);
      s.load_shared(sin + token * sin_stride, pair);
    }
    if (transposed) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float swapped = -s.b[i];
        s.b[i] = -s.a[i];
        s.a[i] = swapped;
      }
    }
    const auto rotate = [&](const X* x, int64_t head_stride, Y* out, int heads) {
#pragma unroll 2
      for (int head = first_head; head < heads; head += down) {
        Pairs<kInterleaved, kPairs> v;
        v.load(x + head * head_stride, pair, half);
        rotated(v, c, s).store(out + static_cast<int64_t>(head) * 2 * half, pair, half);
      }
    };
    rotate(q + token * q_token, q_head, q_out + token * q_heads * 2 * half, q_heads);
    rotate(k + token * k_token, k_head, k_out + token * k_heads * 2 * half, k_heads);
  }
}

// Calls body with the types of x, of the tables and of y.
template <typename Body>
void with_types(const RotaryTables& t, const Body& body) {
  const auto narrow = [&](DType dtype) {
    with_type(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if (t.x_dtype == t.table_dtype && t.x_dtype == t.y_dtype) return body(Type<T>{}, Type<T>{}, Type<T>{});
      if (t.table_dtype == DType::kFloat32) {
        if (t.y_dtype == DType::kFloat32) return body(Type<T>{}, Type<float>{}, Type<float>{});
        if (t.x_dtype == DType::kFloat32) return body(Type<float>{}, Type<float>{}, Type<T>{});
      }
      throw std::invalid_argument("rotary: got x, tables and y of " + std::string(name_of(t.x_dtype)) + ", " +
                                  name_of(t.table_dtype) + " and " + name_of(t.y_dtype) +
                                  "; takes one dtype, or tables of float32 with x or y of float32");
    });
  };
  narrow(t.x_dtype == DType::kFloat32 ? t.y_dtype : t.x_dtype);
}

}  // namespace

void rotary(const Rotary* xs, int count, const RotaryTables& t, const Place& place) {
  if (count < 1 || count > 2) throw std::invalid_argument("rotary: takes one or two tensors");
  const Rotary &q = xs[0], k = count == 2 ? xs[1] : Rotary{nullptr, 0, 0, nullptr, 0};
  const int64_t heads = q.heads > k.heads ? q.heads : k.heads, half = t.head_dim / 2;
  if (t.tokens == 0 || heads == 0) return;
  with_types(t, [&](auto x_type, auto table_type, auto y_type) {
    using X = typename decltype(x_type)::type;
    using Table = typename decltype(table_type)::type;
    using Y = typename decltype(y_type)::type;
    const auto run = [&](auto kernel, int pairs) {
      const int64_t packs = ceil_div(half, pairs);
      const int along = static_cast<int>(packs < kThreads ? packs : kThreads), room = kThreads / along;
      const int down = static_cast<int>(heads < room ? heads : room);
      launch(
          kernel, ceil_div(t.tokens, room / down), dim3(kThreads), 0, place,
          [&] {
            return "rotary of " + std::to_string(t.tokens) + " tokens, " + std::to_string(q.heads) + " and " +
                   std::to_string(k.heads) + " heads of " + std::to_string(t.head_dim) + ", " + name_of(t.x_dtype);
          },
          static_cast<const X*>(q.x), q.token_stride, q.head_stride, static_cast<Y*>(q.y),
          narrow("rotary: heads", q.heads), static_cast<const X*>(k.x), k.token_stride, k.head_stride,
          static_cast<Y*>(k.y), narrow("rotary: heads", k.heads), static_cast<const Table*>(t.cos), t.cos_stride,
          static_cast<const Table*>(t.sin), t.sin_stride, t.columns == t.head_dim, t.backward, t.tokens,
          narrow("rotary: half of head_dim", half), along, down);
    };
    // Where a type is float32, it decides how much fits into 16 bytes.
    constexpr bool kWide = sizeof(X) == 4 || sizeof(Y) == 4;
    constexpr int kElements = kWide ? 4 : 8;
    const auto fits = [&](std::size_t elements) {
      const Alignment x{elements * sizeof(X)}, y{elements * sizeof(Y)};
      const auto tensor = [&](const Rotary& r) {
        return x.holds(r.x, r.token_stride, sizeof(X)) && x.holds(r.x, r.head_stride, sizeof(X)) && y.holds(r.y);
      };
      // Interleaved tables of half the width are read by half a pack.
      const std::size_t of_table = t.interleaved && t.columns < t.head_dim ? elements / 2 : elements;
      const Alignment table{of_table * sizeof(Table)};
      return (t.interleaved ? t.head_dim : half) % static_cast<int64_t>(elements) == 0 && tensor(q) && tensor(k) &&
             table.holds(t.cos, t.cos_stride, sizeof(Table)) && table.holds(t.sin, t.sin_stride, sizeof(Table));
    };
    if (t.interleaved) {
      constexpr int kPairs = kElements / 2;
      fits(kElements) ? run(rotary_kernel<X, Table, Y, true, kPairs>, kPairs)
                      : run(rotary_kernel<X, Table, Y, true, 1>, 1);
    } else {
      fits(kElements) ? run(rotary_kernel<X, Table, Y, false, kElements>, kElements)
                      : run(rotary_kernel<X, Table, Y, false, 1>, 1);
    }
  });
}

}  // namespace lemur::cuda
