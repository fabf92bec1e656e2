// The kernels of one precision, as launch.cu sees them: forward.cu and backward.cu are compiled once for each.
#pragma once

#include "arguments.h"

// `Element`: what tensors hold. kExact: for float, whether products are of true float32, or of TF32. Two addresses that
// the CUDA runtime launches.
#define GRJCA_DECLARE_PRECISION(precision, type, exact) \
  namespace grjca::cuda::precision {                    \
  using Element = type;                                 \
  constexpr bool kExact = exact;                        \
  const void* forward_address();                        \
  const void* backward_address();                       \
  }

GRJCA_DECLARE_PRECISION(float32, float, true)
GRJCA_DECLARE_PRECISION(tf32, float, false)
GRJCA_DECLARE_PRECISION(bfloat16, BFloat16, false)
GRJCA_DECLARE_PRECISION(float16, Float16, false)
#undef GRJCA_DECLARE_PRECISION
