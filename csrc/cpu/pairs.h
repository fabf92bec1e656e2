// Operands of products in bfloat16: words of two consecutive terms, the first in the lower half. They are rounded from
// float as eager PyTorch rounds what it puts into products, and summed in float.
#pragma once

#include "storage.h"
#include "vector.h"

namespace grjca::GRJCA_ISA {

// Word i of the result is (even[i], odd[i]).
GRJCA_INLINE Vector<float> pair(Halves even, Halves odd) {
  return (Vector<float>)(__builtin_convertvector(even, Words) | (__builtin_convertvector(odd, Words) << 16));
}

}  // namespace grjca::GRJCA_ISA

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace grjca::GRJCA_ISA {

// Adds the products of both halves of `left` and of each word of `right`.
GRJCA_INLINE Vector<float> add_products(Vector<float> acc, const float* left, Vector<float> right) {
  uint32_t word;
  std::memcpy(&word, left, sizeof word);
  return (Vector<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(word)),
                                         (__m512bh)right);
}

// Word i of two vectors: (even[i], odd[i]).
GRJCA_INLINE Vector<float> pair(Vector<float> even, Vector<float> odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (Vector<float>)_mm512_permutexvar_epi16(order, (__m512i)both);
}

// Makes words of `terms` consecutive values and fills the last one with zero. The first function writes 16 words at a
// time, and the second one none beyond the last, for another thread may have written what follows.
GRJCA_INLINE void pair_along(float* words, const float* from, int64_t terms) {
  for (int64_t k = 0; k < terms; k += 32, words += 16) {
    const uint32_t present = terms - k < 32 ? (uint32_t{1} << (terms - k)) - 1 : ~uint32_t{0};
    const __m512 first = _mm512_maskz_loadu_ps(static_cast<__mmask16>(present), from + k);
    const __m512 second = _mm512_maskz_loadu_ps(static_cast<__mmask16>(present >> 16), from + k + 16);
    const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
    std::memcpy(words, &both, sizeof both);
  }
}
GRJCA_INLINE void pair_along(float* words, const BFloat16* from, int64_t terms) {
  if (terms % 2) std::memset(words + terms / 2, 0, sizeof(float));
  std::memcpy(words, from, terms * sizeof(BFloat16));
}

// words[k * 8 + r] = (from[2 k step + r], from[(2 k + 1) step + r]) for r < rows <= 8, and zero beyond.
GRJCA_INLINE void pair_across(float* words, const float* from, int64_t step, int64_t terms, int64_t rows) {
  const __m256i order = _mm256_set_epi16(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
  const __mmask8 present = static_cast<__mmask8>(rows < 8 ? (1 << rows) - 1 : 255);
  for (int64_t k = 0; k < terms; k += 2, words += 8) {
    const __m256 even = _mm256_maskz_loadu_ps(present, from + k * step);
    const __m256 odd = k + 1 < terms ? _mm256_maskz_loadu_ps(present, from + (k + 1) * step) : _mm256_setzero_ps();
    const __m256bh both = _mm512_cvtneps_pbh(_mm512_insertf32x8(_mm512_castps256_ps512(even), odd, 1));
    const __m256i mixed = _mm256_permutexvar_epi16(order, (__m256i)both);
    std::memcpy(words, &mixed, sizeof mixed);
  }
}
GRJCA_INLINE void pair_across(float* words, const BFloat16* from, int64_t step, int64_t terms, int64_t rows) {
  const __mmask8 present = static_cast<__mmask8>(rows < 8 ? (1 << rows) - 1 : 255);
  for (int64_t k = 0; k < terms; k += 2, words += 8) {
    const __m128i even = _mm_maskz_loadu_epi16(present, from + k * step);
    const __m128i odd = k + 1 < terms ? _mm_maskz_loadu_epi16(present, from + (k + 1) * step) : _mm_setzero_si128();
    const __m128i mixed[2] = {_mm_unpacklo_epi16(even, odd), _mm_unpackhi_epi16(even, odd)};
    std::memcpy(words, mixed, sizeof mixed);
  }
}

}  // namespace grjca::GRJCA_ISA
#endif
