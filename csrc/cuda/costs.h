// The cost of a launch, by counting: the one model behind the choice of tiles (plan.h) and the tables of
// `python -m benchmarks.gpu --estimate`. Host only.
//
// A task waits (kTask or kFrame clocks until its pipeline is full and its sums are out, and kTrip for each time that it
// needs something from L2 before it can go on), and it works: as long as the slowest of tensor cores, L2 and tanh
// takes, at the rates of a whole multiprocessor. Two blocks of a multiprocessor wait at the same time, and work one
// after another. A phase lasts as long as its busiest multiprocessor, and then comes a barrier. Operands that are
// copied by 8 bytes, as W_k of 300 frames is, count like those by 16: the bytes are the same, and L2 takes longer to
// bring them than the multiprocessor takes to ask twice. No GPU has confirmed the constants: they are those of an H200
// in kernels.md, which says where each is from.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "stream.h"
#include "weights_backward.h"

namespace grjca::cuda::costs {

constexpr double kClock = 1.755e9;                           // per second
constexpr double kProducts = 1200, kBytes = 24, kTanh = 16;  // of a multiprocessor, per clock
constexpr double kTask = 1500, kFrame = 600, kTrip = 375;    // clocks, of a product, of frames, and of a trip to L2
constexpr double kBarrier = 2600, kGridBarrier = 3300;       // clocks, of a team and of the grid

// Tasks that cost the same, one after another among those of a phase.
struct Group {
  double tasks;
  double work, wait, trips;  // of one: clocks of both kinds, and times that it needs something from L2 at once
  double bytes;              // of one, through L2
};

// The cost of a phase: tasks and bytes of the whole grid, turns and trips of the busiest block.
struct Cost {
  double tasks, turns, bytes, trips, clocks;
};

// The blocks of a launch: block b runs on multiprocessor b % multiprocessors, and belongs to team b / team_blocks.
struct Grid {
  int team_blocks, teams, multiprocessors;
  double barrier;
};

inline Cost cost_of(const std::vector<Group>& groups, const Grid& grid) {
  struct Load {
    double tasks = 0, work = 0, wait = 0, trips = 0;
  };
  std::vector<Load> loads(grid.team_blocks), of_multiprocessor(grid.multiprocessors);
  Cost cost{};
  for (const Group& group : groups) {
    const int64_t begin = static_cast<int64_t>(cost.tasks), end = begin + static_cast<int64_t>(group.tasks);
    for (int r = 0; r < grid.team_blocks; ++r) {
      const auto before = [&](int64_t n) { return (n - r + grid.team_blocks - 1) / grid.team_blocks; };
      const double n = static_cast<double>(before(end) - before(begin));
      loads[r].tasks += n;
      loads[r].work += n * group.work;
      loads[r].trips += n * group.trips;
      loads[r].wait += n * (group.wait + group.trips * kTrip);
    }
    cost.tasks += group.tasks;
    cost.bytes += group.tasks * group.bytes;
  }
  cost.tasks *= grid.teams;
  cost.bytes *= grid.teams;
  for (int b = 0; b < grid.team_blocks * grid.teams; ++b) {
    const Load& load = loads[rank_of(b, grid.team_blocks, grid.teams)];
    Load& all = of_multiprocessor[b % grid.multiprocessors];
    all.work += load.work;
    all.wait = std::max(all.wait, load.wait);
    cost.clocks = std::max(cost.clocks, all.work + all.wait);
    cost.turns = std::max(cost.turns, load.tasks);
    cost.trips = std::max(cost.trips, load.trips);
  }
  cost.clocks += grid.barrier;
  return cost;
}

// Lists the tasks of every phase.
class Phases {
 public:
  // A tile has at most `rows` rows, and the gradients of W_k are summed in `key_parts` parts of the samples. The plan
  // needs no tiles yet.
  Phases(const Problem& p, const Plan& plan, int bytes, int rows, int key_parts)
      : p_(p),
        plan_(plan),
        bytes_(bytes),
        most_rows_(rows),
        s_(least(plan.chunk, static_cast<int>(p.batch))),
        key_parts_(key_parts) {}

  std::vector<Group> of(Phase phase, Tile tile) const {
    Groups groups(*this, tile);
    const int length = static_cast<int>(p_.length), width = plan_.width, chunk_rows = s_ * plan_.frames;
    const int row_tiles = tiles(chunk_rows, tile.rows), frame_tiles = s_ * tiles(length, tile.rows);
    const int column_tiles = tiles(width, tile.columns);
    const auto columns_of = [&](int m) { return tiles(plan_.widths[m], tile.columns); };
    const auto each_modality = [&](auto f) {
      for (int m = 0; m < p_.modalities; ++m) f(m, plan_.widths[m]);
    };
    switch (phase) {
      case Phase::initial:
        groups.frames(kFramesAtOnce, p_.normalize ? 3 : 2, 2);
        break;
      case Phase::project:
        if (p_.projected) groups.rows_product(row_tiles * column_tiles, chunk_rows, width);
        each_modality([&](int m, int d) { groups.rows_product(row_tiles * columns_of(m), chunk_rows, d); });
        each_modality([&](int m, int d) {
          if (plan_.key_samples > 0)
            groups.keys(tiles(d, kKeyColumns), least(kKeyColumns, d));
          else
            groups.rows_product(frame_tiles * columns_of(m), length, length);
        });
        if (plan_.backward) groups.frames(2, 3, 2);
        break;
      case Phase::correlate:
        each_modality([&](int, int d) { groups.product(s_ * tiles(d, tile.rows) * column_tiles, length, {0, true}); });
        break;
      case Phase::attend:
        each_modality([&](int, int d) {
          if (plan_.streamed)
            groups.streamed(s_ * tiles(width, kStreamRows), d, 2, 3);
          else
            groups.rows_product(frame_tiles * column_tiles, length, d, {0, true});
        });
        break;
      case Phase::output:
      case Phase::output_backward:
        each_modality(
            [&](int m, int) { groups.rows_product(row_tiles * columns_of(m), chunk_rows, width, {1, false}); });
        break;
      case Phase::gate:
        groups.frames(2, 3 + gate_trips(), 2 + p_.iterations);
        break;
      case Phase::gates_backward:
        groups.frames(1, 3 + 2 * p_.gates() + gate_trips(), 5 + 3 * p_.iterations);
        break;
      case Phase::attend_backward:
        if (weights()) each_modality([&](int, int d) { groups.weights(d, width, chunk_rows, parts_of(plan_)); });
        each_modality([&](int, int d) { groups.rows_product(row_tiles * column_tiles, chunk_rows, d, {1, false}); });
        break;
      case Phase::correlate_backward:
        if (plan_.streamed) {
          each_modality([&](int, int d) { groups.streamed(s_ * tiles(d, kStreamRows), width, 4, 6); });
          groups.streamed(s_ * tiles(width, kStreamRows), width, 3, 4);
        } else {
          each_modality([&](int m, int) { groups.rows_product(frame_tiles * columns_of(m), length, width); });
          each_modality(
              [&](int, int d) { groups.product(s_ * tiles(d, tile.rows) * column_tiles, length, {1, false}); });
        }
        break;
      case Phase::key_joint_backward:
        groups.product(2 * frame_tiles * column_tiles, width);
        break;
      case Phase::project_backward:
        if (weights()) {
          if (p_.projected) groups.weights(width, width, chunk_rows, parts_of(plan_));
          each_modality([&](int, int d) { groups.weights(d, d, chunk_rows, parts_of(plan_)); });
          each_modality([&](int, int d) { groups.weights(length, length, s_ * d, key_parts_); });
        }
        each_modality([&](int m, int d) {
          const int terms = d + (p_.projected ? width : 0) + (plan_.streamed ? 0 : length);
          groups.product((plan_.streamed ? row_tiles : frame_tiles) * columns_of(m), terms, {2, false});
        });
        break;
      case Phase::initial_backward:
        groups.frames(kFramesAtOnce, p_.normalize ? 5 : 2, p_.normalize ? 4 : 2);
        break;
      case Phase::reduce:
        groups.reduce();
        break;
    }
    return groups.all;
  }

 private:
  struct Epilogue {
    int loads;  // of elements, for each that is stored
    bool tanh;
  };

  struct Groups {
    const Phases& of;
    Tile tile;
    std::vector<Group> all;

    Groups(const Phases& phases, Tile t) : of(phases), tile(t) {}

    void add(double tasks, double wait, double products, double bytes, double tanhs, double trips) {
      if (tasks > 0)
        all.push_back({tasks, std::max({products / kProducts, bytes / kBytes, tanhs / kTanh}), wait, trips, bytes});
    }
    void product(double tasks, double terms, Epilogue epilogue = {0, false}) {
      product(tasks, terms, tile, epilogue, of.bytes_);
    }
    void rows_product(double tasks, int rows, double terms, Epilogue epilogue = {0, false}) {
      product(tasks, terms, {least(tile.rows, rows), tile.columns}, epilogue, of.bytes_);
    }
    void product(double tasks, double terms, Tile t, Epilogue epilogue, double stored_bytes) {
      const bool whole = computed_whole(t.rows, t.columns, of.most_rows_);
      const double computed = whole ? of.most_rows_ * kTile : t.rows * t.columns, elements = t.rows * t.columns;
      add(tasks, kTask, computed * terms,
          (t.rows + t.columns) * terms * of.bytes_ + elements * (1 + epilogue.loads) * stored_bytes,
          epilogue.tanh ? elements : 0, epilogue.loads ? elements / 16 / kThreads : 0);
    }
    // Adds the tiles of the gradient of a weight, whose sums have so many terms in all parts together.
    void weights(int outputs, int inputs, double terms, int parts) {
      const Plan& plan = of.plan_;
      const int size = plan.tile_weights;
      product(weight_tiles(plan, outputs, inputs, false) * parts, terms / parts,
              {least(size, outputs), least(size, inputs)}, {plan.parts > 0, false}, 4);
      if (of.p_.released)
        add(tiles(outputs, size) * parts, kTask, 0, least(size, outputs) * terms / parts * of.bytes_, 0, 1);
    }
    // Adds tasks of so many columns of K, for several samples each.
    void keys(double tiles_of_columns, double columns) {
      const int per_task = of.plan_.key_samples, tasks = tiles(of.s_, per_task);
      const double samples = static_cast<double>(of.s_) / tasks, frames = of.plan_.frames;
      const double length = static_cast<double>(of.p_.length);
      add(tiles_of_columns * tasks, kTask, samples * frames * frames * columns,
          (2 * samples * columns + length) * length * of.bytes_, 0, 0);
    }
    // Adds tasks of kStreamRows rows of C and `width` columns. Each element enters so many products with every frame,
    // and a task reads the columns of every frame `reads` times.
    void streamed(double tasks, double width, double products, double reads) {
      const double elements = kStreamRows * width, frames = of.plan_.frames;
      add(tasks, kTask, elements * products * std::max(frames, 16.0),
          (reads * width + kStreamRows) * frames * of.bytes_, elements, 1);
    }
    // Adds the frames of the chunk. A warp takes so many at once, and reads or writes every element `passes` times.
    void frames(int per_task, double trips, double passes) {
      const double warps = static_cast<double>(of.s_) * of.p_.length * of.p_.modalities / per_task;
      const double elements = per_task * (kThreads / kWarp) * static_cast<double>(of.plan_.width) / of.p_.modalities;
      add(std::ceil(warps / (kThreads / kWarp)), kFrame, 0, elements * passes * of.bytes_, 0, trips);
    }
    void reduce() {
      const Plan& plan = of.plan_;
      const double elements = kUnitsAtOnce * kPlaceUnit;
      add(std::ceil(static_cast<double>(plan.gradients) / elements), kFrame, 0,
          elements * (4.0 * plan.parts + of.bytes_), 0, plan.parts);
    }
  };

  bool weights() const { return plan_.gradients > 0; }
  double gate_trips() const { return p_.gates() * (1 + std::ceil((p_.iterations + 1) / 4.0)); }

  const Problem& p_;
  const Plan& plan_;
  int bytes_, most_rows_, s_, key_parts_;
};

}  // namespace grjca::cuda::costs
