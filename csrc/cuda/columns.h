// The columns of a frame, divided among the lanes of a warp: 16 bytes each, in turn.
#pragma once

#include "numbers.h"

namespace grjca::cuda {

template <class T>
constexpr int kColumns = 16 / static_cast<int>(sizeof(T));  // of a lane, at once

template <class T>
struct Columns {
  float x[kColumns<T>] = {};

  template <class F>
  GRJCA_DEVICE void each(F f) {
    GRJCA_UNROLL
    for (int i = 0; i < kColumns<T>; ++i) f(x[i], i);
  }
};

struct alignas(16) Words {
  uint32_t words[4];
};

// Columns as they stand in memory, so that nothing waits for them before they are used.
template <class T>
struct StoredColumns {
  Words all;

  GRJCA_DEVICE Columns<T> wide() const {
    Columns<T> to;
    to.each([&](float& x, int i) {
      if constexpr (sizeof(T) == 2)
        x = widen(T{static_cast<uint16_t>(all.words[i / 2] >> i % 2 * 16)});
      else
        x = float_of(all.words[i]);
    });
    return to;
  }
};

// n of them from `from` on, with `step` elements between two; the others are 0.
template <class T>
GRJCA_DEVICE StoredColumns<T> load_stored(const T* from, int n, int64_t step = 1) {
  if (n >= kColumns<T> && step == 1 && reinterpret_cast<uintptr_t>(from) % 16 == 0)
    return {*reinterpret_cast<const Words*>(from)};
  constexpr int kOfWord = 4 / sizeof(T);
  StoredColumns<T> to{};
  GRJCA_UNROLL
  for (int i = 0; i < kColumns<T>; ++i)
    to.all.words[i / kOfWord] |= (i < n ? bits_of(from[i * step]) : 0) << i % kOfWord * 16;
  return to;
}
template <class T>
GRJCA_DEVICE Columns<T> load_columns(const T* from, int n, int64_t step = 1) {
  return load_stored(from, n, step).wide();
}

template <class T>
GRJCA_DEVICE void store_columns(T* to, int n, int64_t step, Columns<T> from) {
  if (n >= kColumns<T> && step == 1 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    Words all{};
    from.each([&](float& x, int i) {
      if constexpr (sizeof(T) == 2)
        all.words[i / 2] |= static_cast<uint32_t>(narrow_to<T>(x).bits) << i % 2 * 16;
      else
        all.words[i] = bits_of(x);
    });
    *reinterpret_cast<Words*>(to) = all;
  } else {
    from.each([&](float& x, int i) {
      if (i < n) to[i * step] = narrow_to<T>(x);
    });
  }
}

template <class T>
GRJCA_DEVICE float dot(Columns<T> a, const Columns<T>& b) {
  float sum = 0;
  a.each([&](float& x, int i) { sum += x * b.x[i]; });
  return sum;
}

// f(first column of this lane, which may lie beyond the last) until there are no more; all lanes call it equally often.
template <class T, class F>
GRJCA_DEVICE void each_columns(const Thread& me, int width, F f) {
  constexpr int kOfWarp = kWarp * kColumns<T>;
  GRJCA_LOOP
  for (int c = 0; c < width; c += kOfWarp) f(c + me.lane() * kColumns<T>);
}

GRJCA_DEVICE float sum_of_warp(float x) {
  GRJCA_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// A tensor of the caller, [B, L, columns]: so many columns of a frame, as floats; 0 beyond the last, or where there is
// no tensor.
template <class T>
GRJCA_DEVICE T* element(const View& view, int sample, int frame, int column) {
  return static_cast<T*>(view.data) + sample * view.sample + frame * view.frame + column * view.column;
}
template <class T>
GRJCA_DEVICE StoredColumns<T> load_stored(const View& view, int sample, int frame, int column, int width) {
  if (!view.data || column >= width) return {};
  return load_stored(element<T>(view, sample, frame, column), width - column, view.column);
}
template <class T>
GRJCA_DEVICE Columns<T> load_columns(const View& view, int sample, int frame, int column, int width) {
  return load_stored<T>(view, sample, frame, column, width).wide();
}
template <class T>
GRJCA_DEVICE void store_columns(const View& view, int sample, int frame, int column, int width,
                                const Columns<T>& from) {
  if (column < width) store_columns(element<T>(view, sample, frame, column), width - column, view.column, from);
}

}  // namespace grjca::cuda
