// One iteration, equation by equation, on the rows of some samples. The forward runs it, and so does the backward to
// recompute.
#pragma once

#include <math.h>

#include "dropout.h"
#include "storage.h"
#include "tanh.h"
#include "weights.h"
#include "workspace.h"

namespace grjca::GRJCA_ISA {

// Activations of one iteration. Matrices are [rows, ld] with the modalities side by side; J is kept as panels
// [panel][row][kPanel], the form in which the correlation reads it.
template <class R>
struct Activations {
  int64_t ld, hidden_ld;
  R *x, *joint, *key, *value, *hidden;
  R* correlation;  // tanh(K_m J / sqrt(d)) of all samples, [sample][panel][row of all C][kPanel]; null: not kept

  static Activations of(const Problem& p) {
    Activations a{};
    a.ld = leading<R>(p.width());
    a.hidden_ld = leading<R>(p.width() * p.modalities);
    return a;
  }
  void plan_kept(int64_t rows, Arena& arena) {  // what the sums of the weights' gradients read
    x = arena.take<R>(rows * ld);
    hidden = arena.take<R>(rows * hidden_ld);
  }
  void plan_passing(const Problem& p, int64_t rows, Arena& arena) {
    joint = arena.take<R>(panels<R>(p.width()) * rows * kPanel<R>);
    key = arena.take<R>(rows * ld);
    value = arena.take<R>(rows * ld);
  }
};

constexpr int64_t kRowBlock = 128, kPanelBlock = 4;

// Rows times packed weights: epilogue(row, column, vector).
template <class E, class R = Compute<E>, class Epilogue>
inline void project(int threads, int64_t rows, int64_t terms, Left<R> a, const R* weights, int64_t columns,
                    Epilogue epilogue) {
  const int64_t panel_blocks = blocks(panels<R>(columns), kPanelBlock);
  parallel_for(threads, blocks(rows, kRowBlock) * panel_blocks, [=](int64_t task, int) {
    const int64_t i = task / panel_blocks * kRowBlock, q = task % panel_blocks * kPanelBlock;
    const Left<R> block{a.data + i * a.row, a.row, a.column};
    for (int64_t panel = q; panel < smaller(q + kPanelBlock, panels<R>(columns)); ++panel) {
      const int64_t column = panel * kPanel<R>;
      product<E>(smaller(kRowBlock, rows - i), smaller(kPanel<R>, columns - column), block,
                 weights + panel * terms * kPanel<R>, terms,
                 [=](int64_t r, int64_t c, Vector<R> v) { epilogue(i + r, column + c, v); });
    }
  });
}

template <class E, class R = Compute<E>>
struct Iteration {
  const Problem& p;
  const Samples& samples;
  const LayerWeights<R>& weights;
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

  static R key_scale(const Problem& p) { return static_cast<R>(1 / sqrt(static_cast<double>(p.width()))); }

  R* thread_scratch(int thread) const { return scratch + thread * scratch_step; }
  const R* joint_panel(int64_t q, int64_t b) const {
    return a.joint + (q * samples.rows() + samples.row(b)) * kPanel<R>;
  }

  // J = [X_v, X_a] W_q^T + b_q, or J = [X_v, X_a].
  void project_joint() const {
    const int64_t d = p.width(), rows = samples.rows();
    R* const joint = a.joint;
    if (!p.projected) {
      parallel_for(threads, panels<R>(d), [&](int64_t q, int) {
        copy_rows(joint + q * rows * kPanel<R>, a.x + q * kPanel<R>, a.ld, rows, d - q * kPanel<R>);
      });
      return;
    }
    const R* const bias = weights.query_bias;
    project<E>(threads, rows, d, {a.x, a.ld, 1}, weights.query, d, [=](int64_t r, int64_t c, Vector<R> v) {
      store(joint + (c / kPanel<R> * rows + r) * kPanel<R> + c % kPanel<R>, v + load(bias + c));
    });
  }

  // J as the correlation takes it, from here on: the terms of a sample begin with its first row.
  void pack_joint() const {
    if (!kPaired<E>) return;
    const int64_t all = panels<R>(p.width());
    parallel_for(threads, samples.count * all, [&](int64_t task, int) {
      const int64_t b = task / all;
      R* const panel = a.joint + (task % all * samples.rows() + samples.row(b)) * kPanel<R>;
      pack<E>(panel, panel, samples.frames(b));
    });
  }

  // K_m = X_m^T W_k^T + b_k, kept transposed [L, d_m] and already divided by sqrt(d).
  void project_key() const {
    const R scale = key_scale(p);
    each_modality_panel([&](int64_t b, int m, int64_t column, int64_t columns, int thread) {
      R* const panel = thread_scratch(thread);
      const int64_t n = samples.frames(b), place = samples.row(b) * a.ld + p.offset(m) + column;
      pack_rows<E>(panel, a.x + place, a.ld, n, columns);
      const R* const bias = weights.key_bias[m];
      R* const key = a.key + place;
      product<E>(n, columns, {weights.key[m], p.length, 1}, panel, n, [=](int64_t l, int64_t c, Vector<R> v) {
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
      project<E>(threads, samples.rows(), d_m, {a.x + offset, a.ld, 1}, weights.value[m], d_m,
                 [=](int64_t r, int64_t c, Vector<R> v) {
                   store_some<R>(value + r * a.ld + c, bias ? v + load(bias + c) : v, d_m - c);
                 });
    }
  }

  // C_m = drop(tanh(K_m J / sqrt(d))), one panel of columns at a time in scratch; H_m = relu(tanh(V_m C_m)).
  void attend() const {
    const int64_t d = p.width(), all = panels<R>(d);
    parallel_for(threads, samples.count * p.modalities * all, [&](int64_t task, int thread) {
      const int64_t b = task / all / p.modalities, q = task % all, n = samples.frames(b);
      const int m = static_cast<int>(task / all % p.modalities);
      const int64_t columns = smaller(kPanel<R>, d - q * kPanel<R>), place = samples.row(b) * a.ld + p.offset(m);
      R* const correlation = thread_scratch(thread);
      R* const tanhs = a.correlation ? kept_correlation(b, m, q) : correlation;
      correlate(b, m, q, 0, p.widths[m], tanhs);
      drop_correlation(b, m, q, 0, p.widths[m], tanhs, correlation, nullptr);
      pack<E>(correlation, correlation, p.widths[m]);
      R* const hidden = a.hidden + samples.row(b) * a.hidden_ld + m * d + q * kPanel<R>;
      product<E>(n, columns, {a.value + place, a.ld, 1}, correlation, p.widths[m],
                 [=](int64_t l, int64_t c, Vector<R> v) {
                   store_some<R>(hidden + l * a.hidden_ld + c, relu<R>(p.released ? tanh(v) : v), columns - c);
                 });
    });
  }

  // tanh(K_m J / sqrt(d)) for rows [i, i + rows) of C_m and panel q, as a panel [rows][kPanel].
  void correlate(int64_t b, int m, int64_t q, int64_t i, int64_t rows, R* correlation) const {
    const R* const key = a.key + samples.row(b) * a.ld + p.offset(m) + i;
    product<E>(rows, p.width() - q * kPanel<R>, {key, 1, a.ld}, joint_panel(q, b), samples.frames(b),
               [=](int64_t r, int64_t c, Vector<R> v) { store(correlation + r * kPanel<R> + c, tanh(v)); });
  }

  R* kept_correlation(int64_t b, int m, int64_t q) const {
    return a.correlation + ((b * panels<R>(p.width()) + q) * p.width() + p.offset(m)) * kPanel<R>;
  }

  // C_m: what correlate() gave, with dropout. `slope`, unless null, receives its derivative by K_m J / sqrt(d).
  void drop_correlation(int64_t b, int m, int64_t q, int64_t i, int64_t rows, const R* tanhs, R* correlation,
                        R* slope) const {
    const auto one = [&](int64_t at, Vector<R> factor) {
      const Vector<R> c = load(tanhs + at);
      if (slope) store<R>(slope + at, (1 - c * c) * factor);
      store<R>(correlation + at, c * factor);
    };
    if (p.dropout == 0) {
      if (slope || tanhs != correlation)
        for (int64_t at = 0; at < rows * kPanel<R>; at += kLanes<R>) one(at, splat<R>(1));
      return;
    }
    const Dropout drop = Dropout::at(p, seed, t, m, Site::correlation, samples.first + b);
    for (int64_t r = 0; r < rows; r += kDropoutRows)
      for (int64_t c = 0; c < kPanel<R>; c += kLanes<float>)
        each_factor<R>(drop, (i + r) / kDropoutRows, q * kPanel<R> + c, 1 / (1 - p.dropout),
                       [&](int64_t k, int64_t offset, Vector<R> factor) {
                         if (r + k < rows) one((r + k) * kPanel<R> + c + offset, factor);
                       });
  }

  // H_m W_h^T + b_h, before relu and dropout.
  void project_output(R* update) const {
    const int64_t d = p.width();
    for (int m = 0; m < p.modalities; ++m) {
      const int64_t d_m = p.widths[m];
      const R* const bias = weights.output_bias[m];
      R* const to = update + p.offset(m);
      project<E>(threads, samples.rows(), d, {a.hidden + m * d, a.hidden_ld, 1}, weights.output[m], d_m,
                 [=](int64_t r, int64_t c, Vector<R> v) {
                   store_some<R>(to + r * a.ld + c, bias ? v + load(bias + c) : v, d_m - c);
                 });
    }
  }

  // f(address offset in [rows, ld], lanes, factor) over all elements of U_m, where factor is the dropout of that site.
  template <class F>
  void each_output(F f) const {
    const int64_t groups = blocks(p.length, kFrames);
    parallel_for(threads, samples.count * groups, [&](int64_t task, int) {
      const int64_t b = task / groups, begin = task % groups * kFrames,
                    end = smaller(begin + kFrames, samples.frames(b));
      for (int m = 0; m < p.modalities; ++m) {
        const Dropout drop = Dropout::at(p, seed, t, m, Site::output, samples.first + b);
        for (int64_t l = begin; l < end; l += kDropoutRows)
          for (int64_t c = 0; c < p.widths[m]; c += kLanes<float>) {
            const auto one = [&](int64_t k, int64_t offset, Vector<R> factor) {
              const int64_t lanes = p.widths[m] - c - offset;
              if (l + k < end && lanes > 0)
                f((samples.row(b) + l + k) * a.ld + p.offset(m) + c + offset, lanes, factor);
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
    parallel_for(threads, samples.count * of_sample, [&](int64_t task, int thread) {
      int64_t q = task % of_sample;
      int m = 0;
      while (q >= panels<R>(p.widths[m])) q -= panels<R>(p.widths[m++]);
      const int64_t column = q * kPanel<R>;
      f(task / of_sample, m, column, smaller(kPanel<R>, p.widths[m] - column), thread);
    });
  }
};

}  // namespace grjca::GRJCA_ISA
