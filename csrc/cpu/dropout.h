// The dropout mask of grjca_kernels/operator.md: Philox4x32, seven rounds; one call decides eight rows of one column.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../grjca.h"
#include "vector.h"

namespace grjca::GRJCA_ISA {

enum class Site : uint32_t { correlation = 0, output = 1 };

constexpr int kDropoutRows = 8;

typedef uint64_t DoubleWords __attribute__((vector_size(GRJCA_VECTOR_BYTES)));

// Products of the even 32-bit lanes with m.
GRJCA_INLINE DoubleWords multiply_even(DoubleWords x, uint32_t m) {
#if defined(__AVX512F__)
  return (DoubleWords)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi32(static_cast<int>(m)));
#elif defined(__AVX2__)
  return (DoubleWords)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi32(static_cast<int>(m)));
#elif defined(__SSE2__)
  return (DoubleWords)_mm_mul_epu32((__m128i)x, _mm_set1_epi32(static_cast<int>(m)));
#else
  return (x & 0xFFFFFFFFu) * m;
#endif
}

GRJCA_INLINE void multiply_words(Words x, uint32_t m, Words& high, Words& low) {
  const DoubleWords even = multiply_even((DoubleWords)x, m);
  const DoubleWords odd = multiply_even((DoubleWords)x >> 32, m);
  low = (Words)((even & 0xFFFFFFFFu) | (odd << 32));
  high = (Words)((even >> 32) | (odd & 0xFFFFFFFF00000000u));
}

// The mask of one site of one modality, iteration and sample.
struct Dropout {
  uint32_t key0, key1, sample, place, threshold;
  float scale;  // of what is kept

  static Dropout at(const Problem& p, uint64_t seed, int iteration, int modality, Site site, int64_t sample) {
    const double threshold = static_cast<double>(static_cast<int64_t>(p.dropout * 65536 + 0.5));
    return {static_cast<uint32_t>(seed),
            static_cast<uint32_t>(seed >> 32),
            static_cast<uint32_t>(sample),
            static_cast<uint32_t>(iteration) | static_cast<uint32_t>(modality) << 8 | static_cast<uint32_t>(site) << 16,
            threshold > 65535 ? 65535 : static_cast<uint32_t>(threshold),
            static_cast<float>(1 / (1 - p.dropout))};
  }

  // keep[r]: all bits of a lane set where row 8 * group + r of column `column` + lane is kept.
  GRJCA_INLINE void keep(uint32_t group, uint32_t column, Words (&keep)[kDropoutRows]) const {
    Words c0, c1 = group - Words{}, c2 = sample - Words{}, c3 = place - Words{};
    for (int i = 0; i < kLanes<float>; ++i) c0[i] = column + i;
    uint32_t k0 = key0, k1 = key1;
    for (int round = 0; round < 7; ++round) {
      Words high0, low0, high1, low1;
      multiply_words(c0, 0xD2511F53u, high0, low0);
      multiply_words(c2, 0xCD9E8D57u, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const Words words[4] = {c0, c1, c2, c3};
    for (int r = 0; r < kDropoutRows; ++r) {
      const Words draw = r % 2 ? words[r / 2] >> 16 : words[r / 2] & 0xFFFFu;
      keep[r] = (Words)(draw >= threshold);
    }
  }
};

// Calls f(row, offset, factor) for rows [8 * group, ...) and columns [column, column + kLanes<float>) in vectors of R:
// factor is 0 where dropped and 1 / (1 - p) where kept.
template <class R, class F>
GRJCA_INLINE void each_factor(const Dropout& drop, int64_t group, int64_t column, double scale, F f) {
  Words keep[kDropoutRows];
  drop.keep(static_cast<uint32_t>(group), static_cast<uint32_t>(column), keep);
  for (int r = 0; r < kDropoutRows; ++r) {
    if constexpr (sizeof(R) == sizeof(float)) {
      const Vector<float> factor = keep[r] ? splat(drop.scale) : Vector<float>{};
      f(r, 0, factor);
    } else {
      for (int half = 0; half < 2; ++half) {
        Vector<R> factor;
        for (int i = 0; i < kLanes<R>; ++i) factor[i] = keep[r][half * kLanes<R> + i] ? scale : 0;
        f(r, half * kLanes<R>, factor);
      }
    }
  }
}

}  // namespace grjca::GRJCA_ISA
