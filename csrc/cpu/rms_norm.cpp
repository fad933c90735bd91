// RMSNorm with an optional residual added first, forward and backward. The pattern for every memory-bound op here.
//
//   h = round(x + residual)                      (h = x without a residual)
//   y = round(h * rstd) * w                      rstd = 1 / sqrt(mean(h^2) + eps), per row
//
//   x_hat = h * rstd,  g = w * dy
//   dx = rstd * (g - x_hat * mean(g * x_hat)) + dh
//   dw = sum over rows of dy * x_hat
//
// The inner rounding, to x's dtype, is Hugging Face's. The backward leaves it out: its x_hat is the fp32 one, which is
// nearer to the exact gradient. Everything is read from memory once and written once: a row's second pass finds it in
// the cache.
#include <cmath>
#include <cstring>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace lemur::cpu::LEMUR_ISA {
namespace {

// `w` is the weight in scratch memory: it serves every row.
template <typename X, typename Y, bool kResidual>
void fwd_rows(const RmsNormFwd& a, const float* w, int64_t begin, int64_t end) {
  const bool streamed = can_stream(static_cast<const Y*>(a.y), a.rows, a.cols);
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(a.x) + row * a.x_stride;
    const X* residual = kResidual ? static_cast<const X*>(a.residual) + row * a.residual_stride : nullptr;
    X* h = kResidual ? static_cast<X*>(a.h) + row * a.cols : nullptr;
    Y* y = static_cast<Y*>(a.y) + row * a.cols;

    const float squares = sum_lanes(a.cols, [&](int64_t i, auto lanes, Vec partial) {
      Vec v = load(x + i, lanes);
      if constexpr (kResidual) {
        v = round_to<X>(add(v, load(residual + i, lanes)));
        store(h + i, v, lanes);
      }
      return fma(v, v, partial);
    });
    const float rstd = 1.f / sqrtf(squares / static_cast<float>(a.cols) + a.eps);
    if (a.rstd) a.rstd[row] = rstd;

    const X* source = kResidual ? h : x;
    const Vec scale = broadcast(rstd);
    for_lanes(a.cols, streamed, [&](int64_t i, auto lanes) {
      prefetch(x + a.x_stride + i);
      if constexpr (kResidual) prefetch(residual + a.residual_stride + i);
      const Vec x_hat = round_to<X>(mul(load(source + i, lanes), scale));
      store(y + i, mul(x_hat, load_scratch(w + i)), lanes);
    });
  }
  if (streamed) finish_streams();
}

// Rows of one block: their dx, and their share of dw added to `dw` (null when it is not wanted).
template <typename X, typename Y>
void bwd_rows(const RmsNormBwd& a, const float* w, int64_t begin, int64_t end, float* dw) {
  const bool streamed = can_stream(static_cast<const X*>(a.dx), a.rows, a.cols);
  for (int64_t row = begin; row < end; ++row) {
    const Y* dy = static_cast<const Y*>(a.dy) + row * a.dy_stride;
    const X* dh = a.dh ? static_cast<const X*>(a.dh) + row * a.dh_stride : nullptr;
    const X* h = static_cast<const X*>(a.h) + row * a.h_stride;
    X* dx = static_cast<X*>(a.dx) + row * a.cols;
    const float rstd = a.rstd[row];

    // Of g and h; rstd turns h into x_hat.
    const float products = sum_lanes(a.cols, [&](int64_t i, auto lanes, Vec partial) {
      const Vec g = mul(load(dy + i, lanes), load_scratch(w + i));
      return fma(g, load(h + i, lanes), partial);
    });
    const float mean = products * rstd / static_cast<float>(a.cols);

    const Vec scale = broadcast(rstd), minus_mean = broadcast(-mean);
    for_lanes(a.cols, streamed, [&](int64_t i, auto lanes) {
      prefetch(dy + a.dy_stride + i);
      prefetch(h + a.h_stride + i);
      const Vec dy_i = load(dy + i, lanes);
      const Vec x_hat = mul(load(h + i, lanes), scale);
      const Vec g = mul(dy_i, load_scratch(w + i));
      Vec dx_i = mul(scale, fma(x_hat, minus_mean, g));
      if (dh) dx_i = add(dx_i, load(dh + i, lanes));
      store(dx + i, dx_i, lanes);
      if (dw) store_scratch(dw + i, fma(dy_i, x_hat, load_scratch(dw + i)));
    });
  }
  if (streamed) finish_streams();
}

template <typename W>
void load_weight(const void* weight, int64_t cols, float* out) {
  const W* w = static_cast<const W*>(weight);
  for_lanes(cols, [&](int64_t i, auto lanes) { store_scratch(out + i, load(w + i, lanes)); });
}

}  // namespace

void rms_norm_fwd(const RmsNormFwd& a) {
  const Scratch weight(scratch_size(a.cols));
  with_type(a.x_dtype, [&](auto x_type) {
    with_type(a.w_dtype, [&](auto w_type) {
      using X = typename decltype(x_type)::type;
      using W = typename decltype(w_type)::type;
      using Y = typename Promote<X, W>::type;
      load_weight<W>(a.weight, a.cols, weight.data());
      parallel_for(a.rows, rows_per_grain(a.cols), [&](int64_t begin, int64_t end) {
        a.residual ? fwd_rows<X, Y, true>(a, weight.data(), begin, end)
                   : fwd_rows<X, Y, false>(a, weight.data(), begin, end);
      });
    });
  });
}

void rms_norm_bwd(const RmsNormBwd& a) {
  // dw is summed in blocks of rows, and the blocks in order. Where the blocks lie depends on the number of rows alone,
  // so that the sum has the same bits whatever the threads do and however many they are.
  constexpr int64_t kMaxBlocks = 64, kMinRows = 16;
  const int64_t even_share = (a.rows + kMaxBlocks - 1) / kMaxBlocks;
  const int64_t block_rows = even_share < kMinRows ? kMinRows : even_share;
  const int64_t blocks = (a.rows + block_rows - 1) / block_rows;
  const int64_t partial_size = scratch_size(a.cols);
  const Scratch weight(partial_size);
  const Scratch partials(a.dw ? blocks * partial_size : 0);

  with_type(a.x_dtype, [&](auto x_type) {
    with_type(a.w_dtype, [&](auto w_type) {
      using X = typename decltype(x_type)::type;
      using W = typename decltype(w_type)::type;
      using Y = typename Promote<X, W>::type;
      load_weight<W>(a.weight, a.cols, weight.data());
      const int64_t grain = (rows_per_grain(a.cols) + block_rows - 1) / block_rows;
      parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          float* dw = a.dw ? partials.data() + block * partial_size : nullptr;
          if (dw) std::memset(dw, 0, sizeof(float) * static_cast<size_t>(partial_size));
          const int64_t first = block * block_rows, past = first + block_rows;
          bwd_rows<X, Y>(a, weight.data(), first, past < a.rows ? past : a.rows, dw);
        }
      });
    });
  });

  if (!a.dw) return;
  const int64_t vectors = partial_size / kLanes;
  parallel_for(vectors, kGrain / kLanes / (blocks + 1) + 1, [&](int64_t begin, int64_t end) {
    const int64_t offset = begin * kLanes, past = end * kLanes;
    for_lanes((past < a.cols ? past : a.cols) - offset, [&](int64_t i, auto lanes) {
      Vec total = broadcast(0.f);
      for (int64_t block = 0; block < blocks; ++block) {
        total = add(total, load_scratch(partials.data() + block * partial_size + offset + i));
      }
      store(a.dw + offset + i, total, lanes);
    });
  });
}

}  // namespace lemur::cpu::LEMUR_ISA
