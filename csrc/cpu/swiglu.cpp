// SwiGLU, forward and backward. Each element is read once and written once; silu is computed anew in the backward.
//
//   y = gate * s * up,   s = sigmoid(gate)
//   dup = dy * gate * s
//   dgate = dy * up * s * (1 + gate * (1 - s))
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace lemur::cpu::LEMUR_ISA {
namespace {

// Calls body(row, column, count) on pieces of a [rows, cols] array: of rows, or of the whole where that lies in one
// block of memory, however short its rows are.
template <typename Body>
void for_pieces(int64_t rows, int64_t cols, bool one_block, Body&& body) {
  if (!one_block) {
    parallel_for(rows, rows_per_grain(cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(row, 0, cols);
    });
    return;
  }
  parallel_pieces(rows * cols, [&](int64_t begin, int64_t count) { body(0, begin, count); });
}

template <typename T>
void fwd(const SwigluFwd& a) {
  const bool one_block = a.gate_stride == a.cols && a.up_stride == a.cols;
  for_pieces(a.rows, a.cols, one_block, [&](int64_t row, int64_t column, int64_t count) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + column;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride + column;
    T* y = static_cast<T*>(a.y) + row * a.cols + column;
    for_lanes(count, [&](int64_t i, auto lanes) {
      const Vec g = load(gate + i, lanes);
      store(y + i, mul(mul(g, sigmoid(g)), load(up + i, lanes)), lanes);
    });
  });
}

template <typename T>
void bwd(const SwigluBwd& a) {
  const bool one_block = a.dy_stride == a.cols && a.gate_stride == a.cols && a.up_stride == a.cols;
  const Vec one = broadcast(1.f);
  for_pieces(a.rows, a.cols, one_block, [&](int64_t row, int64_t column, int64_t count) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride + column;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + column;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride + column;
    T* dgate = static_cast<T*>(a.dgate) + row * a.cols + column;
    T* dup = static_cast<T*>(a.dup) + row * a.cols + column;
    for_lanes(count, [&](int64_t i, auto lanes) {
      const Vec g = load(gate + i, lanes), d = load(dy + i, lanes);
      const Vec s = sigmoid(g);
      store(dup + i, mul(d, mul(g, s)), lanes);
      const Vec slope = mul(s, fma(g, sub(one, s), one));
      store(dgate + i, mul(mul(d, load(up + i, lanes)), slope), lanes);
    });
  });
}

}  // namespace

void swiglu_fwd(const SwigluFwd& a) {
  with_type(a.dtype, [&](auto type) { fwd<typename decltype(type)::type>(a); });
}

void swiglu_bwd(const SwigluBwd& a) {
  with_type(a.dtype, [&](auto type) { bwd<typename decltype(type)::type>(a); });
}

}  // namespace lemur::cpu::LEMUR_ISA
