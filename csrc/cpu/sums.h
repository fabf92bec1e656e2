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

template <class E, class R = Compute<E>, class H = Held<E>>
class Sums {
 public:
  Sums(const Problem& p, const Samples& samples) : p_(p), samples_(samples) {}

  // Adds the sums of y = x W^T + b, with d_y (output, row) and x [rows, in], of R or H. A null sum is not wanted.
  template <class X>
  void linear(R* weight, R* bias, int64_t out, int64_t in, Left<R> d_y, const X* x, int64_t x_ld) {
    if (weight)
      tasks_.add({kWeight, weight, out, in, d_y, {x, x_ld}, 1}, blocks(out, kOut) * blocks(panels<R>(in), kIn));
    if (bias)
      tasks_.add({d_y.column == 1 ? kRows : kColumns, bias, out, 1, d_y, {}, 1},
                 blocks(out, d_y.column == 1 ? kFrames : kLanes<R>));
  }

  // Adds the sums of K = X^T W_k^T + b_k, times `scale`, with d_key [d_m, frames] and x [rows, d_m].
  void key(R* weight, R* bias, int64_t d_m, const R* d_key, int64_t d_ld, const R* x, int64_t x_ld, R scale) {
    const Left<R> d{d_key, d_ld, 1};
    if (weight)
      tasks_.add({kKeyWeight, weight, p_.length, d_m, d, {x, x_ld}, scale}, blocks(panels<R>(p_.length), kKeyIn));
    if (bias) tasks_.add({kKeyBias, bias, p_.length, d_m, d, {}, scale}, blocks(p_.length, kLanes<R>));
  }

  static int64_t scratch_size(const Problem& p) {
    const int64_t weight = kIn * kTerms * kPanel<R> + prepared_size<R>(kOut, kTerms);
    const int64_t key = kKeyIn * (kTerms + p.length) * kPanel<R> + prepared_size<R>(kRowBlock, kTerms);
    return larger(weight, key);
  }

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
  static constexpr int64_t kOut = kRowBlock;  // rows of a weight that one task takes
  static constexpr int64_t kIn = 6;           // panels of its columns
  static constexpr int64_t kKeyIn = 2;        // panels of the rows of W_k
  enum Kind { kWeight, kColumns, kRows, kKeyWeight, kKeyBias };

  // The rows of X are the terms. Its elements are of R or of H, and the other pointer is null.
  struct Right {
    const R* plain = nullptr;
    const H* held = nullptr;
    int64_t ld = 0;

    Right() = default;
    Right(const R* x, int64_t x_ld) : plain(x), ld(x_ld) {}
    template <class X, std::enable_if_t<std::is_same_v<X, H> && !std::is_same_v<H, R>, int> = 0>
    Right(const X* x, int64_t x_ld) : held(x), ld(x_ld) {}

    void pack(R* panel, int64_t row, int64_t column, int64_t terms, int64_t columns) const {
      const int64_t at = row * ld + column;
      plain ? pack_rows<E>(panel, plain + at, ld, terms, columns) : pack_rows<E>(panel, held + at, ld, terms, columns);
    }
  };
  struct Sum {
    Kind kind;
    R* to;
    int64_t out, in;
    Left<R> d;  // element (output, row)
    Right x;
    R scale;
  };

  const Problem& p_;
  const Samples& samples_;
  TaskList<Sum, 2 + 10 * kMaxModalities> tasks_;

  // to [out, in] += d x
  void weight(const Sum& s, int64_t task, R* space) const {
    const int64_t out_blocks = blocks(s.out, kOut), in = s.in, i = task % out_blocks * kOut;
    const int64_t column = task / out_blocks * kIn * kPanel<R>, columns = smaller(kIn * kPanel<R>, in - column);
    R* const left = space + kIn * kTerms * kPanel<R>;
    R* const to = s.to + i * in + column;
    samples_.each_block([&](int64_t k, int64_t terms) {
      for (int64_t first = 0; first < terms; first += kAtOnce)
        for (int64_t c = 0; c < columns; c += kPanel<R>)
          s.x.pack(space + c * kTerms + words<E>(first) * kPanel<R>, k + first, column + c,
                   smaller(kAtOnce, terms - first), columns - c);
      product<E>(
          smaller(kOut, s.out - i), columns, s.d.from(i, k), space, kTerms * kPanel<R>, terms, left,
          [=](int64_t r, int64_t c, Vector<R> v) { add<R>(to + r * in + c, v, columns - c); }, Fetched<R>{to, in});
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

  // Adds scale * d_key^T x^T of all samples to [l, l']. A task fetches some panels of l transposed, adds sample by
  // sample, and puts them back, so that where a chunk ends makes no difference.
  void key_weight(const Sum& s, int64_t task, R* space) const {
    const int64_t length = p_.length, first = task * kKeyIn * kPanel<R>;
    const int64_t columns = smaller(kKeyIn * kPanel<R>, length - first);
    R* const sums = space + kKeyIn * kTerms * kPanel<R>;
    R* const left = sums + kKeyIn * length * kPanel<R>;
    for (int64_t c = 0; c < columns; c += kPanel<R>)
      copy_columns(sums + c * length, s.to + (first + c) * length, length, length, columns - c);
    for (int64_t b = 0; b < samples_.count; ++b)
      add_sample(s, b, first, smaller(columns, samples_.frames(b) - first), space, sums, left);
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < length; ++r)
        s.to[(first + c) * length + r] = sums[(c / kPanel<R> * length + r) * kPanel<R> + c % kPanel<R>];
  }

  void add_sample(const Sum& s, int64_t b, int64_t first, int64_t columns, R* space, R* sums, R* left) const {
    const int64_t row = samples_.row(b), length = p_.length;
    for (int64_t k = 0; k < s.in && columns > 0; k += kTerms) {
      const int64_t terms = smaller(kTerms, s.in - k);
      for (int64_t c = 0; c < columns; c += kPanel<R>)
        pack_rows<E>(space + c * kTerms, s.d.data + k * s.d.row + row + first + c, s.d.row, terms, columns - c);
      product<E>(samples_.frames(b), columns, Left<R>{s.x.plain + row * s.x.ld + k, s.x.ld, 1}, space,
                 kTerms * kPanel<R>, terms, left, [=](int64_t r, int64_t c, Vector<R> v) {
                   R* const at = sums + (c / kPanel<R> * length + r) * kPanel<R> + c % kPanel<R>;
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
