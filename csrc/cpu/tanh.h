// tanh on vectors. float: coefficients and error (1.6 units in the last place) from fit_tanh.py; double: the C library.
#pragma once

#include <math.h>

#include "vector.h"

namespace grjca::GRJCA_ISA {

template <int N>
GRJCA_INLINE Vector<float> polynomial(const float (&coefficients)[N], Vector<float> x) {
  Vector<float> sum = splat(coefficients[N - 1]);
  for (int i = N - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// x + x z P(z), z = x^2, near zero; 1 - 2 / (2^r + 1), r = 2 |x| / ln 2, elsewhere, with the sign restored.
GRJCA_INLINE Vector<float> tanh(Vector<float> x) {
  constexpr float kSmall[] = {-0.333332807f, 0.133314416f, -0.0537397154f, 0.0206390861f, -0.0057049864f};
  constexpr float kPower[] = {0.693147182f, 0.240226477f, 0.0555033237f, 0.00961843692f, 0.0013398875f, 0.00015353362f};
  constexpr float kOne = 9.1f;           // tanh rounds to 1 from here on
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds, and leaves the integer in the low bits
  const Words sign = (Words)x & 0x80000000u;
  const Vector<float> a = (Vector<float>)((Words)x ^ sign), z = a * a;
  const Vector<float> small = a + a * z * polynomial(kSmall, z);
  const Vector<float> r = (a > kOne ? splat(kOne) : a) * 2.88539008f;
  const Vector<float> rounded = r + kRound, f = r - (rounded - kRound);
  const Words power = (Words)(1 + f * polynomial(kPower, f)) + ((Words)rounded << 23);
  const Vector<float> large = 1 - 2 / ((Vector<float>)power + 1);
  const Vector<float> y = a >= 0.625f ? large : small;  // NaN is not large, and so stays NaN
  return (Vector<float>)((Words)y | sign);
}

inline Vector<double> tanh(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::tanh(x[i]);
  return x;
}

}  // namespace grjca::GRJCA_ISA
