// Scratch memory of one call: a plan of consecutive pieces, walked once to learn the size and once to place them.
#pragma once

#include "../grjca.h"
#include "matrix.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace grjca::GRJCA_ISA {

class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class R>
  R* take(int64_t count) {
    R* piece = base_ ? reinterpret_cast<R*>(base_ + used_) : nullptr;
    used_ += blocks(count * sizeof(R), 64) * 64;
    return piece;
  }
  size_t used() const { return used_ + 64; }  // and room to align the base

  static void* align(void* base) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(base) + 63) / 64 * 64);
  }

 private:
  char* base_;
  size_t used_ = 0;
};

// f(task, thread) for every task. Which thread takes a task never changes what the task computes.
template <class F>
inline void parallel_for(int threads, int64_t tasks, F f) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (tasks > 1 && threads > 1)
  for (int64_t task = 0; task < tasks; ++task) f(task, omp_get_thread_num());
#else
  (void)threads;
  for (int64_t task = 0; task < tasks; ++task) f(task, 0);
#endif
}

// The batch is walked in chunks of samples whose activations fit `budget` bytes. The size depends on the shape alone, so
// sums over the batch run in the same order on any number of threads.
inline int64_t samples_per_chunk(int64_t batch, int64_t bytes_per_sample, int64_t budget) {
  const int64_t most = larger(1, smaller(batch, budget / larger(1, bytes_per_sample)));
  return larger(1, blocks(batch, larger(1, blocks(batch, most))));
}

// The samples of a chunk. Their present frames stand one after another as rows: absent frames have none.
struct Chunk {
  int64_t first, samples;
  int64_t* start;  // [samples + 1]: first row of each sample, and the number of rows

  int64_t rows() const { return start[samples]; }
  int64_t frames(int64_t b) const { return start[b + 1] - start[b]; }

  void place(const Problem& p, const int64_t* lengths) {
    start[0] = 0;
    for (int64_t b = 0; b < samples; ++b) start[b + 1] = start[b] + (lengths ? lengths[first + b] : p.length);
  }
};

constexpr int64_t kFrames = 16;  // frames in one task of a pass that works row by row; a multiple of kDropoutRows

}  // namespace grjca::GRJCA_ISA
