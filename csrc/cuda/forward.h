// The forward in one launch. A team walks through its samples alone: X^0, the phases of every iteration, the gates,
// with a barrier of the team between two of them.
#pragma once

#include "gates.h"
#include "stream.h"

namespace grjca::cuda {

template <class T, class M>
GRJCA_DEVICE void forward_step(const ForwardArguments& a, int step) {
  const auto share = [&](auto tasks, auto task) { for_each_task(a, step, tasks, task); };
  const Team team = team_of(a, step);
  switch (team.phase) {
    case Phase::initial:
      return initial<T>(a, team);
    case Phase::project:
      return share(project_tasks, project_task<T, M>);
    case Phase::correlate:
      return share(correlate_tasks, correlate_task<T, M>);
    case Phase::attend:
      if (a.plan.streamed) return share(attend_tasks, attend_task<T, M>);
      return share(attend_stored_tasks, attend_stored_task<T, M>);
    case Phase::output:
      return share(output_tasks, output_task<T, M>);
    default:
      return gate<T>(a, team, a.to);
  }
}

// Steps first_step <= step < last_step of every team; all of them are the whole forward.
template <class T, bool kExact>
GRJCA_DEVICE void forward_kernel(const ForwardArguments& a) {
  GRJCA_LOOP
  for (int step = a.first_step; step < a.last_step; ++step) {
    if (team_of(a, step).count <= 0) return;
    forward_step<T, ForwardMath<T, kExact>>(a, step);
    if (step + 1 < a.last_step) {
      const Team team = team_of(a, step);
      barrier(a.counters + team.number, team.rank, team.size);
    }
  }
}

}  // namespace grjca::cuda
