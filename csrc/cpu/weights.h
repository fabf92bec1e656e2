// The weights of one iteration in arithmetic type, packed as right operands of matrix products.
#pragma once

#include "storage.h"
#include "workspace.h"

namespace grjca::GRJCA_ISA {

template <class R>
struct LayerWeights {
  // for x W^T + b: panels of W^T, and biases padded to whole panels; null in the paper form where it has none
  R *query, *query_bias;
  R *key[kMaxModalities], *key_bias[kMaxModalities];  // W_k is a left operand, and stays [L, L]
  R *value[kMaxModalities], *value_bias[kMaxModalities];
  R *output[kMaxModalities], *output_bias[kMaxModalities];
  // for d_y W, in the backward: panels of W
  R *query_back, *value_back[kMaxModalities], *output_back[kMaxModalities];

  static LayerWeights plan(const Problem& p, bool backward, Arena& arena) {
    LayerWeights w{};
    const int64_t d = p.width();
    const auto packed = [&](int64_t terms, int64_t columns) {
      return arena.take<R>(panels<R>(columns) * terms * kPanel<R>);
    };
    const auto bias = [&](int64_t n) { return p.released ? packed(1, n) : nullptr; };
    if (p.projected) w.query = packed(d, d);
    if (p.projected && backward) w.query_back = packed(d, d);
    if (p.projected) w.query_bias = bias(d);
    for (int m = 0; m < p.modalities; ++m) {
      const int64_t d_m = p.widths[m];
      w.key[m] = arena.take<R>(p.length * p.length);
      w.value[m] = packed(d_m, d_m);
      w.output[m] = packed(d, d_m);
      w.key_bias[m] = bias(p.length);
      w.value_bias[m] = bias(d_m);
      w.output_bias[m] = bias(d_m);
      if (backward) w.value_back[m] = packed(d_m, d_m);
      if (backward) w.output_back[m] = packed(d_m, d);
    }
    return w;
  }

  template <class S>
  void fill(const Problem& p, const void* const* parameters, int t, int threads) {
    const ParameterIndex index{p};
    const int64_t d = p.width();
    TaskList<Piece<S>, 6 * kMaxModalities + 3 + kMaxModalities * 2> pieces;
    const auto add = [&](R* forward, R* backward, R* bias, int i, int64_t out, int64_t in) {
      const S* const weight = static_cast<const S*>(parameters[i]);
      pieces.add({Piece<S>::kTransposed, forward, weight, out, in}, panels<R>(out));
      if (backward) pieces.add({Piece<S>::kPlain, backward, weight, out, in}, panels<R>(in));
      if (bias) pieces.add({Piece<S>::kBias, bias, static_cast<const S*>(parameters[i + 1]), out, 1}, panels<R>(out));
    };
    if (p.projected) add(query, query_back, query_bias, index.query(t), d, d);
    for (int m = 0; m < p.modalities; ++m) {
      const int64_t d_m = p.widths[m];
      const void* const* of_key = parameters + index.key(t, m);
      pieces.add({Piece<S>::kCopy, key[m], static_cast<const S*>(of_key[0]), p.length, p.length}, p.length);
      if (p.released)
        pieces.add({Piece<S>::kBias, key_bias[m], static_cast<const S*>(of_key[1]), p.length, 1}, panels<R>(p.length));
      add(value[m], value_back[m], value_bias[m], index.value(t, m), d_m, d_m);
      add(output[m], output_back[m], output_bias[m], index.output(t, m), d_m, d);
    }
    pieces.run(threads, [](const Piece<S>& piece, int64_t task, int) { piece.fill(task); });
  }

 private:
  template <class S>
  struct Piece {
    enum Kind { kTransposed, kPlain, kCopy, kBias } kind;
    R* to;
    const S* from;  // [out, in]
    int64_t out, in;

    void fill(int64_t task) const {
      const int64_t c = task * kPanel<R>;
      if (kind == kTransposed) pack_columns<Operand<S>>(to + c * in, from + c * in, in, in, out - c);
      if (kind == kPlain) pack_rows<Operand<S>>(to + c * out, from + c, in, out, in - c);
      if (kind == kBias) copy_columns(to + c, from + c, 1, 1, out - c);
      if (kind == kCopy) load_row(to + task * in, from + task * in, 1, in);
    }
  };
};

}  // namespace grjca::GRJCA_ISA
