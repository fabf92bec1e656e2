// Reading and writing rows of the four storage types; arithmetic is float (double for double).
#pragma once

#include "vector.h"

namespace grjca::GRJCA_ISA {

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

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

GRJCA_INLINE float widen(float x) { return x; }
GRJCA_INLINE double widen(double x) { return x; }
GRJCA_INLINE float widen(Float16 x) { return static_cast<float>(x); }
GRJCA_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

GRJCA_INLINE void narrow(float x, float* to) { *to = x; }
GRJCA_INLINE void narrow(double x, double* to) { *to = x; }
GRJCA_INLINE void narrow(float x, Float16* to) { *to = static_cast<Float16>(x); }
GRJCA_INLINE void narrow(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to->bits = static_cast<uint16_t>(x != x ? 0x7FC0 : rounded);
}

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
