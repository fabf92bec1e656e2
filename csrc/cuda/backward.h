// The backward in one launch. For every chunk of samples it computes X^0, the gates in reverse, for every iteration
// from the last its activations and then its gradients, and d x. After all chunks it adds the sums of the parts once.
#pragma once

#include "gates.h"
#include "stream_backward.h"
#include "weights_backward.h"

namespace grjca::cuda {

// The gradients that H_m W_h^T sends back, and that of W_h while H is still there; W_h comes first, as its sums are
// longer.
GRJCA_DEVICE int attend_backward_tasks(const BackwardArguments& a, const Team& team) {
  return output_weights_tasks(a) + attended_tasks(a, team);
}
template <class T, class M>
GRJCA_DEVICE void attend_backward_task(const BackwardArguments& a, const Team& team, int i) {
  const int of_weights = output_weights_tasks(a);
  if (i < of_weights)
    output_weights_task<T, M>(a, team, i);
  else
    attended_task<T, M>(a, team, i - of_weights);
}

// What the projections send back to their weights, whose sums are longer, and to X^t; with the last iteration the
// gates' weights.
GRJCA_DEVICE int all_weights_tasks(const BackwardArguments& a, const Team& team) {
  return linear_weights_tasks(a, team) + key_weights_tasks(a);
}
GRJCA_DEVICE int project_backward_tasks(const BackwardArguments& a, const Team& team) {
  return all_weights_tasks(a, team) + input_tasks(a, team);
}
template <class T, class M>
GRJCA_DEVICE void project_backward_task(const BackwardArguments& a, const Team& team, int i) {
  const int of_linear = linear_weights_tasks(a, team), of_weights = all_weights_tasks(a, team);
  if (i < of_linear)
    linear_weights_task<T, M>(a, team, i);
  else if (i < of_weights)
    key_weights_task<T, M>(a, team, i - of_linear);
  else
    input_task<T, M>(a, team, i - of_weights);
}

template <class T, class M>
GRJCA_DEVICE void backward_step(const BackwardArguments& a, int step) {
  const auto share = [&](auto tasks, auto task) { for_each_task(a, step, tasks, task); };
  const bool streamed = a.plan.streamed;
  const Team team = team_of(a, step);
  switch (team.phase) {
    case Phase::initial:
      return initial<T>(a, team);
    case Phase::gates_backward:
      gates_backward<T>(a, team);
      return states_backward<T>(a, team, a.p.iterations);
    case Phase::project:
      share(project_tasks, project_task<T, M>);
      return states_backward<T>(a, team_of(a, step), team_of(a, step).t);
    case Phase::correlate:
      return share(correlate_tasks, correlate_task<T, M>);
    case Phase::attend:
      if (streamed) return share(attend_tasks, attend_task<T, M>);
      return share(attend_stored_tasks, attend_stored_task<T, M>);
    case Phase::output_backward:
      return share(output_tasks, output_backward_task<T, M>);
    case Phase::attend_backward:
      return share(attend_backward_tasks, attend_backward_task<T, M>);
    case Phase::correlate_backward:
      if (streamed) return share(correlate_backward_tasks, correlate_backward_task<T, M>);
      return share(correlate_backward_stored_tasks, correlate_backward_stored_task<T, M>);
    case Phase::key_joint_backward:
      return share(key_joint_backward_tasks, key_joint_backward_task<T, M>);
    case Phase::project_backward:
      return share(project_backward_tasks, project_backward_task<T, M>);
    default:
      return initial_backward<T>(a, team, a.d_features);
  }
}

// Steps first_step <= step < last_step; all of them are the whole backward. There is one team.
template <class T, bool kExact>
GRJCA_DEVICE void backward_kernel(const BackwardArguments& a) {
  const Plan& plan = a.plan;
  GRJCA_LOOP
  for (int step = a.first_step; step < a.last_step; ++step) {
    if (step == plan.chunks * plan.steps)
      reduce<T>(a, block_index(), plan.blocks);
    else
      backward_step<T, BackwardMath<T, kExact>>(a, step);
    if (step + 1 < a.last_step) barrier(a.counters, block_index(), plan.blocks);
  }
}

}  // namespace grjca::cuda
