// Gradients of the parameters, without atomics.
//
// A task sums a tile of one gradient over one part of the rows. Where there is but one part, and all samples pass at
// once, that is the gradient, and it goes where the caller wants it. Otherwise sums of parts stand in the workspace, in
// float32; what an earlier chunk, or an iteration that shares the layer, has left there is added to; and at the very
// end `reduce` adds the parts in their order. So every sum has one order, whatever the grid.
#pragma once

#include "gates_backward.h"

namespace grjca::cuda {

constexpr int kPlaceUnit = kThreads;  // gradients begin at multiples of it among the sums of a part

// Sums over the terms of every row of A, in all columns of one fragment; the warps of the first column do it.
template <class T, class M>
struct RowSums {
  Thread me;
  float values[M::kRows / 32][4] = {};

  GRJCA_DEVICE RowSums() { me = this_thread(); }
  GRJCA_DEVICE int row(int i) const { return (me.warp() % 2 + 2 * i) * 16; }

  template <Major kA, bool kGrouped>
  GRJCA_DEVICE void add(const Matrix<T>& a, int rows, int terms) {
    Loader<T, kA, kA == Major::terms ? M::kRows : kTile, kGrouped> load;
    load.begin(me, a, rows, up_to_fragments(rows), terms);
    constexpr int kRing = 2 * kStages;  // there is but one operand
    const auto stage = [](int step) { return reinterpret_cast<T*>(shared_memory() + step % kRing * kStageBytes); };
    const typename M::B ones = M::ones();
    const int steps = tiles(terms, kTerms<T>);
    block_barrier();
    GRJCA_LOOP
    for (int step = 1 - kRing; step < steps; ++step) {  // as in `product`
      if (step >= 0) {
        copy_wait<kRing - 2>();
        block_barrier();
      }
      const int next = step + kRing - 1;
      if (next < steps) load.load(stage(next), next * kTerms<T>);
      copy_commit();
      if (step < 0 || me.warp() / 2 != 0) continue;
      GRJCA_UNROLL
      for (int i = 0; i < M::kRows / 32; ++i)
        if (row(i) < rows) {
          GRJCA_UNROLL
          for (int k = 0; k < kTerms<T>; k += M::kUnit) {
            const T* const from = stage(step) + place<kA>(row(i), k, kLine<T, kA>);
            M::add(values[i], M::template load_a<kA>(me, from, kLine<T, kA>), ones, 0);
          }
        }
    }
  }

  // f(row, sum) by one lane for each row.
  template <class F>
  GRJCA_DEVICE void each(int rows, F f) const {
    if (me.warp() / 2 != 0 || me.t() != 0) return;
    GRJCA_UNROLL
    for (int i = 0; i < M::kRows / 32; ++i) {
      GRJCA_UNROLL
      for (int h = 0; h < 2; ++h)
        if (row(i) + me.g() + 8 * h < rows) f(row(i) + me.g() + 8 * h, values[i][2 * h]);
    }
  }
};

// The place where a task stores its sums.
template <class T>
struct Gradient {
  const BackwardArguments& a;
  int index, part;
  bool fresh;

  GRJCA_DEVICE float* sum(int64_t at) const {
    return reinterpret_cast<float*>(a.workspace + a.plan.gradients_at) + part * a.plan.gradients + a.places[index] + at;
  }
  // The sum that earlier chunks or iterations have left.
  GRJCA_DEVICE float earlier(int64_t at) const { return a.plan.parts == 0 || fresh ? 0 : *sum(at); }
  GRJCA_DEVICE void store(int64_t at, float x) const {
    if (a.plan.parts == 0)
      static_cast<T*>(a.d_parameters[index])[at] = narrow_to<T>(x);
    else
      *sum(at) = x;
  }
  GRJCA_DEVICE void add(int64_t at, float x) const { store(at, earlier(at) + x); }

  template <class S>
  GRJCA_DEVICE void add_tile(const S& sums, int64_t at, int64_t row_step, int rows, int columns) const {
    finish(
        sums, rows, columns, [](int, int) { return 0; },
        [&](int, int r, int c, bool both) {
          const int64_t place = at + r * row_step + c;
          return Pair{earlier(place), both ? earlier(place + 1) : 0};
        },
        [&](int, const Pair& before, int r, int c, float x0, float x1, bool both) {
          const int64_t place = at + r * row_step + c;
          store(place, before.x + x0);
          if (both) store(place + 1, before.y + x1);
        });
  }
};

GRJCA_BOTH int parts_of(const Plan& plan) { return plan.parts > 0 ? plan.parts : 1; }

// Whether this iteration of this chunk is the first to reach its layer.
GRJCA_DEVICE bool is_fresh(const Common& a, const Team& team) {
  return team.first == 0 && (!a.p.shared || team.t == a.p.iterations - 1);
}

struct Part {
  int first, count;
};
// A part of n rows or samples; the size of every part but the last is a multiple of `unit`.
GRJCA_BOTH Part part_of(int part, int parts, int n, int unit) {
  const int size = tiles(tiles(n, parts), unit) * unit, first = least(part * size, n);
  return {first, least(size, n - first)};
}

// A tile of one gradient; `bias`: of the bias, whose tiles follow those of the last columns.
struct WeightTile {
  int part, row, rows, column, columns;
  bool bias;
};

GRJCA_BOTH int weight_tiles(const Plan& plan, int outputs, int inputs, bool biased) {
  return (tiles(inputs, plan.tile_weights) + biased) * tiles(outputs, plan.tile_weights);
}
GRJCA_BOTH WeightTile weight_tile(const Plan& plan, int outputs, int inputs, int tile, int part) {
  const int size = plan.tile_weights, n = tiles(outputs, size);
  const int row = tile % n * size, column = tile / n * size;
  return {part, row, least(size, outputs - row), column, least(size, inputs - column), column >= inputs};
}

// ---- linear maps of frames

// y = x W^T + b: where dy and x of the chunk stand, and the parameter.
template <class T>
struct LinearMap {
  const T *dy, *x;
  int dy_row, x_row;  // elements between rows
  int64_t x_sample;   // and between samples; those of dy are plan.frames rows apart
  int outputs, inputs, parameter;
};

// A part of a tile of d W = dy^T x, or of d b. find(arguments, team, i) says which.
template <class T>
struct WeightTask {
  LinearMap<T> map;
  WeightTile tile;
  bool fresh;

  GRJCA_DEVICE Gradient<T> gradient(const BackwardArguments& a) const {
    return {a, map.parameter + tile.bias, tile.part, fresh};
  }
};

template <class T, class M, class F>
GRJCA_DEVICE void weights_task(const BackwardArguments& a, const Team& team, int i, F find) {
  const WeightTask<T> task = find(a, team, i);
  const WeightTile& tile = task.tile;
  if (!a.d_parameters[task.map.parameter + tile.bias]) return;
  const Part of = part_of(tile.part, parts_of(a.plan), team.count * a.plan.frames, 16);
  const int frames = a.plan.frames, length = static_cast<int>(a.p.length);
  const Matrix<T> dy{task.map.dy + tile.row,
                     task.map.dy_row,
                     of.first,
                     frames,
                     length,
                     static_cast<int64_t>(frames) * task.map.dy_row};
  if (tile.bias) {
    RowSums<T, M> sums;
    sums.template add<Major::outer, true>(dy, tile.rows, of.count);
    sums.each(tile.rows, [&](int row, float x) { task.gradient(a).add(tile.row + row, x); });
    return;
  }
  SumsOf<M> sums;
  in_two_parts(
      a, team, i,
      [&](const BackwardArguments&, const Team&, int) {
        const Matrix<T> x{task.map.x + tile.column, task.map.x_row, of.first, frames, length, task.map.x_sample};
        product<T, M, Major::outer, Major::outer, true>(sums, dy, x, tile.rows, tile.columns, of.count);
      },
      [&](const BackwardArguments& b, const Team& again, int k) {
        const WeightTask<T> same = find(b, again, k);
        same.gradient(b).add_tile(sums, static_cast<int64_t>(same.tile.row) * same.map.inputs + same.tile.column,
                                  same.map.inputs, same.tile.rows, same.tile.columns);
      });
}

// W_h: what H_m W_h^T sends back while H is still there.
GRJCA_DEVICE int output_weights_tasks(const BackwardArguments& a) {
  int n = 0;
  for (int m = 0; m < a.p.modalities; ++m) n += weight_tiles(a.plan, a.plan.widths[m], a.plan.width, a.p.released);
  return a.weights ? n * parts_of(a.plan) : 0;
}

template <class T>
GRJCA_DEVICE WeightTask<T> find_output(const BackwardArguments& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  int m = 0, tile = i / parts_of(plan);
  while (tile >= weight_tiles(plan, plan.widths[m], plan.width, a.p.released))
    tile -= weight_tiles(plan, plan.widths[m++], plan.width, a.p.released);
  const Matrix<T> x = activation<T>(a, team, plan.slots.hidden, a.p.modalities);
  return {{d_update<T>(a, team, team.t).data + plan.offsets[m], x.data + m * plan.width, plan.width, x.row, x.sample,
           plan.widths[m], plan.width, index_of(a).output(team.t, m)},
          weight_tile(plan, plan.widths[m], plan.width, tile, i % parts_of(plan)),
          is_fresh(a, team)};
}

template <class T, class M>
GRJCA_DEVICE void output_weights_task(const BackwardArguments& a, const Team& team, int i) {
  weights_task<T, M>(a, team, i, find_output<T>);
}

// W_q, W_v, and with the last iteration the gates.
GRJCA_DEVICE int query_tiles(const BackwardArguments& a) {
  return a.p.projected ? weight_tiles(a.plan, a.plan.width, a.plan.width, true) : 0;
}
GRJCA_DEVICE int value_tiles(const BackwardArguments& a, int m) {
  return weight_tiles(a.plan, a.plan.widths[m], a.plan.widths[m], a.p.released);
}
GRJCA_DEVICE int gate_tiles(const BackwardArguments& a, const Team& team, int m) {  // of each: their ways are few
  return team.t == a.p.iterations - 1 ? weight_tiles(a.plan, 1, a.plan.widths[m], a.p.released) : 0;
}
GRJCA_DEVICE int linear_weights_tasks(const BackwardArguments& a, const Team& team) {
  int n = query_tiles(a);
  for (int m = 0; m < a.p.modalities; ++m) n += value_tiles(a, m) + a.p.gates() * gate_tiles(a, team, m);
  return a.weights ? n * parts_of(a.plan) : 0;
}

template <class T>
GRJCA_DEVICE WeightTask<T> find_linear(const BackwardArguments& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const ParameterIndex index = index_of(a);
  int tile = i / parts_of(plan), m = 0, of_values = 0;
  for (int n = 0; n < a.p.modalities; ++n) of_values += value_tiles(a, n);
  const bool of_query = tile < query_tiles(a), of_value = !of_query && tile < query_tiles(a) + of_values;
  const T* dy = slot<T>(a, team, of_query ? plan.slots.d_joint : plan.slots.d_value);
  int outputs = plan.width, inputs = plan.width, offset = 0, dy_row = plan.width, t = team.t,
      parameter = index.query(t);
  if (!of_query) {
    tile -= query_tiles(a) + (of_value ? 0 : of_values);
    const auto tiles_of = [&](int n) { return of_value ? value_tiles(a, n) : a.p.gates() * gate_tiles(a, team, n); };
    while (tile >= tiles_of(m)) tile -= tiles_of(m++);
    outputs = inputs = plan.widths[m];
    offset = plan.offsets[m];
    parameter = index.value(t, m);
    dy += offset;
    if (!of_value) {
      const int g = tile / gate_tiles(a, team, m);
      tile %= gate_tiles(a, team, m);
      outputs = a.p.ways(g);
      parameter = index.gate(m, g);
      dy = d_logits_of<T>(a, team, 0, m) + first_way(g);
      dy_row = a.p.modalities * a.p.all_ways();
      t = state_of_gate(a.p, g);
    }
  }
  const Matrix<T> x = state<T>(a, team, t);
  return {{dy, x.data + offset, dy_row, x.row, x.sample, outputs, inputs, parameter},
          weight_tile(plan, outputs, inputs, tile, i % parts_of(plan)),
          of_query || of_value ? is_fresh(a, team) : team.first == 0};
}

template <class T, class M>
GRJCA_DEVICE void linear_weights_task(const BackwardArguments& a, const Team& team, int i) {
  weights_task<T, M>(a, team, i, find_linear<T>);
}

// ---- W_k

GRJCA_DEVICE int key_weights_tasks(const BackwardArguments& a) {
  const int length = static_cast<int>(a.p.length);
  return a.weights ? parts_of(a.plan) * a.p.modalities * weight_tiles(a.plan, length, length, a.p.released) : 0;
}

// A part of a tile of d W_k,m = sum of d K_m^T X_m^T over samples, or of d b_k.
template <class T, class M>
GRJCA_DEVICE void key_weights_task(const BackwardArguments& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int length = static_cast<int>(a.p.length), of_modality = weight_tiles(plan, length, length, a.p.released);
  const int part = i % parts_of(plan), m = i / parts_of(plan) / of_modality;
  const WeightTile tile = weight_tile(plan, length, length, i / parts_of(plan) % of_modality, part);
  const Part of = part_of(part, parts_of(plan), team.count, 1);
  const Gradient<T> gradient{a, index_of(a).key(team.t, m) + tile.bias, part, is_fresh(a, team)};
  if (!a.d_parameters[gradient.index]) return;
  const Matrix<T> dy = activation<T>(a, team, plan.slots.d_key).from(0, plan.offsets[m]);
  if (tile.bias) {
    RowSums<T, M> sums;
    GRJCA_LOOP
    for (int s = of.first; s < of.first + of.count; ++s)
      sums.template add<Major::terms, false>(sample_of(dy, s).from(tile.row, 0), tile.rows, plan.widths[m]);
    sums.each(tile.rows, [&](int row, float x) { gradient.add(tile.row + row, x); });
  } else {
    const Matrix<T> x = state<T>(a, team, team.t).from(0, plan.offsets[m]);
    SumsOf<M> sums;
    GRJCA_LOOP
    for (int s = of.first; s < of.first + of.count; ++s)
      product<T, M, Major::terms, Major::terms>(sums, sample_of(dy, s).from(tile.row, 0),
                                                sample_of(x, s).from(tile.column, 0), tile.rows, tile.columns,
                                                plan.widths[m]);
    gradient.add_tile(sums, static_cast<int64_t>(tile.row) * length + tile.column, length, tile.rows, tile.columns);
  }
}

// ---- the second stage

constexpr int kUnitsAtOnce = 8;

// Adds the parts, rounds, and stores the gradients where the caller wants them. A unit is 128
// elements, all of one gradient. A block starts to load several units before it waits for the first.
template <class T>
GRJCA_DEVICE void reduce(const BackwardArguments& a, int block, int blocks) {
  const Plan& plan = a.plan;
  const int parameters = index_of(a).count();
  const float* const sums = reinterpret_cast<const float*>(a.workspace + plan.gradients_at);
  const int me = this_thread().index;
  const int64_t units = plan.gradients / kPlaceUnit;
  GRJCA_LOOP
  for (int64_t i = block; i < units; i += kUnitsAtOnce * blocks) {
    float totals[kUnitsAtOnce] = {};
    GRJCA_LOOP
    for (int part = 0; part < plan.parts; ++part) {
      const float* const from = sums + part * plan.gradients + me;
      float x[kUnitsAtOnce] = {};
      GRJCA_UNROLL
      for (int k = 0; k < kUnitsAtOnce; ++k)
        if (i + k * blocks < units) x[k] = from[(i + k * blocks) * kPlaceUnit];
      GRJCA_UNROLL
      for (int k = 0; k < kUnitsAtOnce; ++k) totals[k] += x[k];
    }
    GRJCA_UNROLL
    for (int k = 0; k < kUnitsAtOnce; ++k) {
      const uint32_t first = static_cast<uint32_t>(i + k * blocks) * kPlaceUnit;
      if (i + k * blocks >= units) continue;
      int low = 0, high = parameters - 1;  // the last parameter that begins at `first` or before
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (a.places[middle] <= first)
          low = middle;
        else
          high = middle - 1;
      }
      const int64_t at = first - a.places[low] + me;
      if (a.d_parameters[low] && at < a.sizes[low]) static_cast<T*>(a.d_parameters[low])[at] = narrow_to<T>(totals[k]);
    }
  }
}

}  // namespace grjca::cuda
