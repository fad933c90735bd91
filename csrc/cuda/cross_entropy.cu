// Loss of every row of logits, its stats, and its gradient. The formulas stand in lemur_fast/ops/_loss.py.
//
// A block takes a row. The forward reads it once, with a running maximum; where the gradient is wanted at once, a
// second walk writes it, over the logits themselves if so asked: each thread writes what it alone has read.
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace lemur::cuda {
namespace {

constexpr int kThreads = 512;

template <bool kSoftcap>
__device__ __forceinline__ float capped(float v, float softcap, float inverse_softcap) {
  return kSoftcap ? softcap * tanh_of(v * inverse_softcap) : v;
}

// What a thread, and then the block, knows of a row's softmax.
struct Running {
  float largest = -INFINITY;
  float total = 0.f;     // of exp(x - largest)
  float products = 0.f;  // of exp(x - largest) * (x - largest)
  float plain = 0.f;     // of x

  // Takes `base` in place of `largest`; infinities stand for nothing seen. Where all shrinks to nothing, as under a
  // mask of the least float, the products may be infinite.
  __device__ __forceinline__ void move_to(float base) {
    const float apart = largest - base, shrink = exp2_of(apart * kLog2e);
    products = shrink > 0.f ? shrink * (products + (total > 0.f ? apart * total : 0.f)) : 0.f;
    total *= shrink;
    largest = base;
  }
};

// The largest of the block, and then the sums; the same bits in every thread.
__device__ __forceinline__ Running over_block(Running mine) {
  __shared__ float largest[kThreads / 32], total[kThreads / 32], products[kThreads / 32], plain[kThreads / 32];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const float of_warp = warp_max(mine.largest);
  if (threadIdx.x % 32 == 0) largest[warp] = of_warp;
  __syncthreads();
  float high = -INFINITY;
  for (int i = 0; i < warps; ++i) high = fmaxf(high, largest[i]);
  mine.move_to(high == -INFINITY ? 0.f : high);
  const float sums[] = {warp_sum(mine.total), warp_sum(mine.products), warp_sum(mine.plain)};
  if (threadIdx.x % 32 == 0) {
    total[warp] = sums[0];
    products[warp] = sums[1];
    plain[warp] = sums[2];
  }
  __syncthreads();
  Running all;
  all.largest = high;
  for (int i = 0; i < warps; ++i) {
    all.total += total[i];
    all.products += products[i];
    all.plain += plain[i];
  }
  return all;
}

struct Options {
  float label_smoothing;
  float z_loss;
  float softcap;  // 0: none
  float inverse_softcap;
};

// dlogits of a row whose label is not ignored. Packs are read kAhead at a time, before the first of them is written.
template <typename T, bool kSoftcap, int kSize, int kAhead>
__device__ __forceinline__ void write_gradient(const T* logits, T* dlogits, int cols, int64_t label, bool known,
                                               float lse, float dloss, const Options& options) {
  const float incoming = known ? dloss : NAN;
  const float factor = 1.f + 2.f * options.z_loss * lse;
  const float uniform = options.label_smoothing / static_cast<float>(cols);
  const int step = blockDim.x * kSize;
  for (int start = threadIdx.x * kSize; start < cols; start += kAhead * step) {
    Pack<T, kSize> read[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (start + k * step < cols) read[k] = load_pack<kSize>(logits + start + k * step);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int col = start + k * step;
      if (col >= cols) break;
      float out[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float x = capped<kSoftcap>(to_float(read[k].values[i]), options.softcap, options.inverse_softcap);
        float d = exp2_of((x - lse) * kLog2e) * factor - uniform;
        if (col + i == label) d -= 1.f - options.label_smoothing;
        if (kSoftcap) {
          const float t = x * options.inverse_softcap;
          d *= 1.f - t * t;
        }
        out[i] = d * incoming;
      }
      store_pack(dlogits + col, pack_of<T>(out));
    }
  }
}

template <typename T, int kSize>
__device__ __forceinline__ void write_zeros(T* dlogits, int cols) {
  for (int col = threadIdx.x * kSize; col < cols; col += blockDim.x * kSize) {
    store_pack(dlogits + col, zeros<T, kSize>());
  }
}

// log_prob, entropy and correct, and dlogits, are null where they are not wanted. dlogits may be logits.
template <typename T, bool kSoftcap, int kSize, int kAhead>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_fwd_kernel(const T* logits, int64_t logits_stride, const int64_t* __restrict__ labels,
                             float* __restrict__ loss, float* __restrict__ lse, float* __restrict__ log_prob,
                             float* __restrict__ entropy, bool* __restrict__ correct, const float* __restrict__ dloss,
                             T* dlogits, int cols, int64_t ignore_index, float label_smoothing, float z_loss,
                             float softcap, float inverse_softcap) {
  const Options options{label_smoothing, z_loss, softcap, inverse_softcap};
  const int64_t row = blockIdx.x, label = labels[row];
  const T* row_logits = logits + row * logits_stride;
  T* row_dlogits = dlogits + row * cols;
  if (label == ignore_index) {
    if (threadIdx.x == 0) {
      loss[row] = lse[row] = 0.f;
      if (log_prob != nullptr) {
        log_prob[row] = entropy[row] = 0.f;
        correct[row] = false;
      }
    }
    if (dlogits != nullptr) write_zeros<T, kSize>(row_dlogits, cols);
    return;
  }
  const bool known = label >= 0 && label < cols;
  // Before the barriers, and so before anything is written over it.
  const float of_label =
      capped<kSoftcap>(known ? to_float(row_logits[label]) : 0.f, options.softcap, options.inverse_softcap);

  Running mine;
  const int step = blockDim.x * kSize;
  for (int start = threadIdx.x * kSize; start < cols; start += kAhead * step) {
    Pack<T, kSize> read[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (start + k * step < cols) read[k] = load_pack<kSize>(row_logits + start + k * step);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (start + k * step >= cols) break;
      // A pack shares a maximum: moving to a new one takes one exponential for all of it.
      float x[kSize], high = mine.largest;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        x[i] = capped<kSoftcap>(to_float(read[k].values[i]), options.softcap, options.inverse_softcap);
        mine.plain += x[i];
        high = fmaxf(high, x[i]);
      }
      const float base = high == -INFINITY ? 0.f : high;
      mine.move_to(base);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float apart = x[i] - base, weight = exp2_of(apart * kLog2e);
        mine.total += weight;
        if (weight > 0.f) mine.products = fmaf(weight, apart, mine.products);
      }
      mine.largest = high;
    }
  }
  const Running all = over_block(mine);
  const float log_sum = logf(all.total), row_lse = all.largest + log_sum;
  if (threadIdx.x == 0) {
    float row_loss = (1.f - options.label_smoothing) * (row_lse - of_label) + options.z_loss * row_lse * row_lse;
    // Guarded: 0 * (lse - mean) is NaN where a logit is -inf.
    if (options.label_smoothing != 0.f) {
      row_loss += options.label_smoothing * (row_lse - all.plain / static_cast<float>(cols));
    }
    loss[row] = known ? row_loss : NAN;
    lse[row] = row_lse;
    if (log_prob != nullptr) {
      log_prob[row] = of_label - row_lse;
      entropy[row] = log_sum - all.products / all.total;
      correct[row] = of_label >= all.largest;
    }
  }
  if (dlogits != nullptr) {
    write_gradient<T, kSoftcap, kSize, kAhead>(row_logits, row_dlogits, cols, label, known, row_lse,
                                               dloss == nullptr ? 1.f : dloss[row], options);
  }
}

template <typename T, bool kSoftcap, int kSize, int kAhead>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_bwd_kernel(const float* __restrict__ dloss, const T* logits, int64_t logits_stride,
                             const int64_t* __restrict__ labels, const float* __restrict__ lse, T* dlogits, int cols,
                             int64_t ignore_index, float label_smoothing, float z_loss, float softcap,
                             float inverse_softcap) {
  const Options options{label_smoothing, z_loss, softcap, inverse_softcap};
  const int64_t row = blockIdx.x, label = labels[row];
  T* row_dlogits = dlogits + row * cols;
  if (label == ignore_index) return write_zeros<T, kSize>(row_dlogits, cols);
  write_gradient<T, kSoftcap, kSize, kAhead>(logits + row * logits_stride, row_dlogits, cols, label,
                                             label >= 0 && label < cols, lse[row], dloss[row], options);
}

// Calls run(Type<T>, softcap?, elements of a pack, packs read ahead), the last three as integral constants.
template <typename Run>
void with_variant(const CrossEntropy& a, const Run& run) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kPack = kWhole<T>;
    const Alignment whole{16};
    const bool aligned = a.cols % kPack == 0 && whole.holds(a.logits, a.rows > 1 ? a.logits_stride : 0, sizeof(T)) &&
                         whole.holds(a.dlogits);
    using Capped = std::true_type;
    using Plain = std::false_type;
    using Whole = std::integral_constant<int, kPack>;
    using Single = std::integral_constant<int, 1>;
    using Four = std::integral_constant<int, 4>;
    using Eight = std::integral_constant<int, 8>;
    if (a.softcap != 0.f) {
      aligned ? run(type, Capped{}, Whole{}, Four{}) : run(type, Capped{}, Single{}, Eight{});
    } else {
      aligned ? run(type, Plain{}, Whole{}, Four{}) : run(type, Plain{}, Single{}, Eight{});
    }
  });
}

// A thread has kAhead packs of a row at a time, or the row's share of kThreads.
dim3 threads_for(int64_t cols, int pack, int ahead) {
  const int64_t needed = whole_warps(ceil_div(cols, pack * ahead));
  return dim3(static_cast<unsigned>(needed < kThreads ? needed : kThreads));
}

}  // namespace

void cross_entropy_fwd(const CrossEntropy& a, const Place& place) {
  if (a.rows == 0) return;
  with_variant(a, [&](auto type, auto softcap, auto pack, auto ahead) {
    using T = typename decltype(type)::type;
    launch(
        cross_entropy_fwd_kernel<T, softcap.value, pack.value, ahead.value>, a.rows,
        threads_for(a.cols, pack.value, ahead.value), 0, place,
        [&] { return "cross_entropy forward of " + shape_of(a.rows, a.cols, a.dtype); },
        static_cast<const T*>(a.logits), a.logits_stride, a.labels, a.loss, a.lse, a.log_prob, a.entropy, a.correct,
        a.dloss, static_cast<T*>(a.dlogits), narrow("cross_entropy: cols", a.cols), a.ignore_index, a.label_smoothing,
        a.z_loss, a.softcap, a.softcap != 0.f ? 1.f / a.softcap : 0.f);
  });
}

void cross_entropy_bwd(const CrossEntropy& a, const Place& place) {
  if (a.rows == 0) return;
  with_variant(a, [&](auto type, auto softcap, auto pack, auto ahead) {
    using T = typename decltype(type)::type;
    launch(
        cross_entropy_bwd_kernel<T, softcap.value, pack.value, ahead.value>, a.rows,
        threads_for(a.cols, pack.value, ahead.value), 0, place,
        [&] { return "cross_entropy backward of " + shape_of(a.rows, a.cols, a.dtype); }, a.dloss,
        static_cast<const T*>(a.logits), a.logits_stride, a.labels, a.lse, static_cast<T*>(a.dlogits),
        narrow("cross_entropy: cols", a.cols), a.ignore_index, a.label_smoothing, a.z_loss, a.softcap,
        a.softcap != 0.f ? 1.f / a.softcap : 0.f);
  });
}

}  // namespace lemur::cuda
