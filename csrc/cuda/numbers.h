// Functions of one number, and the dropout mask of operator.md.
#pragma once

#include "arguments.h"

namespace grjca::cuda {

template <class T>
GRJCA_DEVICE T narrow_to(float x) {
  T y;
  narrow(x, y);
  return y;
}

GRJCA_DEVICE uint32_t bits_of(BFloat16 x) { return x.bits; }
GRJCA_DEVICE uint32_t bits_of(Float16 x) { return x.bits; }

// Two elements as one word, the first in its low half.
template <class T>
GRJCA_DEVICE uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(narrow_to<T>(low).bits) | static_cast<uint32_t>(narrow_to<T>(high).bits) << 16;
}

// tanh of float32, NaN for NaN; for 16-bit types the processor's own, good to 2^-11, else to about 2 ulp: near zero
// x + x z P(z), z = x^2, with the coefficients of csrc/cpu/fit_tanh.py, elsewhere by exp.
template <class T>
GRJCA_DEVICE float tanh_of(float x) {
  if constexpr (sizeof(T) == 2) {
    return tanh_approximate(x);
  } else {
    const float magnitude = x < 0 ? -x : x, z = x * x;
    float p = -0.0057049864f * z + 0.0206390861f;
    p = p * z - 0.0537397154f;
    p = p * z + 0.133314416f;
    p = p * z - 0.333332807f;
    const float large = 1 - divide_fast(2, exponential(2 * magnitude) + 1);
    return magnitude >= 0.625f ? (x < 0 ? -large : large) : x + x * z * p;
  }
}

GRJCA_DEVICE float relu(float x) { return x < 0 ? 0 : x; }  // NaN for NaN
// A gradient through relu, given its argument or its value; a NaN in x passes, as in autograd.
GRJCA_DEVICE float where_positive(float x, float d) { return x <= 0 ? 0 : d; }

// H from V C, and the slope there.
template <class T>
GRJCA_DEVICE float hidden_of(bool released, float attended) {
  return relu(released ? tanh_of<T>(attended) : attended);
}

// ---- dropout

enum class Site : uint32_t { correlation = 0, output = 1 };

// Which of eight rows of two neighbouring columns are kept.
struct KeepBits {
  uint32_t bits[2];

  GRJCA_DEVICE bool first(int row) const { return bits[0] >> row % 8 & 1; }
  GRJCA_DEVICE bool second(int row) const { return bits[1] >> row % 8 & 1; }
  static GRJCA_DEVICE float factor(bool kept, float scale) { return kept ? scale : 0; }
};
constexpr KeepBits kKeepAll{{255, 255}};

// The mask of one site of one modality, iteration and sample.
struct Mask {
  uint32_t key0, key1, sample, place, threshold;

  static GRJCA_DEVICE Mask at(const Common& a, int t, int m, Site site, int sample) {
    const uint64_t seed = *a.seed;
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(sample),
            static_cast<uint32_t>(t) | static_cast<uint32_t>(m) << 8 | static_cast<uint32_t>(site) << 16,
            a.plan.threshold};
  }

  // Philox4x32, seven rounds: bit r says whether row 8 group + r of the column is kept.
  GRJCA_DEVICE uint32_t kept(uint32_t column, uint32_t group) const {
    uint32_t c0 = column, c1 = group, c2 = sample, c3 = place, k0 = key0, k1 = key1;
    GRJCA_UNROLL
    for (int round = 0; round < 7; ++round) {
      const uint32_t high0 = multiply_high(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
      const uint32_t high1 = multiply_high(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return kept_two(c0) | kept_two(c1) << 2 | kept_two(c2) << 4 | kept_two(c3) << 6;
  }

  GRJCA_DEVICE uint32_t kept_two(uint32_t word) const {
    return static_cast<uint32_t>((word & 0xFFFFu) >= threshold) | static_cast<uint32_t>((word >> 16) >= threshold) << 1;
  }

  GRJCA_DEVICE KeepBits keep_pair(int row, int column) const {
    const uint32_t group = static_cast<uint32_t>(row / 8);
    return {{kept(static_cast<uint32_t>(column), group), kept(static_cast<uint32_t>(column + 1), group)}};
  }

  // The mask of two fragments of 16 rows and 8 columns side by side, in the layout of fragment.h; rows begin at a
  // multiple of 16. Bit i of bits[h] is element i of this lane in fragment h. One call decides eight rows of a column,
  // so every lane makes one of the 32 calls and asks the others for theirs. All lanes of the warp must take part.
  GRJCA_DEVICE void of_rows(const Thread& me, int row, int column, uint32_t (&bits)[2]) const {
    const int lane = me.lane(), g = me.g(), t = me.t();
    const uint32_t mine = kept(static_cast<uint32_t>(column + lane % 16), static_cast<uint32_t>(row / 8 + lane / 16));
    GRJCA_UNROLL
    for (int h = 0; h < 2; ++h) {
      bits[h] = 0;
      GRJCA_UNROLL
      for (int i = 0; i < 4; ++i) bits[h] |= (shuffle(mine, 16 * (i / 2) + 8 * h + 2 * t + i % 2) >> g & 1) << i;
    }
  }

  // As of_rows, for fragments of the transpose: the mask's rows are the fragments' columns.
  GRJCA_DEVICE void of_columns(const Thread& me, int row, int column, uint32_t (&bits)[2]) const {
    const int g = me.g(), t = me.t();
    const uint32_t mine = kept(static_cast<uint32_t>(row + g + 8 * (t % 2)), static_cast<uint32_t>(column / 8 + t / 2));
    GRJCA_UNROLL
    for (int h = 0; h < 2; ++h) {
      bits[h] = 0;
      GRJCA_UNROLL
      for (int i = 0; i < 4; ++i) bits[h] |= (shuffle(mine, 4 * g + 2 * h + i / 2) >> (2 * t + i % 2) & 1) << i;
    }
  }
};

}  // namespace grjca::cuda
