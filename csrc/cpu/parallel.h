// Threads and scratch memory for the kernels.
//
// The functions declared here are compiled once, for the plainest CPU: the kernels' own files must not pull in
// templates of the standard library, because the linker keeps one copy of such a template for all instruction sets, and
// could keep the one that older CPUs cannot run.
#pragma once

#include <cstdint>

namespace lemur::cpu {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Calls fn on ranges that cover [0, n), on as many threads as OpenMP (torch.set_num_threads) gives, but one range at
// least `grain` long. Which thread runs what does not depend on timing.
void parallel_ranges(int64_t n, int64_t grain, RangeFn fn, void* context);

// Elements below which another thread costs more than it brings.
constexpr int64_t kGrain = 1 << 14;

inline int64_t rows_per_grain(int64_t cols) { return cols >= kGrain ? 1 : kGrain / cols; }

template <typename F>
inline void parallel_for(int64_t n, int64_t grain, F&& body) {
  parallel_ranges(
      n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); }, &body);
}

// Calls body(begin, count) on pieces of [0, n) that begin at multiples of 64 elements.
template <typename F>
inline void parallel_pieces(int64_t n, F&& body) {
  constexpr int64_t kPiece = 64;
  parallel_for((n + kPiece - 1) / kPiece, kGrain / kPiece, [&](int64_t begin, int64_t end) {
    const int64_t past = end * kPiece < n ? end * kPiece : n;
    body(begin * kPiece, past - begin * kPiece);
  });
}

// Uninitialised floats, 64-byte aligned, freed at the end of the scope. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(int64_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

// The same, but of the calling thread, which may hold one at a time. Up to 16 MiB are kept for the thread's next one:
// memory fresh from the system costs more than what small kernels do with it.
class ThreadScratch {
 public:
  explicit ThreadScratch(int64_t floats);
  ~ThreadScratch();
  ThreadScratch(const ThreadScratch&) = delete;
  ThreadScratch& operator=(const ThreadScratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

// Most threads that parallel_for may use now.
int max_threads();

}  // namespace lemur::cpu
