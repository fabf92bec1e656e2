// tanh on vectors. float: x P(x^2) / Q(x^2) with the coefficients of fit_tanh.py; double: the C library, lane by lane.
#pragma once

#include <math.h>

#include "vector.h"

namespace grjca::GRJCA_ISA {

GRJCA_INLINE Vector<float> tanh(Vector<float> x) {
  constexpr float P[] = {1.0f, 0.133796707f, 0.00349397841f, 2.05825236e-05f, 1.33176785e-08f};
  constexpr float Q[] = {1.0f, 0.467129856f, 0.0258708615f, 0.000328299968f, 7.76146351e-07f};
  constexpr float kOne = 9.02f;  // tanh rounds to 1 from here on
  x = x > kOne ? splat(kOne) : x;  // written so that NaN passes
  x = x < -kOne ? splat(-kOne) : x;
  const Vector<float> z = x * x;
  Vector<float> p = splat(P[4]), q = splat(Q[4]);
  for (int i = 3; i >= 0; --i) {
    p = p * z + P[i];
    q = q * z + Q[i];
  }
  Vector<float> y = x * p / q;
  y = y > 1.0f ? splat(1.0f) : y;
  return y < -1.0f ? splat(-1.0f) : y;
}

inline Vector<double> tanh(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::tanh(x[i]);
  return x;
}

}  // namespace grjca::GRJCA_ISA
