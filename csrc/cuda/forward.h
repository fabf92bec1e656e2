// The forward in one launch. A team walks through its samples alone: X^0, the phases of every iteration, the gates,
// with a barrier of the team between two of them.
#pragma once

#include "gates.h"
#include "stream.h"

namespace grjca::cuda {

template <class T, class M>
GRJCA_DEVICE void forward_step(const ForwardArguments& a, int step) {
  const Plan& plan = a.plan;
  const int i = step % plan.steps, phase = (i - 1) % plan.phases;
  const auto share = [&](auto tasks, auto task) { share_out(a, step, tasks, task); };
  if (i == 0) {
    initial<T>(a, team_of(a, step));
  } else if (i == plan.steps - 1) {
    gate<T>(a, team_of(a, step), a.to);
  } else if (phase == 0) {
    share(project_tasks, project_task<T, M>);
  } else if (phase == plan.phases - 1) {
    share(output_tasks, output_task<T, M>);
  } else if (plan.streamed) {
    share(attend_tasks, attend_task<T, M>);
  } else if (phase == 1) {
    share(correlate_tasks, correlate_task<T, M>);
  } else {
    share(attend_stored_tasks, attend_stored_task<T, M>);
  }
}

// Steps first_step <= step < last_step of every team; all of them are the whole forward.
template <class T, bool kExact>
GRJCA_DEVICE void forward_kernel(const ForwardArguments& a) {
  GRJCA_LOOP
  for (int step = a.first_step; step < a.last_step; ++step) {
    if (team_of(a, step).count <= 0) return;
    forward_step<T, ForwardMath<T, kExact>>(a, step);
    const int number = block_index() / a.plan.team_blocks, rank = block_index() % a.plan.team_blocks;
    if (step + 1 < a.last_step) barrier(a.counters + number, rank, a.plan.team_blocks);
  }
}

}  // namespace grjca::cuda
