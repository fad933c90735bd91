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

// Turned in blocks of 32 columns by as many rows as make long runs to read, which the processor then fetches ahead.
template <typename X, typename Y>
void scale_transposed(const Scale& a) {
  constexpr int64_t kRows = 256, kColumns = 32;
  const X* x = static_cast<const X*>(a.x);
  Y* y = static_cast<Y*>(a.y);
  const auto least = [](int64_t p, int64_t q) { return p < q ? p : q; };
  parallel_for((a.rows + kRows - 1) / kRows, 1 + kGrain / (kRows * a.cols), [&](int64_t begin, int64_t end) {
    alignas(64) float runs[kColumns * kRows] = {}, tile[16 * kColumns];
    for (int64_t row = begin * kRows; row < least(end * kRows, a.rows); row += kRows) {
      const int64_t height = least(kRows, a.rows - row);
      for (int64_t column = 0; column < a.cols; column += kColumns) {
        const int64_t width = least(kColumns, a.cols - column);
        for (int64_t j = 0; j < width; ++j) {
          scale_run(x + (column + j) * a.rows + row, runs + j * kRows, height, a.factor);
        }
        for (int64_t i = 0; i < height; i += 16) {
          for (int64_t j = 0; j < kColumns; j += 16) transpose_16x16(runs + j * kRows + i, kRows, tile + j, kColumns);
          for (int64_t k = 0; k < least(16, height - i); ++k) {
            scale_run(static_cast<const float*>(tile) + k * kColumns, y + (row + i + k) * a.cols + column, width, 1.f);
          }
        }
      }
    }
  });
}

}  // namespace

void accumulate(const Accumulate& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(a.rows, rows_per_grain(a.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.x) + row * a.cols;
        float* total = a.total + row * a.total_stride;
        for_lanes(a.cols, [&](int64_t i, auto lanes) {
          const Vec v = load(x + i, lanes);
          store(total + i, a.add ? add(v, load(static_cast<const float*>(total) + i, lanes)) : v, lanes);
        });
      }
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
