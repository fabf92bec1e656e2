// One iteration, equation by equation, on the rows of a chunk. The forward runs it, and so does the backward to recompute.
#pragma once

#include <math.h>

#include "dropout.h"
#include "storage.h"
#include "tanh.h"
#include "workspace.h"

namespace grjca::GRJCA_ISA {

// Parameters of one iteration in arithmetic type, weights packed as right operands (the transposes that x W^T needs).
template <class R>
struct PackedLayer {
  R *query, *query_bias;
  R* key[kMaxModalities];  // W_k as it is, [L, L]
  R* key_bias[kMaxModalities];
  R *value[kMaxModalities], *value_bias[kMaxModalities];
  R *output[kMaxModalities], *output_bias[kMaxModalities];

  static PackedLayer plan(const Problem& p, Arena& arena) {
    PackedLayer w{};
    const int64_t d = p.width();
    const auto panel_space = [](int64_t terms, int64_t columns) { return panels<R>(columns) * terms * kPanel<R>; };
    const auto bias = [&](int64_t n) { return p.released ? arena.take<R>(panels<R>(n) * kPanel<R>) : nullptr; };
    w.query = p.released ? arena.take<R>(panel_space(d, d)) : nullptr;
    w.query_bias = bias(d);
    for (int m = 0; m < p.modalities; ++m) {
      w.key[m] = arena.take<R>(p.length * p.length);
      w.key_bias[m] = bias(p.length);
      w.value[m] = arena.take<R>(panel_space(p.widths[m], p.widths[m]));
      w.value_bias[m] = bias(p.widths[m]);
      w.output[m] = arena.take<R>(panel_space(d, p.widths[m]));
      w.output_bias[m] = bias(p.widths[m]);
    }
    return w;
  }

  template <class S>
  void fill(const Problem& p, const void* const* parameters, int t, int threads) {
    const ParameterIndex index{p};
    const int64_t d = p.width();
    const auto weight = [&](int i) { return static_cast<const S*>(parameters[i]); };
    const auto packed = [&](R* to, const S* from, int64_t out, int64_t in) {
      parallel_for(threads, panels<R>(out), [=](int64_t q, int) {
        pack_columns(to + q * in * kPanel<R>, from + q * kPanel<R> * in, in, in, out - q * kPanel<R>);
      });
    };
    const auto bias = [&](R* to, int i, int64_t n) {
      if (!p.released) return;
      std::memset(to, 0, panels<R>(n) * kPanel<R> * sizeof(R));
      load_row(to, weight(i + 1), 1, n);
    };
    if (p.released) packed(query, weight(index.query(t)), d, d);
    if (p.released) bias(query_bias, index.query(t), d);
    for (int m = 0; m < p.modalities; ++m) {
      load_row(key[m], weight(index.key(t, m)), 1, p.length * p.length);
      bias(key_bias[m], index.key(t, m), p.length);
      packed(value[m], weight(index.value(t, m)), p.widths[m], p.widths[m]);
      bias(value_bias[m], index.value(t, m), p.widths[m]);
      packed(output[m], weight(index.output(t, m)), p.widths[m], d);
      bias(output_bias[m], index.output(t, m), p.widths[m]);
    }
  }
};

// Activations of one iteration. Matrices are [rows, ld] with the modalities side by side; J is kept as panels
// [panel][row][kPanel], the form in which the correlation reads it.
template <class R>
struct Activations {
  int64_t ld, hidden_ld;
  R *x, *joint, *key, *value, *hidden;

  static Activations plan(const Problem& p, int64_t rows, Arena& arena) {
    Activations a{};
    const int64_t d = p.width();
    a.ld = leading<R>(d);
    a.hidden_ld = leading<R>(d * p.modalities);
    a.x = arena.take<R>(rows * a.ld);
    a.joint = arena.take<R>(panels<R>(d) * rows * kPanel<R>);
    a.key = arena.take<R>(rows * a.ld);
    a.value = arena.take<R>(rows * a.ld);
    a.hidden = arena.take<R>(rows * a.hidden_ld);
    return a;
  }
};

constexpr int64_t kRowBlock = 128, kPanelBlock = 4;

// Rows times packed weights: epilogue(row, column, vector).
template <class R, class Epilogue>
inline void project(int threads, int64_t rows, int64_t terms, Left<R> a, const R* weights, int64_t columns,
                    Epilogue epilogue) {
  const int64_t panel_blocks = blocks(panels<R>(columns), kPanelBlock);
  parallel_for(threads, blocks(rows, kRowBlock) * panel_blocks, [=](int64_t task, int) {
    const int64_t i = task / panel_blocks * kRowBlock, q = task % panel_blocks * kPanelBlock;
    const Left<R> block{a.data + i * a.row, a.row, a.column};
    for (int64_t panel = q; panel < smaller(q + kPanelBlock, panels<R>(columns)); ++panel) {
      const int64_t column = panel * kPanel<R>;
      product<R>(smaller(kRowBlock, rows - i), smaller(kPanel<R>, columns - column), block,
                 weights + panel * terms * kPanel<R>, terms,
                 [=](int64_t r, int64_t c, Vector<R> v) { epilogue(i + r, column + c, v); });
    }
  });
}

template <class R>
struct Iteration {
  const Problem& p;
  const Chunk& chunk;
  const PackedLayer<R>& weights;
  const Activations<R>& a;
  uint64_t seed;
  int t;  // from 0
  int threads;
  R* scratch;  // scratch_size() for each thread
  int64_t scratch_step;

  static int64_t scratch_size(const Problem& p) {
    int64_t terms = p.length;
    for (int m = 0; m < p.modalities; ++m) terms = larger(terms, p.widths[m]);
    return terms * kPanel<R>;
  }

  R* thread_scratch(int thread) const { return scratch + thread * scratch_step; }
  const R* joint_panel(int64_t q, int64_t b) const {
    return a.joint + (q * chunk.rows() + chunk.start[b]) * kPanel<R>;
  }

  // J = [X_v, X_a] W_q^T + b_q; the paper form has J = [X_v, X_a].
  void project_joint() const {
    const int64_t d = p.width(), rows = chunk.rows();
    R* const joint = a.joint;
    if (!p.released) {
      parallel_for(threads, panels<R>(d), [&](int64_t q, int) {
        pack_rows(joint + q * rows * kPanel<R>, a.x + q * kPanel<R>, a.ld, rows, d - q * kPanel<R>);
      });
      return;
    }
    const R* const bias = weights.query_bias;
    project<R>(threads, rows, d, {a.x, a.ld, 1}, weights.query, d, [=](int64_t r, int64_t c, Vector<R> v) {
      store(joint + (c / kPanel<R> * rows + r) * kPanel<R> + c % kPanel<R>, v + load(bias + c));
    });
  }

  // K_m = X_m^T W_k^T + b_k, kept transposed [L, d_m] and already divided by sqrt(d).
  void mix_time() const {
    const R scale = static_cast<R>(1 / sqrt(static_cast<double>(p.width())));
    each_modality_panel([&](int64_t b, int m, int64_t column, int64_t columns, int thread) {
      R* const panel = thread_scratch(thread);
      const int64_t n = chunk.frames(b), place = chunk.start[b] * a.ld + p.offset(m) + column;
      pack_rows(panel, a.x + place, a.ld, n, columns);
      const R* const bias = weights.key_bias[m];
      R* const key = a.key + place;
      product<R>(n, columns, {weights.key[m], p.length, 1}, panel, n, [=](int64_t l, int64_t c, Vector<R> v) {
        if (bias) v += bias[l];
        store_some<R>(key + l * a.ld + c, v * scale, columns - c);
      });
    });
  }

  // V_m = X_m W_v^T + b_v.
  void project_value() const {
    for (int m = 0; m < p.modalities; ++m) {
      const int64_t d_m = p.widths[m], offset = p.offset(m);
      const R* const bias = weights.value_bias[m];
      R* const value = a.value + offset;
      project<R>(threads, chunk.rows(), d_m, {a.x + offset, a.ld, 1}, weights.value[m], d_m,
                 [=](int64_t r, int64_t c, Vector<R> v) {
                   store_some<R>(value + r * a.ld + c, bias ? v + load(bias + c) : v, d_m - c);
                 });
    }
  }

  // C_m = drop(tanh(K_m J / sqrt(d))), one panel of columns at a time in scratch; H_m = relu(tanh(V_m C_m)).
  void attend() const {
    const int64_t d = p.width(), all = panels<R>(d);
    parallel_for(threads, chunk.samples * p.modalities * all, [&](int64_t task, int thread) {
      const int64_t b = task / all / p.modalities, q = task % all, n = chunk.frames(b);
      const int m = static_cast<int>(task / all % p.modalities);
      const int64_t columns = smaller(kPanel<R>, d - q * kPanel<R>), place = chunk.start[b] * a.ld + p.offset(m);
      R* const correlation = thread_scratch(thread);
      correlate(b, m, q, 0, p.widths[m], correlation);
      drop_correlation(b, m, q, 0, p.widths[m], correlation);
      R* const hidden = a.hidden + chunk.start[b] * a.hidden_ld + m * d + q * kPanel<R>;
      product<R>(n, columns, {a.value + place, a.ld, 1}, correlation, p.widths[m],
                 [=](int64_t l, int64_t c, Vector<R> v) {
                   store_some<R>(hidden + l * a.hidden_ld + c, relu<R>(p.released ? tanh(v) : v), columns - c);
                 });
    });
  }

  // tanh(K_m J / sqrt(d)) for rows [i, i + rows) of C_m and panel q, as a panel [rows][kPanel].
  void correlate(int64_t b, int m, int64_t q, int64_t i, int64_t rows, R* correlation) const {
    const R* const key = a.key + chunk.start[b] * a.ld + p.offset(m) + i;
    product<R>(rows, p.width() - q * kPanel<R>, {key, 1, a.ld}, joint_panel(q, b), chunk.frames(b),
               [=](int64_t r, int64_t c, Vector<R> v) { store(correlation + r * kPanel<R> + c, tanh(v)); });
  }

  void drop_correlation(int64_t b, int m, int64_t q, int64_t i, int64_t rows, R* correlation) const {
    if (p.dropout == 0) return;
    const Dropout drop = Dropout::at(p, seed, t, m, Site::correlation, chunk.first + b);
    for (int64_t r = 0; r < rows; r += kDropoutRows)
      for (int64_t c = 0; c < kPanel<R>; c += kLanes<float>)
        each_factor<R>(drop, (i + r) / kDropoutRows, q * kPanel<R> + c, 1 / (1 - p.dropout),
                       [&](int64_t k, int64_t offset, Vector<R> factor) {
                         R* const at = correlation + (r + k) * kPanel<R> + c + offset;
                         if (r + k < rows) store(at, load(at) * factor);
                       });
  }

  // H_m W_h^T + b_h, before relu and dropout.
  void project_output(R* update) const {
    const int64_t d = p.width();
    for (int m = 0; m < p.modalities; ++m) {
      const int64_t d_m = p.widths[m];
      const R* const bias = weights.output_bias[m];
      R* const to = update + p.offset(m);
      project<R>(threads, chunk.rows(), d, {a.hidden + m * d, a.hidden_ld, 1}, weights.output[m], d_m,
                 [=](int64_t r, int64_t c, Vector<R> v) {
                   store_some<R>(to + r * a.ld + c, bias ? v + load(bias + c) : v, d_m - c);
                 });
    }
  }

  // f(address offset in [rows, ld], lanes, factor) over all elements of U_m, where factor is the dropout of that site.
  template <class F>
  void each_output(F f) const {
    const int64_t groups = blocks(p.length, kFrames);
    parallel_for(threads, chunk.samples * groups, [&](int64_t task, int) {
      const int64_t b = task / groups, begin = task % groups * kFrames, end = smaller(begin + kFrames, chunk.frames(b));
      for (int m = 0; m < p.modalities; ++m) {
        const Dropout drop = Dropout::at(p, seed, t, m, Site::output, chunk.first + b);
        for (int64_t l = begin; l < end; l += kDropoutRows)
          for (int64_t c = 0; c < p.widths[m]; c += kLanes<float>) {
            const auto one = [&](int64_t k, int64_t offset, Vector<R> factor) {
              const int64_t lanes = p.widths[m] - c - offset;
              if (l + k < end && lanes > 0)
                f((chunk.start[b] + l + k) * a.ld + p.offset(m) + c + offset, lanes, factor);
            };
            if (p.dropout > 0) {
              each_factor<R>(drop, l / kDropoutRows, c, 1 / (1 - p.dropout), one);
            } else {
              for (int64_t k = 0; k < kDropoutRows; ++k)
                for (int64_t offset = 0; offset < kLanes<float>; offset += kLanes<R>) one(k, offset, splat<R>(1));
            }
          }
      }
    });
  }

  // f(sample, modality, first column within the modality, columns, thread) for every panel of every modality.
  template <class F>
  void each_modality_panel(F f) const {
    int64_t of_sample = 0;
    for (int m = 0; m < p.modalities; ++m) of_sample += panels<R>(p.widths[m]);
    parallel_for(threads, chunk.samples * of_sample, [&](int64_t task, int thread) {
      int64_t q = task % of_sample;
      int m = 0;
      while (q >= panels<R>(p.widths[m])) q -= panels<R>(p.widths[m++]);
      const int64_t column = q * kPanel<R>;
      f(task / of_sample, m, column, smaller(kPanel<R>, p.widths[m] - column), thread);
    });
  }
};

}  // namespace grjca::GRJCA_ISA
