// RMSNorm with an optional residual added first, forward and backward. The formulas stand in csrc/cpu/rms_norm.cpp.
//
// Whole warps take a row. Where the row is aligned and fits, each thread holds its packs of it in registers, so that
// memory is read once; else the row is walked twice, and the second walk finds it in the cache.
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace lemur::cuda {
namespace {

constexpr int kForwardPacks = 4;       // that a thread holds
constexpr int kForwardThreads = 1024;  // at most
constexpr int kBackwardThreads = 512;  // so that a thread has 128 registers

// ---- forward ----

// One pack of h = round(x + residual), which is x without a residual; written where there is one.
template <int kSize, typename X>
__device__ __forceinline__ Pack<X, kSize> add_pack(Pack<X, kSize> x, const X* residual) {
  if (residual == nullptr) return x;
  const auto r = load_pack<kSize>(residual);
  float sum[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum[i] = to_float(x.values[i]) + to_float(r.values[i]);
  return pack_of<X>(sum);
}

template <int kSize, typename X>
__device__ __forceinline__ float squares_of(const Pack<X, kSize>& pack, float sum) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float v = to_float(pack.values[i]);
    sum = fmaf(v, v, sum);
  }
  return sum;
}

// round(h * rstd) * w
template <typename Y, int kSize, typename X, typename W>
__device__ __forceinline__ void write_scaled(const Pack<X, kSize>& h, float rstd, const W* weight, Y* y) {
  const auto w = load_pack<kSize>(weight);
  float out[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) out[i] = to_float(h.values[i]) * rstd;
  const auto x_hat = pack_of<X>(out);
#pragma unroll
  for (int i = 0; i < kSize; ++i) out[i] = to_float(x_hat.values[i]) * to_float(w.values[i]);
  store_pack(y, pack_of<Y>(out));
}

// blockDim.y rows a block. kHeld: the packs of a row are at most kForwardPacks a thread.
template <typename X, typename W, typename Y, int kSize, bool kHeld>
__global__ void __launch_bounds__(kForwardThreads, 1)
    rms_norm_fwd_kernel(const X* __restrict__ x, int64_t x_stride, const X* __restrict__ residual,
                        int64_t residual_stride, const W* __restrict__ weight, Y* __restrict__ y, X* __restrict__ h,
                        float* __restrict__ rstd, int64_t rows, int cols, float inverse_cols, float eps) {
  __shared__ float scratch[kForwardThreads / 32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int end = row < rows ? cols : 0;  // threads of no row stay for the barrier
  const X* row_x = x + row * x_stride;
  const X* row_residual = residual == nullptr ? nullptr : residual + row * residual_stride;
  const int first = threadIdx.x * kSize, step = blockDim.x * kSize;
  const auto at = [&](const X* p, int col) { return p == nullptr ? nullptr : p + col; };

  float sum = 0.f, scale;
  if constexpr (kHeld) {
    Pack<X, kSize> held[kForwardPacks];
#pragma unroll
    for (int k = 0; k < kForwardPacks; ++k) {
      const int col = first + k * step;
      held[k] = col < end ? load_pack<kSize>(row_x + col) : zeros<X, kSize>();
    }
#pragma unroll
    for (int k = 0; k < kForwardPacks; ++k) {
      const int col = first + k * step;
      if (col < end && residual != nullptr) {
        held[k] = add_pack(held[k], row_residual + col);
        store_pack(h + row * cols + col, held[k]);
      }
      sum = squares_of(held[k], sum);
    }
    scale = rsqrtf(row_sum(sum, scratch) * inverse_cols + eps);
#pragma unroll
    for (int k = 0; k < kForwardPacks; ++k) {
      const int col = first + k * step;
      if (col < end) write_scaled(held[k], scale, weight + col, y + row * cols + col);
    }
  } else {
#pragma unroll 4
    for (int col = first; col < end; col += step) {
      const auto pack = add_pack(load_pack<kSize>(row_x + col), at(row_residual, col));
      if (residual != nullptr) store_pack(h + row * cols + col, pack);
      sum = squares_of(pack, sum);
    }
    scale = rsqrtf(row_sum(sum, scratch) * inverse_cols + eps);
#pragma unroll 4
    for (int col = first; col < end; col += step) {
      const auto pack = add_pack(load_pack<kSize>(row_x + col), at(row_residual, col));
      write_scaled(pack, scale, weight + col, y + row * cols + col);
    }
  }
  if (row < rows && rstd != nullptr && threadIdx.x == 0) rstd[row] = scale;
}

// ---- backward ----

// A turn's tensors of one row: what is read of it.
template <typename X, typename Y, int kSize, int kPacks>
struct Row {
  Pack<X, kSize> h[kPacks];
  Pack<Y, kSize> dy[kPacks];
  float rstd;
};

// Writes the sums of a warp's threads, kSize neighbouring columns each, as the lanes lie: without gaps between them.
template <int kSize>
__device__ __forceinline__ void store_sums(const float (&sums)[kSize], float* out, int first_of_warp, int cols) {
  const int lane = threadIdx.x % 32;
  if constexpr (kSize < 8) {
    const int col = first_of_warp + lane * kSize;
    Pack<float, kSize> pack;
#pragma unroll
    for (int i = 0; i < kSize; ++i) pack.values[i] = sums[i];
    if (col < cols) store_pack(out + col, pack);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int source = half * 16 + lane / 2;
      Pack<float, 4> pack;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = __shfl_sync(0xffffffffu, sums[i], source);
        const float high = __shfl_sync(0xffffffffu, sums[4 + i], source);
        pack.values[i] = lane % 2 ? high : low;
      }
      const int col = first_of_warp + half * 128 + lane * 4;
      if (col < cols) store_pack(out + col, pack);
    }
  }
}

// `rows_each` rows a block, blockDim.y at a time; the block's part of dw goes to its row of `partial`, where that is
// not null. Rows that fit into registers: kPacks packs a thread.
template <typename X, typename W, typename Y, int kSize, int kPacks>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    rms_norm_bwd_kernel(const Y* __restrict__ dy, int64_t dy_stride, const X* __restrict__ dh, int64_t dh_stride,
                        const X* __restrict__ h, int64_t h_stride, const W* __restrict__ weight,
                        const float* __restrict__ rstd, X* __restrict__ dx, float* __restrict__ partial, int64_t rows,
                        int64_t rows_each, int cols, float inverse_cols) {
  // Two of each: a turn must not overwrite what slow warps of the turn before still read.
  __shared__ float scratch[2][kBackwardThreads / 32];
  extern __shared__ float sums_of_groups[];
  const int64_t first_row = blockIdx.x * rows_each;
  const int64_t last_row = first_row + rows_each < rows ? first_row + rows_each : rows;
  const int first = threadIdx.x * kSize, step = blockDim.x * kSize;

  const auto read = [&](int64_t row) {
    Row<X, Y, kSize, kPacks> out;
    const bool inside = row < last_row;
    out.rstd = inside ? rstd[row] : 0.f;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int col = first + k * step;
      const bool here = inside && col < cols;
      out.h[k] = here ? load_pack<kSize>(h + row * h_stride + col) : zeros<X, kSize>();
      out.dy[k] = here ? load_pack<kSize>(dy + row * dy_stride + col) : zeros<Y, kSize>();
    }
    return out;
  };

  // From the first cache at every turn: held, it would take the registers that the next row has.
  const auto weight_of = [&](int k) {
    const int col = first + k * step;
    return col < cols ? load_pack<kSize>(weight + col) : zeros<W, kSize>();
  };

  // Where registers suffice, the next row is on its way while this one's sum is made.
  constexpr bool kAhead = kPacks <= 2;
  float dw[kPacks][kSize] = {};
  auto next = kAhead ? read(first_row + threadIdx.y) : Row<X, Y, kSize, kPacks>{};
  int turn = 0;
  for (int64_t start = first_row; start < last_row; start += blockDim.y, turn ^= 1) {
    const int64_t row = start + threadIdx.y;
    const auto now = kAhead ? next : read(row);
    if constexpr (kAhead) next = read(row + blockDim.y);

    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const auto w = weight_of(k);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float g = to_float(now.dy[k].values[i]) * to_float(w.values[i]);
        sum = fmaf(g, to_float(now.h[k].values[i]) * now.rstd, sum);
      }
    }
    const float mean = row_sum(sum, scratch[turn]) * inverse_cols;
    if (row >= last_row) continue;

#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int col = first + k * step;
      if (col >= cols) break;
      const auto from_above = dh == nullptr ? zeros<X, kSize>() : load_pack<kSize>(dh + row * dh_stride + col);
      const auto w = weight_of(k);
      float out[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float d = to_float(now.dy[k].values[i]);
        const float x_hat = to_float(now.h[k].values[i]) * now.rstd;
        const float g = d * to_float(w.values[i]);
        out[i] = fmaf(now.rstd, fmaf(x_hat, -mean, g), to_float(from_above.values[i]));
        dw[k][i] = fmaf(d, rounded<X>(x_hat), dw[k][i]);
      }
      store_pack(dx + row * cols + col, pack_of<X>(out));
    }
  }
  if (partial == nullptr) return;

  // One after the other, the block's groups of rows add theirs: always in the same order.
  for (int group = 0; group + 1 < blockDim.y; ++group) {
    if (threadIdx.y == group) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) sums_of_groups[(k * kSize + i) * blockDim.x + threadIdx.x] = dw[k][i];
      }
    }
    __syncthreads();
    if (threadIdx.y == group + 1) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) dw[k][i] += sums_of_groups[(k * kSize + i) * blockDim.x + threadIdx.x];
      }
    }
  }
  if (threadIdx.y + 1 < blockDim.y) return;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int first_of_warp = (threadIdx.x / 32 * 32) * kSize + k * step;
    store_sums(dw[k], partial + blockIdx.x * cols, first_of_warp, cols);
  }
}

// Adds to sums in global memory that the same thread will read again.
template <int kSize>
__device__ __forceinline__ void add_to(float* total, const float (&values)[kSize], bool first) {
  constexpr int kAtOnce = kSize < 4 ? kSize : 4;
#pragma unroll
  for (int start = 0; start < kSize; start += kAtOnce) {
    auto* at = reinterpret_cast<Pack<float, kAtOnce>*>(total + start);
    auto sum = first ? zeros<float, kAtOnce>() : *at;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum.values[i] += values[start + i];
    *at = sum;
  }
}

// The same for rows of any width, one at a time; dw is summed where it ends up.
template <typename X, typename W, typename Y, int kSize>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    rms_norm_bwd_walking_kernel(const Y* __restrict__ dy, int64_t dy_stride, const X* __restrict__ dh,
                                int64_t dh_stride, const X* __restrict__ h, int64_t h_stride,
                                const W* __restrict__ weight, const float* __restrict__ rstd, X* __restrict__ dx,
                                float* partial, int64_t rows, int64_t rows_each, int cols, float inverse_cols) {
  __shared__ float scratch[2][kBackwardThreads / 32];
  const int64_t first_row = blockIdx.x * rows_each;
  const int64_t last_row = first_row + rows_each < rows ? first_row + rows_each : rows;
  const int first = threadIdx.x * kSize, step = blockDim.x * kSize;
  int turn = 0;
  for (int64_t row = first_row; row < last_row; ++row, turn ^= 1) {
    const Y* row_dy = dy + row * dy_stride;
    const X* row_h = h + row * h_stride;
    const float scale = rstd[row];
    float sum = 0.f;
#pragma unroll 4
    for (int col = first; col < cols; col += step) {
      const auto d = load_pack<kSize>(row_dy + col);
      const auto v = load_pack<kSize>(row_h + col);
      const auto w = load_pack<kSize>(weight + col);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        sum = fmaf(to_float(d.values[i]) * to_float(w.values[i]), to_float(v.values[i]) * scale, sum);
      }
    }
    const float mean = row_sum(sum, scratch[turn]) * inverse_cols;
#pragma unroll 2
    for (int col = first; col < cols; col += step) {
      const auto d = load_pack<kSize>(row_dy + col);
      const auto v = load_pack<kSize>(row_h + col);
      const auto w = load_pack<kSize>(weight + col);
      const auto from_above = dh == nullptr ? zeros<X, kSize>() : load_pack<kSize>(dh + row * dh_stride + col);
      float out[kSize], of_dw[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float x_hat = to_float(v.values[i]) * scale;
        const float g = to_float(d.values[i]) * to_float(w.values[i]);
        out[i] = fmaf(scale, fmaf(x_hat, -mean, g), to_float(from_above.values[i]));
        of_dw[i] = to_float(d.values[i]) * rounded<X>(x_hat);
      }
      if (partial != nullptr) add_to(partial + static_cast<int64_t>(blockIdx.x) * cols + col, of_dw, row == first_row);
      store_pack(dx + row * cols + col, pack_of<X>(out));
    }
  }
}

constexpr int kSumColumns = 32, kSumThreads = 256;  // of a block

// total[cols] = the sum over the rows of x [rows, cols]. The threads along y take a row each, then the next such lot of
// rows; in the end a warp adds up what they have.
template <int kSize>
__global__ void __launch_bounds__(kSumThreads)
    sum_rows_kernel(const float* __restrict__ x, float* __restrict__ total, int64_t rows, int cols) {
  constexpr int kGroups = kSumThreads / (kSumColumns / kSize);  // blockDim.y
  __shared__ alignas(16) float sums[kGroups][kSumColumns];
  const int first = threadIdx.x * kSize, col = blockIdx.x * kSumColumns + first;
  auto sum = zeros<float, kSize>();
  if (col < cols) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += kGroups) {
      const auto pack = load_pack<kSize>(x + row * cols + col);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum.values[i] += pack.values[i];
    }
  }
  *reinterpret_cast<Pack<float, kSize>*>(&sums[threadIdx.y][first]) = sum;
  __syncthreads();
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, own = blockIdx.x * kSumColumns + thread;
  if (thread >= kSumColumns || own >= cols) return;
  float all = 0.f;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) all += sums[group][thread];
  total[own] = all;
}

// ---- host ----

// Calls body with the types of x, of the weight and of y.
template <typename Body>
void with_types(DType x_dtype, DType w_dtype, const Body& body) {
  with_type(x_dtype, [&](auto x_type) {
    using X = typename decltype(x_type)::type;
    if (w_dtype == x_dtype) return body(Type<X>{}, Type<X>{}, Type<X>{});
    if (w_dtype == DType::kFloat32) return body(Type<X>{}, Type<float>{}, Type<float>{});
    throw std::invalid_argument("rms_norm: got a weight of " + std::string(name_of(w_dtype)) + "; takes " +
                                name_of(x_dtype) + ", x's, or float32");
  });
}

}  // namespace

void rms_norm_fwd(const RmsNormFwd& a, const Place& place) {
  if (a.rows == 0) return;
  const int cols = narrow("rms_norm: cols", a.cols);
  const bool many = a.rows > 1;  // else strides do not matter
  const auto describe = [&] { return "rms_norm forward of " + shape_of(a.rows, a.cols, a.x_dtype); };
  with_types(a.x_dtype, a.w_dtype, [&](auto x_type, auto w_type, auto y_type) {
    using X = typename decltype(x_type)::type;
    using W = typename decltype(w_type)::type;
    using Y = typename decltype(y_type)::type;
    const auto run = [&](auto kernel, int pack, int packs) {
      const int64_t needed = whole_warps(ceil_div(ceil_div(a.cols, pack), packs));
      const int threads = static_cast<int>(needed < kForwardThreads ? needed : kForwardThreads);
      const int rows = threads < 128 ? 128 / threads : 1;
      launch(kernel, ceil_div(a.rows, rows), dim3(threads, rows), 0, place, describe, static_cast<const X*>(a.x),
             a.x_stride, static_cast<const X*>(a.residual), a.residual_stride, static_cast<const W*>(a.weight),
             static_cast<Y*>(a.y), static_cast<X*>(a.h), a.rstd, a.rows, cols, 1.f / static_cast<float>(a.cols), a.eps);
    };
    constexpr int kPack = kWhole<Y>;
    const Alignment x{kPack * sizeof(X)}, w{kPack * sizeof(W)}, y{16};
    const bool aligned = a.cols % kPack == 0 && x.holds(a.x, many ? a.x_stride : 0, sizeof(X)) &&
                         x.holds(a.residual, many ? a.residual_stride : 0, sizeof(X)) && x.holds(a.h) &&
                         w.holds(a.weight) && y.holds(a.y);
    if (!aligned) {
      run(rms_norm_fwd_kernel<X, W, Y, 1, false>, 1, 8);
    } else if (a.cols <= kPack * kForwardPacks * kForwardThreads) {
      run(rms_norm_fwd_kernel<X, W, Y, kPack, true>, kPack, kForwardPacks);
    } else {
      run(rms_norm_fwd_kernel<X, W, Y, kPack, false>, kPack, 1);
    }
  });
}

void rms_norm_bwd(const RmsNormBwd& a, float* partial, int64_t parts, const Place& place) {
  const int cols = narrow("rms_norm: cols", a.cols);
  const bool many = a.rows > 1;  // else strides do not matter
  const auto describe = [&] { return "rms_norm backward of " + shape_of(a.rows, a.cols, a.x_dtype); };
  int64_t blocks = 0;
  if (a.rows > 0) {
    with_types(a.x_dtype, a.w_dtype, [&](auto x_type, auto w_type, auto y_type) {
      using X = typename decltype(x_type)::type;
      using W = typename decltype(w_type)::type;
      using Y = typename decltype(y_type)::type;
      const auto run = [&](auto kernel, int threads, int groups, int shared) {
        const int64_t rows_each = ceil_div(ceil_div(a.rows, parts), groups) * groups;
        blocks = ceil_div(a.rows, rows_each);
        launch(kernel, blocks, dim3(threads, groups), shared, place, describe, static_cast<const Y*>(a.dy), a.dy_stride,
               static_cast<const X*>(a.dh), a.dh_stride, static_cast<const X*>(a.h), a.h_stride,
               static_cast<const W*>(a.weight), a.rstd, static_cast<X*>(a.dx), a.dw ? partial : nullptr, a.rows,
               rows_each, cols, 1.f / static_cast<float>(a.cols));
      };
      constexpr int kPack = kWhole<Y>;
      const auto hold = [&](auto kernel, int packs) {
        const int threads = whole_warps(ceil_div(a.cols / kPack, packs)), groups = kBackwardThreads / threads;
        const int shared = groups > 1 ? threads * packs * kPack * static_cast<int>(sizeof(float)) : 0;
        run(kernel, threads, groups, shared);
      };
      const auto walk = [&](auto kernel, int pack) {
        const int64_t needed = whole_warps(ceil_div(a.cols, pack));
        run(kernel, static_cast<int>(needed < kBackwardThreads ? needed : kBackwardThreads), 1, 0);
      };
      const Alignment x{kPack * sizeof(X)}, w{kPack * sizeof(W)}, y{16};
      const bool aligned = a.cols % kPack == 0 && y.holds(a.dy, many ? a.dy_stride : 0, sizeof(Y)) &&
                           x.holds(a.dh, many ? a.dh_stride : 0, sizeof(X)) &&
                           x.holds(a.h, many ? a.h_stride : 0, sizeof(X)) && w.holds(a.weight) && x.holds(a.dx) &&
                           y.holds(partial);
      if (!aligned) {
        walk(rms_norm_bwd_walking_kernel<X, W, Y, 1>, 1);
      } else if (a.cols <= 2 * kPack * kBackwardThreads) {
        hold(rms_norm_bwd_kernel<X, W, Y, kPack, 2>, 2);
      } else {
        if constexpr (kPack == 4) {  // of 8 elements, 4 packs and their part of dw would not fit into registers
          if (a.cols <= 4 * kPack * kBackwardThreads) return hold(rms_norm_bwd_kernel<X, W, Y, kPack, 4>, 4);
        }
        walk(rms_norm_bwd_walking_kernel<X, W, Y, kPack>, kPack);
      }
    });
  }
  if (a.dw) {
    const auto add_up = [&](auto kernel, int pack) {
      const int along = kSumColumns / pack;
      launch(kernel, ceil_div(a.cols, kSumColumns), dim3(along, kSumThreads / along), 0, place, describe,
             static_cast<const float*>(partial), a.dw, blocks, cols);
    };
    const Alignment whole{16};
    const bool aligned = a.cols % 4 == 0 && whole.holds(partial);
    aligned ? add_up(sum_rows_kernel<4>, 4) : add_up(sum_rows_kernel<1>, 1);
  }
}

}  // namespace lemur::cuda
