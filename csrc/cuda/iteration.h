// The phases of one iteration, forward; the backward runs them too, to recompute. A phase is a loop over tasks, a tile
// each, that the blocks of a team share out. t counts from 0.
//
// In the workspace K_m stands transposed, [L, d_m], and divided by sqrt(d). C_m is stored, [d_m, d] with dropout
// applied, or for few frames streamed (stream.h). A stored 0 that dropout made is -0, and every other 0 is +0: so the
// backward finds the mask again.
#pragma once

#include "columns.h"
#include "product.h"
#include "tasks.h"

namespace grjca::cuda {

// ---- where things are

// An activation of the chunk: `columns` of them, plan.width unless there is a block for each modality.
template <class T>
GRJCA_DEVICE Matrix<T> activation(const Common& a, const Team& team, int i, int blocks = 1) {
  const int row = a.plan.width * blocks;
  return {slot<T>(a, team, i),
          row,
          0,
          a.plan.frames,
          static_cast<int>(a.p.length),
          static_cast<int64_t>(a.plan.frames) * row};
}

// X^t of the chunk: X^0 in the workspace, the others among the iterates.
template <class T>
GRJCA_DEVICE Matrix<T> state(const Common& a, const Team& team, int t) {
  if (t == 0) return activation<T>(a, team, a.plan.slots.initial);
  const int64_t sample = a.p.length * a.plan.width;
  const T* const x = static_cast<const T*>(a.iterates) + ((t - 1) * a.p.batch + team.first) * sample;
  return {x, a.plan.width, 0, a.plan.frames, static_cast<int>(a.p.length), sample};
}

// One sample of it.
template <class T>
GRJCA_DEVICE Matrix<T> sample_of(const Matrix<T>& matrix, int s) {
  return {matrix.data + s * matrix.sample, matrix.row};
}

// J; where it is raw, it is X^t.
template <class T>
GRJCA_DEVICE Matrix<T> joint(const Common& a, const Team& team, int t) {
  return a.p.projected ? activation<T>(a, team, a.plan.slots.joint) : state<T>(a, team, t);
}

// The stored C of a sample, [d, d]: all modalities' rows one after another.
template <class T>
GRJCA_DEVICE T* correlation(const Common& a, const Team& team, int s) {
  return reinterpret_cast<T*>(workspace_of(a, team) + a.plan.correlations) +
         static_cast<int64_t>(s) * a.plan.width * a.plan.width;
}

GRJCA_DEVICE ParameterIndex index_of(const Common& a) { return {a.p}; }

// ---- X^0

// max(|x|, 1e-12) of a frame; 1 unless normalising.
template <class T>
GRJCA_DEVICE float norm_of_frame(const Common& a, const Thread& me, int sample, int frame, int m) {
  if (!a.p.normalize) return 1;
  float squares = 0;
  each_columns<T>(me, a.plan.widths[m], [&](int c) {
    const Columns<T> x = load_columns<T>(a.features[m], sample, frame, c, a.plan.widths[m]);
    squares += dot(x, x);
  });
  const float norm = square_root(sum_of_warp(squares));
  return norm < 1e-12f ? 1e-12f : norm;
}

// f(thread, sample within the chunk, frame, modality) for every frame, by a warp each.
template <class F>
GRJCA_DEVICE void each_frame(const Common& a, const Team& team, F f) {
  const int modalities = a.p.modalities, length = static_cast<int>(a.p.length);
  const Thread me = this_thread();
  const int warps = kThreads / kWarp, frames = team.count * length;
  GRJCA_LOOP
  for (int i = team.rank * warps + me.warp(); i < frames * modalities; i += team.size * warps) {
    const int row = i / modalities;
    f(me, row / length, row % length, i % modalities);
  }
}

// X^0: absent frames cleared, every frame divided by its norm if asked for.
template <class T>
GRJCA_DEVICE void initial(const Common& a, const Team& team) {
  T* const to = slot<T>(a, team, a.plan.slots.initial);
  each_frame(a, team, [&](const Thread& me, int s, int l, int m) {
    const int sample = team.first + s;
    const bool present = l < frames_of(a, sample);
    const float norm = present ? norm_of_frame<T>(a, me, sample, l, m) : 1;
    const int width = a.plan.widths[m];
    T* const row = to + static_cast<int64_t>(s * a.plan.frames + l) * a.plan.width + a.plan.offsets[m];
    each_columns<T>(me, width, [&](int c) {
      Columns<T> x;
      if (present) x = load_columns<T>(a.features[m], sample, l, c, width);
      x.each([&](float& y, int) { y /= norm; });
      store_columns(row + c, width - c, 1, x);
    });
  });
}

// ---- J, V, K

// A bias by columns, or 0.
template <class T>
GRJCA_DEVICE Pair bias_of(const T* bias, int column, bool both) {
  return bias ? load_pair(bias + column, both) : Pair{0, 0};
}

// Adds a bias by columns and stores a tile, [rows, columns] of a row-major matrix that begins at `to`.
template <class T, class S>
GRJCA_DEVICE void store_linear(const S& sums, T* to, int64_t row_step, const T* bias, int rows, int columns) {
  finish(
      sums, rows, columns, [&](int, int c) { return bias_of(bias, c, c + 1 < columns); },
      [&](const Pair& b, int r, int c, float x0, float x1, bool both) {
        store_pair(to + r * row_step + c, x0 + b.x, x1 + b.y, both);
      });
}

template <class T, class M>
GRJCA_DEVICE void linear_task(const Common& a, const Team& team, int i, int of_joint_tasks, int row_tiles) {
  const ParameterIndex index = index_of(a);
  const Plan& plan = a.plan;
  const bool of_joint = i < of_joint_tasks;
  ModalityTile tile;
  if (of_joint) {
    const int column = i / row_tiles * plan.tile_columns;
    tile = {0, column, least(plan.tile_columns, plan.width - column)};
  } else {
    i -= of_joint_tasks;
    tile = modality_tile(plan, i / row_tiles, plan.tile_columns);
  }
  const int row = i % row_tiles * plan.tile_rows, rows = least(plan.tile_rows, team.count * plan.frames - row);
  const int offset = of_joint ? 0 : plan.offsets[tile.m], inputs = of_joint ? plan.width : plan.widths[tile.m];
  const int weight = of_joint ? index.query(team.t) : index.value(team.t, tile.m);
  const Matrix<T> w{parameter<T>(a, weight), inputs};
  SumsOf<M> sums;
  product<T, M, Major::terms, Major::terms>(sums, state<T>(a, team, team.t).from(row, offset), w.from(tile.column, 0),
                                            rows, tile.columns, inputs);
  T* const to = slot<T>(a, team, of_joint ? plan.slots.joint : plan.slots.value) +
                static_cast<int64_t>(row) * plan.width + offset + tile.column;
  const T* const bias = a.p.released ? parameter<T>(a, weight + 1) + tile.column : nullptr;
  store_linear(sums, to, plan.width, bias, rows, tile.columns);
}

// K_m^T = (W_k X_m + b_k) / sqrt(d), absent frames 0.
template <class T, class M>
GRJCA_DEVICE void key_task(const Common& a, const Team& team, int i, int row_tiles) {
  const Plan& plan = a.plan;
  const int length = static_cast<int>(a.p.length), row = i % row_tiles * plan.tile_rows, s = i / row_tiles % team.count;
  const ModalityTile tile = modality_tile(plan, i / row_tiles / team.count, plan.tile_columns);
  const int rows = least(plan.tile_rows, length - row), present = frames_of(a, team.first + s);
  const int weight = index_of(a).key(team.t, tile.m), column = plan.offsets[tile.m] + tile.column;
  const Matrix<T> w{parameter<T>(a, weight), length};
  SumsOf<M> sums;
  product<T, M, Major::terms, Major::outer>(
      sums, w.from(row, 0), sample_of(state<T>(a, team, team.t), s).from(0, column), rows, tile.columns, present);
  T* const to = slot<T>(a, team, plan.slots.key) + static_cast<int64_t>(s * plan.frames + row) * plan.width + column;
  const T* const bias = a.p.released ? parameter<T>(a, weight + 1) + row : nullptr;
  finish(
      sums, rows, tile.columns, [](int, int) { return 0; },
      [&](int, int r, int c, float x0, float x1, bool both) {
        const float b = bias ? widen(bias[r]) : 0;
        const bool exists = row + r < present;
        store_pair(to + static_cast<int64_t>(r) * plan.width + c, exists ? (x0 + b) * plan.key_scale : 0,
                   exists ? (x1 + b) * plan.key_scale : 0, both);
      });
}

// All that needs only X^t: J = X W_q^T + b_q where it is projected, V_m = X_m W_v^T + b_v, and K_m.
GRJCA_DEVICE int row_tiles_of(const Common& a, const Team& team) {
  return tiles(team.count * a.plan.frames, a.plan.tile_rows);
}
GRJCA_DEVICE int joint_tasks(const Common& a, const Team& team) {
  return a.p.projected ? row_tiles_of(a, team) * tiles(a.plan.width, a.plan.tile_columns) : 0;
}
GRJCA_DEVICE int linear_tasks(const Common& a, const Team& team) {
  return joint_tasks(a, team) + row_tiles_of(a, team) * modality_tiles(a.plan, a.p.modalities, a.plan.tile_columns);
}
GRJCA_DEVICE int project_tasks(const Common& a, const Team& team) {
  return linear_tasks(a, team) + team.count * tiles(static_cast<int>(a.p.length), a.plan.tile_rows) *
                                     modality_tiles(a.plan, a.p.modalities, a.plan.tile_columns);
}

template <class T, class M>
GRJCA_DEVICE void project_task(const Common& a, const Team& team, int i) {
  const int of_linear = linear_tasks(a, team);
  if (i < of_linear)
    linear_task<T, M>(a, team, i, joint_tasks(a, team), row_tiles_of(a, team));
  else
    key_task<T, M>(a, team, i - of_linear, tiles(static_cast<int>(a.p.length), a.plan.tile_rows));
}

// ---- C and H, stored

// +0 for either zero.
GRJCA_DEVICE float without_sign(float x) { return x == 0 ? 0.0f : x; }

// C = drop(tanh(K J)) as it is stored: the sign of a zero says whether dropout made it, also if storing rounds to zero.
template <class T>
GRJCA_DEVICE float stored_correlation(float score, bool kept, float factor) {
  if (!kept) return score != score ? score : -0.0f;
  return without_sign(widen(narrow_to<T>(tanh_of<T>(score) * factor)));
}

GRJCA_DEVICE int correlate_tasks(const Common& a, const Team& team) {
  return team.count * modality_tiles(a.plan, a.p.modalities, a.plan.tile_rows) *
         tiles(a.plan.width, a.plan.tile_columns);
}

template <class T, class M>
GRJCA_DEVICE void correlate_task(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int column_tiles = tiles(plan.width, plan.tile_columns);
  const int row_tiles = modality_tiles(plan, a.p.modalities, plan.tile_rows);
  const int s = i / column_tiles / row_tiles, column = i % column_tiles * plan.tile_columns;
  const ModalityTile tile = modality_tile(plan, i / column_tiles % row_tiles, plan.tile_rows);  // of rows, here
  const int rows = tile.columns, columns = least(plan.tile_columns, plan.width - column);
  const int row = plan.offsets[tile.m] + tile.column;
  SumsOf<M> sums;
  product<T, M, Major::outer, Major::outer>(sums, sample_of(activation<T>(a, team, plan.slots.key), s).from(0, row),
                                            sample_of(joint<T>(a, team, team.t), s).from(0, column), rows, columns,
                                            frames_of(a, team.first + s));
  T* const to = correlation<T>(a, team, s) + static_cast<int64_t>(row) * plan.width + column;
  const bool drops = a.p.dropout > 0;
  const Mask mask = drops ? Mask::at(a, team.t, tile.m, Site::correlation, team.first + s) : Mask{};
  finish(
      sums, rows, columns, [&](int r, int c) { return drops ? mask.kept_pair(tile.column + r, column + c) : kAllKept; },
      [&](const Kept& kept, int r, int c, float x0, float x1, bool both) {
        store_pair(to + static_cast<int64_t>(r) * plan.width + c, stored_correlation<T>(x0, kept.first(r), plan.kept),
                   stored_correlation<T>(x1, kept.second(r), plan.kept), both);
      });
}

// H_m = relu(tanh(V_m C_m)).
GRJCA_DEVICE int attend_stored_tasks(const Common& a, const Team& team) {
  return team.count * a.p.modalities * tiles(static_cast<int>(a.p.length), a.plan.tile_rows) *
         tiles(a.plan.width, a.plan.tile_columns);
}

template <class T, class M>
GRJCA_DEVICE void attend_stored_task(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int length = static_cast<int>(a.p.length), row_tiles = tiles(length, plan.tile_rows);
  const int column_tiles = tiles(plan.width, plan.tile_columns), hidden_width = a.p.modalities * plan.width;
  const int s = i / column_tiles / row_tiles / a.p.modalities, m = i / column_tiles / row_tiles % a.p.modalities;
  const int row = i / column_tiles % row_tiles * plan.tile_rows, rows = least(plan.tile_rows, length - row);
  const int column = i % column_tiles * plan.tile_columns, columns = least(plan.tile_columns, plan.width - column);
  const Matrix<T> c{correlation<T>(a, team, s), plan.width};
  SumsOf<M> sums;
  product<T, M, Major::terms, Major::outer>(
      sums, sample_of(activation<T>(a, team, plan.slots.value), s).from(row, plan.offsets[m]),
      c.from(plan.offsets[m], column), rows, columns, plan.widths[m]);
  T* const to = slot<T>(a, team, plan.slots.hidden) + static_cast<int64_t>(s * plan.frames + row) * hidden_width +
                m * plan.width + column;
  finish(
      sums, rows, columns, [](int, int) { return 0; },
      [&](int, int r, int c, float x0, float x1, bool both) {
        store_pair(to + static_cast<int64_t>(r) * hidden_width + c, hidden_of<T>(a.p.released, x0),
                   hidden_of<T>(a.p.released, x1), both);
      });
}

// ---- U

// Of eight rows of the chunk and two columns of U_m.
struct OutputRows {
  int sample, frame, present;  // of the first row: within the chunk, and within the sample; frames of the sample
  Pair bias;
  Kept kept;
};

// f(OutputRows, row, column, x0, x1, whether there are both) for a tile of H_m W_h^T + b_h from a row of the chunk and
// a column of modality m on, before relu and dropout; not for frames beyond L.
template <class T, class M, class F>
GRJCA_DEVICE void project_output(const Common& a, const Team& team, int row, const ModalityTile& tile, int rows, F f) {
  const Plan& plan = a.plan;
  const int weight = index_of(a).output(team.t, tile.m), length = static_cast<int>(a.p.length);
  const Matrix<T> w{parameter<T>(a, weight), plan.width};
  SumsOf<M> sums;
  product<T, M, Major::terms, Major::terms>(
      sums, activation<T>(a, team, plan.slots.hidden, a.p.modalities).from(row, tile.m * plan.width),
      w.from(tile.column, 0), rows, tile.columns, plan.width);
  const T* const bias = a.p.released ? parameter<T>(a, weight + 1) + tile.column : nullptr;
  const bool drops = a.p.dropout > 0;
  finish(
      sums, rows, tile.columns,
      [&](int r, int c) {
        OutputRows of{};
        of.sample = (row + r) / plan.frames;
        of.frame = row + r - of.sample * plan.frames;
        const int sample = team.first + of.sample;
        of.present = frames_of(a, sample);
        of.bias = bias_of(bias, c, c + 1 < tile.columns);
        of.kept =
            drops ? Mask::at(a, team.t, tile.m, Site::output, sample).kept_pair(of.frame, tile.column + c) : kAllKept;
        return of;
      },
      [&](const OutputRows& of, int r, int c, float x0, float x1, bool both) {
        if (of.frame + r % 8 < length) f(of, r, c, x0 + of.bias.x, x1 + of.bias.y, both);
      });
}

// X_m^(t+1) = X_m^t + drop(relu(H_m W_h^T + b_h)); absent frames stay 0.
GRJCA_DEVICE int output_tasks(const Common& a, const Team& team) {
  return row_tiles_of(a, team) * modality_tiles(a.plan, a.p.modalities, a.plan.tile_columns);
}

template <class T, class M>
GRJCA_DEVICE void output_task(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int row_tiles = row_tiles_of(a, team);
  const Matrix<T> x = state<T>(a, team, team.t), next = state<T>(a, team, team.t + 1);
  const bool released = a.p.released;
  const ModalityTile tile = modality_tile(plan, i / row_tiles, plan.tile_columns);
  const int row = i % row_tiles * plan.tile_rows, rows = least(plan.tile_rows, team.count * plan.frames - row);
  const int column = plan.offsets[tile.m] + tile.column;
  project_output<T, M>(a, team, row, tile, rows,
                       [&](const OutputRows& of, int r, int c, float x0, float x1, bool both) {
                         if (released) {
                           x0 = relu(x0) * of.kept.factor(of.kept.first(r), plan.kept);
                           x1 = relu(x1) * of.kept.factor(of.kept.second(r), plan.kept);
                         }
                         const int l = of.frame + r % 8;
                         const bool present = l < of.present;
                         const Pair old = load_pair(x.data + of.sample * x.sample + l * x.row + column + c, both);
                         T* const to = const_cast<T*>(next.data) + of.sample * next.sample + l * next.row + column + c;
                         store_pair(to, old.x + (present ? x0 : 0), old.y + (present ? x1 : 0), both);
                       });
}

}  // namespace grjca::cuda
