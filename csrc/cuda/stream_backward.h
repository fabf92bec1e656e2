// The backward of C for few frames, which recomputes C twice: once by its rows, once by its columns.
#pragma once

#include "iteration_backward.h"
#include "stream.h"

namespace grjca::cuda {

// In two fragments, turns scores K J into C after dropout, and gradients by that C into gradients by K J.
template <class T>
GRJCA_DEVICE void slopes(float (&scores)[2][4], float (&gradients)[2][4], const uint32_t (&kept)[2], float factor) {
  GRJCA_UNROLL
  for (int h = 0; h < 2; ++h) {
    GRJCA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const float c = tanh_of<T>(scores[h][e]), left = kept[h] >> e & 1 ? factor : 0;
      gradients[h][e] *= (1 - c * c) * left;
      scores[h][e] = c * left;
    }
  }
}

// Stores the transpose of what this warp has of [16 rows, frames]: rows are columns of `to`, of which `columns` exist.
template <class T>
GRJCA_DEVICE void store_transposed(const Thread& me, T* to, int64_t row_step, float (&sums)[kStreamFrames / 8][4],
                                   int first, int columns, int frames) {
  GRJCA_UNROLL
  for (int f = 0; f < kStreamFrames; f += 16)
    if (f < frames)
      each_pair(me, first, f, sums[f / 8], sums[f / 8 + 1], [&](int c, int l, float x0, float x1) {
        if (c >= columns) return;
        if (l < frames) to[l * row_step + c] = narrow_to<T>(x0);
        if (l + 1 < frames) to[(l + 1) * row_step + c] = narrow_to<T>(x1);
      });
}

// sums += P Q^T for fragments P [16, 16] and Q [frames, 16], the latter from shared memory.
template <class T, class M, Major kMajor>
GRJCA_DEVICE void add_chained(const Thread& me, float (&sums)[kStreamFrames / 8][4], const float (&p)[2][4], const T* q,
                              int lines) {
  GRJCA_UNROLL
  for (int u = 0; u < 16; u += M::kUnit) {
    const typename M::A chained = M::chain(p + u / 8);
    GRJCA_UNROLL
    for (int f = 0; f < kStreamFrames; f += 16)
      if (f < lines) {
        const typename M::B b = M::template load_chained<kMajor>(me, q + place<kMajor>(f, u, kStreamLine), kStreamLine);
        M::add(sums[f / 8], chained, b, 0);
        M::add(sums[f / 8 + 1], chained, b, 1);
      }
  }
}

// 16 rows of a product over all frames, [16, 16 columns from `column` on]: A in registers, B [frames, columns].
template <class T, class M>
GRJCA_DEVICE void over_frames(const Thread& me, float (&to)[2][4], const typename M::A (&as)[kFrameUnits<M>],
                              const T* b, int column, int lines) {
  GRJCA_UNROLL
  for (int u = 0; u < kFrameUnits<M>; ++u)
    if (u * M::kUnit < lines) {
      const typename M::B bs =
          M::template load_b<Major::outer>(me, b + u * M::kUnit * kStreamLine + column, kStreamLine);
      M::add(to[0], as[u], bs, 0);
      M::add(to[1], as[u], bs, 1);
    }
}

// Rows c of C_m, all columns: d V_m and d K_m; d X_m += W_k^T d K_m.
template <class T, class M>
GRJCA_DEVICE void rows_backward(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const Thread me = this_thread();
  const int length = static_cast<int>(a.p.length), lines = (length + 15) / 16 * 16, s = i % team.count;
  const ModalityTile tile = modality_tile(plan, i / team.count, kStreamRows);  // of rows, here
  const int offset = plan.offsets[tile.m] + tile.column, mine = me.warp() * 16, steps = tiles(plan.width, kStreamTile);
  const Matrix<T> j = sample_of(joint<T>(a, team, team.t), s), d = sample_of(d_attended<T>(a, team), s);
  const auto load = [&](int step) {
    const int c = step * kStreamTile;
    load_frames<kStreamTile>(me, columns_block<T, 2>(step, 0), j, length, c, plan.width - c);
    load_frames<kStreamTile>(me, columns_block<T, 2>(step, 1), d, length, tile.m * plan.width + c, plan.width - c);
  };
  const bool drops = a.p.dropout > 0;
  const Mask mask = drops ? Mask::at(a, team.t, tile.m, Site::correlation, team.first + s) : Mask{};
  typename M::A keys[kFrameUnits<M>], values[kFrameUnits<M>];
  float d_value[kStreamFrames / 8][4] = {}, d_key[kStreamFrames / 8][4] = {};
  block_barrier();
  load_frames<kStreamRows>(me, rows_block<T>(0), sample_of(activation<T>(a, team, plan.slots.key), s), length, offset,
                           tile.columns);
  load_frames<kStreamRows>(me, rows_block<T>(1), sample_of(activation<T>(a, team, plan.slots.value), s), length, offset,
                           tile.columns);
  in_stages<T, 2>(steps, load, [&](int step) {
    load_rows<T, M>(me, keys, rows_block<T>(0), mine, lines);
    load_rows<T, M>(me, values, rows_block<T>(1), mine, lines);
    const T* const joints = columns_block<T, 2>(step, 0);
    const T* const ds = columns_block<T, 2>(step, 1);
    GRJCA_LOOP
    for (int c = 0; c < kStreamTile; c += 16) {
      float correlations[2][4] = {}, gradients[2][4] = {};
      over_frames<T, M>(me, correlations, keys, joints, c, lines);
      over_frames<T, M>(me, gradients, values, ds, c, lines);
      uint32_t kept[2] = {15, 15};
      if (drops) mask.of_rows(me, tile.column + mine, step * kStreamTile + c, kept);
      slopes<T>(correlations, gradients, kept, plan.kept);
      add_chained<T, M, Major::terms>(me, d_value, correlations, ds + c, lines);
      add_chained<T, M, Major::terms>(me, d_key, gradients, joints + c, lines);
    }
  });
  const int64_t row = static_cast<int64_t>(s) * plan.frames * plan.width + offset;
  store_transposed(me, slot<T>(a, team, plan.slots.d_value) + row, plan.width, d_value, mine, tile.columns, length);

  const int present = frames_of(a, team.first + s);
  GRJCA_UNROLL
  for (int f = 0; f < kStreamFrames / 8; ++f) {
    GRJCA_UNROLL
    for (int e = 0; e < 4; ++e) d_key[f][e] = f * 8 + 2 * me.t() + e % 2 < present ? d_key[f][e] * plan.key_scale : 0;
  }
  store_transposed(me, slot<T>(a, team, plan.slots.d_key) + row, plan.width, d_key, mine, tile.columns, length);
  const Matrix<T> w{parameter<T>(a, index_of(a).key(team.t, tile.m)), length};
  block_barrier();  // all have multiplied what is in the stages
  load_frames<kStreamTile>(me, columns_block<T, 2>(0, 0), w, present, 0, present);
  copy_commit();
  copy_wait<0>();
  block_barrier();
  float d_x[kStreamFrames / 8][4] = {};
  GRJCA_UNROLL
  for (int f = 0; f < kStreamFrames; f += 16)
    if (f < (present + 15) / 16 * 16) {
      const float two[2][4] = {{d_key[f / 8][0], d_key[f / 8][1], d_key[f / 8][2], d_key[f / 8][3]},
                               {d_key[f / 8 + 1][0], d_key[f / 8 + 1][1], d_key[f / 8 + 1][2], d_key[f / 8 + 1][3]}};
      add_chained<T, M, Major::outer>(me, d_x, two, columns_block<T, 2>(0, 0) + f * kStreamLine,
                                      (present + 15) / 16 * 16);
    }
  T* const to = writable(d_state<T>(a, team, team.t), 0) + row;
  GRJCA_UNROLL
  for (int f = 0; f < kStreamFrames; f += 16)
    if (f < present)
      each_pair(me, mine, f, d_x[f / 8], d_x[f / 8 + 1], [&](int c, int l, float x0, float x1) {
        if (c >= tile.columns) return;
        T* const x = to + static_cast<int64_t>(l) * plan.width + c;
        if (l < present) x[0] = narrow_to<T>(widen(x[0]) + x0);
        if (l + 1 < present) x[plan.width] = narrow_to<T>(widen(x[plan.width]) + x1);
      });
}

// Columns j of C, all rows and modalities: d J.
template <class T, class M>
GRJCA_DEVICE void joint_backward(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const Thread me = this_thread();
  const int length = static_cast<int>(a.p.length), lines = (length + 15) / 16 * 16;
  const int blocks = tiles(plan.width, kStreamRows), s = i / blocks, j = i % blocks * kStreamRows;
  const int mine = me.warp() * 16;
  const Matrix<T> k = sample_of(activation<T>(a, team, plan.slots.key), s);
  const Matrix<T> v = sample_of(activation<T>(a, team, plan.slots.value), s);
  const Matrix<T> d = sample_of(d_attended<T>(a, team), s);
  const bool drops = a.p.dropout > 0;
  typename M::A joints[kFrameUnits<M>], ds[kFrameUnits<M>];
  float d_joint[kStreamFrames / 8][4] = {};
  GRJCA_LOOP
  for (int m = 0; m < a.p.modalities; ++m) {
    const Mask mask = drops ? Mask::at(a, team.t, m, Site::correlation, team.first + s) : Mask{};
    const int offset = plan.offsets[m], width = plan.widths[m], steps = tiles(width, kStreamTile);
    const auto load = [&](int step) {
      const int c = step * kStreamTile;
      load_frames<kStreamTile>(me, columns_block<T, 2>(step, 0), k, length, offset + c, width - c);
      load_frames<kStreamTile>(me, columns_block<T, 2>(step, 1), v, length, offset + c, width - c);
    };
    block_barrier();
    load_frames<kStreamRows>(me, rows_block<T>(0), sample_of(joint<T>(a, team, team.t), s), length, j, plan.width - j);
    load_frames<kStreamRows>(me, rows_block<T>(1), d, length, m * plan.width + j, plan.width - j);
    in_stages<T, 2>(steps, load, [&](int step) {
      load_rows<T, M>(me, joints, rows_block<T>(0), mine, lines);
      load_rows<T, M>(me, ds, rows_block<T>(1), mine, lines);
      const T* const keys = columns_block<T, 2>(step, 0);
      const T* const values = columns_block<T, 2>(step, 1);
      GRJCA_LOOP
      for (int c = 0; c < kStreamTile; c += 16) {
        float correlations[2][4] = {}, gradients[2][4] = {};
        over_frames<T, M>(me, correlations, joints, keys, c, lines);
        over_frames<T, M>(me, gradients, ds, values, c, lines);
        uint32_t kept[2] = {15, 15};
        if (drops) mask.of_columns(me, j + mine, step * kStreamTile + c, kept);
        slopes<T>(correlations, gradients, kept, plan.kept);
        add_chained<T, M, Major::terms>(me, d_joint, gradients, keys + c, lines);
      }
    });
  }
  T* const to = slot<T>(a, team, plan.slots.d_joint) + static_cast<int64_t>(s) * plan.frames * plan.width + j;
  store_transposed(me, to, plan.width, d_joint, mine, plan.width - j, length);
}

GRJCA_DEVICE int rows_backward_tasks(const Common& a, const Team& team) {
  return team.count * modality_tiles(a.plan, a.p.modalities, kStreamRows);
}
GRJCA_DEVICE int correlate_backward_tasks(const Common& a, const Team& team) {
  return rows_backward_tasks(a, team) + team.count * tiles(a.plan.width, kStreamRows);
}

template <class T, class M>
GRJCA_DEVICE void correlate_backward_task(const Common& a, const Team& team, int i) {
  const int of_rows = rows_backward_tasks(a, team);
  if (i < of_rows)
    rows_backward<T, M>(a, team, i);
  else
    joint_backward<T, M>(a, team, i - of_rows);
}

}  // namespace grjca::cuda
