// The forward keeps for the backward, beside X^t, the pieces of every iteration that the problem names, in the type of
// the activations (storage.h). Rows are the present frames of the batch, one after another.
#pragma once

#include "storage.h"
#include "workspace.h"

namespace grjca::GRJCA_ISA {

// Rows of held activations stand so far apart: multiples of 64 bytes, and never of the page (see leading()).
template <class H>
constexpr int64_t held_leading(int64_t columns) {
  const int64_t bytes = (columns * static_cast<int64_t>(sizeof(H)) + 63) / 64 * 64;
  return (bytes % 1024 ? bytes : bytes + 64) / static_cast<int64_t>(sizeof(H));
}

// The signs of a vector take a byte for each lane; the words are as wide as its lanes.
template <class R>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef uint8_t bytes __attribute__((vector_size(GRJCA_VECTOR_BYTES / 4)));
  typedef Words words;
};
template <>
struct LanesOf<double> {
  typedef uint8_t bytes __attribute__((vector_size(GRJCA_VECTOR_BYTES / 8)));
  typedef uint64_t words __attribute__((vector_size(GRJCA_VECTOR_BYTES)));
};
template <class R>
using Signs = typename LanesOf<R>::bytes;
template <class R>
using WordsOf = typename LanesOf<R>::words;

// These are the pieces of one iteration. A piece that is not kept is null.
template <class H>
struct SavedActivations {
  H *joint, *key, *value;  // [rows, ld]
  H* hidden;               // [rows, ld of all modalities side by side]
  H* correlation;          // tanh(K J / sqrt(d)), [sample][d][ld]
  uint8_t* signs;          // where U is positive: a bit for each of 8 frames, [sample][frames / 8][d]

  static SavedActivations plan(const Problem& p, Arena& arena) {
    const int64_t d = p.width(), rows = p.batch * p.length, ld = held_leading<H>(d);
    const auto take = [&](Keep piece, int64_t size) { return p.keeps(piece) ? arena.take<H>(size) : nullptr; };
    SavedActivations k{};
    k.joint = take(Keep::joint, rows * ld);
    k.key = take(Keep::key, rows * ld);
    k.value = take(Keep::value, rows * ld);
    k.hidden = take(Keep::hidden, rows * held_leading<H>(p.modalities * d));
    k.correlation = take(Keep::correlation, p.batch * d * ld);
    if (p.keeps(Keep::signs)) k.signs = arena.take<uint8_t>(p.batch * blocks(p.length, 8) * d);
    return k;
  }

  static int64_t bytes(const Problem& p) {
    Arena measuring(nullptr);
    plan(p, measuring);
    return static_cast<int64_t>(measuring.used());
  }

  // Finds the pieces of iteration t, from 0, in what was kept.
  static SavedActivations of(const Problem& p, void* kept, int t) {
    if (!kept) return {};
    Arena placed(static_cast<char*>(kept) + t * bytes(p));
    return plan(p, placed);
  }
};

}  // namespace grjca::GRJCA_ISA
