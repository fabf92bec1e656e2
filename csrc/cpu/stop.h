// A call that ends early, when whoever called asks for it: Ctrl-C must not wait for the last of a hundred samples.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#include "../grjca.h"

namespace grjca::cpu {

// Of one call. Every thread that works for it finds it, and looks between two tasks; what is left is then skipped.
class Stop {
 public:
  explicit Stop(bool (*asked)()) : asked_(asked), next_(std::chrono::steady_clock::now() + kEvery) {}

  bool reached();
  bool was_reached() const { return reached_.load(std::memory_order_relaxed); }

  static Stop* of_thread();  // or null

  // Within a block, this thread works for that call.
  class Scope {
   public:
    explicit GRJCA_INLINE Scope(Stop* stop) : stop_(stop), before_(stop ? enter(stop) : nullptr) {}
    GRJCA_INLINE ~Scope() {
      if (stop_) enter(before_);
    }
    Scope(const Scope&) = delete;

   private:
    static Stop* enter(Stop*);  // what was there before
    Stop *stop_, *before_;
  };

 private:
  static constexpr std::chrono::milliseconds kEvery{100};  // asking takes Python's lock; most calls are over before

  bool (*asked_)();
  std::atomic<bool> reached_{false};
  const std::thread::id caller_ = std::this_thread::get_id();  // the one that may ask
  std::chrono::steady_clock::time_point next_;
};

}  // namespace grjca::cpu
