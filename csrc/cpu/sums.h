// Gradients of weights and biases: sums over the rows of a chunk, each added to in the same order on any number of
// threads.
#pragma once

#include "storage.h"
#include "workspace.h"

namespace grjca::GRJCA_ISA {

template <class R>
GRJCA_INLINE void add(R* to, Vector<R> v, int64_t lanes) {
  store_some<R>(to, load_some<R>(to, lanes) + v, lanes);
}

template <class E, class R = Compute<E>>
class Sums {
 public:
  Sums(const Problem& p, const Samples& samples) : p_(p), samples_(samples) {}

  // Those of y = x W^T + b, with d_y [rows, out] and x [rows, in]; a null sum is not wanted. `transposed`: d_y is
  // [out, rows].
  void linear(R* weight, R* bias, int64_t out, int64_t in, const R* d_y, int64_t d_ld, bool transposed, const R* x,
              int64_t x_ld) {
    const int64_t row = transposed ? 1 : d_ld, column = transposed ? d_ld : 1;
    if (weight)
      tasks_.add({kWeight, weight, out, in, {d_y, column, row}, x, x_ld, 1}, panels<R>(in) * blocks(out, kOut));
    if (bias)
      tasks_.add({transposed ? kRows : kColumns, bias, out, 1, {d_y, column, row}, nullptr, 0, 1},
                 blocks(out, transposed ? kFrames : kLanes<R>));
  }

  // Those of K = X^T W_k^T + b_k, times `scale`, with d_key [d_m, frames] and x [rows, d_m].
  void key(R* weight, R* bias, int64_t d_m, const R* d_key, int64_t d_ld, const R* x, int64_t x_ld, R scale) {
    const Left<R> d{d_key, d_ld, 1};
    if (weight) tasks_.add({kKeyWeight, weight, p_.length, d_m, d, x, x_ld, scale}, panels<R>(p_.length));
    if (bias) tasks_.add({kKeyBias, bias, p_.length, d_m, d, nullptr, 0, scale}, blocks(p_.length, kLanes<R>));
  }

  static int64_t scratch_size(const Problem& p) { return (kTerms + p.length) * kPanel<R>; }

  void run(int threads, R* scratch, int64_t scratch_step) const {
    tasks_.run(threads, [&](const Sum& sum, int64_t task, int thread) {
      R* const own = scratch + thread * scratch_step;
      if (sum.kind == kWeight) weight(sum, task, own);
      if (sum.kind == kColumns) columns(sum, task);
      if (sum.kind == kRows) rows(sum, task);
      if (sum.kind == kKeyWeight) key_weight(sum, task, own);
      if (sum.kind == kKeyBias) key_bias(sum, task);
    });
  }

 private:
  static constexpr int64_t kOut = 128;  // rows of a weight that one task takes
  enum Kind { kWeight, kColumns, kRows, kKeyWeight, kKeyBias };
  struct Sum {
    Kind kind;
    R* to;
    int64_t out, in;
    Left<R> d;  // element (output, row)
    const R* x;
    int64_t x_ld;
    R scale;
  };

  const Problem& p_;
  const Samples& samples_;
  TaskList<Sum, 2 + 10 * kMaxModalities> tasks_;

  // to [out, in] += d x
  void weight(const Sum& s, int64_t task, R* panel) const {
    const int64_t out_blocks = blocks(s.out, kOut), in = s.in;
    const int64_t column = task / out_blocks * kPanel<R>, i = task % out_blocks * kOut;
    R* const to = s.to + i * in + column;
    samples_.each_block([&](int64_t k, int64_t terms) {
      pack_rows<E>(panel, s.x + k * s.x_ld + column, s.x_ld, terms, in - column);
      product<E>(smaller(kOut, s.out - i), in - column, {s.d.data + i * s.d.row + k * s.d.column, s.d.row, s.d.column},
                 panel, terms, [=](int64_t r, int64_t c, Vector<R> v) { add<R>(to + r * in + c, v, in - column - c); });
    });
  }

  void columns(const Sum& s, int64_t task) const {
    const int64_t c = task * kLanes<R>, lanes = s.out - c;
    samples_.each_block([&](int64_t k, int64_t terms) {
      Vector<R> part{};
      for (int64_t r = 0; r < terms; r += kFrames) {
        Vector<R> run{};
        for (int64_t i = r; i < smaller(r + kFrames, terms); ++i)
          run += load_some<R>(s.d.data + (k + i) * s.d.column + c, lanes);
        part += run;
      }
      add<R>(s.to + c, part, lanes);
    });
  }

  void rows(const Sum& s, int64_t task) const {
    for (int64_t i = task * kFrames; i < smaller((task + 1) * kFrames, s.out); ++i)
      samples_.each_block([&](int64_t k, int64_t terms) {
        Vector<R> part{};
        for (int64_t r = 0; r < terms; r += kLanes<R>) part += load_some<R>(s.d.data + i * s.d.row + k + r, terms - r);
        s.to[i] += sum<R>(part);
      });
  }

  // to [l, l'] += scale * sum over samples of d_key^T x^T, a panel of l at a time: it is fetched transposed, added to
  // sample by sample, and put back, so that where a chunk ends makes no difference.
  void key_weight(const Sum& s, int64_t task, R* panel) const {
    const int64_t length = p_.length, column = task * kPanel<R>, columns = smaller(kPanel<R>, length - column);
    R* const sum_t = panel + kTerms * kPanel<R>;
    copy_columns(sum_t, s.to + column * length, length, length, columns);
    for (int64_t b = 0; b < samples_.count; ++b)
      add_sample(s, b, column, smaller(columns, samples_.frames(b) - column), panel, sum_t);
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < length; ++r) s.to[(column + c) * length + r] = sum_t[r * kPanel<R> + c];
  }

  void add_sample(const Sum& s, int64_t b, int64_t column, int64_t columns, R* panel, R* sum_t) const {
    const int64_t first = samples_.row(b);
    for (int64_t k = 0; k < s.in && columns > 0; k += kTerms) {
      const int64_t terms = smaller(kTerms, s.in - k);
      pack_rows<E>(panel, s.d.data + k * s.d.row + first + column, s.d.row, terms, columns);
      product<E>(samples_.frames(b), columns, {s.x + first * s.x_ld + k, s.x_ld, 1}, panel, terms,
                 [=](int64_t r, int64_t c, Vector<R> v) {
                   R* const at = sum_t + r * kPanel<R> + c;
                   store<R>(at, load(at) + v * s.scale);
                 });
    }
  }

  void key_bias(const Sum& s, int64_t task) const {
    const int64_t l = task * kLanes<R>;
    for (int64_t b = 0; b < samples_.count; ++b) {
      const int64_t lanes = samples_.frames(b) - l;
      if (lanes <= 0) continue;
      Vector<R> part{};
      for (int64_t i = 0; i < s.in; i += kFrames) {
        Vector<R> run{};
        for (int64_t k = i; k < smaller(i + kFrames, s.in); ++k)
          run += load_some<R>(s.d.data + k * s.d.row + samples_.row(b) + l, lanes);
        part += run;
      }
      add<R>(s.to + l, part * s.scale, smaller(lanes, p_.length - l));
    }
  }
};

}  // namespace grjca::GRJCA_ISA
