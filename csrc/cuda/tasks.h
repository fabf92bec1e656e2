// The distribution of work: a launch is a sequence of steps, a step a loop over tasks, a task a tile.
#pragma once

#include "arguments.h"

namespace grjca::cuda {

// Tiles of columns, each within one modality.
GRJCA_BOTH int modality_tiles(const Plan& plan, int modalities, int tile) {
  int n = 0;
  for (int m = 0; m < modalities; ++m) n += tiles(plan.widths[m], tile);
  return n;
}

struct ModalityTile {
  int m, column, columns;  // of modality m, from its own column on
};
GRJCA_BOTH ModalityTile modality_tile(const Plan& plan, int i, int tile) {
  int m = 0;
  while (i >= tiles(plan.widths[m], tile)) i -= tiles(plan.widths[m++], tile);
  return {m, i * tile, least(tile, plan.widths[m] - i * tile)};
}

// ---- steps

// The rank of a block within its team. Blocks b and b + n share a multiprocessor where there are n of these, and ranks
// run backward in the second half of the teams, so that a block with one task more is not beside another one.
GRJCA_BOTH int rank_of(int block, int team_blocks, int teams) {
  const int rank = block % team_blocks;
  return block / team_blocks * 2 < teams ? rank : team_blocks - 1 - rank;
}

// The phase of step i of a chunk. After all chunks, a backward with parts has one more step, reduce.
GRJCA_BOTH Phase phase_of(const Plan& plan, int i) {
  if (i == 0) return Phase::initial;
  if (i == plan.steps - 1) return plan.backward ? Phase::initial_backward : Phase::gate;
  if (plan.backward && i == 1) return Phase::gates_backward;
  return plan.order[(i - 1 - plan.backward) % plan.phases];
}

// Whom this block works with in a step, and on what. In the backward, iterations go from the last to the first, and one
// more step precedes them.
GRJCA_DEVICE Team team_of(const Common& a, int step) {
  const Plan& plan = a.plan;
  const int number = block_index() / plan.team_blocks, chunk = number + step / plan.steps * plan.teams;
  const int batch = static_cast<int>(a.p.batch), first = least(chunk * plan.chunk, batch), i = step % plan.steps;
  const int of_iterations = i - 1 - plan.backward < 0 ? 0 : i - 1 - plan.backward, t = of_iterations / plan.phases;
  return {step,
          number,
          rank_of(block_index(), plan.team_blocks, plan.teams),
          plan.team_blocks,
          first,
          least(plan.chunk, batch - first),
          plan.backward ? a.p.iterations - 1 - t : t,
          phase_of(plan, i),
          plan.tile[of_iterations % plan.phases]};
}

// The same arguments, but what follows from them is computed anew: kept through a task, it would take registers that
// the task needs.
template <class A>
GRJCA_DEVICE const A& force_recompute(const A& a) {
  return (&a)[opaque_zero()];
}

// begin(arguments, team, i) and then end(arguments, team, i), which find out anew what i is.
template <class A, class B, class E>
GRJCA_DEVICE void in_two_parts(const A& a, const Team& team, int i, B begin, E end) {
  begin(a, team, i);
  const A& later = force_recompute(a);
  end(later, team_of(later, team.step), i + opaque_zero());
}

// task(arguments, team, i) for tasks i < tasks(arguments, team) of this block.
template <class A, class N, class F>
GRJCA_DEVICE void for_each_task(const A& a, int step, N tasks, F task) {
  GRJCA_LOOP
  for (int i = rank_of(block_index(), a.plan.team_blocks, a.plan.teams);; i += a.plan.team_blocks) {
    const A& now = force_recompute(a);
    const Team team = team_of(now, step);
    if (i >= tasks(now, team)) return;
    task(now, team, i);
  }
}

}  // namespace grjca::cuda
