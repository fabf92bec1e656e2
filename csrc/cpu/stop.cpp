#include "stop.h"

#include <utility>

namespace grjca::cpu {
namespace {

thread_local Stop* current = nullptr;

}  // namespace

bool Stop::reached() {
  if (was_reached()) return true;
  if (std::this_thread::get_id() != caller_) return false;
  const auto now = std::chrono::steady_clock::now();
  if (now < next_) return false;
  next_ = now + kEvery;
  reached_.store(asked_(), std::memory_order_relaxed);
  return was_reached();
}

Stop* Stop::of_thread() { return current; }

Stop* Stop::Scope::enter(Stop* stop) { return std::exchange(current, stop); }

}  // namespace grjca::cpu
