// The weights of one iteration in arithmetic type, packed as right operands of matrix products.
#pragma once

#include "storage.h"
#include "workspace.h"

namespace grjca::GRJCA_ISA {

template <class R>
struct LayerWeights {
  // for x W^T + b: panels of W^T, and biases padded to whole panels; null in the paper form where it has none
  R *query, *query_bias;
  R *key[kMaxModalities], *key_bias[kMaxModalities];  // W_k is a left operand, in prepared rows
  R *value[kMaxModalities], *value_bias[kMaxModalities];
  R *output[kMaxModalities], *output_bias[kMaxModalities];
  // for d_y W, in the backward: panels of W, and W_k^T in prepared tiles
  R *query_back, *key_back[kMaxModalities], *value_back[kMaxModalities], *output_back[kMaxModalities];

  // A backward packs for itself, beside its own, the weights of what it computes anew; the others stay null.
  static LayerWeights plan(const Problem& p, bool backward, Arena& arena) {
    LayerWeights w{};
    const int64_t d = p.width();
    const auto packed = [&](int64_t terms, int64_t columns) {
      return arena.take<R>(panels<R>(columns) * terms * kPanel<R>);
    };
    const auto bias = [&](int64_t n) { return p.released ? packed(1, n) : nullptr; };
    const auto needed = [&](Keep piece) { return !backward || !p.keeps(piece); };
    if (p.projected && needed(Keep::joint)) {
      w.query = packed(d, d);
      w.query_bias = bias(d);
    }
    if (p.projected && backward) w.query_back = packed(d, d);
    for (int m = 0; m < p.modalities; ++m) {
      const int64_t d_m = p.widths[m];
      if (needed(Keep::key)) {
        w.key[m] = arena.take<R>(prepared_size<R>(p.length, p.length));
        w.key_bias[m] = bias(p.length);
      }
      if (needed(Keep::value)) {
        w.value[m] = packed(d_m, d_m);
        w.value_bias[m] = bias(d_m);
      }
      if (needed(Keep::signs)) {
        w.output[m] = packed(d, d_m);
        w.output_bias[m] = bias(d_m);
      }
      if (backward) w.key_back[m] = arena.take<R>(prepared_size<R>(p.length, p.length));
      if (backward) w.value_back[m] = packed(d_m, d_m);
      if (backward) w.output_back[m] = packed(d_m, d);
    }
    return w;
  }

  // These return the first `frames` rows of W_k, and of its transpose.
  template <class E>
  Prepared<R> key_rows(const Problem& p, int m, int64_t frames) const {
    const int64_t row = leading<R>(words<E>(p.length));
    return {key[m], frames, row * kTileRows, row, 1};
  }
  template <class E>
  Prepared<R> key_columns(const Problem& p, int m, int64_t frames) const {
    return {key_back[m], frames, words<E>(p.length) * kTileRows, 1, kTileRows};
  }

  template <class S>
  void fill(const Problem& p, const void* const* parameters, int t, int threads) {
    const ParameterIndex index{p};
    const int64_t d = p.width();
    TaskList<Piece<S>, 3 + 9 * kMaxModalities> pieces;
    const auto piece = [&](auto kind, R* to, int i, int64_t out, int64_t in, int64_t tasks) {
      if (to) pieces.add({kind, to, static_cast<const S*>(parameters[i]), out, in}, tasks);
    };
    const auto add = [&](R* forward, R* backward, R* bias, int i, int64_t out, int64_t in) {
      piece(Piece<S>::kTransposed, forward, i, out, in, panels<R>(out));
      piece(Piece<S>::kPlain, backward, i, out, in, panels<R>(in));
      piece(Piece<S>::kBias, bias, i + 1, out, 1, panels<R>(out));
    };
    if (p.projected) add(query, query_back, query_bias, index.query(t), d, d);
    for (int m = 0; m < p.modalities; ++m) {
      const int64_t d_m = p.widths[m], n = p.length;
      const int i = index.key(t, m);
      piece(Piece<S>::kRow, key[m], i, n, n, n);
      piece(Piece<S>::kTile, key_back[m], i, n, n, blocks(n, kTileRows));
      piece(Piece<S>::kBias, key_bias[m], i + 1, n, 1, panels<R>(n));
      add(value[m], value_back[m], value_bias[m], index.value(t, m), d_m, d_m);
      add(output[m], output_back[m], output_bias[m], index.output(t, m), d_m, d);
    }
    pieces.run(threads, [](const Piece<S>& piece, int64_t task, int) { piece.fill(task); });
  }

 private:
  template <class S>
  struct Piece {
    enum Kind { kTransposed, kPlain, kBias, kRow, kTile } kind;
    R* to;
    const S* from;  // [out, in]
    int64_t out, in;

    void fill(int64_t task) const {
      using E = Operand<S>;
      const int64_t c = task * kPanel<R>, i = task * kTileRows;
      if (kind == kTransposed) pack_columns<E>(to + c * in, from + c * in, in, in, out - c);
      if (kind == kPlain) pack_rows<E>(to + c * out, from + c, in, out, in - c);
      if (kind == kBias) copy_columns(to + c, from + c, 1, 1, out - c);
      if (kind == kRow) prepare_row<E>(to + task * leading<R>(words<E>(in)), from + task * in, in);
      if (kind == kTile) prepare_tile<E>(to + i * words<E>(out), from + i, in, out, in - i);
    }
  };
};

}  // namespace grjca::GRJCA_ISA
