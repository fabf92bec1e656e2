// The launch: a pure function of the problem and of how many blocks can be resident. Host only.
//
// No GPU has measured any of it. Costs are counted in clocks of an H200: tensor cores by mma.sync reach about 1200
// multiplications per clock and multiprocessor, L2 gives a multiprocessor 24 bytes per clock, and two blocks share
// both.
#pragma once

#include <algorithm>
#include <cmath>

#include "weights_backward.h"

namespace grjca::cuda {

// What a plan depends on beside the problem.
struct Target {
  int bytes;     // of an element
  int rows;      // of a tile, at most: Math::kRows
  int resident;  // blocks that the device can hold at once
};

namespace planning {

constexpr double kProducts = 600, kBytes = 12, kTanh = 8;  // of a block, per clock
constexpr double kTask = 1500, kBarrier = 2500;            // clocks
constexpr int64_t kMostBytes = 512 << 20;                  // of workspace, unless one sample takes more

inline int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Clocks of phases, whose tasks a team shares out.
struct Cost {
  const Plan& plan;
  int bytes;
  double clocks = 0, work = 0, longest = 0;

  void add(double tasks, double clocks_of_one) {
    work += tasks * (kTask + clocks_of_one);
    longest = std::max(longest, kTask + clocks_of_one);
  }
  // So many tiles, rows x columns x terms each.
  void add(double tasks, double rows, double columns, double terms) {
    add(tasks, std::max(rows * columns * terms / kProducts, (rows + columns) * terms * bytes / kBytes));
  }

  // A phase ends when its last task does: between when all blocks are busy to the end and one task later.
  void end_phase() {
    const int blocks = plan.team_blocks;
    clocks += work <= blocks * longest ? longest : work / blocks + longest / 2;
    clocks += blocks > 1 ? kBarrier : 0;
    work = longest = 0;
  }
};

inline double cost_of_iteration(const Problem& p, const Plan& plan, int bytes) {
  Cost cost{plan, bytes};
  const int length = static_cast<int>(p.length), tile = plan.tile_columns, s = std::min<int64_t>(plan.chunk, p.batch);
  const double rows = std::min(s * plan.frames, plan.tile_rows), frames = std::min(plan.frames, plan.tile_rows);
  const double row_tiles = tiles(s * plan.frames, plan.tile_rows), frame_tiles = tiles(length, plan.tile_rows);
  const double columns = modality_tiles(plan, p.modalities, tile), all_columns = tiles(plan.width, tile);
  const double width = static_cast<double>(plan.width) / p.modalities;
  cost.add(row_tiles * all_columns, rows, tile, plan.width);  // J
  cost.add(row_tiles * columns, rows, tile, width);           // V
  cost.add(s * frame_tiles * columns, frames, tile, length);  // K
  cost.end_phase();
  if (plan.streamed) {
    cost.add(s * p.modalities * tiles(plan.width, kStreamRows),
             std::max(kStreamRows * width / kTanh, 2 * plan.frames * width * bytes / kBytes));
  } else {
    cost.add(s * all_columns * modality_tiles(plan, p.modalities, plan.tile_rows), plan.tile_rows, tile, length);  // C
    cost.end_phase();
    cost.add(s * p.modalities * frame_tiles * all_columns, frames, tile, width);  // H
  }
  cost.end_phase();
  cost.add(row_tiles * columns, rows, tile, plan.width);  // U
  cost.end_phase();
  return cost.clocks;
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

// Of a team's workspace: what grows with the samples that it walks through at once.
inline int64_t bytes_of_samples(const Plan& plan, int bytes, int64_t samples) {
  const int64_t correlations = plan.streamed ? 0 : (1 + plan.backward) * static_cast<int64_t>(plan.width);
  return samples * (plan.slots.count * static_cast<int64_t>(plan.frames) + correlations) * plan.width * bytes;
}

inline void share_out(Plan& plan, const Problem& p, const Target& target, int chunk) {
  const int64_t most = std::max<int64_t>(1, kMostBytes / bytes_of_samples(plan, target.bytes, chunk));
  plan.chunk = chunk;
  plan.chunks = tiles(static_cast<int>(p.batch), chunk);
  plan.teams = plan.backward ? 1 : static_cast<int>(std::min<int64_t>(most, std::min(plan.chunks, target.resident)));
  plan.team_blocks = target.resident / plan.teams;
  plan.blocks = plan.teams * plan.team_blocks;
}

// The cheapest tiles, and unless `chunk` is given about the cheapest number of samples at once: of two that differ by
// less than a tenth the one that takes less memory.
inline void choose(Plan& plan, const Problem& p, const Target& target, int chunk) {
  double least = INFINITY;
  Plan best = plan;
  const int batch = static_cast<int>(p.batch);
  for (int s = chunk ? std::min(chunk, batch) : 1;; s = std::min(2 * s, batch)) {
    double cheapest = INFINITY;
    Plan of_chunk = plan;
    share_out(of_chunk, p, target, s);
    Plan tried = of_chunk;
    for (tried.tile_rows = 64; tried.tile_rows <= target.rows; tried.tile_rows += 16)
      for (tried.tile_columns = 64; tried.tile_columns <= kTile; tried.tile_columns *= 2) {
        const double cost = cost_of_iteration(p, tried, target.bytes) * tiles(tried.chunks, tried.teams);
        if (cost < cheapest) {
          cheapest = cost;
          of_chunk = tried;
        }
      }
    if (cheapest < 0.9 * least) {
      least = cheapest;
      best = of_chunk;
    }
    if (chunk || s == batch || bytes_of_samples(plan, target.bytes, 2 * s) > kMostBytes) break;
  }
  plan = best;
}

// What stands behind the activations in the workspace of a team.
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
  plan.workspace_bytes = plan.gradients_at + plan.parts * plan.gradients * 4;
}

}  // namespace planning

// `chunk`: samples at once, 0 for a choice.
inline Plan plan_forward(const Problem& p, const Target& target, int chunk = 0) {
  Plan plan = planning::common(p);
  plan.phases = plan.streamed ? 3 : 4;
  plan.steps = p.iterations * plan.phases + 2;
  // Stored, K and J are dead when H is written.
  const int value = plan.streamed ? 2 : std::max(2, p.modalities), initial = value + 1;
  plan.slots.joint = 0;
  plan.slots.key = 1;
  plan.slots.value = value;
  plan.slots.initial = initial;
  plan.slots.hidden = plan.streamed ? initial + 1 : 0;
  plan.slots.count = plan.streamed ? initial + 1 + p.modalities : initial + 1;
  planning::choose(plan, p, target, chunk);
  planning::lay_out(plan, p, target.bytes);
  return plan;
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

// Parts of the rows in the gradients of the weights: so many that those of one phase keep the grid busy, but none with
// fewer than 256 rows; 0 if all samples and iterations make one sum.
inline int parts_of_rows(const Plan& plan, const Problem& p) {
  const int length = static_cast<int>(p.length);
  int tasks =
      p.modalities * weight_tiles(plan, length, length, false) + weight_tiles(plan, plan.width, plan.width, false);
  for (int m = 0; m < p.modalities; ++m) tasks += weight_tiles(plan, plan.widths[m], plan.widths[m], false);
  const int most = std::min(8, plan.chunk * plan.frames / 256),
            parts = std::max(1, std::min(plan.blocks / tasks, most));
  const bool one_sum = plan.chunks == 1 && !(p.shared && p.iterations > 1);
  return parts == 1 && one_sum ? 0 : parts;
}

// The same of the backward; `weights`: whether any gradient of a parameter is wanted; `parts`: -1 for a choice.
inline Plan plan_backward(const Problem& p, const Target& target, bool weights, int chunk = 0, int parts = -1) {
  Plan plan = planning::common(p);
  plan.backward = true;
  plan.phases = (plan.streamed ? 5 : 7) + p.released;
  plan.steps = p.iterations * plan.phases + 3;
  plan.tile_weights = std::min(plan.width >= 512 ? kTile : 64, target.rows);
  // H is dead when d J and d K are written, d_update when d V is.
  const int m = p.modalities;
  plan.slots = {0, 2, 1, 3, 4, 4 + m, 4 + 2 * m, 4 + 2 * m, 4, 5, 5 + 2 * m, 7 + 2 * m};
  planning::choose(plan, p, target, chunk);
  if (weights) {
    plan.parts = parts < 0 ? parts_of_rows(plan, p) : parts;
    each_parameter(p, [&](int, int64_t n) { plan.gradients += planning::rounded(n, kPlaceUnit); });
  }
  planning::lay_out(plan, p, target.bytes);
  return plan;
}

// Where the sums of every gradient stand.
inline void place_gradients(BackwardArguments& a) {
  int64_t at = 0;
  each_parameter(a.p, [&](int i, int64_t n) {
    a.places[i] = static_cast<uint32_t>(at);
    a.sizes[i] = static_cast<uint32_t>(n);
    at += planning::rounded(n, kPlaceUnit);
  });
}

}  // namespace grjca::cuda
