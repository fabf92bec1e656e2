// K, C and H for few frames. C_m^T is formed 16 rows x 16 columns at a time in the registers of a warp, and goes into
// the next product from there. In both, all is transposed: rows are columns j of J, as in attention of head width L.
#pragma once

#include "iteration.h"

namespace grjca::cuda {

constexpr int kStreamRows = kThreads / kWarp * 16;  // of a task
constexpr int kStreamTile = 64;                     // columns at once
constexpr int kKeyColumns = 2 * kStreamTile;        // of a task of K
// In shared memory frames are lines: first one block for the rows of the task, or two, then the stages of two blocks of
// columns each.
template <int kColumns>
constexpr int kFrameLine = kColumns + 8;
constexpr int kStreamLine = kFrameLine<kStreamTile>, kRowsLine = kFrameLine<kStreamRows>;

template <class T>
GRJCA_DEVICE T* rows_block(int i) {
  return reinterpret_cast<T*>(shared_memory()) + i * kStreamFrames * kRowsLine;
}
// As many stages as fit. With two alone, every step waits for L2.
template <class T, int kRowsBlocks>
constexpr int kStreamStages = sizeof(T) == 2 ? 4 : 4 - kRowsBlocks;
template <class T, int kRowsBlocks>
GRJCA_DEVICE T* columns_block(int step, int i) {
  return rows_block<T>(kRowsBlocks) + (step % kStreamStages<T, kRowsBlocks> * 2 + i) * kStreamFrames * kStreamLine;
}
constexpr int stream_bytes(int rows_blocks, int stages, int bytes) {
  return kStreamFrames * (rows_blocks * kRowsLine + stages * 2 * kStreamLine) * bytes;
}
static_assert(stream_bytes(1, 3, 4) <= kSharedBytes && stream_bytes(2, 2, 4) <= kSharedBytes &&
                  stream_bytes(2, 4, 2) <= kSharedBytes,
              "shared memory");

// Calls multiply(step) for every step, and load(step) as many steps ahead as there are stages. What the caller has
// begun to load is there at the first step.
template <class T, int kRowsBlocks, class L, class F>
GRJCA_DEVICE void in_stages(int steps, L load, F multiply) {
  constexpr int kAhead = kStreamStages<T, kRowsBlocks> - 1;
  GRJCA_LOOP
  for (int step = -kAhead; step < steps; ++step) {  // as in `product`
    if (step >= 0) {
      copy_wait<kAhead - 1>();
      block_barrier();
    }
    if (step + kAhead < steps) load(step + kAhead);
    copy_commit();
    if (step >= 0) multiply(step);
  }
}

// f(row, column, two neighbours in a row) for what this lane has of two fragments side by side.
template <class F>
GRJCA_DEVICE void each_pair(const Thread& me, int row, int column, const float (&left)[4], const float (&right)[4],
                            F f) {
  const int g = me.g(), t = me.t();
  f(row + g, column + 2 * t, left[0], left[1]);
  f(row + g + 8, column + 2 * t, left[2], left[3]);
  f(row + g, column + 2 * t + 8, right[0], right[1]);
  f(row + g + 8, column + 2 * t + 8, right[2], right[3]);
}

// Starts copying all frames of so many columns, of which `columns` exist, from `column` of a sample on. Lines are
// filled up to a multiple of 16; what does not exist is 0.
template <int kColumns, class T>
GRJCA_DEVICE void load_frames(const Thread& me, T* to, const Matrix<T>& from, int frames, int column, int columns) {
  constexpr int kChunk = 16 / sizeof(T), kChunks = kColumns / kChunk;
  const int lines = (frames + 15) / 16 * 16;
  const Matrix<T> block = from.from(0, column);
  const int bytes = block.alignment();
  GRJCA_LOOP
  for (int i = me.index; i < lines * kChunks; i += kThreads) {
    const int line = i / kChunks, chunk = i % kChunks * kChunk;
    const T* const row = line < frames ? block.at(line) : nullptr;
    T* const place = to + line * kFrameLine<kColumns> + chunk;
    const int n = row && chunk < columns ? least(columns - chunk, kChunk) : 0;
    copy_pieces(place, n > 0 ? row + chunk : block.data, n, bytes);
  }
}

// The units of terms in all frames.
template <class M>
constexpr int kFrameUnits = kStreamFrames / M::kUnit;

// 16 columns of all frames, transposed.
template <class T, class M>
GRJCA_DEVICE void load_rows(const Thread& me, typename M::A (&to)[kFrameUnits<M>], const T* from, int column,
                            int lines) {
  GRJCA_UNROLL
  for (int u = 0; u < kFrameUnits<M>; ++u) {
    const int frame = u * M::kUnit < lines ? u * M::kUnit : 0;  // always one, or the compiler needs memory
    to[u] = M::template load_a<Major::outer>(me, from + frame * kRowsLine + column, kRowsLine);
  }
}

// K_m^T = (W_k X_m + b_k) / sqrt(d), absent frames 0. A task takes kKeyColumns columns of plan.key_samples samples,
// which pass through its stages one after another: a task for each would end before its pipeline is full.
GRJCA_DEVICE int key_streamed_tasks(const Common& a, const Team& team) {
  return modality_tiles(a.plan, a.p.modalities, kKeyColumns) * tiles(team.count, a.plan.key_samples);
}

template <class T, class M>
GRJCA_DEVICE void key_streamed_task(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const Thread me = this_thread();
  const int length = static_cast<int>(a.p.length), lines = (length + 15) / 16 * 16;
  const int groups = tiles(team.count, plan.key_samples), first = i % groups * plan.key_samples;
  const ModalityTile tile = modality_tile(plan, i / groups, kKeyColumns);
  const int weight = index_of(a).key(team.t, tile.m), column = plan.offsets[tile.m] + tile.column;
  const Matrix<T> x = state<T>(a, team, team.t);
  const auto load = [&](int step) {
    GRJCA_UNROLL
    for (int h = 0; h < 2; ++h)
      load_frames<kStreamTile>(me, columns_block<T, 1>(step, h), sample_of(x, first + step), length,
                               column + h * kStreamTile, tile.columns - h * kStreamTile);
  };
  block_barrier();
  load_frames<kStreamRows>(me, rows_block<T>(0), Matrix<T>{parameter<T>(a, weight), length}, length, 0, length);
  float biases[kStreamFrames / 8];  // of rows g(), g() + 8, ...
  GRJCA_UNROLL
  for (int k = 0; k < kStreamFrames / 8; ++k) {
    const int l = me.g() + 8 * k;
    biases[k] = a.p.released && l < length ? widen(parameter<T>(a, weight + 1)[l]) : 0;
  }
  in_stages<T, 1>(least(plan.key_samples, team.count - first), load, [&](int step) {
    constexpr int kOfWarp = kKeyColumns * kWarp / kThreads;
    const int s = first + step, present = frames_of(a, team.first + s), mine = me.warp() * kOfWarp;
    T* const to = slot<T>(a, team, plan.slots.key) + static_cast<int64_t>(s) * plan.frames * plan.width + column;
    GRJCA_UNROLL
    for (int c = mine; c < mine + kOfWarp; c += 16) {
      const T* const columns = columns_block<T, 1>(step, c / kStreamTile) + c % kStreamTile;
      GRJCA_UNROLL
      for (int f = 0; f < kStreamFrames; f += 16)
        if (f < lines) {
          const float b0 = biases[f / 8], b1 = biases[f / 8 + 1];  // where the sums begin
          float left[4] = {b0, b0, b1, b1}, right[4] = {b0, b0, b1, b1};
          GRJCA_UNROLL
          for (int u = 0; u < kStreamFrames; u += M::kUnit)
            if (u < lines) {
              const typename M::A w =
                  M::template load_a<Major::terms>(me, rows_block<T>(0) + f * kRowsLine + u, kRowsLine);
              const typename M::B b = M::template load_b<Major::outer>(me, columns + u * kStreamLine, kStreamLine);
              M::add(left, w, b, 0);
              M::add(right, w, b, 1);
            }
          each_pair(me, f, c, left, right, [&](int l, int of_tile, float x0, float x1) {
            if (l >= length || of_tile >= tile.columns) return;
            const bool exists = l < present;
            store_pair(to + static_cast<int64_t>(l) * plan.width + of_tile, exists ? x0 * plan.key_scale : 0,
                       exists ? x1 * plan.key_scale : 0, of_tile + 1 < tile.columns);
          });
        }
    }
  });
}

// The products that need only X^t: J, V and K.
GRJCA_DEVICE int project_tasks(const Common& a, const Team& team) {
  return linear_tasks(a, team) + (a.plan.streamed ? key_streamed_tasks(a, team) : key_tasks(a, team));
}

template <class T, class M>
GRJCA_DEVICE void project_task(const Common& a, const Team& team, int i) {
  const int of_linear = linear_tasks(a, team);
  if (i < of_linear)
    linear_task<T, M>(a, team, i, joint_tasks(a, team), row_tiles_of(a, team));
  else if (a.plan.streamed)
    key_streamed_task<T, M>(a, team, i - of_linear);
  else
    key_task<T, M>(a, team, i - of_linear);
}

GRJCA_DEVICE int attend_tasks(const Common& a, const Team& team) {
  return team.count * a.p.modalities * tiles(a.plan.width, kStreamRows);
}

// H_m = relu(tanh(V_m C_m)).
template <class T, class M>
GRJCA_DEVICE void attend_task(const Common& a, const Team& team, int i) {
  const Plan& plan = a.plan;
  const int length = static_cast<int>(a.p.length), lines = (length + 15) / 16 * 16;
  const int blocks = tiles(plan.width, kStreamRows), hidden_width = a.p.modalities * plan.width;
  const Thread me = this_thread();
  const int s = i / blocks / a.p.modalities, m = i / blocks % a.p.modalities, j = i % blocks * kStreamRows;
  const Matrix<T> k = sample_of(activation<T>(a, team, plan.slots.key), s);
  const Matrix<T> v = sample_of(activation<T>(a, team, plan.slots.value), s);
  const int offset = plan.offsets[m], width = plan.widths[m], steps = tiles(width, kStreamTile);
  const bool drops = a.p.dropout > 0;
  const Mask mask = drops ? Mask::at(a, team.t, m, Site::correlation, team.first + s) : Mask{};
  const auto load = [&](int step) {
    const int c = step * kStreamTile;
    load_frames<kStreamTile>(me, columns_block<T, 1>(step, 0), k, length, offset + c, width - c);
    load_frames<kStreamTile>(me, columns_block<T, 1>(step, 1), v, length, offset + c, width - c);
  };
  block_barrier();
  load_frames<kStreamRows>(me, rows_block<T>(0), sample_of(joint<T>(a, team, team.t), s), length, j, plan.width - j);
  typename M::A joints[kFrameUnits<M>];  // J^T of this warp's 16 columns
  float sums[kStreamFrames / 8][4] = {};
  const int mine = me.warp() * 16;
  in_stages<T, 1>(steps, load, [&](int step) {
    load_rows<T, M>(me, joints, rows_block<T>(0), mine, lines);
    const T* const keys = columns_block<T, 1>(step, 0);
    const T* const values = columns_block<T, 1>(step, 1);
    GRJCA_UNROLL
    for (int c = 0; c < kStreamTile; c += 16) {
      float scores[2][4] = {};
      GRJCA_UNROLL
      for (int u = 0; u < kFrameUnits<M>; ++u)
        if (u * M::kUnit < lines) {
          const typename M::B b =
              M::template load_b<Major::outer>(me, keys + u * M::kUnit * kStreamLine + c, kStreamLine);
          M::add(scores[0], joints[u], b, 0);
          M::add(scores[1], joints[u], b, 1);
        }
      uint32_t kept[2] = {15, 15};
      if (drops) mask.of_columns(me, j + mine, step * kStreamTile + c, kept);
      GRJCA_UNROLL
      for (int h = 0; h < 2; ++h) {
        GRJCA_UNROLL
        for (int e = 0; e < 4; ++e) scores[h][e] = tanh_of<T>(scores[h][e]) * (kept[h] >> e & 1 ? plan.kept : 0);
      }
      GRJCA_UNROLL
      for (int u = 0; u < 16; u += M::kUnit) {
        const typename M::A correlations = M::chain(scores + u / 8);
        GRJCA_UNROLL
        for (int f = 0; f < kStreamFrames; f += 16)
          if (f < lines) {
            const typename M::B b =
                M::template load_chained<Major::terms>(me, values + f * kStreamLine + c + u, kStreamLine);
            M::add(sums[f / 8], correlations, b, 0);
            M::add(sums[f / 8 + 1], correlations, b, 1);
          }
      }
    }
  });
  T* const to =
      slot<T>(a, team, plan.slots.hidden) + static_cast<int64_t>(s) * plan.frames * hidden_width + m * plan.width + j;
  GRJCA_UNROLL
  for (int f = 0; f < kStreamFrames; f += 16)
    if (f < lines)
      each_pair(me, mine, f, sums[f / 8], sums[f / 8 + 1], [&](int column, int l, float x0, float x1) {
        if (column >= plan.width - j) return;
        if (l < length)
          to[static_cast<int64_t>(l) * hidden_width + column] = narrow_to<T>(hidden_of<T>(a.p.released, x0));
        if (l + 1 < length)
          to[static_cast<int64_t>(l + 1) * hidden_width + column] = narrow_to<T>(hidden_of<T>(a.p.released, x1));
      });
}

}  // namespace grjca::cuda
