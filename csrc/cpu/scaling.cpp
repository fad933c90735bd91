// Sums and products with a change of dtype on the way, which torch takes through a temporary.
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace lemur::cpu::LEMUR_ISA {

namespace {

template <typename X, typename Y>
void scale_run(const X* x, Y* y, int64_t n, float factor) {
  const Vec by = broadcast(factor);
  for_lanes(n, [&](int64_t i, auto lanes) { store(y + i, mul(load(x + i, lanes), by), lanes); });
}

// Tiles of kTile x kTile are turned in the first cache: reads and writes both run along whole cache lines.
template <typename X, typename Y>
void scale_transposed(const Scale& a) {
  constexpr int64_t kTile = 64;
  const X* x = static_cast<const X*>(a.x);
  Y* y = static_cast<Y*>(a.y);
  const auto least = [](int64_t p, int64_t q) { return p < q ? p : q; };
  parallel_for((a.rows + kTile - 1) / kTile, 1 + kGrain / (kTile * a.cols), [&](int64_t begin, int64_t end) {
    float column[kTile], tile[kTile * kTile];
    for (int64_t row = begin * kTile; row < least(end * kTile, a.rows); row += kTile) {
      const int64_t height = least(kTile, a.rows - row);
      for (int64_t col = 0; col < a.cols; col += kTile) {
        const int64_t width = least(kTile, a.cols - col);
        for (int64_t j = 0; j < width; ++j) {
          const X* from = x + (col + j) * a.rows + row;
          for_lanes(height, [&](int64_t i, auto lanes) { store(column + i, load(from + i, lanes), lanes); });
          for (int64_t i = 0; i < height; ++i) tile[i * kTile + j] = column[i];
        }
        for (int64_t i = 0; i < height; ++i) {
          scale_run(static_cast<const float*>(tile) + i * kTile, y + (row + i) * a.cols + col, width, a.factor);
        }
      }
    }
  });
}

}  // namespace

void accumulate(const Accumulate& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_pieces(a.n, [&](int64_t begin, int64_t count) {
      const T* x = static_cast<const T*>(a.x) + begin;
      float* total = a.total + begin;
      for_lanes(count, [&](int64_t i, auto lanes) {
        const Vec v = load(x + i, lanes);
        store(total + i, a.add ? add(v, load(static_cast<const float*>(total) + i, lanes)) : v, lanes);
      });
    });
  });
}

void scale(const Scale& a) {
  with_type(a.x_dtype, [&](auto x_type) {
    with_type(a.y_dtype, [&](auto y_type) {
      using X = typename decltype(x_type)::type;
      using Y = typename decltype(y_type)::type;
      if (a.transposed) return scale_transposed<X, Y>(a);
      parallel_pieces(a.rows * a.cols, [&](int64_t begin, int64_t count) {
        scale_run(static_cast<const X*>(a.x) + begin, static_cast<Y*>(a.y) + begin, count, a.factor);
      });
    });
  });
}

}  // namespace lemur::cpu::LEMUR_ISA
