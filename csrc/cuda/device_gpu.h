// device.h on a GPU: one instruction each, or a few.
#pragma once

#include "device.h"

namespace grjca::cuda {

// ---- who

GRJCA_DEVICE int block_index() { return blockIdx.x; }

// This thread, in a way that hides from the compiler that it is the same in every task: it would keep whatever follows
// from the index through all phases, for which there are not registers enough.
GRJCA_DEVICE Thread this_thread() {
  int index = threadIdx.x;
  asm volatile("" : "+r"(index));
  return {index};
}

// Returns 0 in a way that the compiler cannot see through.
GRJCA_DEVICE int opaque_zero() {
  int zero = 0;
  asm volatile("" : "+r"(zero));
  return zero;
}

// ---- numbers

GRJCA_DEVICE float widen(float x) { return x; }
GRJCA_DEVICE float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
GRJCA_DEVICE float widen(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Rounding to nearest, ties to even.
GRJCA_DEVICE void narrow(float x, float& to) { to = x; }
GRJCA_DEVICE void narrow(float x, BFloat16& to) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }
GRJCA_DEVICE void narrow(float x, Float16& to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }

GRJCA_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
GRJCA_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

GRJCA_DEVICE uint32_t round_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

GRJCA_DEVICE float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

GRJCA_DEVICE float exponential(float x) { return expf(x); }
// The error is at most 2 ulp; the result is 0 for a divisor beyond 2^126.
GRJCA_DEVICE float divide_fast(float a, float b) { return __fdividef(a, b); }
GRJCA_DEVICE float square_root(float x) { return sqrtf(x); }
GRJCA_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// ---- shared memory

GRJCA_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

template <class V>
GRJCA_DEVICE V read_shared(const V* p) {
  return *p;
}
template <class V>
GRJCA_DEVICE void write_shared(V* p, V value) {
  *p = value;
}

GRJCA_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Starts a copy of kBytes, of which the first `valid` come from global memory and the rest are zeros.
template <int kBytes>
GRJCA_DEVICE void copy_async(void* to, const void* from, int valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async can copy");
  const uint32_t address = shared_address(to);
  if constexpr (kBytes == 16)  // past L1, which holds nothing of it that could be old
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(kBytes), "r"(valid)
                 : "memory");
}
GRJCA_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
GRJCA_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i. Lane 4 g + t receives
// elements (g, 2 t) and (g, 2 t + 1) of each; transposed, (2 t, g) and (2 t + 1, g).
template <bool kTransposed>
GRJCA_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t address = shared_address(row);
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// ---- tensor cores: d += a b, of shape 16 x 8 x 16 (16-bit types) or 16 x 8 x 8 (TF32)

#define GRJCA_MULTIPLY(type, shape, name)                                                           \
  GRJCA_DEVICE void multiply(type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm("mma.sync.aligned." shape ".row.col.f32." name "." name                                     \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "                                                 \
        "{%8, %9}, {%0, %1, %2, %3};"                                                               \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                        \
  }
GRJCA_MULTIPLY(BFloat16, "m16n8k16", "bf16")
GRJCA_MULTIPLY(Float16, "m16n8k16", "f16")
GRJCA_MULTIPLY(Tf32, "m16n8k8", "tf32")
#undef GRJCA_MULTIPLY

// ---- together

GRJCA_DEVICE void block_barrier() { __syncthreads(); }
GRJCA_DEVICE void warp_barrier() { __syncwarp(); }
GRJCA_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
GRJCA_DEVICE uint32_t shuffle(uint32_t x, int source) { return __shfl_sync(0xFFFFFFFFu, x, source); }

// Adds to a counter in global memory and returns what it was: releases what this thread has seen, acquires what others
// have released.
GRJCA_DEVICE uint32_t add_and_fetch_old(uint32_t* counter, uint32_t n) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(n) : "memory");
  return old;
}
GRJCA_DEVICE uint32_t read_relaxed(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
// What was released by whoever wrote what this thread has read relaxed is visible from here on.
GRJCA_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
GRJCA_DEVICE void pause() {}

}  // namespace grjca::cuda
