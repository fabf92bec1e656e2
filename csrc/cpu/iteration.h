// One iteration, equation by equation, on the rows of some samples. The forward runs it, and so does the backward to
// recompute what the forward did not keep.
#pragma once

#include <math.h>

#include "dropout.h"
#include "saved_activations.h"
#include "storage.h"
#include "tanh.h"
#include "weights.h"
#include "workspace.h"

namespace grjca::GRJCA_ISA {

// Activations of one iteration. Matrices are [rows, ld] with the modalities side by side.
template <class E, class H = Held<E>, class R = Compute<E>>
struct Activations {
  int64_t ld, held_ld, hidden_ld;
  R* x;
  H *joint, *key, *value;  // [rows, held_ld]
  H* hidden;               // [rows, hidden_ld]
  H* correlation;          // tanh(K_m J / sqrt(d)), [sample][row of all C][held_ld]; null: not held
  uint8_t* signs;          // where U is positive (saved_activations.h); null: not held
  R* joint_panels;         // J as the correlation reads it, [sample][panel][frames][kPanel]

  static Activations of(const Problem& p) {
    Activations a{};
    a.ld = leading<R>(p.width());
    a.held_ld = held_leading<H>(p.width());
    a.hidden_ld = held_leading<H>(p.width() * p.modalities);
    return a;
  }
  // The first plans what the sums of the weights' gradients read, the second what only passes from equation to
  // equation. What the forward keeps has its place already.
  void plan_lasting(const Problem& p, int64_t rows, Arena& arena) {
    x = arena.take<R>(rows * ld);
    if (!p.keeps(Keep::hidden)) hidden = arena.take<H>(rows * hidden_ld);
  }
  void plan_passing(const Problem& p, int64_t rows, Arena& arena) {
    joint_panels = arena.take<R>(panels<R>(p.width()) * rows * kPanel<R>);
    if (!p.keeps(Keep::joint)) joint = arena.take<H>(rows * held_ld);
    if (!p.keeps(Keep::key)) key = arena.take<H>(rows * held_ld);
    if (!p.keeps(Keep::value)) value = arena.take<H>(rows * held_ld);
  }
  // Points to the kept pieces of samples from `first` on, whose frames begin at `row` of the batch.
  void place(const Problem& p, const SavedActivations<H>& kept, int64_t first, int64_t row) {
    if (kept.joint) joint = kept.joint + row * held_ld;
    if (kept.key) key = kept.key + row * held_ld;
    if (kept.value) value = kept.value + row * held_ld;
    if (kept.hidden) hidden = kept.hidden + row * hidden_ld;
    if (kept.correlation) correlation = kept.correlation + first * p.width() * held_ld;
    if (kept.signs) signs = kept.signs + first * blocks(p.length, kDropoutRows) * p.width();
  }
};

// A task takes so many panels at once. One thread takes all of them, because every task prepares its left operand anew;
// several threads take as many as leave them tasks enough.
inline int64_t panels_per_task(int threads, int64_t all, int64_t others) {
  return threads > 1 ? larger(2, smaller(4, all * others / (8 * threads))) : larger(1, all);
}

// Multiplies rows by packed weights and calls epilogue(row, column, vector). Every thread has `step` of scratch.
template <class E, class T, class R = Compute<E>, class Epilogue, class F = R>
inline void project(int threads, int64_t rows, int64_t terms, Left<T> a, const R* weights, int64_t columns, R* scratch,
                    int64_t step, Epilogue epilogue, Fetched<F> fetched = {}) {
  const int64_t all = panels<R>(columns), row_blocks = blocks(rows, kRowBlock);
  const int64_t per_task = panels_per_task(threads, all, row_blocks), panel_blocks = blocks(all, per_task);
  const int64_t block = blocks(blocks(rows, larger(1, row_blocks)), kTileRows) * kTileRows;  // so that all are alike
  parallel_for(threads, row_blocks * panel_blocks, [=](int64_t task, int thread) {
    const int64_t i = task / panel_blocks * block, column = task % panel_blocks * per_task * kPanel<R>;
    product<E>(
        smaller(block, rows - i), smaller(per_task * kPanel<R>, columns - column), a.from(i), weights + column * terms,
        terms * kPanel<R>, terms, scratch + thread * step,
        [=](int64_t r, int64_t c, Vector<R> v) { epilogue(i + r, column + c, v); }, fetched.from(i, column));
  });
}

template <class E>
struct Iteration {
  using R = Compute<E>;
  using H = Held<E>;

  const Problem& p;
  const Samples& samples;
  const LayerWeights<R>& weights;
  const Activations<E>& a;
  uint64_t seed;
  int t;  // from 0
  int threads;
  R* scratch;  // scratch_size() for each thread
  int64_t scratch_step;

  static int64_t scratch_size(const Problem& p) {
    int64_t widest = 0;
    for (int m = 0; m < p.modalities; ++m) widest = larger(widest, p.widths[m]);
    const int64_t left = prepared_size<R>(kRowBlock, p.width());
    const int64_t attend = widest * kPanel<R> + prepared_size<R>(widest, p.length) + left;
    return larger(larger(left, attend), p.length * kPanel<R>);
  }

  static R key_scale(const Problem& p) { return static_cast<R>(1 / sqrt(static_cast<double>(p.width()))); }

  R* thread_scratch(int thread) const { return scratch + thread * scratch_step; }
  R* joint_panel(int64_t q, int64_t b) const {
    return a.joint_panels + (samples.row(b) * panels<R>(p.width()) + q * samples.frames(b)) * kPanel<R>;
  }
  template <class T, class Epilogue, class F = R>
  void project_rows(int64_t terms, Left<T> left, const R* packed, int64_t columns, Epilogue epilogue,
                    Fetched<F> fetched = {}) const {
    project<E>(threads, samples.rows(), terms, left, packed, columns, scratch, scratch_step, epilogue, fetched);
  }

  // J = [X_v, X_a] W_q^T + b_q, or J = [X_v, X_a].
  void project_joint() const {
    const int64_t d = p.width(), ld = a.held_ld;
    H* const joint = a.joint;
    const R* const bias = weights.query_bias;
    if (p.projected)
      project_rows(d, Left<R>{a.x, a.ld, 1}, weights.query, d, [=](int64_t r, int64_t c, Vector<R> v) {
        store_some(joint + r * ld + c, v + load(bias + c), d - c);
      });
    else
      each_frame(p, samples, threads, [&](int64_t, int64_t, int64_t row, int) {
        if (row >= 0) store_row(joint + row * ld, 1, a.x + row * a.ld, d);
      });
  }

  // Packs J as the correlation takes it.
  void pack_joint() const {
    const int64_t all = panels<R>(p.width());
    parallel_for(threads, samples.count * all, [&](int64_t task, int) {
      const int64_t b = task / all, q = task % all, column = q * kPanel<R>;
      pack_rows<E>(joint_panel(q, b), a.joint + samples.row(b) * a.held_ld + column, a.held_ld, samples.frames(b),
                   p.width() - column);
    });
  }

  // K_m = X_m^T W_k^T + b_k, held transposed [L, d_m] and already divided by sqrt(d).
  void project_key() const {
    const R scale = key_scale(p);
    each_modality_panel([&](int64_t b, int m, int64_t column, int64_t columns, int thread) {
      R* const panel = thread_scratch(thread);
      const int64_t n = samples.frames(b), row = samples.row(b), offset = p.offset(m) + column, ld = a.held_ld;
      pack_rows<E>(panel, a.x + row * a.ld + offset, a.ld, n, columns);
      const R* const bias = weights.key_bias[m];
      H* const key = a.key + row * ld + offset;
      product<E>(weights.template key_rows<E>(p, m, n), columns, panel, n, [=](int64_t l, int64_t c, Vector<R> v) {
        if (bias) v += bias[l];
        store_some(key + l * ld + c, v * scale, columns - c);
      });
    });
  }

  // V_m = X_m W_v^T + b_v.
  void project_value() const {
    for (int m = 0; m < p.modalities; ++m) {
      const int64_t d_m = p.widths[m], offset = p.offset(m), ld = a.held_ld;
      const R* const bias = weights.value_bias[m];
      H* const value = a.value + offset;
      project_rows(d_m, Left<R>{a.x + offset, a.ld, 1}, weights.value[m], d_m, [=](int64_t r, int64_t c, Vector<R> v) {
        store_some(value + r * ld + c, bias ? v + load(bias + c) : v, d_m - c);
      });
    }
  }

  // C_m = drop(tanh(K_m J / sqrt(d))), one panel of columns at a time in scratch; H_m = relu(tanh(V_m C_m)). Where C is
  // held, it is computed only if `correlated` is false.
  void attend(bool correlated = false) const {
    const int64_t d = p.width(), all = panels<R>(d);
    const int64_t per_task = panels_per_task(threads, all, samples.count * p.modalities);
    const int64_t panel_blocks = blocks(all, per_task);
    parallel_for(threads, samples.count * p.modalities * panel_blocks, [&](int64_t task, int thread) {
      const int64_t b = task / panel_blocks / p.modalities, first = task % panel_blocks * per_task;
      const int m = static_cast<int>(task / panel_blocks % p.modalities);
      const int64_t n = samples.frames(b), d_m = p.widths[m], place = samples.row(b) * a.held_ld + p.offset(m);
      R* const panel = thread_scratch(thread);
      R* const key_space = panel + d_m * kPanel<R>;
      R* const value_space = key_space + prepared_size<R>(d_m, n);
      Prepared<R> key{};
      if (!correlated) key = prepare<E>(d_m, Left<H>{a.key + place, 1, a.held_ld}, n, key_space);
      for (int64_t q = first; q < smaller(first + per_task, all); ++q) {
        const int64_t column = q * kPanel<R>, columns = d - column;
        if (correlated)
          load_correlation(b, m, q, 0, d_m, panel);
        else
          correlate(key, b, m, q, 0, panel);
        drop_correlation(b, m, q, 0, d_m,
                         [=](int64_t at, Vector<R> factor) { store<R>(panel + at, load(panel + at) * factor); });
        pack<E>(panel, panel, d_m);
        H* const hidden = a.hidden + samples.row(b) * a.hidden_ld + m * d + column;
        product<E>(n, smaller(kPanel<R>, columns), Left<H>{a.value + place, a.held_ld, 1}, panel, 0, d_m, value_space,
                   [=](int64_t l, int64_t c, Vector<R> v) {
                     store_some(hidden + l * a.hidden_ld + c, relu<R>(p.released ? tanh(v) : v), columns - c);
                   });
      }
    });
  }

  H* held_correlation(int64_t b, int m, int64_t q, int64_t i) const {
    return a.correlation + (b * p.width() + p.offset(m) + i) * a.held_ld + q * kPanel<R>;
  }

  // Computes panel q of tanh(K_m J / sqrt(d)), as [rows][kPanel]. `key` holds the rows of C_m from i on.
  void correlate(const Prepared<R>& key, int64_t b, int m, int64_t q, int64_t i, R* panel) const {
    const int64_t columns = p.width() - q * kPanel<R>, ld = a.held_ld;
    H* const held = a.correlation ? held_correlation(b, m, q, i) : nullptr;
    product<E>(key, columns, joint_panel(q, b), samples.frames(b), [=](int64_t r, int64_t c, Vector<R> v) {
      const Vector<R> y = rounded<H, R>(tanh(v));
      store(panel + r * kPanel<R> + c, y);
      if (held) store_some(held + r * ld + c, y, columns - c);
    });
  }
  // Copies the same panel from where it is held.
  void load_correlation(int64_t b, int m, int64_t q, int64_t i, int64_t rows, R* panel) const {
    copy_rows(panel, held_correlation(b, m, q, i), a.held_ld, rows, p.width() - q * kPanel<R>);
  }

  // Calls f(place in a panel [rows][kPanel], factor) for rows [i, i + rows) of C_m and panel q, where factor is the
  // dropout.
  template <class F>
  void drop_correlation(int64_t b, int m, int64_t q, int64_t i, int64_t rows, F f) const {
    if (p.dropout == 0) {
      for (int64_t at = 0; at < rows * kPanel<R>; at += kLanes<R>) f(at, splat<R>(1));
      return;
    }
    const Dropout drop = Dropout::at(p, seed, t, m, Site::correlation, samples.first + b);
    for (int64_t r = 0; r < rows; r += kDropoutRows)
      for (int64_t c = 0; c < kPanel<R>; c += kLanes<float>)
        each_factor<R>(drop, (i + r) / kDropoutRows, q * kPanel<R> + c, 1 / (1 - p.dropout),
                       [&](int64_t k, int64_t offset, Vector<R> factor) {
                         if (r + k < rows) f((r + k) * kPanel<R> + c + offset, factor);
                       });
  }

  // H_m W_h^T + b_h, before relu and dropout: [rows, ld].
  void project_output(R* update) const {
    const int64_t d = p.width(), ld = a.ld;
    for (int m = 0; m < p.modalities; ++m) {
      const int64_t d_m = p.widths[m];
      const R* const bias = weights.output_bias[m];
      R* const to = update + p.offset(m);
      project_rows(d, Left<H>{a.hidden + m * d, a.hidden_ld, 1}, weights.output[m], d_m,
                   [=](int64_t r, int64_t c, Vector<R> v) {
                     store_some(to + r * ld + c, bias ? v + load(bias + c) : v, d_m - c);
                   });
    }
  }

  // Calls f(address offset in [rows, ld], lanes, factor, place among the signs, frame of 8) for all elements of U_m,
  // where factor is the dropout of that site.
  template <class F>
  void each_output(F f) const {
    const int64_t groups = blocks(p.length, kFrames), of_signs = blocks(p.length, kDropoutRows);
    parallel_for(threads, samples.count * groups, [&](int64_t task, int) {
      const int64_t b = task / groups, begin = task % groups * kFrames,
                    end = smaller(begin + kFrames, samples.frames(b));
      for (int m = 0; m < p.modalities; ++m) {
        const Dropout drop = Dropout::at(p, seed, t, m, Site::output, samples.first + b);
        for (int64_t l = begin; l < end; l += kDropoutRows)
          for (int64_t c = 0; c < p.widths[m]; c += kLanes<float>) {
            const int64_t signs = (b * of_signs + l / kDropoutRows) * p.width() + p.offset(m) + c;
            const auto one = [&](int64_t k, int64_t offset, Vector<R> factor) {
              const int64_t lanes = p.widths[m] - c - offset;
              if (l + k < end && lanes > 0)
                f((samples.row(b) + l + k) * a.ld + p.offset(m) + c + offset, lanes, factor, signs + offset, k);
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

  // Sets bit k of the signs of some columns where u is positive or NaN.
  void keep_signs(int64_t at, int64_t lanes, int64_t k, Vector<R> u) const {
    Signs<R> signs = k ? load_signs(at, lanes) : Signs<R>{};
    signs |= __builtin_convertvector(u <= 0 ? WordsOf<R>{} : WordsOf<R>{} + (1u << k), Signs<R>);
    if (lanes >= kLanes<R>)
      std::memcpy(a.signs + at, &signs, sizeof signs);
    else
      std::memcpy(a.signs + at, &signs, lanes);
  }
  // Returns what passes the relu of U: d where u is positive or NaN, and elsewhere 0.
  Vector<R> where_positive(int64_t at, int64_t lanes, int64_t k, Vector<R> d) const {
    return (__builtin_convertvector(load_signs(at, lanes), WordsOf<R>) & (1u << k)) != 0 ? d : Vector<R>{};
  }
  Signs<R> load_signs(int64_t at, int64_t lanes) const {
    Signs<R> signs{};
    if (lanes >= kLanes<R>)
      std::memcpy(&signs, a.signs + at, sizeof signs);
    else
      std::memcpy(&signs, a.signs + at, lanes);
    return signs;
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
