// A tile of a matrix product: up to 128 x 128 sums in the registers of a block, operands through a ring of stages in
// shared memory. Fragments that lie wholly beyond the edge of a small tile are neither loaded nor multiplied, so a tile
// may have any size.
#pragma once

#include "fragment.h"

namespace grjca::cuda {

constexpr int kStages = 4;
constexpr int kStageBytes = kTile * 80;  // of one operand: the larger of both layouts
constexpr int kSharedBytes = kStages * 2 * kStageBytes;

// ---- operands

// Row-major, in global memory. Rows may come in groups (the samples of a chunk, `group` rows each, of which `present`
// exist and the others count as zeros); group 0 means that they do not.
template <class T>
struct Matrix {
  const T* data;
  int row;  // elements between rows
  int first = 0;
  int group = 0, present = 0;
  int64_t sample = 0;

  GRJCA_DEVICE Matrix from(int r, int column) const { return {data + column, row, first + r, group, present, sample}; }
  // Null where there is no such row.
  GRJCA_DEVICE const T* at(int r) const {
    r += first;
    if (group == 0) return data + static_cast<int64_t>(r) * row;
    const int s = r / group, l = r - s * group;
    return l < present ? data + s * sample + static_cast<int64_t>(l) * row : nullptr;
  }
  // Bytes that can be copied at once: 16, 8, 4 or sizeof(T).
  GRJCA_DEVICE int alignment() const {
    const uint64_t all = reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(row) * sizeof(T) |
                         static_cast<uint64_t>(sample) * sizeof(T) | 16;
    return static_cast<int>(all & (~all + 1));
  }
};

// Copies n elements, at most 16 bytes, with zeros up to 16 bytes, as two pieces of 8 bytes.
template <class T>
GRJCA_DEVICE void copy_halves(T* to, const T* from, int n) {
  constexpr int kSize = sizeof(T), kHalf = 8 / kSize;
  copy_async<8>(to, from, least(n, kHalf) * kSize);
  copy_async<8>(to + kHalf, from + kHalf, n > kHalf ? (n - kHalf) * kSize : 0);
}

// The same in pieces of 4 bytes, or of one element.
template <class T>
GRJCA_DEVICE void copy_words(T* to, const T* from, int n, int bytes) {
  const int step = bytes / static_cast<int>(sizeof(T));
  GRJCA_LOOP
  for (int k = 0; k < 16 / static_cast<int>(sizeof(T)); k += step) {
    const int here = n - k < 0 ? 0 : n - k < step ? n - k : step, valid = here * static_cast<int>(sizeof(T));
    const T* const source = here > 0 ? from + k : from;
    if (sizeof(T) == 4 || bytes == 4)
      copy_async<4>(to + k, source, valid);
    else
      write_shared(to + k, here > 0 ? *source : T{});
  }
}

// The same in the largest pieces that an alignment of `bytes` allows.
template <class T>
GRJCA_DEVICE void copy_pieces(T* to, const T* from, int n, int bytes) {
  if (bytes == 16)
    copy_async<16>(to, from, n * static_cast<int>(sizeof(T)));
  else if (bytes == 8)
    copy_halves(to, from, n);
  else
    copy_words(to, from, n, bytes);
}

// One operand of a product. The lines of a tile are its rows (A) or columns (B) if the terms are contiguous, or else
// its terms; a thread always copies the same 16 bytes of the same lines. kGrouped: lines are terms, and come in groups.
template <class T, Major kMajor, int kOuter, bool kGrouped>
struct Loader {
  static constexpr bool kByTerms = kMajor == Major::terms;
  static constexpr int kChunk = 16 / sizeof(T), kChunks = (kByTerms ? kTerms<T> : kTile) / kChunk;
  static constexpr int kStep = kThreads / kChunks;  // lines between two that a thread copies
  static constexpr int kCopies = (kByTerms ? kOuter : kTerms<T>) / kStep, kWidth = kLine<T, kMajor>;

  Matrix<T> matrix;
  int place;                // in a stage, of what this thread copies first
  int terms, width;         // from there on; elements of the chunk that exist, if the lines are terms
  uint32_t lines[kCopies];  // if the terms are contiguous: where they begin
  uint32_t flags;           // bit i: line i is wanted, bit 8 + i: it exists; above, how many bytes are copied at once

  GRJCA_DEVICE bool wanted(int i) const { return flags >> i & 1; }
  GRJCA_DEVICE bool exists(int i) const { return flags >> (8 + i) & 1; }
  GRJCA_DEVICE int bytes() const { return static_cast<int>(flags >> 16); }

  // The loader fills rows or columns up to `last`, with zeros from `outer` on.
  GRJCA_DEVICE void begin(const Thread& me, const Matrix<T>& from, int outer, int last, int n_terms) {
    const int line = me.index / kChunks, chunk = me.index % kChunks * kChunk;
    matrix = from;
    place = line * kWidth + chunk;
    flags = static_cast<uint32_t>(matrix.alignment()) << 16;
    if constexpr (kByTerms) {
      terms = n_terms - chunk;
      GRJCA_UNROLL
      for (int i = 0; i < kCopies; ++i) {
        const int r = line + i * kStep;
        const T* const begin = r < outer ? matrix.at(r) : nullptr;
        lines[i] = begin ? static_cast<uint32_t>(begin - matrix.data) : 0;
        flags |= static_cast<uint32_t>(r < last) << i | static_cast<uint32_t>(begin != nullptr) << (8 + i);
      }
      if (terms > 0) matrix.data += chunk;
    } else {
      terms = n_terms - line;
      width = between(outer - chunk, 0, kChunk);
      flags |= chunk < last ? 1 : 0;
      matrix.first += line;
      if (!kGrouped && terms > 0) matrix.data += static_cast<int64_t>(matrix.first) * matrix.row;
      if (width > 0) matrix.data += chunk;
    }
  }

  static GRJCA_DEVICE int between(int n, int least, int most) { return n < least ? least : n < most ? n : most; }

  // f(i, where from, elements) for every line that this thread copies, from term `term` on.
  template <class F>
  GRJCA_DEVICE void each(int term, F f) const {
    if constexpr (kByTerms) {
      const int n = between(terms - term, 0, kChunk);
      const T* const from = matrix.data + (n > 0 ? term : 0);
      GRJCA_UNROLL
      for (int i = 0; i < kCopies; ++i)
        if (wanted(i)) f(i, from + lines[i], exists(i) ? n : 0);
    } else if (wanted(0)) {
      int s = 0, l = 0;
      if constexpr (kGrouped) {
        const int r = matrix.first + term;
        s = r / matrix.group;
        l = r - s * matrix.group;
      }
      GRJCA_UNROLL
      for (int i = 0; i < kCopies; ++i) {
        bool here = i * kStep < terms - term;
        const T* from = matrix.data;
        if constexpr (kGrouped) {
          here = here && l < matrix.present;
          if (here) from += s * matrix.sample + static_cast<int64_t>(l) * matrix.row;
          l += kStep;
          if (l >= matrix.group) {
            l -= matrix.group;
            ++s;
          }
        } else if (here) {
          from += static_cast<int64_t>(term + i * kStep) * matrix.row;
        }
        f(i, from, here ? width : 0);
      }
    }
  }

  // Starts the copies of terms `term`, ... into a stage, in pieces if rows do not begin at multiples of 16 bytes.
  GRJCA_DEVICE void load(T* stage, int term) const {
    T* const to = stage + place;
    if (bytes() == 16) {
      each(term, [&](int i, const T* from, int n) {
        copy_async<16>(to + i * kStep * kWidth, from, n * static_cast<int>(sizeof(T)));
      });
    } else if (bytes() == 8) {  // as rows of 300 frames are; this branch is taken once, and not for every line
      each(term, [&](int i, const T* from, int n) { copy_halves(to + i * kStep * kWidth, from, n); });
    } else {
      each(term, [&](int i, const T* from, int n) { copy_words(to + i * kStep * kWidth, from, n, bytes()); });
    }
  }
};

// ---- sums

// The sums of a block. Its warps stand 2 x 2 and their fragments, 16 rows and 16 columns each, alternate, so that all
// have work at an edge.
template <int kRows>
struct Sums {
  static constexpr int kRowWarps = 2, kColumnWarps = kThreads / kWarp / kRowWarps;
  static constexpr int kFragments = kRows / 16 / kRowWarps, kPairs = kTile / 16 / kColumnWarps;
  Thread me;
  float values[kFragments][2 * kPairs][4];

  GRJCA_DEVICE Sums() {
    me = this_thread();
    GRJCA_UNROLL
    for (auto& of_row : values) {
      GRJCA_UNROLL
      for (auto& fragment : of_row) {
        GRJCA_UNROLL
        for (float& x : fragment) x = 0;
      }
    }
  }

  GRJCA_DEVICE int row(int i) const { return (me.warp() % kRowWarps + kRowWarps * i) * 16; }
  GRJCA_DEVICE int column(int j) const { return (me.warp() / kRowWarps + kColumnWarps * j) * 16; }
};

template <class M>
using SumsOf = Sums<M::kRows>;

template <class T, class M, Major kA, Major kB, bool kWhole>
GRJCA_DEVICE void multiply_stage(SumsOf<M>& sums, const T* a, const T* b, int rows, int columns) {
  using S = SumsOf<M>;
  GRJCA_UNROLL_BY(kWhole ? M::kUnrolled : 1)
  for (int term = 0; term < kTerms<T>; term += M::kUnit) {
    typename M::A as[S::kFragments];
    GRJCA_UNROLL
    for (int i = 0; i < S::kFragments; ++i) {
      const int row = kWhole || sums.row(i) < rows ? sums.row(i) : 0;  // always one, or the compiler needs memory
      as[i] = M::template load_a<kA>(sums.me, a + place<kA>(row, term, kLine<T, kA>), kLine<T, kA>);
    }
    GRJCA_UNROLL
    for (int j = 0; j < S::kPairs; ++j)
      if (kWhole || sums.column(j) < columns) {
        const typename M::B bs =
            M::template load_b<kB>(sums.me, b + place<kB>(sums.column(j), term, kLine<T, kB>), kLine<T, kB>);
        GRJCA_UNROLL
        for (int i = 0; i < S::kFragments; ++i)
          if (kWhole || sums.row(i) < rows) {
            M::add(sums.values[i][2 * j], as[i], bs, 0);
            M::add(sums.values[i][2 * j + 1], as[i], bs, 1);
          }
      }
  }
}

GRJCA_BOTH int up_to_fragments(int n) { return (n + 15) / 16 * 16; }

// Whether the block computes a tile as if it had most_rows x kTile elements, of which some are zeros. The loop over
// terms is then unrolled, as it has no branch for each fragment. A tile waits for L2 and not for the tensor cores, so
// they can do half as much again for nothing.
GRJCA_BOTH bool computed_whole(int rows, int columns, int most_rows) {
  return 3 * rows * columns >= 2 * most_rows * kTile;
}

// sums += A B, of which rows x columns are wanted, M::kRows x kTile at most; A is [rows, terms], B [terms, columns].
// The matrices in memory are A or, where not the terms are contiguous, its transpose; B's transpose, or B.
template <class T, class M, Major kA, Major kB, bool kGrouped = false>
GRJCA_DEVICE void product(SumsOf<M>& sums, const Matrix<T>& a, const Matrix<T>& b, int rows, int columns, int terms) {
  Loader<T, kA, M::kRows, kGrouped> load_a;
  Loader<T, kB, kTile, kGrouped> load_b;
  const bool whole = computed_whole(rows, columns, M::kRows);
  load_a.begin(sums.me, a, rows, whole ? M::kRows : up_to_fragments(rows), terms);
  load_b.begin(sums.me, b, columns, whole ? kTile : up_to_fragments(columns), terms);
  char* const shared = shared_memory();
  const auto stage = [shared](int step, int operand) {
    return reinterpret_cast<T*>(shared + (step % kStages * 2 + operand) * kStageBytes);
  };
  const int steps = tiles(terms, kTerms<T>);
  block_barrier();  // whoever used shared memory before is done
  GRJCA_LOOP
  for (int step = 1 - kStages; step < steps; ++step) {  // the first ones only load: the code for it is there once
    if (step >= 0) {
      copy_wait<kStages - 2>();
      block_barrier();
    }
    const int next = step + kStages - 1;
    if (next < steps) {
      load_a.load(stage(next, 0), next * kTerms<T>);
      load_b.load(stage(next, 1), next * kTerms<T>);
    }
    copy_commit();
    if (step < 0) continue;
    if (whole)
      multiply_stage<T, M, kA, kB, true>(sums, stage(step, 0), stage(step, 1), rows, columns);
    else
      multiply_stage<T, M, kA, kB, false>(sums, stage(step, 0), stage(step, 1), rows, columns);
  }
}

// ---- results

struct alignas(8) Pair {
  float x, y;
};

// Two neighbours in a row, of which the second may not exist.
template <class T>
GRJCA_DEVICE void store_pair(T* to, float x0, float x1, bool both) {
  if (both && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0) {
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint32_t*>(to) = pack<T>(x0, x1);
    } else {
      *reinterpret_cast<uint64_t*>(to) = static_cast<uint64_t>(bits_of(x1)) << 32 | bits_of(x0);
    }
    return;
  }
  to[0] = narrow_to<T>(x0);
  if (both) to[1] = narrow_to<T>(x1);
}

constexpr int kSumsLine = kTile + 8;  // floats in shared memory, so that a fragment's rows lie in different banks

// f(prepared, loaded, row, column, two neighbours in a row, whether the second exists) for every row and every other
// column. prepare(row, column) is called for rows 8 k only, and serves the eight from there on; load(prepared, row,
// column, whether the second exists) is called for all eight before f is for the first: a thread waits once for what
// comes from L2, and not eight times. The sums go through shared memory, so that neighbouring threads have neighbouring
// columns, and the code is there once and not for every fragment.
template <class S, class P, class L, class F>
GRJCA_DEVICE void finish(const S& sums, int rows, int columns, P prepare, L load, F f) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int g = sums.me.g(), t = sums.me.t();
  block_barrier();  // all have multiplied what is in the stages
  GRJCA_UNROLL
  for (int i = 0; i < S::kFragments; ++i) {
    GRJCA_UNROLL
    for (int j = 0; j < 2 * S::kPairs; ++j)
      if (sums.row(i) < rows && sums.column(j / 2) < columns) {
        float* const to = shared + (sums.row(i) + g) * kSumsLine + sums.column(j / 2) + j % 2 * 8 + 2 * t;
        write_shared(reinterpret_cast<Pair*>(to), Pair{sums.values[i][j][0], sums.values[i][j][1]});
        write_shared(reinterpret_cast<Pair*>(to + 8 * kSumsLine), Pair{sums.values[i][j][2], sums.values[i][j][3]});
      }
  }
  block_barrier();
  const int pairs = (columns + 1) / 2, groups = (rows + 7) / 8;
  GRJCA_LOOP
  for (int i = sums.me.index; i < pairs * groups; i += kThreads) {
    const int row = i / pairs * 8, column = i % pairs * 2;
    const bool both = column + 1 < columns;
    const auto prepared = prepare(row, column);
    using Loaded = decltype(load(prepared, row, column, both));
    Loaded loaded[8];
    GRJCA_UNROLL
    for (int k = 0; k < 8; ++k)  // always written, or the compiler needs memory
      loaded[k] = row + k < rows ? load(prepared, row + k, column, both) : Loaded{};
    GRJCA_UNROLL
    for (int k = 0; k < 8; ++k)
      if (row + k < rows) {
        const Pair x = read_shared(reinterpret_cast<const Pair*>(shared + (row + k) * kSumsLine + column));
        f(prepared, loaded[k], row + k, column, x.x, x.y, both);
      }
  }
}

struct Nothing {};
template <class S, class P, class F>
GRJCA_DEVICE void finish(const S& sums, int rows, int columns, P prepare, F f) {
  finish(
      sums, rows, columns, prepare, [](const auto&, int, int, bool) { return Nothing{}; },
      [&](const auto& prepared, Nothing, int r, int c, float x0, float x1, bool both) {
        f(prepared, r, c, x0, x1, both);
      });
}

// Two neighbours as they stand in memory, so that nothing waits for them before they are used.
template <class T>
struct Stored {
  uint32_t first, second;  // 16-bit types: both in `first`

  GRJCA_DEVICE Pair wide() const {
    if constexpr (sizeof(T) == 2)
      return {widen(T{static_cast<uint16_t>(first)}), widen(T{static_cast<uint16_t>(first >> 16)})};
    else
      return {float_of(first), float_of(second)};
  }
};

template <class T>
GRJCA_DEVICE Stored<T> load_pair(const T* from, bool both) {
  if constexpr (sizeof(T) == 2) {
    if (both && reinterpret_cast<uintptr_t>(from) % 4 == 0) return {*reinterpret_cast<const uint32_t*>(from), 0};
    return {bits_of(from[0]) | (both ? bits_of(from[1]) << 16 : 0), 0};
  } else {
    return {bits_of(from[0]), both ? bits_of(from[1]) : 0};
  }
}

}  // namespace grjca::cuda
