// The kernels' arguments: the problem, the plan of the launch, and addresses. A block finds its team and its
// samples here, a phase its activations.
#pragma once

#include "../grjca.h"
#include "device.h"

namespace grjca::cuda {

constexpr int kThreads = 128;
constexpr int kSharing = 2;        // blocks of a multiprocessor, if they fit: one computes while the other waits
constexpr int kTile = 128;         // most rows and columns of a tile
constexpr int kRowGroup = 16;      // the workspace gives a sample a multiple of so many rows
constexpr int kStreamFrames = 32;  // the longest sequence whose C is streamed, and not stored
constexpr int kMaxParameters = ParameterIndex::kMost;

// Activations of the workspace, [samples, frames, d] each; one may reuse the memory of another that is dead.
struct Slots {
  int joint, key, value, initial, hidden;
  int d_attended, d_update, d_value, d_joint, d_key, d_state, d_mixture;  // of the backward; d_state takes two
  int count;
};

// The names of the phases, in the order of a launch. docs/architecture.md has the equation of each, and the functions.
//
// The first six are the forward. The backward begins with initial and gates_backward, recomputes for every iteration,
// from the last on, what the forward computed (up to H, and the sign of U), and then goes through it backward.
#define GRJCA_PHASES(f)                                                                               \
  f(initial) f(project) f(correlate) f(attend) f(output) f(gate) f(gates_backward) f(output_backward) \
      f(attend_backward) f(correlate_backward) f(key_joint_backward) f(project_backward) f(initial_backward) f(reduce)
#define GRJCA_NAME(name) name,
enum class Phase : uint8_t { GRJCA_PHASES(GRJCA_NAME) };
#undef GRJCA_NAME
constexpr int kMostPhases = 8;  // of an iteration

// Rows and columns of a tile, at most.
struct Tile {
  int rows, columns;
};

// A pure function of the problem and the device: plan.h.
struct Plan {
  int width, widths[kMaxModalities], offsets[kMaxModalities];
  int blocks, teams, team_blocks;  // a team of blocks walks through its samples alone, `chunk` of them at a time
  int chunk, chunks, frames;       // frames: L rounded up to kRowGroup
  int tile_weights;
  int key_samples;  // that a task of K takes; 0 where C is stored, as it then takes a part of one
  bool streamed;
  bool backward;
  int phases, steps;  // of an iteration, and of one chunk of a team
  Phase order[kMostPhases];
  Tile tile[kMostPhases];
  Slots slots;
  int64_t slot;                                                  // elements of an activation
  int64_t team_bytes, correlations, d_scores, values, d_logits;  // of a team's workspace, and where in it
  int parts;                        // of the rows, whose gradients of weights stand apart; 0: each is one sum
  int64_t gradients, gradients_at;  // elements of all, and where the sums of the parts stand
  int64_t counters_at;              // behind them
  int64_t workspace_bytes;
  float key_scale, kept, kept_inverse;  // 1 / sqrt(d); 1 / (1 - p), and the other way round
  uint32_t threshold;
};

struct Common {
  Problem p;
  Plan plan;
  View features[kMaxModalities];
  const void* parameters[kMaxParameters];  // in the order of problem.flatten()
  const int64_t* lengths;                  // [B], or null
  const uint64_t* seed;
  void* iterates;      // [T, B, L, d]
  char* workspace;     // 16-byte aligned
  uint32_t* counters;  // one for each team, and one for all; 0 before the launch
  int first_step, last_step;
};

struct ForwardArguments : Common {
  ForwardOutputs to;
};

struct BackwardArguments : Common {
  View d_outputs[kMaxModalities], d_iterates[kMaxModalities], d_gates[kMaxModalities];
  int64_t d_iterates_step[kMaxModalities];
  View d_features[kMaxModalities];
  void* d_parameters[kMaxParameters];                      // null where not wanted
  uint32_t places[kMaxParameters], sizes[kMaxParameters];  // of each among the sums of a part, and its elements
  bool weights;                                            // whether any is
};

static_assert(sizeof(ForwardArguments) <= 32764 && sizeof(BackwardArguments) <= 32764,
              "what CUDA takes as arguments of a kernel, from 12.1 and Volta on");

// A block's work in a step: iteration t of `count` samples from `first` on, with `size` blocks of which it is
// `rank`.
struct Team {
  int step, number, rank, size, first, count, t;
  Phase phase;
  Tile tile;
};

GRJCA_BOTH int tiles(int n, int tile) { return (n + tile - 1) / tile; }
GRJCA_BOTH int least(int a, int b) { return a < b ? a : b; }

// ---- lookups

template <class T>
GRJCA_DEVICE const T* parameter(const Common& a, int i) {
  return static_cast<const T*>(a.parameters[i]);
}

GRJCA_DEVICE char* workspace_of(const Common& a, const Team& team) {
  return a.workspace + a.plan.team_bytes * team.number;
}

// An activation of the workspace: row s * plan.frames + l is frame l of sample s of the chunk; plan.width columns, or
// as many for each modality (hidden, d_attended).
template <class T>
GRJCA_DEVICE T* slot(const Common& a, const Team& team, int i) {
  return reinterpret_cast<T*>(workspace_of(a, team)) + a.plan.slot * i;
}

// Frames of a sample that are present. Lengths outside 0..L count as the nearer of both.
GRJCA_DEVICE int frames_of(const Common& a, int sample) {
  const int64_t length = a.p.length;
  if (!a.lengths) return static_cast<int>(length);
  const int64_t given = a.lengths[sample];
  return static_cast<int>(given < 0 ? 0 : given > length ? length : given);
}

// ---- barriers

// Waits until `blocks` blocks have arrived; what they wrote is then visible to all. The block of rank 0 adds
// 2^31 - (blocks - 1) and each of the others 1, so the highest bit flips when the last arrives and the lower bits are 0
// again: the counter is never reset.
GRJCA_DEVICE void barrier(uint32_t* counter, int rank, int blocks) {
  block_barrier();
  if (blocks > 1 && this_thread().index == 0) {
    const uint32_t old = add_and_fetch_old(counter, rank == 0 ? 0x80000000u - static_cast<uint32_t>(blocks - 1) : 1u);
    while (((old ^ read_relaxed(counter)) & 0x80000000u) == 0) pause();
    fence();  // not in the loop: each would empty the L1 that another block computes from
  }
  block_barrier();
}

}  // namespace grjca::cuda
