// The phases of one iteration in reverse; d_x is the gradient of the loss with respect to x.
//
// d X^t and d X^(t+1) stand in the workspace, beside the activations that iteration.h recomputes. d K_m stands there as
// K_m does, transposed and with the division by sqrt(d) still to be undone in it.
#pragma once

#include "iteration.h"

namespace grjca::cuda {

template <class T>
GRJCA_DEVICE Matrix<T> d_state(const Common& a, const Team& team, int t) {
  return activation<T>(a, team, a.plan.slots.d_state + t % 2);
}

// The gradient by H_m W_h^T + b_h; in the paper form that is d X^(t+1) itself.
template <class T>
GRJCA_DEVICE Matrix<T> d_update(const Common& a, const Team& team, int t) {
  return a.p.released ? activation<T>(a, team, a.plan.slots.d_update) : d_state<T>(a, team, t + 1);
}

template <class T>
GRJCA_DEVICE Matrix<T> d_attended(const Common& a, const Team& team) {
  return activation<T>(a, team, a.plan.slots.d_attended, a.p.modalities);
}

// d (K J) of a sample, as C stands.
template <class T>
GRJCA_DEVICE T* d_score(const Common& a, const Team& team, int s) {
  return reinterpret_cast<T*>(workspace_of(a, team) + a.plan.d_scores) +
         static_cast<int64_t>(s) * a.plan.width * a.plan.width;
}

template <class T>
GRJCA_DEVICE T* writable(const Matrix<T>& matrix, int64_t row) {
  return const_cast<T*>(matrix.data) + row * matrix.row;
}

// ---- U and H

// d (H_m W_h^T + b_h) from d X^(t+1), through dropout and relu. Released form only.
template <class T, class M>
GRJCA_DEVICE void output_backward_task(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int row_tiles = row_tiles_of(a, team);
  const ModalityTile tile = modality_tile(plan, i / row_tiles, team.tile.columns);
  const int row = i % row_tiles * team.tile.rows, rows = least(team.tile.rows, team.count * plan.frames - row);
  const int column = plan.offsets[tile.m] + tile.column;
  const T* const d_next = writable(d_state<T>(a, team, team.t + 1), row) + column;
  T* const to = writable(d_update<T>(a, team, team.t), row) + column;
  const auto place = [&](int r, int c) { return static_cast<int64_t>(r) * plan.width + c; };
  project_output<T, M>(
      a, team, row, tile, rows,
      [&](const OutputRows&, int r, int c, bool both) { return load_pair(d_next + place(r, c), both); },
      [&](const OutputRows& of, const Pair& d, int r, int c, float x0, float x1, bool both) {
        const bool present = of.frame + r % 8 < of.present;
        const float y0 = where_positive(x0, d.x * of.kept.factor(of.kept.first(r), plan.kept));
        const float y1 = where_positive(x1, d.y * of.kept.factor(of.kept.second(r), plan.kept));
        store_pair(to + place(r, c), present ? y0 : 0, present ? y1 : 0, both);
      });
}

GRJCA_DEVICE int attended_tasks(const Common& a, const Team& team) {
  const Plan& plan = a.plan;
  return tiles(team.count * plan.frames, team.tile.rows) * a.p.modalities * tiles(plan.width, team.tile.columns);
}

// d (V_m C_m) = (d_update W_h) times the slope of relu(tanh(.)), which H_m tells.
template <class T, class M>
GRJCA_DEVICE void attended_task(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int row_tiles = tiles(team.count * plan.frames, team.tile.rows);
  const int column_tiles = tiles(plan.width, team.tile.columns);
  const int row = i % row_tiles * team.tile.rows, rows = least(team.tile.rows, team.count * plan.frames - row);
  const int column = i / row_tiles % column_tiles * team.tile.columns, m = i / row_tiles / column_tiles;
  const int columns = least(team.tile.columns, plan.width - column);
  const Matrix<T> w{parameter<T>(a, index_of(a).output(team.t, m)), plan.width};
  SumsOf<M> sums;
  product<T, M, Major::terms, Major::outer>(sums, d_update<T>(a, team, team.t).from(row, plan.offsets[m]),
                                            w.from(0, column), rows, columns, plan.widths[m]);
  const Matrix<T> hidden = activation<T>(a, team, plan.slots.hidden, a.p.modalities);
  const int64_t at = static_cast<int64_t>(row) * hidden.row + m * plan.width + column;
  T* const to = writable(d_attended<T>(a, team), 0) + at;
  const bool released = a.p.released;
  finish(
      sums, rows, columns, [&](int r, int) { return static_cast<int>(a.p.length) - (row + r) % plan.frames; },
      [&](int exist, int r, int c, bool both) {
        const T* const from = hidden.data + at + static_cast<int64_t>(r) * hidden.row + c;
        return r % 8 < exist ? load_pair(from, both) : Stored<T>{};
      },
      [&](int exist, const Stored<T>& loaded, int r, int c, float x0, float x1, bool both) {
        if (r % 8 >= exist) return;
        const int64_t place = static_cast<int64_t>(r) * hidden.row + c;
        const Pair h = loaded.wide();
        if (released) {
          x0 *= 1 - h.x * h.x;
          x1 *= 1 - h.y * h.y;
        }
        store_pair(to + place, where_positive(h.x, x0), where_positive(h.y, x1), both);
      });
}

// ---- stored C

// d V_m = d_attended C_m^T.
template <class T, class M>
GRJCA_DEVICE void value_backward(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int length = static_cast<int>(a.p.length), row_tiles = tiles(length, team.tile.rows);
  const int s = i / row_tiles % team.count, row = i % row_tiles * team.tile.rows;
  const ModalityTile tile = modality_tile(plan, i / row_tiles / team.count, team.tile.columns);
  const int rows = least(team.tile.rows, length - row), column = plan.offsets[tile.m] + tile.column;
  const Matrix<T> c{correlation<T>(a, team, s), plan.width};
  SumsOf<M> sums;
  product<T, M, Major::terms, Major::terms>(sums, sample_of(d_attended<T>(a, team), s).from(row, tile.m * plan.width),
                                            c.from(column, 0), rows, tile.columns, plan.width);
  T* const to =
      slot<T>(a, team, plan.slots.d_value) + static_cast<int64_t>(s * plan.frames + row) * plan.width + column;
  store_linear<T>(sums, to, plan.width, nullptr, rows, tile.columns);
}

// d (K J) from the gradient by C after dropout, and C as it is stored.
GRJCA_DEVICE float slope_of_stored(float c, float d, const Plan& plan) {
  const bool kept = bits_of(c) != 0x80000000u;
  const float before = c * plan.kept_inverse;
  return d * (1 - before * before) * (kept ? plan.kept : 0.0f);
}

// d (K J) = drop(V_m^T d_attended) (1 - C^2).
template <class T, class M>
GRJCA_DEVICE void score_backward(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int column_tiles = tiles(plan.width, team.tile.columns), column = i % column_tiles * team.tile.columns;
  const int s = i / column_tiles % team.count, columns = least(team.tile.columns, plan.width - column);
  const ModalityTile tile = modality_tile(plan, i / column_tiles / team.count, team.tile.rows);  // of rows, here
  const int row = plan.offsets[tile.m] + tile.column, rows = tile.columns;
  SumsOf<M> sums;
  product<T, M, Major::outer, Major::outer>(sums, sample_of(activation<T>(a, team, plan.slots.value), s).from(0, row),
                                            sample_of(d_attended<T>(a, team), s).from(0, tile.m * plan.width + column),
                                            rows, columns, frames_of(a, team.first + s));
  const int64_t at = static_cast<int64_t>(row) * plan.width + column;
  const T* const from = correlation<T>(a, team, s) + at;
  T* const to = d_score<T>(a, team, s) + at;
  finish(
      sums, rows, columns, [](int, int) { return 0; },
      [&](int, int r, int c, bool both) { return load_pair(from + static_cast<int64_t>(r) * plan.width + c, both); },
      [&](int, const Stored<T>& loaded, int r, int c, float x0, float x1, bool both) {
        const int64_t place = static_cast<int64_t>(r) * plan.width + c;
        const Pair stored = loaded.wide();
        store_pair(to + place, slope_of_stored(stored.x, x0, plan), slope_of_stored(stored.y, x1, plan), both);
      });
}

GRJCA_DEVICE int value_backward_tasks(const Common& a, const Team& team) {
  return team.count * tiles(static_cast<int>(a.p.length), team.tile.rows) *
         modality_tiles(a.plan, a.p.modalities, team.tile.columns);
}
GRJCA_DEVICE int correlate_backward_stored_tasks(const Common& a, const Team& team) {
  return value_backward_tasks(a, team) + correlate_tasks(a, team);
}

template <class T, class M>
GRJCA_DEVICE void correlate_backward_stored_task(const Common& a, const Team& team, int i) {
  const int of_value = value_backward_tasks(a, team);
  if (i < of_value)
    value_backward<T, M>(a, team, i);
  else
    score_backward<T, M>(a, team, i - of_value);
}

// d J = K^T d (K J), of all modalities at once.
template <class T, class M>
GRJCA_DEVICE void joint_backward_stored(const Common& a, const Team& team, int s, int row, int column) {
  const Plan& plan = a.plan;
  const int rows = least(team.tile.rows, static_cast<int>(a.p.length) - row);
  const int columns = least(team.tile.columns, plan.width - column);
  const Matrix<T> d{d_score<T>(a, team, s), plan.width};
  SumsOf<M> sums;
  product<T, M, Major::terms, Major::outer>(sums, sample_of(activation<T>(a, team, plan.slots.key), s).from(row, 0),
                                            d.from(0, column), rows, columns, plan.width);
  T* const to =
      slot<T>(a, team, plan.slots.d_joint) + static_cast<int64_t>(s * plan.frames + row) * plan.width + column;
  store_linear<T>(sums, to, plan.width, nullptr, rows, columns);
}

// d K^T = J d (K J)^T, absent frames 0.
template <class T, class M>
GRJCA_DEVICE void key_backward_stored(const Common& a, const Team& team, int s, int row, int column) {
  const Plan& plan = a.plan;
  const int rows = least(team.tile.rows, static_cast<int>(a.p.length) - row);
  const int columns = least(team.tile.columns, plan.width - column), present = frames_of(a, team.first + s);
  const Matrix<T> d{d_score<T>(a, team, s), plan.width};
  SumsOf<M> sums;
  product<T, M, Major::terms, Major::terms>(sums, sample_of(joint<T>(a, team, team.t), s).from(row, 0),
                                            d.from(column, 0), rows, columns, plan.width);
  T* const to = slot<T>(a, team, plan.slots.d_key) + static_cast<int64_t>(s * plan.frames + row) * plan.width + column;
  finish(
      sums, rows, columns, [](int, int) { return 0; },
      [&](int, int r, int c, float x0, float x1, bool both) {
        const bool exists = row + r < present;
        store_pair(to + static_cast<int64_t>(r) * plan.width + c, exists ? x0 * plan.key_scale : 0,
                   exists ? x1 * plan.key_scale : 0, both);
      });
}

GRJCA_DEVICE int key_joint_backward_tasks(const Common& a, const Team& team) {
  return 2 * team.count * tiles(static_cast<int>(a.p.length), team.tile.rows) * tiles(a.plan.width, team.tile.columns);
}

template <class T, class M>
GRJCA_DEVICE void key_joint_backward_task(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int row_tiles = tiles(static_cast<int>(a.p.length), team.tile.rows);
  const int column_tiles = tiles(plan.width, team.tile.columns), tasks = team.count * row_tiles * column_tiles;
  const int s = i % tasks / column_tiles / row_tiles, row = i % tasks / column_tiles % row_tiles * team.tile.rows;
  const int column = i % column_tiles * team.tile.columns;
  if (i < tasks)
    joint_backward_stored<T, M>(a, team, s, row, column);
  else
    key_backward_stored<T, M>(a, team, s, row, column);
}

// ---- X

// Tiles of rows end with a sample only where W_k needs it.
GRJCA_DEVICE int input_row_tiles(const Common& a, const Team& team) {
  const Plan& plan = a.plan;
  return plan.streamed ? tiles(team.count * plan.frames, team.tile.rows)
                       : team.count * tiles(static_cast<int>(a.p.length), team.tile.rows);
}

GRJCA_DEVICE int input_tasks(const Common& a, const Team& team) {
  return input_row_tiles(a, team) * modality_tiles(a.plan, a.p.modalities, team.tile.columns);
}

struct InputTile {
  ModalityTile tile;
  int s, l, row, rows, column;  // of one sample and its frames, unless streamed; row of the chunk, column of all
};
GRJCA_DEVICE InputTile input_tile(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int length = static_cast<int>(a.p.length), row_tiles = input_row_tiles(a, team);
  const ModalityTile tile = modality_tile(plan, i / row_tiles, team.tile.columns);
  const int per_sample = tiles(length, team.tile.rows), s = plan.streamed ? 0 : i % row_tiles / per_sample;
  const int l = (plan.streamed ? i % row_tiles : i % row_tiles % per_sample) * team.tile.rows;
  const int rows = least(team.tile.rows, (plan.streamed ? team.count * plan.frames : length) - l);
  return {tile, s, l, s * plan.frames + l, rows, plan.offsets[tile.m] + tile.column};
}

// d J W_q + d V_m W_v + W_k^T d K_m; with a streamed C the last is in d X^t already.
template <class T, class M>
GRJCA_DEVICE void input_products(SumsOf<M>& sums, const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const ParameterIndex index = index_of(a);
  const InputTile at = input_tile(a, team, i);
  const ModalityTile& tile = at.tile;
  GRJCA_LOOP
  for (int k = 0; k < (a.p.projected ? 2 : 1); ++k) {
    const int terms = k == 0 ? plan.widths[tile.m] : plan.width;
    const Matrix<T> d = activation<T>(a, team, k == 0 ? plan.slots.d_value : plan.slots.d_joint);
    const Matrix<T> w{parameter<T>(a, k == 0 ? index.value(team.t, tile.m) : index.query(team.t)), terms};
    product<T, M, Major::terms, Major::outer>(sums, d.from(at.row, k == 0 ? plan.offsets[tile.m] : 0),
                                              w.from(0, k == 0 ? tile.column : at.column), at.rows, tile.columns,
                                              terms);
  }
  if (plan.streamed) return;
  const Matrix<T> w{parameter<T>(a, index.key(team.t, tile.m)), static_cast<int>(a.p.length)};
  const Matrix<T> d = sample_of(activation<T>(a, team, plan.slots.d_key), at.s);
  product<T, M, Major::outer, Major::outer>(sums, w.from(0, at.l), d.from(0, at.column), at.rows, tile.columns,
                                            frames_of(a, team.first + at.s));
}

// d X^t += d X^(t+1), and these products; where J is raw, d J is itself one of them.
template <class T, class S>
GRJCA_DEVICE void input_sums(const S& sums, const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const InputTile at = input_tile(a, team, i);
  const int length = static_cast<int>(a.p.length), columns = at.tile.columns;
  T* const to = writable(d_state<T>(a, team, team.t), at.row) + at.column;
  const T* const next = writable(d_state<T>(a, team, team.t + 1), at.row) + at.column;
  const T* const d_joint =
      a.p.projected ? nullptr : writable(activation<T>(a, team, plan.slots.d_joint), at.row) + at.column;
  struct Rows {
    int frame, present;
  };
  struct Terms {
    Stored<T> of_gates, residual, of_joint;
  };
  finish(
      sums, at.rows, columns,
      [&](int r, int) {
        const int sample = (at.row + r) / plan.frames;
        return Rows{at.row + r - sample * plan.frames, frames_of(a, team.first + sample)};
      },
      [&](const Rows& of, int r, int c, bool both) {
        const int64_t place = static_cast<int64_t>(r) * plan.width + c;
        Terms terms{};
        if (of.frame + r % 8 >= length) return terms;
        terms.of_gates = load_pair(to + place, both);
        terms.residual = load_pair(next + place, both);
        if (d_joint) terms.of_joint = load_pair(d_joint + place, both);
        return terms;
      },
      [&](const Rows& of, const Terms& loaded, int r, int c, float x0, float x1, bool both) {
        const int frame = of.frame + r % 8;
        if (frame >= length) return;
        const int64_t place = static_cast<int64_t>(r) * plan.width + c;
        const bool present = frame < of.present;
        const Pair of_gates = loaded.of_gates.wide(), residual = loaded.residual.wide();
        const Pair of_joint = loaded.of_joint.wide();
        store_pair(to + place, present ? x0 + of_gates.x + residual.x + of_joint.x : 0,
                   present ? x1 + of_gates.y + residual.y + of_joint.y : 0, both);
      });
}

template <class T, class M>
GRJCA_DEVICE void input_task(const Common& a, const Team& team, int i) {
  SumsOf<M> sums;
  in_two_parts(
      a, team, i, [&](const Common& b, const Team& of, int k) { input_products<T, M>(sums, b, of, k); },
      [&](const Common& b, const Team& of, int k) { input_sums<T>(sums, b, of, k); });
}

// ---- X^0

// d x from d X^0; normalising takes out the part along x, except where 1e-12 was the larger.
template <class T>
GRJCA_DEVICE void initial_backward(const Common& a, const Team& team, const View (&to)[kMaxModalities]) {
  const T* const d_initial = d_state<T>(a, team, 0).data;
  const T* const x_initial = slot<T>(a, team, a.plan.slots.initial);
  struct Both {
    StoredColumns<T> d, x;
  };
  each_frames<kFramesAtOnce>(a, team, [&](const Thread& me, const FrameAt(&frames)[kFramesAtOnce]) {
    const Initial<T> all{a, team, me, frames};
    const auto load = [&](const FrameAt& at, int c) {
      return Both{all.of(d_initial, at, c), a.p.normalize ? all.of(x_initial, at, c) : StoredColumns<T>{}};
    };
    float norms[kFramesAtOnce], along[kFramesAtOnce] = {};
    all.norms(norms);
    if (a.p.normalize)
      all.each(load, [&](const FrameAt&, int n, int, const Both& of) { along[n] += dot(of.d.wide(), of.x.wide()); });
    GRJCA_UNROLL
    for (int n = 0; n < kFramesAtOnce; ++n) along[n] = norms[n] <= 1e-12f ? 0 : sum_of_warp(along[n]);
    all.each(load, [&](const FrameAt& at, int n, int c, const Both& of) {
      if (!at.exists || !to[at.m].data) return;
      Columns<T> d = of.d.wide();
      const Columns<T> x = of.x.wide();
      d.each([&](float& y, int i) { y = (y - along[n] * x.x[i]) / norms[n]; });
      store_columns(to[at.m], all.sample(at), at.l, c, all.width(at), d);
    });
  });
}

}  // namespace grjca::cuda
