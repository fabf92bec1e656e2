// What the kernels ask of the hardware, and nothing else. nvcc compiles device_gpu.h; a host compiler takes emulator.h
// of tests/support/cuda_emulator, which runs every lane on the CPU, so that tests execute the very source of the
// kernels.
#pragma once

#include <cstdint>

namespace grjca::cuda {

constexpr int kWarp = 32;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Tf32 {};  // of a multiplication: float32 cut to 10 bits of mantissa

}  // namespace grjca::cuda

#if defined(__CUDACC__)
#define GRJCA_DEVICE __device__ __forceinline__
#define GRJCA_BOTH __host__ __device__ __forceinline__
#define GRJCA_UNROLL _Pragma("unroll")
#define GRJCA_LOOP _Pragma("unroll 1")
#define GRJCA_PRAGMA(text) _Pragma(#text)
#define GRJCA_UNROLL_BY(n) GRJCA_PRAGMA(unroll(n))
#else
#define GRJCA_DEVICE inline
#define GRJCA_BOTH inline
#define GRJCA_UNROLL
#define GRJCA_LOOP
#define GRJCA_UNROLL_BY(n)
#endif

namespace grjca::cuda {

// A thread of a block. Of a fragment (fragment.h) its lane has rows g() and g() + 8, columns 2 t() and 2 t() + 1.
struct Thread {
  int index;

  GRJCA_DEVICE int lane() const { return index % kWarp; }
  GRJCA_DEVICE int warp() const { return index / kWarp; }
  GRJCA_DEVICE int g() const { return lane() / 4; }
  GRJCA_DEVICE int t() const { return lane() % 4; }
};

}  // namespace grjca::cuda

#if defined(__CUDACC__)
#include "device_gpu.h"
#else
#include "emulator.h"
#endif
