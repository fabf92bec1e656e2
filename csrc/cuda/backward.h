// The backward in one launch: for every chunk of samples X^0, the gates, for every iteration from the last what it
// computed and then its gradients, and d x; after all chunks, once, the sums of the parts.
#pragma once

#include "gates.h"
#include "stream_backward.h"
#include "weights_backward.h"

namespace grjca::cuda {

// What H_m W_h^T sends back, and to W_h while H is still there; this first, as its sums are longer.
GRJCA_DEVICE int attended_and_weights_tasks(const BackwardArguments& a, const Team& team) {
  return output_weights_tasks(a) + attended_tasks(a, team);
}
template <class T, class M>
GRJCA_DEVICE void attended_and_weights_task(const BackwardArguments& a, const Team& team, int i) {
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
GRJCA_DEVICE int inputs_and_weights_tasks(const BackwardArguments& a, const Team& team) {
  return all_weights_tasks(a, team) + input_tasks(a, team);
}
template <class T, class M>
GRJCA_DEVICE void inputs_and_weights_task(const BackwardArguments& a, const Team& team, int i) {
  const int of_linear = linear_weights_tasks(a, team), of_weights = all_weights_tasks(a, team);
  if (i < of_linear)
    linear_weights_task<T, M>(a, team, i);
  else if (i < of_weights)
    key_weights_task<T, M>(a, team, i - of_linear);
  else
    input_task<T, M>(a, team, i - of_weights);
}

template <class T, class M>
GRJCA_DEVICE void iteration_backward(const BackwardArguments& a, int step, int phase) {
  const bool streamed = a.plan.streamed;
  const int of_update = streamed ? 2 : 3, of_attended = of_update + a.p.released;  // the paper form has no relu of U
  const auto share = [&](auto tasks, auto task) { share_out(a, step, tasks, task); };
  if (phase == 0) {
    share(project_tasks, project_task<T, M>);
    const Team team = team_of(a, step);
    states_backward<T>(a, team, team.t);
  } else if (phase == a.plan.phases - 1) {
    share(inputs_and_weights_tasks, inputs_and_weights_task<T, M>);
  } else if (phase == of_attended) {
    share(attended_and_weights_tasks, attended_and_weights_task<T, M>);
  } else if (phase == of_update) {
    share(output_tasks, output_backward_task<T, M>);
  } else if (streamed) {
    if (phase == 1)
      share(attend_tasks, attend_task<T, M>);
    else
      share(correlation_backward_tasks, correlation_backward_task<T, M>);
  } else if (phase == 1) {
    share(correlate_tasks, correlate_task<T, M>);
  } else if (phase == 2) {
    share(attend_stored_tasks, attend_stored_task<T, M>);
  } else if (phase == of_attended + 1) {
    share(correlation_backward_stored_tasks, correlation_backward_stored_task<T, M>);
  } else {
    share(key_joint_backward_tasks, key_joint_backward_task<T, M>);
  }
}

template <class T, class M>
GRJCA_DEVICE void backward_step(const BackwardArguments& a, int step) {
  const int i = step % a.plan.steps;
  if (i == 0) {
    initial<T>(a, team_of(a, step));
  } else if (i == 1) {
    gates_backward<T>(a, team_of(a, step));
    states_backward<T>(a, team_of(a, step), a.p.iterations);
  } else if (i == a.plan.steps - 1) {
    initial_backward<T>(a, team_of(a, step), a.d_features);
  } else {
    iteration_backward<T, M>(a, step, (i - 2) % a.plan.phases);
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
