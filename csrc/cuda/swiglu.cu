// SwiGLU, forward and backward. The formulas stand in csrc/cpu/swiglu.cpp. One read and one write of every tensor.
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace lemur::cuda {
namespace {

constexpr int kThreads = 256;

// Where this thread's k-th pack is: `blocks_each` blocks share a row, and a block's packs lie side by side.
template <int kSize, int kPacks>
struct Walk {
  int64_t row;
  int64_t first;

  __device__ explicit Walk(unsigned blocks_each) {
    const unsigned block = blockIdx.x % blocks_each;
    row = blockIdx.x / blocks_each;
    first = (static_cast<int64_t>(block) * kPacks * kThreads + threadIdx.x) * kSize;
  }
  __device__ int64_t col(int k) const { return first + k * kThreads * kSize; }
};

template <typename T, int kSize, int kPacks>
__global__ void __launch_bounds__(kThreads)
    swiglu_fwd_kernel(const T* __restrict__ gate, int64_t gate_stride, const T* __restrict__ up, int64_t up_stride,
                      T* __restrict__ y, int64_t cols, unsigned blocks_each) {
  const Walk<kSize, kPacks> at(blocks_each);
  Pack<T, kSize> g[kPacks], u[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t col = at.col(k);
    if (col >= cols) break;
    g[k] = load_pack<kSize>(gate + at.row * gate_stride + col);
    u[k] = load_pack<kSize>(up + at.row * up_stride + col);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t col = at.col(k);
    if (col >= cols) break;
    float out[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float v = to_float(g[k].values[i]);
      out[i] = v * sigmoid(v) * to_float(u[k].values[i]);
    }
    store_pack(y + at.row * cols + col, pack_of<T>(out));
  }
}

template <typename T, int kSize, int kPacks>
__global__ void __launch_bounds__(kThreads)
    swiglu_bwd_kernel(const T* __restrict__ dy, int64_t dy_stride, const T* __restrict__ gate, int64_t gate_stride,
                      const T* __restrict__ up, int64_t up_stride, T* __restrict__ dgate, T* __restrict__ dup,
                      int64_t cols, unsigned blocks_each) {
  const Walk<kSize, kPacks> at(blocks_each);
  Pack<T, kSize> d[kPacks], g[kPacks], u[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t col = at.col(k);
    if (col >= cols) break;
    d[k] = load_pack<kSize>(dy + at.row * dy_stride + col);
    g[k] = load_pack<kSize>(gate + at.row * gate_stride + col);
    u[k] = load_pack<kSize>(up + at.row * up_stride + col);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t col = at.col(k);
    if (col >= cols) break;
    float out_gate[kSize], out_up[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float v = to_float(g[k].values[i]), from_above = to_float(d[k].values[i]);
      const float s = sigmoid(v);
      out_gate[i] = from_above * to_float(u[k].values[i]) * s * (1.f + v * (1.f - s));
      out_up[i] = from_above * v * s;
    }
    store_pack(dgate + at.row * cols + col, pack_of<T>(out_gate));
    store_pack(dup + at.row * cols + col, pack_of<T>(out_up));
  }
}

// Rows and columns to walk: one row of everything, where every tensor lies in one piece.
struct Extent {
  int64_t rows, cols;

  Extent(int64_t rows_, int64_t cols_, bool whole) : rows(whole ? 1 : rows_), cols(whole ? rows_ * cols_ : cols_) {}
  int64_t blocks_each(int elements) const { return ceil_div(cols, elements); }
  int64_t stride(int64_t between_rows) const { return rows > 1 ? between_rows : 0; }
};

}  // namespace

void swiglu_fwd(const SwigluFwd& a, const Place& place) {
  const Extent extent(a.rows, a.cols, a.rows == 1 || (a.gate_stride == a.cols && a.up_stride == a.cols));
  if (a.rows == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto kernel, int elements) {
      const int64_t each = extent.blocks_each(elements);
      launch(
          kernel, extent.rows * each, dim3(kThreads), 0, place,
          [&] { return "swiglu forward of " + shape_of(a.rows, a.cols, a.dtype); }, static_cast<const T*>(a.gate),
          a.gate_stride, static_cast<const T*>(a.up), a.up_stride, static_cast<T*>(a.y), extent.cols,
          static_cast<unsigned>(each));
    };
    constexpr int kPack = kWhole<T>;
    const Alignment whole{16};
    const bool aligned = extent.cols % kPack == 0 && whole.holds(a.gate, extent.stride(a.gate_stride), sizeof(T)) &&
                         whole.holds(a.up, extent.stride(a.up_stride), sizeof(T)) && whole.holds(a.y);
    aligned ? run(swiglu_fwd_kernel<T, kPack, 2>, 2 * kThreads * kPack) : run(swiglu_fwd_kernel<T, 1, 8>, 8 * kThreads);
  });
}

void swiglu_bwd(const SwigluBwd& a, const Place& place) {
  const Extent extent(a.rows, a.cols,
                      a.rows == 1 || (a.dy_stride == a.cols && a.gate_stride == a.cols && a.up_stride == a.cols));
  if (a.rows == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto kernel, int elements) {
      const int64_t each = extent.blocks_each(elements);
      launch(
          kernel, extent.rows * each, dim3(kThreads), 0, place,
          [&] { return "swiglu backward of " + shape_of(a.rows, a.cols, a.dtype); }, static_cast<const T*>(a.dy),
          a.dy_stride, static_cast<const T*>(a.gate), a.gate_stride, static_cast<const T*>(a.up), a.up_stride,
          static_cast<T*>(a.dgate), static_cast<T*>(a.dup), extent.cols, static_cast<unsigned>(each));
    };
    constexpr int kPack = kWhole<T>;
    const Alignment whole{16};
    const bool aligned = extent.cols % kPack == 0 && whole.holds(a.dy, extent.stride(a.dy_stride), sizeof(T)) &&
                         whole.holds(a.gate, extent.stride(a.gate_stride), sizeof(T)) &&
                         whole.holds(a.up, extent.stride(a.up_stride), sizeof(T)) && whole.holds(a.dgate) &&
                         whole.holds(a.dup);
    aligned ? run(swiglu_bwd_kernel<T, kPack, 2>, 2 * kThreads * kPack) : run(swiglu_bwd_kernel<T, 1, 8>, 8 * kThreads);
  });
}

}  // namespace lemur::cuda
