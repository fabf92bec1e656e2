// How long the threads of a call spend in each of its phases, for `python -m benchmarks.roofline --phases`.
#pragma once

#include <atomic>
#include <chrono>

#include "../grjca.h"

namespace grjca::cpu {

#define GRJCA_CPU_PHASES(f)                                                                                      \
  f(pack) f(load) f(project_joint) f(project_key) f(project_value) f(attend) f(output) f(gate) f(gates_backward) \
      f(output_backward) f(attended_backward) f(correlation_backward) f(value_backward) f(key_backward)          \
          f(joint_backward) f(sum_weights)

#define GRJCA_ENUMERATE(name) name,
enum class Phase { GRJCA_CPU_PHASES(GRJCA_ENUMERATE) count };
#undef GRJCA_ENUMERATE

struct PhaseTimes {
  std::atomic<int64_t> nanoseconds[static_cast<int>(Phase::count)] = {};
};

// Adds the time from here to the end of the scope to a phase; `times` may be null.
class Timed {
  using Clock = std::chrono::steady_clock;

 public:
  GRJCA_INLINE Timed(PhaseTimes* times, Phase phase) : times_(times), phase_(phase) {
    if (times_) start_ = Clock::now();
  }
  GRJCA_INLINE ~Timed() {
    if (times_)
      times_->nanoseconds[static_cast<int>(phase_)] +=
          std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start_).count();
  }
  Timed(const Timed&) = delete;

 private:
  PhaseTimes* times_;
  Phase phase_;
  Clock::time_point start_;
};

template <class F>
GRJCA_INLINE void timed(PhaseTimes* times, Phase phase, F f) {
  const Timed scope(times, phase);
  f();
}

}  // namespace grjca::cpu
