// This file multiplies a left operand, prepared by rows, by packed panels of a right one. A tile of kTileRows x two
// vectors stays in registers while the sum runs. E is the type of the operands (storage.h), R that of sums, T that of
// what an operand is made from.
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

// A paired operand holds words of two terms, each in the place of an R.
template <class E>
constexpr bool kPaired = !std::is_same_v<E, Compute<E>>;

template <class E>
int64_t words(int64_t terms) {
  return kPaired<E> ? blocks(terms, 2) : terms;
}

// ---- left operands

// Element (i, k) of a left operand: at data[i * row + k * column], and one of these steps is 1.
template <class T>
struct Left {
  const T* data;
  int64_t row, column;

  Left from(int64_t i, int64_t k = 0) const { return {data + i * row + k * column, row, column}; }
};

// A product reads a left operand in this form: word k of row r of a tile stands at data[r * row + k * step], and the
// tiles of kTileRows rows stand `tile` apart.
template <class R>
struct Prepared {
  const R* data;
  int64_t rows, tile, row, step;
};

// A product prepares so many rows of its left operand at a time.
constexpr int64_t kRowBlock = 128;

template <class E, class R = Compute<E>>
int64_t prepared_size(int64_t rows, int64_t terms) {
  return blocks(rows, kTileRows) * kTileRows * leading<R>(words<E>(terms));
}

// A copy takes so many terms of all rows or panels before it takes the next ones, so that it reads memory along its
// lines.
constexpr int64_t kAtOnce = 64;

// Fills row `to` with the words of `terms` consecutive values.
template <class E, class T, class R = Compute<E>>
GRJCA_INLINE void prepare_row(R* to, const T* from, int64_t terms) {
  if constexpr (kPaired<E>)
    pair_along(to, from, terms);
  else
    load_row(to, from, 1, terms);
}

// Fills a tile with words: to[k * kTileRows + r] = from[k * step + r] for r < rows.
template <class E, class T, class R = Compute<E>>
GRJCA_INLINE void prepare_tile(R* to, const T* from, int64_t step, int64_t terms, int64_t rows) {
  if constexpr (kPaired<E>) {
    pair_across(to, from, step, terms, rows);
  } else if (rows >= kTileRows) {
    for (int64_t k = 0; k < terms; ++k, to += kTileRows, from += step) {
      R row[kTileRows];
      for (int r = 0; r < kTileRows; ++r) row[r] = widen(from[r]);
      std::memcpy(to, row, sizeof row);
    }
  } else {
    for (int64_t k = 0; k < terms; ++k, to += kTileRows, from += step)
      for (int64_t r = 0; r < kTileRows; ++r) to[r] = r < rows ? widen(from[r]) : 0;
  }
}

// Takes the operand where it is if products can read it there, and else copies it to `space`.
template <class E, class T, class R = Compute<E>>
inline Prepared<R> prepare(int64_t rows, Left<T> a, int64_t terms, R* space) {
  if (a.column == 1) {
    if constexpr (std::is_same_v<T, E>)
      if (!kPaired<E> || (terms % 2 == 0 && a.row % 2 == 0)) {
        const int64_t row = words<E>(a.row);
        return {reinterpret_cast<const R*>(a.data), rows, row * kTileRows, row, 1};
      }
    const int64_t row = leading<R>(words<E>(terms));
    for (int64_t i = 0; i < rows; ++i) prepare_row<E>(space + i * row, a.data + i * a.row, terms);
    return {space, rows, row * kTileRows, row, 1};
  }
  const int64_t size = words<E>(terms) * kTileRows;
  for (int64_t k = 0; k < terms; k += kAtOnce)
    for (int64_t i = 0; i < rows; i += kTileRows)
      prepare_tile<E>(space + i / kTileRows * size + words<E>(k) * kTileRows, a.data + i + k * a.column, a.column,
                      smaller(kAtOnce, terms - k), rows - i);
  return {space, rows, size, 1, kTileRows};
}

// ---- products

// Terms after which a sum is put aside and begun anew: rounding then grows with the square root of kRun and of the
// number of runs, not of their product.
constexpr int64_t kRun = 128;

// Clears them in registers, where `= {}` makes GCC fill memory.
template <class R, int V>
GRJCA_INLINE void clear(Vector<R> (&acc)[kTileRows][V]) {
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = Vector<R>{};
}

// Adds A B to a tile: a[r] is row r of A, whose terms stand Step apart, and b is a panel [words][kPanel].
template <class E, int V, int Step, class R = Compute<E>>
GRJCA_INLINE void multiply(Vector<R> (&acc)[kTileRows][V], const R* const (&a)[kTileRows], const R* b, int64_t count) {
  for (int64_t k = 0; k < count; ++k, b += kPanel<R>) {
    Vector<R> right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes<R>);
    for (int r = 0; r < kTileRows; ++r) {
      if constexpr (kPaired<E>) {
        for (int v = 0; v < V; ++v) acc[r][v] = add_products(acc[r][v], a[r] + k * Step, right[v]);
      } else {
        const Vector<R> left = splat(a[r][k * Step]);
        for (int v = 0; v < V; ++v) acc[r][v] += left * right[v];
      }
    }
  }
}

// Computes one tile. Pairs need no runs: beside what rounding the operands does, that of the sum is nothing.
template <class E, int V, int Step, class R = Compute<E>>
GRJCA_INLINE void tile(Vector<R> (&acc)[kTileRows][V], const R* (&a)[kTileRows], const R* panel, int64_t count) {
  if constexpr (kPaired<E>) {
    multiply<E, V, Step>(acc, a, panel, count);
  } else {
    multiply<E, V, Step>(acc, a, panel, smaller(kRun, count));
    for (int64_t k = kRun; k < count; k += kRun) {
      for (int r = 0; r < kTileRows; ++r) a[r] += kRun * Step;
      Vector<R> run[kTileRows][V];
      clear<R, V>(run);
      multiply<E, V, Step>(run, a, panel + k * kPanel<R>, smaller(kRun, count - k));
      for (int r = 0; r < kTileRows; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] += run[r][v];
    }
  }
}

// Names what an epilogue reads, rows of T that stand `ld` apart, or nothing: a product fetches them while its sum runs.
template <class T>
struct Fetched {
  const T* data = nullptr;
  int64_t ld = 0;

  Fetched from(int64_t row, int64_t column) const { return data ? Fetched{data + row * ld + column, ld} : *this; }
  template <class R>
  GRJCA_INLINE void fetch(int64_t row, int64_t rows) const {
    if (!data) return;
    for (int64_t r = row; r < row + rows; ++r)
      for (int64_t c = 0; c < kPanel<R>; c += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(data + r * ld + c, 1);
  }
};

template <class E, int V, int Step, class R, class Epilogue, class F>
GRJCA_INLINE void product_of(const Prepared<R>& a, const R* panel, int64_t terms, Epilogue epilogue,
                             Fetched<F> fetched) {
  const R* of_tile = a.data;
  for (int64_t i = 0; i < a.rows; i += kTileRows, of_tile += a.tile) {
    const int64_t present = smaller(kTileRows, a.rows - i);
    fetched.template fetch<R>(i, present);
    const R* row[kTileRows];
    for (int r = 0; r < kTileRows; ++r) row[r] = of_tile + smaller(r, present - 1) * a.row;
    Vector<R> acc[kTileRows][V];
    clear<R, V>(acc);
    tile<E, V, Step>(acc, row, panel, words<E>(terms));
    for (int r = 0; r < kTileRows; ++r)
      if (r < present)
        for (int v = 0; v < V; ++v) epilogue(i + r, v * kLanes<R>, acc[r][v]);
  }
}

// [rows x columns] = A * panel, columns <= kPanel; epilogue(row, column, vector) receives it vector by vector.
template <class E, class R, class Epilogue, class F = R>
inline void product(const Prepared<R>& a, int64_t columns, const R* panel, int64_t terms, Epilogue epilogue,
                    Fetched<F> fetched = {}) {
  if (columns > kLanes<R>)
    a.step == 1 ? product_of<E, 2, 1>(a, panel, terms, epilogue, fetched)
                : product_of<E, 2, kTileRows>(a, panel, terms, epilogue, fetched);
  else
    a.step == 1 ? product_of<E, 1, 1>(a, panel, terms, epilogue, fetched)
                : product_of<E, 1, kTileRows>(a, panel, terms, epilogue, fetched);
}

// This product has any number of columns, in panels that stand `step` apart. It prepares kRowBlock rows in `space`.
template <class E, class T, class R, class Epilogue, class F = R>
inline void product(int64_t rows, int64_t columns, Left<T> a, const R* panel, int64_t step, int64_t terms, R* space,
                    Epilogue epilogue, Fetched<F> fetched = {}) {
  for (int64_t i = 0; i < rows; i += kRowBlock) {
    const Prepared<R> block = prepare<E>(smaller(kRowBlock, rows - i), a.from(i), terms, space);
    for (int64_t q = 0; q < panels<R>(columns); ++q) {
      const int64_t column = q * kPanel<R>;
      product<E>(
          block, columns - column, panel + q * step, terms,
          [=](int64_t r, int64_t c, Vector<R> v) { epilogue(i + r, column + c, v); }, fetched.from(i, column));
    }
  }
}

// ---- panels

// rows[k][c] = from[k * step + c], zero beyond `columns`.
template <class S, class R>
inline void copy_rows(R* panel, const S* from, int64_t step, int64_t terms, int64_t columns) {
  if (columns >= kPanel<R>) {
    for (int64_t k = 0; k < terms; ++k, panel += kPanel<R>, from += step)
      for (int64_t c = 0; c < kPanel<R>; c += kLanes<R>) store(panel + c, load_wide<R>(from + c));
    return;
  }
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
      for (int c = 0; c < kSquare; ++c) rows[c] = load_wide<R>(from + (done + c) * step + k);
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
    for (int64_t k = 0; k < terms; k += 2, panel += kPanel<R>)
      for (int64_t c = 0; c < kPanel<R>; c += kLanes<R>) {
        const R* const even = rows + k * kPanel<R> + c;
        store(panel + c, pair(load(even), k + 1 < terms ? load(even + kPanel<R>) : Vector<R>{}));
      }
  } else if (panel != rows) {
    std::memcpy(panel, rows, terms * kPanel<R> * sizeof(R));
  }
}

// Makes a panel of the rows that copy(rows, first term, terms) copies.
template <class E, class R, class Copy>
inline void pack_by(R* panel, int64_t terms, Copy copy) {
  if constexpr (kPaired<E>) {
    R rows[kPanel<R> * kPanel<R>];
    for (int64_t k = 0; k < terms; k += kPanel<R>) {
      const int64_t count = smaller(kPanel<R>, terms - k);
      copy(rows, k, count);
      pack<E>(panel + k / 2 * kPanel<R>, rows, count);
    }
  } else {
    copy(panel, 0, terms);
  }
}

// The panel whose term k is from[k * step + column].
template <class E, class S, class R>
inline void pack_rows(R* panel, const S* from, int64_t step, int64_t terms, int64_t columns) {
  if constexpr (kPaired<E> && std::is_same_v<S, E>)
    if (columns >= kPanel<R>) {
      for (int64_t k = 0; k < terms; k += 2, panel += kPanel<R>)
        for (int64_t c = 0; c < kPanel<R>; c += kLanes<R>) {
          Halves even, odd{};
          std::memcpy(&even, from + k * step + c, sizeof even);
          if (k + 1 < terms) std::memcpy(&odd, from + (k + 1) * step + c, sizeof odd);
          store(panel + c, pair(even, odd));
        }
      return;
    }
  pack_by<E>(panel, terms, [=](R* rows, int64_t k, int64_t n) { copy_rows(rows, from + k * step, step, n, columns); });
}

// The panel whose term k is from[column * step + k].
template <class E, class S, class R>
inline void pack_columns(R* panel, const S* from, int64_t step, int64_t terms, int64_t columns) {
  if constexpr (kPaired<E> && std::is_same_v<S, E>)
    if (terms % 2 == 0 && step % 2 == 0)  // pairs stand side by side, and are moved as they are
      return copy_columns(panel, reinterpret_cast<const R*>(from), step / 2, terms / 2, columns);
  pack_by<E>(panel, terms, [=](R* rows, int64_t k, int64_t n) { copy_columns(rows, from + k, step, n, columns); });
}

}  // namespace grjca::GRJCA_ISA
