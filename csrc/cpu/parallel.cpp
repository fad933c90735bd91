#include "cpu/parallel.h"

#include <algorithm>
#include <exception>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lemur::cpu {

int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

void parallel_ranges(int64_t n, int64_t grain, RangeFn fn, void* context) {
  if (n <= 0) return;
  const int64_t longest_team = std::max<int64_t>(1, n / std::max<int64_t>(1, grain));
  const int threads = static_cast<int>(std::min<int64_t>(longest_team, max_threads()));
  if (threads == 1) {
    fn(context, 0, n);
    return;
  }
#ifdef _OPENMP
  std::exception_ptr failure;
#pragma omp parallel num_threads(threads)
  {
    // The team may be smaller than asked for.
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t share = n / team, rest = n % team;
    const int64_t begin = me * share + std::min(me, rest);
    const int64_t end = begin + share + (me < rest ? 1 : 0);
    try {  // an exception that leaves a parallel region ends the process
      if (begin < end) fn(context, begin, end);
    } catch (...) {
#pragma omp critical(lemur_fast_failure)
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
#endif
}

namespace {

float* allocate(int64_t floats) {
  return static_cast<float*>(::operator new(sizeof(float) * static_cast<size_t>(floats), std::align_val_t(64)));
}

void release(float* data) { ::operator delete(data, std::align_val_t(64)); }

constexpr int64_t kMostKept = int64_t{16} << 18;  // floats

struct Kept {
  float* data = nullptr;
  int64_t size = 0;
  ~Kept() { release(data); }
};

thread_local Kept kept;

}  // namespace

Scratch::Scratch(int64_t floats) : data_(allocate(floats)) {}

Scratch::~Scratch() { release(data_); }

ThreadScratch::ThreadScratch(int64_t floats) {
  if (floats > kMostKept) {
    data_ = allocate(floats);
    return;
  }
  if (kept.size < floats) {
    release(kept.data);  // before the larger piece is asked for
    kept.data = nullptr;
    kept.size = 0;
    kept.data = allocate(floats);
    kept.size = floats;
  }
  data_ = kept.data;
}

ThreadScratch::~ThreadScratch() {
  if (data_ != kept.data) release(data_);
}

}  // namespace lemur::cpu
