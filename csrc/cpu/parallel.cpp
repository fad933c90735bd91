#include "cpu/parallel.h"

#include <algorithm>
#include <memory>
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
#pragma omp parallel num_threads(threads)
  {
    // The team may be smaller than asked for.
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t share = n / team, rest = n % team;
    const int64_t begin = me * share + std::min(me, rest);
    const int64_t end = begin + share + (me < rest ? 1 : 0);
    if (begin < end) fn(context, begin, end);
  }
#endif
}

Scratch::Scratch(int64_t floats)
    : data_(static_cast<float*>(::operator new(sizeof(float) * static_cast<size_t>(floats), std::align_val_t(64)))) {}

float* thread_scratch(int64_t floats) {
  thread_local std::unique_ptr<Scratch> memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset();  // before the larger piece is asked for
    size = 0;
    memory = std::make_unique<Scratch>(floats);
    size = floats;
  }
  return memory->data();
}

Scratch::~Scratch() { ::operator delete(data_, std::align_val_t(64)); }

}  // namespace lemur::cpu
