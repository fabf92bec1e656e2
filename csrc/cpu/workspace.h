// Scratch memory of one call: a plan of consecutive pieces, walked once to learn the size and once to place them.
#pragma once

#include "../grjca.h"
#include "matrix.h"
#include "stop.h"

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

  static void* align(void* base) { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(base) + 63) / 64 * 64); }

 private:
  char* base_;
  size_t used_ = 0;
};

// Returns the piece that many bytes after this one, or null for null.
template <class T>
T* beyond(T* piece, int64_t bytes) {
  return piece ? reinterpret_cast<T*>(reinterpret_cast<char*>(piece) + bytes) : nullptr;
}

// Calls f(task, thread) for every task until the call is stopped. Which thread takes a task never changes the result.
template <class F>
inline void parallel_for(int threads, int64_t tasks, F f) {
  cpu::Stop* const stop = cpu::Stop::of_thread();
  const auto unless_stopped = [&](int64_t task, int thread) {
    if (stop && stop->reached()) return;
    const cpu::Stop::Scope scope(stop);
    f(task, thread);
  };
#ifdef _OPENMP
  if (tasks > 1 && threads > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) unless_stopped(task, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t task = 0; task < tasks; ++task) unless_stopped(task, 0);
}

// Several kinds of tasks in one parallel_for: fewer barriers, and threads that never wait for the shorter kind.
template <class Item, int Most>
struct TaskList {
  Item items[Most];
  int64_t end[Most];
  int count = 0;

  int64_t total() const { return count ? end[count - 1] : 0; }
  void add(const Item& item, int64_t tasks) {
    end[count] = total() + tasks;
    items[count++] = item;
  }
  // f(item, task of that item, thread)
  template <class F>
  void run(int threads, F f) const {
    parallel_for(threads, total(), [&](int64_t task, int thread) {
      int i = 0;
      while (task >= end[i]) ++i;
      f(items[i], task - (i ? end[i - 1] : 0), thread);
    });
  }
};

// Sums over the rows of a batch are taken in blocks of at most kTerms rows of the same group of samples, and the blocks
// added one after another: rounding grows with neither, and the order is that of the batch, however it is cut up. A
// group has about kGroup rows.
constexpr int64_t kTerms = 512, kGroup = 256;

inline int64_t samples_per_group(const Problem& p) { return larger(1, kGroup / p.length); }

// How a batch is divided. It is processed in chunks, and a chunk in units, each the work of one of `workers` threads
// from the first equation to the last; where there are too few groups of samples to keep all threads busy, a unit is a
// whole chunk and the threads share every equation instead. Nothing computed depends on the choice.
struct Split {
  int64_t chunk, unit;  // samples: whole groups, or all there are
  int workers, threads_each;

  // bytes_shared: of a sample in a chunk; bytes_private: of a sample in a unit.
  static Split plan(const Problem& p, int64_t bytes_shared, int64_t bytes_private, int threads) {
    const int64_t group = samples_per_group(p), groups = blocks(p.batch, group);
    const int64_t budget = (int64_t{32} + 4 * threads) << 20;
    if (groups >= 4 * threads || (groups && groups % threads == 0)) {
      const int64_t round = group * threads;
      const int64_t rounds = bytes_shared ? larger(1, budget / (bytes_shared * round)) : p.batch;
      return {smaller(rounds * round, p.batch), smaller(group, p.batch), threads, 1};
    }
    const int64_t most = larger(1, budget / ((bytes_shared + bytes_private) * group));
    const int64_t chunk = smaller(blocks(larger(1, groups), blocks(larger(1, groups), most)) * group, p.batch);
    return {larger(1, chunk), larger(1, chunk), 1, threads};
  }
};

// Consecutive samples. Their present frames stand one after another as rows: absent frames have none.
struct Samples {
  int64_t first, count, group;
  const int64_t* start;  // [count + 1]: first row of each sample

  int64_t rows() const { return start[count] - start[0]; }
  int64_t row(int64_t b) const { return start[b] - start[0]; }
  int64_t frames(int64_t b) const { return start[b + 1] - start[b]; }

  // All samples of the batch; start is filled.
  static Samples all(const Problem& p, const int64_t* lengths, int64_t* start) {
    start[0] = 0;
    // The forward has checked the values, but a hook on saved tensors may give the backward others.
    const auto frames = [&](int64_t n) { return n < 0 ? 0 : smaller(n, p.length); };
    for (int64_t b = 0; b < p.batch; ++b) start[b + 1] = start[b] + (lengths ? frames(lengths[b]) : p.length);
    return {0, p.batch, samples_per_group(p), start};
  }
  Samples part(int64_t begin, int64_t most) const {
    return {first + begin, smaller(most, count - begin), group, start + begin};
  }

  // f(first row, rows) for every block of a sum.
  template <class F>
  GRJCA_INLINE void each_block(F f) const {
    for (int64_t b = 0; b < count; b += group) {
      const int64_t end = row(smaller(b + group, count));
      for (int64_t r = row(b); r < end; r += kTerms) f(r, smaller(kTerms, end - r));
    }
  }
};

// Frames in one task of a pass that works row by row; a multiple of kDropoutRows.
constexpr int64_t kFrames = 16;

// f(sample, frame, row or -1 where the frame is absent, thread) for every frame.
template <class F>
inline void each_frame(const Problem& p, const Samples& samples, int threads, F f) {
  const int64_t groups = blocks(p.length, kFrames);
  parallel_for(threads, samples.count * groups, [&](int64_t task, int thread) {
    const int64_t b = task / groups, begin = task % groups * kFrames;
    for (int64_t l = begin; l < smaller(begin + kFrames, p.length); ++l)
      f(b, l, l < samples.frames(b) ? samples.row(b) + l : -1, thread);
  });
}

}  // namespace grjca::GRJCA_ISA
