// Lets a long call end early, so that Ctrl-C does not wait for the last of a hundred samples.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#include "../grjca.h"

namespace grjca::cpu {

// Every call has its own Stop. All threads that work for the call look at it before each task, and once it is reached
// they skip the tasks that are left. Only the thread that made the call asks whether it shall stop.
class Stop {
 public:
  explicit Stop(bool (*asked)()) : asked_(asked), next_(std::chrono::steady_clock::now() + kEvery) {}

  bool reached();
  bool was_reached() const { return reached_.load(std::memory_order_relaxed); }

  static Stop* of_thread();  // the Stop of the call that this thread works for, or null

  // While a Scope lives, this thread works for the call of that Stop.
  class Scope {
   public:
    explicit GRJCA_INLINE Scope(Stop* stop) : stop_(stop), before_(stop ? enter(stop) : nullptr) {}
    GRJCA_INLINE ~Scope() {
      if (stop_) enter(before_);
    }
    Scope(const Scope&) = delete;

   private:
    static Stop* enter(Stop*);  // returns the Stop that it replaces
    Stop *stop_, *before_;
  };

 private:
  static constexpr std::chrono::milliseconds kEvery{100};  // asking takes Python's lock, so it is done rarely

  bool (*asked_)();
  std::atomic<bool> reached_{false};
  const std::thread::id caller_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point next_;
};

}  // namespace grjca::cpu
