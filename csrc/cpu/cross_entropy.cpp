// Cross-entropy of rows of logits, and its gradient. With x the logits after the softcap c, y the label, e the label
// smoothing, z the factor of the z-loss, V the vocabulary:
//
//   x = c * tanh(logits / c)              (x = logits without a softcap)
//   lse = m + log(sum exp(x - m))         for any m; near max x, so that nothing overflows
//   loss = (1 - e) * (lse - x_y) + e * (lse - mean x) + z * lse^2
//   dx_v = exp(x_v - lse) * (1 + 2 z lse) - (1 - e) [v = y] - e / V
//   dlogits = dloss * dx * (1 - (x / c)^2)
//
// A row is read from memory once: its later passes find it in the cache. Where the gradient is asked for in the
// forward, it is the last of them, and may overwrite the logits.
#include <cfloat>
#include <cmath>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace lemur::cpu::LEMUR_ISA {
namespace {

// Logits as the softmax sees them.
template <typename T, bool kSoftcap>
struct Logits {
  float softcap;

  static Vec squashed(Vec v, float softcap) { return tanh(mul(v, broadcast(1.f / softcap))); }

  template <typename Lanes>
  Vec operator()(const T* p, Lanes lanes) const {
    const Vec v = load(p, lanes);
    if constexpr (kSoftcap) return mul(broadcast(softcap), squashed(v, softcap));
    return v;
  }
  float one(const T* p) const { return first((*this)(p, Tail{1})); }
};

// How far ahead of the arithmetic memory is asked for, in elements. Half of it leaves the arithmetic waiting.
template <typename T>
constexpr int64_t kAhead = 4096 / sizeof(T);

template <typename T, bool kSoftcap>
void loss_of_row(const CrossEntropy& a, int64_t row, const T* logits) {
  constexpr int64_t kBlock = 1024;
  const Logits<T, kSoftcap> x{a.softcap};
  const Vec zero = broadcast(0.f);
  const auto largest_of = [&](const T* p, int64_t count) {
    const float largest = max_lanes(count, [&](int64_t i, auto lanes) { return x(p + i, lanes); });
    return largest > -FLT_MAX ? largest : -FLT_MAX;
  };
  // The sum's terms are relative to the largest of the first block, which is taken for the row's: to look for that one
  // would be another pass. A block whose sum shows that it has a much larger one (or a NaN) is done again, relative to
  // its own. What lies a little above does no harm: the exponential loses half a rounding for each unit.
  constexpr float kMost = 2.f * kBlock;
  float base = -FLT_MAX;
  double total = 0;
  for (int64_t begin = 0; begin < a.cols; begin += kBlock) {
    const int64_t count = a.cols - begin < kBlock ? a.cols - begin : kBlock;
    const T* block = logits + begin;
    const auto sum_of_block = [&] {
      const Vec shift = broadcast(-base);
      return sum_lanes(count, [&](int64_t i, auto lanes, Vec partial) {
        prefetch(block + kAhead<T> + i);
        return add(partial, keep(exp(add(x(block + i, lanes), shift)), zero, lanes));
      });
    };
    if (begin == 0) base = largest_of(block, count);
    float sum = sum_of_block();
    if (!(sum <= kMost)) {
      const float here = largest_of(block, count);
      if (here > base) {
        total *= ::exp(static_cast<double>(base) - here);
        base = here;
        sum = sum_of_block();
      }
    }
    total += sum;
  }
  const double x_y = x.one(logits + a.labels[row]), lse = base + ::log(total);
  double loss = (1. - a.label_smoothing) * (lse - x_y);
  if (a.label_smoothing != 0.f) {
    const double all = sum_lanes(a.cols, [&](int64_t i, auto lanes, Vec partial) {
      return add(partial, keep(x(logits + i, lanes), zero, lanes));
    });
    loss += a.label_smoothing * (lse - all / static_cast<double>(a.cols));
  }
  a.loss[row] = static_cast<float>(loss + a.z_loss * lse * lse);
  a.lse[row] = static_cast<float>(lse);
  if (!a.log_prob) return;
  const float largest = largest_of(logits, a.cols);
  total *= ::exp(static_cast<double>(base) - largest);
  // Of p * log p, up to the factor 1 / total. The floor keeps 0 * -inf from being NaN.
  const Vec floor = broadcast(-104.f), shift = broadcast(-largest);
  const double products = sum_lanes(a.cols, [&](int64_t i, auto lanes, Vec partial) {
    const Vec below = add(x(logits + i, lanes), shift);
    return add(partial, keep(mul(exp(below), maximum(floor, below)), zero, lanes));
  });
  a.log_prob[row] = static_cast<float>(x_y - lse);
  a.entropy[row] = static_cast<float>(::log(total) - products / total);
  a.correct[row] = x_y >= largest;
}

template <typename T, bool kSoftcap>
void gradient_of_row(const CrossEntropy& a, int64_t row, const T* logits, T* dlogits) {
  const float dloss = a.dloss ? a.dloss[row] : 1.f, lse = a.lse[row];
  const Vec minus_lse = broadcast(-lse), one = broadcast(1.f);
  const Vec factor = broadcast(dloss * (1.f + 2.f * a.z_loss * lse));
  const float uniform = -dloss * a.label_smoothing / static_cast<float>(a.cols);
  const auto gradient = [&](Vec v, Vec offset) {
    if constexpr (kSoftcap) {
      const Vec t = Logits<T, true>::squashed(v, a.softcap);
      const Vec dx = fma(exp(fma(t, broadcast(a.softcap), minus_lse)), factor, offset);
      return mul(dx, sub(one, mul(t, t)));
    } else {
      return fma(exp(add(v, minus_lse)), factor, offset);
    }
  };
  const int64_t label = a.labels[row];
  // Before the loop: dlogits may be logits.
  const float of_label =
      first(gradient(load(logits + label, Tail{1}), broadcast(uniform - dloss * (1.f - a.label_smoothing))));
  const Vec offset = broadcast(uniform);
  for_lanes(a.cols, [&](int64_t i, auto lanes) {
    prefetch(logits + kAhead<T> + i);
    store(dlogits + i, gradient(load(logits + i, lanes), offset), lanes);
  });
  store_one(dlogits + label, of_label);
}

template <typename T>
void ignored_row(const CrossEntropy& a, int64_t row, T* dlogits, bool forward) {
  if (forward) {
    a.loss[row] = a.lse[row] = 0.f;
    if (a.log_prob) {
      a.log_prob[row] = a.entropy[row] = 0.f;
      a.correct[row] = false;
    }
  }
  if (dlogits) {
    for_lanes(a.cols, [&](int64_t i, auto lanes) { store(dlogits + i, broadcast(0.f), lanes); });
  }
}

template <typename T, bool kSoftcap>
void run_rows(const CrossEntropy& a, bool forward, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* logits = static_cast<const T*>(a.logits) + row * a.logits_stride;
    T* dlogits = a.dlogits ? static_cast<T*>(a.dlogits) + row * a.cols : nullptr;
    if (a.labels[row] == a.ignore_index) {
      ignored_row(a, row, dlogits, forward);
      continue;
    }
    if (forward) loss_of_row<T, kSoftcap>(a, row, logits);
    if (dlogits) gradient_of_row<T, kSoftcap>(a, row, logits, dlogits);
  }
}

void run(const CrossEntropy& a, bool forward) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(a.rows, rows_per_grain(a.cols), [&](int64_t begin, int64_t end) {
      a.softcap != 0.f ? run_rows<T, true>(a, forward, begin, end) : run_rows<T, false>(a, forward, begin, end);
    });
  });
}

}  // namespace

void cross_entropy_fwd(const CrossEntropy& a) { run(a, true); }

void cross_entropy_bwd(const CrossEntropy& a) { run(a, false); }

}  // namespace lemur::cpu::LEMUR_ISA
