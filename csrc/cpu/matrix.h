// Matrix products on packed panels: a tile of kTileRows x two vectors stays in registers while the sum runs. E is the
// type of the operands (storage.h), R that of sums and of all that is kept.
#pragma once

#include <type_traits>

#include "pairs.h"
#include "storage.h"
#include "vector.h"

namespace grjca::GRJCA_ISA {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class R>
int64_t panels(int64_t columns) {
  return blocks(columns, kPanel<R>);
}

// Distance between rows of a workspace matrix: whole vectors, and never a multiple of the page, where rows would all
// fall into the same cache set.
template <class R>
int64_t leading(int64_t columns) {
  const int64_t padded = blocks(columns, kPanel<R>) * kPanel<R>;
  return padded * sizeof(R) % 1024 ? padded : padded + kPanel<R>;
}

// Whether panels hold words of two terms, each in the place of an R. They take half the room of the same panel of R.
template <class E>
constexpr bool kPaired = !std::is_same_v<E, Compute<E>>;

// Where an even term of a panel stands.
template <class E, class R = Compute<E>>
int64_t place_of(int64_t term) {
  return (kPaired<E> ? term / 2 : term) * kPanel<R>;
}

// Element (i, k) of a left operand: at data[i * row + k * column], and one of these steps is 1. If the sum is split,
// part s of `depth` terms begins at data + s * split.
template <class R>
struct Left {
  const R* data;
  int64_t row, column;
  int64_t split = 0;
};

// Terms by which a left operand of large steps is fetched ahead.
constexpr int64_t kAhead = 16;

// acc += A B for a tile: a[r] is row r of A (step between terms), b is a panel [terms][kPanel].
template <class R, int V>
GRJCA_INLINE void multiply(Vector<R> (&acc)[kTileRows][V], const R* const (&a)[kTileRows], int64_t step, const R* b,
                           int64_t terms) {
  for (int64_t k = 0, ka = 0; k < terms; ++k, ka += step, b += kPanel<R>) {
    if (step != 1) __builtin_prefetch(a[0] + ka + kAhead * step);  // rows a page apart, which no processor foresees
    Vector<R> right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes<R>);
    for (int r = 0; r < kTileRows; ++r) {
      const Vector<R> left = splat(a[r][ka]);
      for (int v = 0; v < V; ++v) acc[r][v] += left * right[v];
    }
  }
}

// Terms after which a sum is put aside and begun anew: rounding then grows with the square root of kRun and of the
// number of runs, not of their product.
constexpr int64_t kRun = 64;

// One tile: the sum over all splits, or over runs of terms where there is one split.
template <class R, int V>
GRJCA_INLINE void tile(Vector<R> (&acc)[kTileRows][V], const R* (&a)[kTileRows], int64_t step, int64_t split,
                       const R* panel, int64_t terms, int64_t splits) {
  multiply<R, V>(acc, a, step, panel, splits > 1 ? terms : smaller(kRun, terms));
  for (int64_t s = 1; s < splits; ++s) {
    for (int r = 0; r < kTileRows; ++r) a[r] += split;
    multiply<R, V>(acc, a, step, panel + s * terms * kPanel<R>, terms);
  }
  for (int64_t k = kRun; splits == 1 && k < terms; k += kRun) {
    for (int r = 0; r < kTileRows; ++r) a[r] += kRun * step;
    Vector<R> run[kTileRows][V] = {};
    multiply<R, V>(run, a, step, panel + k * kPanel<R>, smaller(kRun, terms - k));
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] += run[r][v];
  }
}

// The same in pairs: those of the left operand are made here, some terms at a time. Beside what rounding the operands
// does, that of the sum is nothing, and it needs no runs.
template <class E, int V, bool kAlong, class R = Compute<E>>
GRJCA_INLINE void tile_of_pairs(Vector<R> (&acc)[kTileRows][V], const R* a, int64_t row, int64_t column, int64_t rows,
                                const R* panel, int64_t terms) {
  constexpr int64_t kWords = kRun / 2, kRow = kAlong ? kWords : 1, kStep = kAlong ? 1 : kTileRows;
  uint32_t words[kTileRows * kWords];
  for (int64_t k = 0; k < terms; k += kRun) {
    const int64_t count = smaller(kRun, terms - k);
    if constexpr (kAlong)
      for (int64_t r = 0; r < kTileRows; ++r) pair_along(words + r * kWords, a + k + smaller(r, rows - 1) * row, count);
    else
      pair_across(words, a + k * column, column, count, rows);
    const R* b = panel + place_of<E>(k);
    const uint32_t* left = words;
    for (int64_t pair = 0; pair < blocks(count, 2); ++pair, b += kPanel<R>, left += kStep) {
      Vector<R> right[V];
      for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes<R>);
      for (int r = 0; r < kTileRows; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = add_products(acc[r][v], left[r * kRow], right[v]);
    }
  }
}

template <class E, int V, class R, class Epilogue>
GRJCA_INLINE void product_of_width(int64_t rows, const Left<R>& a, const R* panel, int64_t terms, int64_t splits,
                                   Epilogue epilogue) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    Vector<R> acc[kTileRows][V] = {};
    const int64_t present = smaller(kTileRows, rows - i);
    if constexpr (kPaired<E>) {
      for (int64_t s = 0; s < splits; ++s) {
        const R *const from = a.data + i * a.row + s * a.split, *const b = panel + place_of<E>(s * terms);
        if (a.column == 1)
          tile_of_pairs<E, V, true>(acc, from, a.row, 1, present, b, terms);
        else
          tile_of_pairs<E, V, false>(acc, from, 1, a.column, present, b, terms);
      }
    } else {
      const R* row[kTileRows];
      for (int r = 0; r < kTileRows; ++r) row[r] = a.data + smaller(i + r, rows - 1) * a.row;
      if (a.column == 1)
        tile<R, V>(acc, row, 1, a.split, panel, terms, splits);
      else
        tile<R, V>(acc, row, a.column, a.split, panel, terms, splits);
    }
    for (int r = 0; r < kTileRows; ++r)
      if (r < present)
        for (int v = 0; v < V; ++v) epilogue(i + r, v * kLanes<R>, acc[r][v]);
  }
}

// [rows x columns] = A * panel, columns <= kPanel; epilogue(row, column, vector) receives it vector by vector.
template <class E, class R = Compute<E>, class Epilogue>
inline void product(int64_t rows, int64_t columns, Left<R> a, const R* panel, int64_t terms, Epilogue epilogue,
                    int64_t splits = 1) {
  if (columns > kLanes<R>)
    product_of_width<E, 2>(rows, a, panel, terms, splits, epilogue);
  else
    product_of_width<E, 1>(rows, a, panel, terms, splits, epilogue);
}

// rows[k][c] = from[k * step + c], zero beyond `columns`.
template <class S, class R>
inline void copy_rows(R* panel, const S* from, int64_t step, int64_t terms, int64_t columns) {
  columns = smaller(columns, kPanel<R>);
  for (int64_t k = 0; k < terms; ++k, panel += kPanel<R>, from += step) {
    for (int64_t c = 0; c < columns; ++c) panel[c] = widen(from[c]);
    for (int64_t c = columns; c < kPanel<R>; ++c) panel[c] = 0;
  }
}

// rows[k][c] = from[c * step + k], zero beyond `columns`.
template <class S, class R>
inline void copy_columns(R* panel, const S* from, int64_t step, int64_t terms, int64_t columns) {
  columns = smaller(columns, kPanel<R>);
  int64_t done = 0;  // columns
#ifdef GRJCA_SHUFFLES
  constexpr int kSquare = kLanes<R>;
  for (; done + kSquare <= columns; done += kSquare) {
    int64_t k = 0;
    for (; k + kSquare <= terms; k += kSquare) {
      Vector<R> rows[kSquare];
      for (int c = 0; c < kSquare; ++c) {
        R row[kSquare];
        load_row(row, from + (done + c) * step + k, 1, kSquare);
        rows[c] = load(row);
      }
      transpose<R>(rows);
      for (int r = 0; r < kSquare; ++r) store(panel + (k + r) * kPanel<R> + done, rows[r]);
    }
    for (; k < terms; ++k)
      for (int c = 0; c < kSquare; ++c) panel[k * kPanel<R> + done + c] = widen(from[(done + c) * step + k]);
  }
#endif
  for (int64_t k = 0; k < terms; ++k) {
    for (int64_t c = done; c < columns; ++c) panel[k * kPanel<R> + c] = widen(from[c * step + k]);
    for (int64_t c = columns; c < kPanel<R>; ++c) panel[k * kPanel<R> + c] = 0;
  }
}

// The panel of rows [terms][kPanel]. It may begin where they do.
template <class E, class R = Compute<E>>
inline void pack(R* panel, const R* rows, int64_t terms) {
  if constexpr (kPaired<E>) {
    for (int64_t k = 0; k < terms; k += 2)
      for (int64_t c = 0; c < kPanel<R>; c += kLanes<R>) {
        const R* const even = rows + k * kPanel<R> + c;
        store(panel + place_of<E>(k) + c, pair(load(even), k + 1 < terms ? load(even + kPanel<R>) : Vector<R>{}));
      }
  } else if (panel != rows) {
    std::memcpy(panel, rows, terms * kPanel<R> * sizeof(R));
  }
}

// The panel of what copy(rows, first term, terms) copies.
template <class E, class R, class Copy>
inline void pack_by(R* panel, int64_t terms, Copy copy) {
  if constexpr (kPaired<E>) {
    R rows[kPanel<R> * kPanel<R>];
    for (int64_t k = 0; k < terms; k += kPanel<R>) {
      const int64_t count = smaller(kPanel<R>, terms - k);
      copy(rows, k, count);
      pack<E>(panel + place_of<E>(k), rows, count);
    }
  } else {
    copy(panel, 0, terms);
  }
}

// The panel whose term k is from[k * step + column].
template <class E, class S, class R>
inline void pack_rows(R* panel, const S* from, int64_t step, int64_t terms, int64_t columns) {
  pack_by<E>(panel, terms, [=](R* rows, int64_t k, int64_t n) { copy_rows(rows, from + k * step, step, n, columns); });
}

// The panel whose term k is from[column * step + k].
template <class E, class S, class R>
inline void pack_columns(R* panel, const S* from, int64_t step, int64_t terms, int64_t columns) {
  pack_by<E>(panel, terms, [=](R* rows, int64_t k, int64_t n) { copy_columns(rows, from + k, step, n, columns); });
}

}  // namespace grjca::GRJCA_ISA
