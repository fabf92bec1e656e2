// One vector type per instruction set, by the compiler's vector extensions. This header, and all that include it, is
// compiled once per instruction set into a namespace of that name, so that no function is shared between the builds.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../grjca.h"

#if defined(__AVX512F__)
#define GRJCA_VECTOR_BYTES 64
#define GRJCA_TILE_ROWS 8
#elif defined(__AVX2__)
#define GRJCA_VECTOR_BYTES 32
#define GRJCA_TILE_ROWS 4
#else
#define GRJCA_VECTOR_BYTES 16
#define GRJCA_TILE_ROWS 4
#endif

namespace grjca::GRJCA_ISA {

template <class R>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(GRJCA_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(GRJCA_VECTOR_BYTES)));
};
typedef uint32_t Words __attribute__((vector_size(GRJCA_VECTOR_BYTES)));

template <class R>
using Vector = typename VectorOf<R>::type;

template <class R>
constexpr int kLanes = GRJCA_VECTOR_BYTES / sizeof(R);
constexpr int kTileRows = GRJCA_TILE_ROWS;
template <class R>
constexpr int kPanel = 2 * kLanes<R>;  // columns of a packed panel: two vectors

template <class R>
GRJCA_INLINE Vector<R> load(const R* from) {
  Vector<R> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class R>
GRJCA_INLINE void store(R* to, Vector<R> v) {
  std::memcpy(to, &v, sizeof v);
}

template <class R>
GRJCA_INLINE Vector<R> splat(R x) {
  return x - Vector<R>{};
}

// The first `count` lanes; the others load as zero, and are not stored.
template <class R>
GRJCA_INLINE Vector<R> load_some(const R* from, int64_t count) {
  if (count >= kLanes<R>) return load(from);
  Vector<R> v{};
  for (int i = 0; i < kLanes<R>; ++i)
    if (i < count) v[i] = from[i];
  return v;
}

template <class R>
GRJCA_INLINE void store_some(R* to, Vector<R> v, int64_t count) {
  if (count >= kLanes<R>) return store(to, v);
  for (int i = 0; i < kLanes<R>; ++i)
    if (i < count) to[i] = v[i];
}

template <class R>
GRJCA_INLINE Vector<R> relu(Vector<R> x) {  // NaN stays NaN, as in torch.relu
  return x < 0 ? Vector<R>{} : x;
}

// Sum of the lanes, always in the same order.
template <class R>
GRJCA_INLINE R sum(Vector<R> v) {
  for (int half = kLanes<R> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

template <class R>
GRJCA_INLINE R dot(const R* a, const R* b, int64_t n) {
  Vector<R> s{};
  for (int64_t i = 0; i < n; i += kLanes<R>) s += load_some(a + i, n - i) * load_some(b + i, n - i);
  return sum<R>(s);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define GRJCA_SHUFFLES 1
#endif
#endif

#ifdef GRJCA_SHUFFLES
// Swaps the blocks of `Half` lanes off the diagonal of the 2 x 2 blocks that rows a and b = a + Half form.
template <class R, int Half, size_t... Lane>
GRJCA_INLINE void swap_blocks(Vector<R>& a, Vector<R>& b, std::index_sequence<Lane...>) {
  constexpr int n = sizeof...(Lane);
  const Vector<R> upper = __builtin_shufflevector(a, b, (Lane & Half ? n + Lane - Half : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & Half ? n + Lane : Lane + Half)...);
  a = upper;
}

// Transposes a square of kLanes vectors.
template <class R, int Half = kLanes<R> / 2>
GRJCA_INLINE void transpose(Vector<R> (&rows)[kLanes<R>]) {
  for (int i = 0; i < kLanes<R>; ++i)
    if (!(i & Half)) swap_blocks<R, Half>(rows[i], rows[i + Half], std::make_index_sequence<kLanes<R>>());
  if constexpr (Half > 1) transpose<R, Half / 2>(rows);
}
#endif

}  // namespace grjca::GRJCA_ISA
