// Reading and writing rows of the four storage types; arithmetic is float (double for double).
#pragma once

#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "vector.h"

namespace grjca::GRJCA_ISA {

struct __attribute__((may_alias)) BFloat16 {  // read two at a time as operands of products
  uint16_t bits;
};
struct Float16 {  // not _Float16, which GCC has from 12 on only and Clang from 15
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

// The operand type of products: bfloat16 where the processor multiplies it, the arithmetic type elsewhere.
template <class S>
struct OperandOf {
  using type = Compute<S>;
};
#ifdef __AVX512BF16__
template <>
struct OperandOf<BFloat16> {
  using type = BFloat16;
};
#endif
template <class S>
using Operand = typename OperandOf<S>::type;

GRJCA_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
GRJCA_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

GRJCA_INLINE float widen(float x) { return x; }
GRJCA_INLINE double widen(double x) { return x; }
GRJCA_INLINE float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
GRJCA_INLINE float widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  // Exponent and mantissa in their places; a product with 2^112 mends the bias of the exponent, of subnormals too.
  const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  return float_of(sign | (magnitude < 0x7C00u ? finite : (magnitude << 13) | 0x7F800000u));
}

// Rounding to nearest, ties to even.
GRJCA_INLINE void narrow(float x, float* to) { *to = x; }
GRJCA_INLINE void narrow(double x, double* to) { *to = x; }
GRJCA_INLINE void narrow(float x, BFloat16* to) {
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(x != x ? 0x7FC0 : rounded);
}
GRJCA_INLINE void narrow(float x, Float16* to) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u, magnitude = bits_of(x) & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // the sum rounds at 2^-24
  const uint32_t large = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;              // NaN, infinity
  const uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;           // below 2^-14
  to->bits = static_cast<uint16_t>(sign | (magnitude < 0x47800000u ? rounded : large));
}

// J, K, V, H and C are held, between two products, as what these take.
template <class S>
using Held = Operand<S>;

// ---- vectors in bfloat16

typedef uint16_t Halves __attribute__((vector_size(GRJCA_VECTOR_BYTES / 2)));

GRJCA_INLINE Vector<float> widen(Halves x) { return (Vector<float>)(__builtin_convertvector(x, Words) << 16); }
GRJCA_INLINE Halves narrow(Vector<float> x) {
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  const Words bits = (Words)x, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x != x ? Words{} + 0x7FC0 : rounded, Halves);
#endif
}

GRJCA_INLINE Vector<float> load(const BFloat16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof x);
  return widen(x);
}
GRJCA_INLINE Vector<float> load_some(const BFloat16* from, int64_t count) {
  if (count >= kLanes<float>) return load(from);
  Halves x{};
  std::memcpy(&x, from, count * sizeof(BFloat16));
  return widen(x);
}
GRJCA_INLINE void store(BFloat16* to, Vector<float> x) {
  const Halves rounded = narrow(x);
  std::memcpy(to, &rounded, sizeof rounded);
}
GRJCA_INLINE void store_some(BFloat16* to, Vector<float> x, int64_t count) {
  if (count >= kLanes<float>) return store(to, x);
  const Halves rounded = narrow(x);
  std::memcpy(to, &rounded, count * sizeof(BFloat16));
}

// Returns x as it comes back from where it is held.
template <class H, class R>
GRJCA_INLINE Vector<R> rounded(Vector<R> x) {
  if constexpr (std::is_same_v<H, BFloat16>)
    return widen(narrow(x));
  else
    return x;
}

// Loads a vector of R from consecutive elements of any storage type.
template <class R, class S>
GRJCA_INLINE Vector<R> load_wide(const S* from) {
  if constexpr (std::is_same_v<S, R> || std::is_same_v<S, BFloat16>) {
    return load(from);
  } else {
    R row[kLanes<R>];
    for (int i = 0; i < kLanes<R>; ++i) row[i] = widen(from[i]);
    return load(row);
  }
}

// ---- rows

template <class S, class R>
GRJCA_INLINE void load_row(R* to, const S* from, int64_t step, int64_t n) {
  if (step == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i * step]);
}

template <class S, class R>
GRJCA_INLINE void store_row(S* to, int64_t step, const R* from, int64_t n) {
  if (step == 1)
    for (int64_t i = 0; i < n; ++i) narrow(from[i], to + i);
  else
    for (int64_t i = 0; i < n; ++i) narrow(from[i], to + i * step);
}

template <class S>
GRJCA_INLINE void clear_row(S* to, int64_t step, int64_t n) {
  for (int64_t i = 0; i < n; ++i) std::memset(to + i * step, 0, sizeof(S));
}

}  // namespace grjca::GRJCA_ISA
