// The launch: a pure function of the problem and of how many blocks can be resident. Host only.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "costs.h"

namespace grjca::cuda {

// The inputs of a plan besides the problem.
struct Target {
  int bytes;               // of an element
  int rows;                // of a tile, at most: Math::kRows
  int resident;            // blocks that the device can hold at once
  int sharing = kSharing;  // of them, on one multiprocessor
};

namespace planning {

constexpr int64_t kMostBytes = 512 << 20;  // of workspace, unless one sample takes more

inline int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline costs::Grid grid_of(const Plan& plan, const Target& target) {
  const double barrier = plan.team_blocks == 1 ? 0 : plan.teams == 1 ? costs::kGridBarrier : costs::kBarrier;
  return {plan.team_blocks, plan.teams, tiles(target.resident, target.sharing), barrier};
}

inline Plan common(const Problem& p) {
  Plan plan{};
  for (int m = 0; m < p.modalities; ++m) {
    plan.widths[m] = static_cast<int>(p.widths[m]);
    plan.offsets[m] = plan.width;
    plan.width += plan.widths[m];
  }
  plan.frames = static_cast<int>(rounded(p.length, kRowGroup));
  plan.streamed = p.length <= kStreamFrames;
  plan.key_scale = static_cast<float>(1 / std::sqrt(static_cast<double>(plan.width)));
  plan.kept = static_cast<float>(1 / (1 - p.dropout));
  plan.kept_inverse = static_cast<float>(1 - p.dropout);
  plan.threshold = static_cast<uint32_t>(std::min(65535.0, std::floor(p.dropout * 65536 + 0.5)));
  return plan;
}

// The bytes of a team's workspace that grow with the number of samples in a chunk.
inline int64_t bytes_of_samples(const Plan& plan, int bytes, int64_t samples) {
  const int64_t correlations = plan.streamed ? 0 : (1 + plan.backward) * static_cast<int64_t>(plan.width);
  return samples * (plan.slots.count * static_cast<int64_t>(plan.frames) + correlations) * plan.width * bytes;
}

inline void assign_teams(Plan& plan, const Problem& p, const Target& target, int chunk) {
  const int64_t most = std::max<int64_t>(1, kMostBytes / bytes_of_samples(plan, target.bytes, chunk));
  plan.chunk = chunk;
  plan.chunks = tiles(static_cast<int>(p.batch), chunk);
  plan.teams = plan.backward ? 1 : static_cast<int>(std::min<int64_t>(most, std::min(plan.chunks, target.resident)));
  plan.team_blocks = target.resident / plan.teams;
  plan.blocks = plan.teams * plan.team_blocks;
  if (plan.streamed)  // about one such task for every block
    plan.key_samples = tiles(chunk * modality_tiles(plan, p.modalities, kKeyColumns), plan.team_blocks);
}

// f(index of a parameter, its elements) for all of them.
template <class F>
void each_parameter(const Problem& p, F f) {
  const ParameterIndex index{p};
  const auto linear = [&](int i, int64_t outputs, int64_t inputs) {
    f(i, outputs * inputs);
    if (p.released) f(i + 1, outputs);
  };
  for (int t = 0; t < p.layers(); ++t) {
    if (p.projected) linear(index.query(t), p.width(), p.width());
    for (int m = 0; m < p.modalities; ++m) linear(index.key(t, m), p.length, p.length);
    for (int m = 0; m < p.modalities; ++m) linear(index.value(t, m), p.widths[m], p.widths[m]);
    for (int m = 0; m < p.modalities; ++m) linear(index.output(t, m), p.widths[m], p.width());
  }
  for (int m = 0; m < p.modalities; ++m)
    for (int g = 0; g < p.gates(); ++g) linear(index.gate(m, g), p.ways(g), p.widths[m]);
}

inline int64_t elements_of_gradients(const Problem& p) {
  int64_t all = 0;
  each_parameter(p, [&](int, int64_t n) { all += rounded(n, kPlaceUnit); });
  return all;
}

// A row of the plan's table: every team comes `times` times to this phase, and each time it costs so much.
struct Row {
  Phase phase;
  Tile tile;
  double times;
  costs::Cost cost;
};

inline std::vector<Row> table(const Plan& plan, const Problem& p, const costs::Phases& phases,
                              const costs::Grid& grid) {
  const double rounds = tiles(plan.chunks, plan.teams);
  std::vector<Row> rows;
  const auto add = [&](Phase phase, double times, Tile tile = {0, 0}) {
    const Tile any = {tile.rows ? tile.rows : kTile, tile.columns ? tile.columns : kTile};
    rows.push_back({phase, tile, times, costs::cost_of(phases.of(phase, any), grid)});
  };
  add(Phase::initial, rounds);
  if (plan.backward) add(Phase::gates_backward, rounds);
  for (int i = 0; i < plan.phases; ++i) add(plan.order[i], rounds * p.iterations, plan.tile[i]);
  add(plan.backward ? Phase::initial_backward : Phase::gate, rounds);
  if (plan.parts > 0) add(Phase::reduce, 1);
  return rows;
}

inline std::vector<Row> table(const Plan& plan, const Problem& p, const Target& target) {
  const costs::Phases phases(p, plan, target.bytes, target.rows, parts_of(plan));
  return table(plan, p, phases, grid_of(plan, target));
}

inline double clocks_of(const std::vector<Row>& rows) {
  double clocks = 0;
  for (const Row& row : rows) clocks += row.times * row.cost.clocks;
  return clocks;
}

// Gives phase i of an iteration its cheapest tile, and returns the clocks of that.
inline double choose_tile(Plan& plan, int i, const costs::Phases& phases, const costs::Grid& grid, int most_rows) {
  double least = INFINITY;
  for (int columns = kTile; columns >= 64; columns /= 2)
    for (int rows = most_rows; rows >= 64; rows -= 16) {
      const double clocks = costs::cost_of(phases.of(plan.order[i], {rows, columns}), grid).clocks;
      if (clocks < least) {
        least = clocks;
        plan.tile[i] = {rows, columns};
      }
    }
  return least;
}

inline bool sums_weights(Phase phase) { return phase == Phase::attend_backward || phase == Phase::project_backward; }

// Chooses the cheapest tiles of the gradients of weights, and the cheapest number of parts of the rows, none of which
// has fewer than 256. The plan has no parts where all samples and iterations make one sum.
inline void choose_weights(Plan& plan, const Problem& p, const Target& target, int parts) {
  const bool one_sum = plan.chunks == 1 && !(p.shared && p.iterations > 1);
  const int most = std::max(1, std::min(8, plan.chunk * plan.frames / 256));
  double least = INFINITY;
  Plan best = plan;
  for (int tile = std::min(kTile, target.rows); tile >= 64; tile -= 32)
    for (int n = parts < 0 ? 1 : parts; n <= (parts < 0 ? most : parts); n = 2 * n + (n == 0)) {
      Plan tried = plan;
      tried.tile_weights = tile;
      tried.parts = parts < 0 && n == 1 && one_sum ? 0 : n;
      const costs::Phases phases(p, tried, target.bytes, target.rows, parts_of(tried));
      const costs::Grid grid = grid_of(tried, target);
      double clocks = tried.parts > 0 ? costs::cost_of(phases.of(Phase::reduce, {kTile, kTile}), grid).clocks : 0;
      for (int i = 0; i < plan.phases; ++i)
        if (sums_weights(plan.order[i]))
          clocks += plan.chunks * p.iterations * choose_tile(tried, i, phases, grid, target.rows);
      if (clocks < least) {
        least = clocks;
        best = tried;
      }
    }
  plan = best;
}

// Chooses the cheapest tiles and, unless `chunk` is given, about the cheapest number of samples at once: of two that
// differ by less than a tenth it takes the one that needs less memory. It chooses the parts if `parts` is -1.
inline void choose(Plan& plan, const Problem& p, const Target& target, int chunk, bool weights, int parts) {
  double least = INFINITY;
  Plan best = plan, largest = plan;
  const int batch = static_cast<int>(p.batch);
  if (weights) plan.gradients = elements_of_gradients(p);
  for (int s = chunk ? std::min(chunk, batch) : 1;; s = std::min(2 * s, batch)) {
    Plan tried = plan;
    assign_teams(tried, p, target, s);
    const costs::Phases phases(p, tried, target.bytes, target.rows, parts_of(tried));
    for (int i = 0; i < tried.phases; ++i) choose_tile(tried, i, phases, grid_of(tried, target), target.rows);
    const double clocks = clocks_of(table(tried, p, target));
    if (clocks < 0.9 * least) {
      least = clocks;
      best = tried;
    }
    largest = tried;
    if (chunk || s == batch || bytes_of_samples(plan, target.bytes, 2 * s) > kMostBytes) break;
  }
  if (weights) {  // which want many rows, so the largest chunk is tried too
    choose_weights(best, p, target, parts);
    if (best.chunk != largest.chunk) {
      choose_weights(largest, p, target, parts);
      if (clocks_of(table(largest, p, target)) < 0.9 * clocks_of(table(best, p, target))) best = largest;
    }
  }
  plan = best;
}

// Lists the phases of an iteration. The paper form has no output_backward, as it has no relu of U. Where C is streamed,
// no phase stores it or reads it back.
inline void set_order(Plan& plan, const Problem& p) {
  using P = Phase;
  const auto set = [&](std::initializer_list<Phase> order) {
    for (const Phase phase : order) {
      const bool stored_only = phase == P::correlate || phase == P::key_joint_backward;
      if (!(stored_only && plan.streamed) && (p.released || phase != P::output_backward))
        plan.order[plan.phases++] = phase;
    }
  };
  if (plan.backward)
    set({P::project, P::correlate, P::attend, P::output_backward, P::attend_backward, P::correlate_backward,
         P::key_joint_backward, P::project_backward});
  else
    set({P::project, P::correlate, P::attend, P::output});
  plan.steps = p.iterations * plan.phases + 2 + plan.backward;
}

// The table of other kernels that run these phases.
inline std::vector<Row> table_of(const Problem& p, bool backward, bool weights, const OtherKernels& other) {
  Plan plan = common(p);
  plan.backward = backward;
  set_order(plan, p);
  plan.frames = static_cast<int>(p.length);
  plan.chunk = other.chunk;
  plan.chunks = tiles(static_cast<int>(p.batch), other.chunk);
  plan.teams = 1;
  plan.blocks = plan.team_blocks = other.programs;
  plan.tile_weights = other.tile_weights;
  plan.parts = other.parts;
  plan.gradients = weights ? elements_of_gradients(p) : 0;
  std::fill_n(plan.tile, plan.phases, Tile{other.rows, other.columns});
  const costs::Phases phases(p, plan, p.dtype == Dtype::float32 ? 4 : 2, other.rows, other.key_parts);
  return table(plan, p, phases, {other.programs, 1, other.multiprocessors, costs::kGridBarrier});
}

// Lays out the part of a team's workspace behind the activations.
inline void lay_out(Plan& plan, const Problem& p, int bytes) {
  const int64_t samples = plan.chunk, rows = samples * plan.frames, ways = rows * p.modalities * p.all_ways();
  plan.slot = rounded(rows * plan.width, 64);
  int64_t at = plan.slot * plan.slots.count * bytes;
  const auto take = [&at](int64_t size) {
    const int64_t begin = at;
    at = rounded(at + size, 256);
    return begin;
  };
  const int64_t correlations = plan.streamed ? 0 : samples * plan.width * plan.width * bytes;
  plan.correlations = take(correlations);
  if (plan.backward) {
    plan.d_scores = take(correlations);
    plan.values = take(ways * 4);
    plan.d_logits = take(ways * bytes);
  }
  plan.team_bytes = at;
  plan.gradients_at = at * plan.teams;
  plan.counters_at = plan.gradients_at + plan.parts * plan.gradients * 4;
  plan.workspace_bytes = plan.counters_at + (plan.teams + 1) * 4;
}

}  // namespace planning

// `chunk`: samples at once, 0 for a choice.
inline Plan plan_forward(const Problem& p, const Target& target, int chunk = 0) {
  Plan plan = planning::common(p);
  planning::set_order(plan, p);
  // Stored, K and J are dead when H is written.
  const int value = plan.streamed ? 2 : std::max(2, p.modalities), initial = value + 1;
  plan.slots.joint = 0;
  plan.slots.key = 1;
  plan.slots.value = value;
  plan.slots.initial = initial;
  plan.slots.hidden = plan.streamed ? initial + 1 : 0;
  plan.slots.count = plan.streamed ? initial + 1 + p.modalities : initial + 1;
  planning::choose(plan, p, target, chunk, false, 0);
  planning::lay_out(plan, p, target.bytes);
  return plan;
}

// The plan of the backward; `weights`: whether any gradient of a parameter is wanted; `parts`: -1 for a choice.
inline Plan plan_backward(const Problem& p, const Target& target, bool weights, int chunk = 0, int parts = -1) {
  Plan plan = planning::common(p);
  plan.backward = true;
  planning::set_order(plan, p);
  plan.tile_weights = 64;
  // H is dead when d J and d K are written, d_update when d V is.
  const int m = p.modalities;
  plan.slots = {0, 2, 1, 3, 4, 4 + m, 4 + 2 * m, 4 + 2 * m, 4, 5, 5 + 2 * m, 7 + 2 * m, 7 + 2 * m + (p.gates() > 0)};
  planning::choose(plan, p, target, chunk, weights, parts);
  planning::lay_out(plan, p, target.bytes);
  return plan;
}

// Places the sums of every gradient.
inline void place_gradients(BackwardArguments& a) {
  int64_t at = 0;
  planning::each_parameter(a.p, [&](int i, int64_t n) {
    a.places[i] = static_cast<uint32_t>(at);
    a.sizes[i] = static_cast<uint32_t>(n);
    at += planning::rounded(n, kPlaceUnit);
  });
}

}  // namespace grjca::cuda
