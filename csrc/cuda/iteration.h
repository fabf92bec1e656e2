// The forward phases of one iteration; the backward runs them too, to recompute. A phase is a loop over tasks, one tile
// each, divided among the blocks of a team. t counts from 0.
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

constexpr int kFramesAtOnce = 4;  // a warp waits once for all of them

// Frame l of sample s of the chunk, columns of modality m.
struct FrameAt {
  int s, l, m;
  bool exists;
};

// Every warp calls f(thread, so many frames) until the team has taken all frames of all modalities.
template <int kFrames, class F>
GRJCA_DEVICE void each_frames(const Common& a, const Team& team, F f) {
  const int modalities = a.p.modalities, length = static_cast<int>(a.p.length);
  const Thread me = this_thread();
  const int warps = team.size * (kThreads / kWarp), all = team.count * length * modalities;
  GRJCA_LOOP
  for (int i = team.rank * (kThreads / kWarp) + me.warp(); i < all; i += kFrames * warps) {
    FrameAt frames[kFrames];
    GRJCA_UNROLL
    for (int n = 0; n < kFrames; ++n) {
      const int j = i + n * warps, row = j / modalities;
      frames[n] = {row / length, row % length, j % modalities, j < all};
    }
    f(me, frames);
  }
}

// Every warp calls f(thread, sample within the chunk, frame, modality) for one frame at a time.
template <class F>
GRJCA_DEVICE void each_frame(const Common& a, const Team& team, F f) {
  each_frames<1>(a, team, [&](const Thread& me, const FrameAt(&at)[1]) { f(me, at[0].s, at[0].l, at[0].m); });
}

// The frames whose X^0, or the gradient by it, a warp computes at once.
template <class T>
struct Initial {
  const Common& a;
  const Team& team;
  const Thread& me;
  const FrameAt (&frames)[kFramesAtOnce];

  GRJCA_DEVICE int sample(const FrameAt& at) const { return team.first + at.s; }
  GRJCA_DEVICE int width(const FrameAt& at) const { return a.plan.widths[at.m]; }
  GRJCA_DEVICE bool present(const FrameAt& at) const { return at.exists && at.l < frames_of(a, sample(at)); }
  // The index of its first element in an activation.
  GRJCA_DEVICE int64_t place(const FrameAt& at) const {
    return static_cast<int64_t>(at.s * a.plan.frames + at.l) * a.plan.width + a.plan.offsets[at.m];
  }

  // For this lane's columns, from c on, it calls load(frame, c) for all frames, and then use(frame, its number, c, what
  // was loaded) for each; and so on for the columns after them.
  template <class L, class U>
  GRJCA_DEVICE void each(L load, U use) const {
    int widest = 0;
    for (const FrameAt& at : frames) widest = widest < width(at) ? width(at) : widest;
    each_columns<T>(me, widest, [&](int c) {
      decltype(load(frames[0], c)) loaded[kFramesAtOnce];
      GRJCA_UNROLL
      for (int n = 0; n < kFramesAtOnce; ++n) loaded[n] = load(frames[n], c);
      GRJCA_UNROLL
      for (int n = 0; n < kFramesAtOnce; ++n) use(frames[n], n, c, loaded[n]);
    });
  }

  GRJCA_DEVICE StoredColumns<T> feature(const FrameAt& at, int c) const {
    if (!present(at)) return {};
    return load_stored<T>(a.features[at.m], sample(at), at.l, c, width(at));
  }
  GRJCA_DEVICE StoredColumns<T> of(const T* activation, const FrameAt& at, int c) const {
    if (!present(at) || c >= width(at)) return {};
    return load_stored(activation + place(at) + c, width(at) - c);
  }

  // Computes max(|x|, 1e-12) of every frame, or 1 where nothing is normalised.
  GRJCA_DEVICE void norms(float (&to)[kFramesAtOnce]) const {
    GRJCA_UNROLL
    for (float& norm : to) norm = 0;
    if (a.p.normalize)
      each([&](const FrameAt& at, int c) { return feature(at, c); },
           [&](const FrameAt&, int n, int, const StoredColumns<T>& x) { to[n] += dot(x.wide(), x.wide()); });
    GRJCA_UNROLL
    for (float& norm : to) {
      norm = square_root(sum_of_warp(norm));
      norm = !a.p.normalize ? 1 : norm < 1e-12f ? 1e-12f : norm;
    }
  }
};

// X^0: absent frames cleared, every frame divided by its norm if asked for.
template <class T>
GRJCA_DEVICE void initial(const Common& a, const Team& team) {
  T* const to = slot<T>(a, team, a.plan.slots.initial);
  each_frames<kFramesAtOnce>(a, team, [&](const Thread& me, const FrameAt(&frames)[kFramesAtOnce]) {
    const Initial<T> all{a, team, me, frames};
    float norms[kFramesAtOnce];
    all.norms(norms);
    all.each([&](const FrameAt& at, int c) { return all.feature(at, c); },
             [&](const FrameAt& at, int n, int c, const StoredColumns<T>& loaded) {
               if (!at.exists || c >= all.width(at)) return;
               Columns<T> x = loaded.wide();
               x.each([&](float& y, int) { y /= norms[n]; });
               store_columns(to + all.place(at) + c, all.width(at) - c, 1, x);
             });
  });
}

// ---- J, V, K

// A bias by columns, or 0.
template <class T>
GRJCA_DEVICE Pair bias_of(const T* bias, int column, bool both) {
  return bias ? load_pair(bias + column, both).wide() : Pair{0, 0};
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
    const int column = i / row_tiles * team.tile.columns;
    tile = {0, column, least(team.tile.columns, plan.width - column)};
  } else {
    i -= of_joint_tasks;
    tile = modality_tile(plan, i / row_tiles, team.tile.columns);
  }
  const int row = i % row_tiles * team.tile.rows, rows = least(team.tile.rows, team.count * plan.frames - row);
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
GRJCA_DEVICE void key_task(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int length = static_cast<int>(a.p.length), row_tiles = tiles(length, team.tile.rows);
  const int row = i % row_tiles * team.tile.rows, s = i / row_tiles % team.count;
  const ModalityTile tile = modality_tile(plan, i / row_tiles / team.count, team.tile.columns);
  const int rows = least(team.tile.rows, length - row), present = frames_of(a, team.first + s);
  const int weight = index_of(a).key(team.t, tile.m), column = plan.offsets[tile.m] + tile.column;
  const Matrix<T> w{parameter<T>(a, weight), length};
  SumsOf<M> sums;
  product<T, M, Major::terms, Major::outer>(
      sums, w.from(row, 0), sample_of(state<T>(a, team, team.t), s).from(0, column), rows, tile.columns, present);
  T* const to = slot<T>(a, team, plan.slots.key) + static_cast<int64_t>(s * plan.frames + row) * plan.width + column;
  const T* const bias = a.p.released ? parameter<T>(a, weight + 1) + row : nullptr;
  finish(
      sums, rows, tile.columns, [](int, int) { return 0; },
      [&](int, int r, int, bool) { return bias ? load_pair(bias + r, false) : Stored<T>{}; },
      [&](int, const Stored<T>& of_row, int r, int c, float x0, float x1, bool both) {
        const float b = of_row.wide().x;
        const bool exists = row + r < present;
        store_pair(to + static_cast<int64_t>(r) * plan.width + c, exists ? (x0 + b) * plan.key_scale : 0,
                   exists ? (x1 + b) * plan.key_scale : 0, both);
      });
}

// J = X W_q^T + b_q where it is projected, and V_m = X_m W_v^T + b_v.
GRJCA_DEVICE int row_tiles_of(const Common& a, const Team& team) {
  return tiles(team.count * a.plan.frames, team.tile.rows);
}
GRJCA_DEVICE int joint_tasks(const Common& a, const Team& team) {
  return a.p.projected ? row_tiles_of(a, team) * tiles(a.plan.width, team.tile.columns) : 0;
}
GRJCA_DEVICE int linear_tasks(const Common& a, const Team& team) {
  return joint_tasks(a, team) + row_tiles_of(a, team) * modality_tiles(a.plan, a.p.modalities, team.tile.columns);
}
GRJCA_DEVICE int key_tasks(const Common& a, const Team& team) {
  return team.count * tiles(static_cast<int>(a.p.length), team.tile.rows) *
         modality_tiles(a.plan, a.p.modalities, team.tile.columns);
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
  return team.count * modality_tiles(a.plan, a.p.modalities, team.tile.rows) * tiles(a.plan.width, team.tile.columns);
}

template <class T, class M>
GRJCA_DEVICE void correlate_task(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int column_tiles = tiles(plan.width, team.tile.columns);
  const int row_tiles = modality_tiles(plan, a.p.modalities, team.tile.rows);
  const int s = i / column_tiles / row_tiles, column = i % column_tiles * team.tile.columns;
  const ModalityTile tile = modality_tile(plan, i / column_tiles % row_tiles, team.tile.rows);  // of rows, here
  const int rows = tile.columns, columns = least(team.tile.columns, plan.width - column);
  const int row = plan.offsets[tile.m] + tile.column;
  SumsOf<M> sums;
  product<T, M, Major::outer, Major::outer>(sums, sample_of(activation<T>(a, team, plan.slots.key), s).from(0, row),
                                            sample_of(joint<T>(a, team, team.t), s).from(0, column), rows, columns,
                                            frames_of(a, team.first + s));
  T* const to = correlation<T>(a, team, s) + static_cast<int64_t>(row) * plan.width + column;
  const bool drops = a.p.dropout > 0;
  const Mask mask = drops ? Mask::at(a, team.t, tile.m, Site::correlation, team.first + s) : Mask{};
  finish(
      sums, rows, columns, [&](int r, int c) { return drops ? mask.keep_pair(tile.column + r, column + c) : kKeepAll; },
      [&](const KeepBits& kept, int r, int c, float x0, float x1, bool both) {
        store_pair(to + static_cast<int64_t>(r) * plan.width + c, stored_correlation<T>(x0, kept.first(r), plan.kept),
                   stored_correlation<T>(x1, kept.second(r), plan.kept), both);
      });
}

// H_m = relu(tanh(V_m C_m)).
GRJCA_DEVICE int attend_stored_tasks(const Common& a, const Team& team) {
  return team.count * a.p.modalities * tiles(static_cast<int>(a.p.length), team.tile.rows) *
         tiles(a.plan.width, team.tile.columns);
}

template <class T, class M>
GRJCA_DEVICE void attend_stored_task(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int length = static_cast<int>(a.p.length), row_tiles = tiles(length, team.tile.rows);
  const int column_tiles = tiles(plan.width, team.tile.columns), hidden_width = a.p.modalities * plan.width;
  const int s = i / column_tiles / row_tiles / a.p.modalities, m = i / column_tiles / row_tiles % a.p.modalities;
  const int row = i / column_tiles % row_tiles * team.tile.rows, rows = least(team.tile.rows, length - row);
  const int column = i % column_tiles * team.tile.columns, columns = least(team.tile.columns, plan.width - column);
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

// The place, bias and dropout mask of eight rows of the chunk and two columns of U_m.
struct OutputRows {
  int sample, frame, present;  // of the first row: within the chunk, and within the sample; frames of the sample
  Pair bias;
  KeepBits kept;
};

// f(OutputRows, what load(OutputRows, row, column, whether there are both) gave, row, column, x0, x1, whether there are
// both) for a tile of H_m W_h^T + b_h from a row of the chunk and a column of modality m on, before relu and dropout;
// not for frames beyond L.
template <class T, class M, class L, class F>
GRJCA_DEVICE void project_output(const Common& a, const Team& team, int row, const ModalityTile& tile, int rows, L load,
                                 F f) {
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
            drops ? Mask::at(a, team.t, tile.m, Site::output, sample).keep_pair(of.frame, tile.column + c) : kKeepAll;
        return of;
      },
      [&](const OutputRows& of, int r, int c, bool both) {
        return of.frame + r % 8 < length ? load(of, r, c, both) : Stored<T>{};
      },
      [&](const OutputRows& of, const Stored<T>& loaded, int r, int c, float x0, float x1, bool both) {
        if (of.frame + r % 8 < length) f(of, loaded.wide(), r, c, x0 + of.bias.x, x1 + of.bias.y, both);
      });
}

// X_m^(t+1) = X_m^t + drop(relu(H_m W_h^T + b_h)); absent frames stay 0.
GRJCA_DEVICE int output_tasks(const Common& a, const Team& team) {
  return row_tiles_of(a, team) * modality_tiles(a.plan, a.p.modalities, team.tile.columns);
}

template <class T, class M>
GRJCA_DEVICE void output_task(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int row_tiles = row_tiles_of(a, team);
  const Matrix<T> x = state<T>(a, team, team.t), next = state<T>(a, team, team.t + 1);
  const bool released = a.p.released;
  const ModalityTile tile = modality_tile(plan, i / row_tiles, team.tile.columns);
  const int row = i % row_tiles * team.tile.rows, rows = least(team.tile.rows, team.count * plan.frames - row);
  const int column = plan.offsets[tile.m] + tile.column;
  project_output<T, M>(
      a, team, row, tile, rows,
      [&](const OutputRows& of, int r, int c, bool both) {
        return load_pair(x.data + of.sample * x.sample + (of.frame + r % 8) * x.row + column + c, both);
      },
      [&](const OutputRows& of, const Pair& old, int r, int c, float x0, float x1, bool both) {
        if (released) {
          x0 = relu(x0) * of.kept.factor(of.kept.first(r), plan.kept);
          x1 = relu(x1) * of.kept.factor(of.kept.second(r), plan.kept);
        }
        const int l = of.frame + r % 8;
        const bool present = l < of.present;
        T* const to = const_cast<T*>(next.data) + of.sample * next.sample + l * next.row + column + c;
        store_pair(to, old.x + (present ? x0 : 0), old.y + (present ? x1 : 0), both);
      });
}

}  // namespace grjca::cuda
