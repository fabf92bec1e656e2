// Operands and sums of the tensor cores in registers, and how they lie in shared memory.
//
// A fragment of sums is 16 rows x 8 columns: lane 4 g + t of the warp has (g, 2 t), (g, 2 t + 1), (g + 8, 2 t) and
// (g + 8, 2 t + 1). Products run over units of kUnit terms.
#pragma once

#include "numbers.h"

namespace grjca::cuda {

// Which index of an operand is contiguous: that of the sum, or the other one (A's rows, B's columns).
enum class Major { terms, outer };

// Elements from one line of an operand in shared memory to the next. Lines are padded so that what a warp reads at once
// lies in different banks: check_layout.cpp of tests/support/cuda_emulator counts.
template <class T, Major kMajor>
constexpr int kLine = kMajor == Major::terms ? (64 + 16) / static_cast<int>(sizeof(T)) : kTile + 8;

template <class T>
constexpr int kTerms = 64 / static_cast<int>(sizeof(T));  // of the tiles that are in shared memory at once

template <Major kMajor>
GRJCA_BOTH constexpr int place(int outer, int term, int line) {
  return kMajor == Major::terms ? outer * line + term : term * line + outer;
}

// How the lanes give the rows of four 8 x 8 matrices to load_matrices: A's are (rows 0, 8) x (terms 0, 8), rows first;
// B's (terms 0, 8) x (columns 0, 8), terms first.
template <Major kMajor>
GRJCA_BOTH constexpr int place_of_a(int lane, int line) {
  return kMajor == Major::terms ? place<kMajor>(lane % 16, lane / 16 * 8, line)
                                : place<kMajor>(lane / 8 % 2 * 8, lane % 8 + lane / 16 * 8, line);
}
template <Major kMajor>
GRJCA_BOTH constexpr int place_of_b(int lane, int line) {
  return kMajor == Major::terms ? place<kMajor>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8, line)
                                : place<kMajor>(lane / 16 * 8, lane % 16, line);
}

// bfloat16 and float16. kMostRows: of a tile; the more, the less is read twice, but the more registers sums take.
template <class T, bool kExact, int kMostRows>
struct Math {
  static constexpr int kUnit = 16, kRows = kMostRows, kUnrolled = 2;  // terms at once; most rows of a tile
  struct A {
    uint32_t words[4];
  };
  struct B {
    uint32_t words[4];  // 16 columns
  };

  template <Major kMajor>
  static GRJCA_DEVICE A load_a(const Thread& me, const T* p, int line) {
    A a;
    load_matrices<kMajor == Major::outer>(a.words, p + place_of_a<kMajor>(me.lane(), line));
    return a;
  }
  template <Major kMajor>
  static GRJCA_DEVICE B load_b(const Thread& me, const T* p, int line) {
    B b;
    load_matrices<kMajor == Major::outer>(b.words, p + place_of_b<kMajor>(me.lane(), line));
    return b;
  }
  // An operand whose terms follow one another as those of `chain` do.
  template <Major kMajor>
  static GRJCA_DEVICE B load_chained(const Thread& me, const T* p, int line) {
    return load_b<kMajor>(me, p, line);
  }

  // Sums of kUnit columns as the operand of the next product.
  static GRJCA_DEVICE A chain(const float (*sums)[4]) {
    return {{pack<T>(sums[0][0], sums[0][1]), pack<T>(sums[0][2], sums[0][3]), pack<T>(sums[1][0], sums[1][1]),
             pack<T>(sums[1][2], sums[1][3])}};
  }

  static GRJCA_DEVICE B ones() {
    const uint32_t one = pack<T>(1, 1);
    return {{one, one, one, one}};
  }

  // Adds to the sums of columns 8 h, ...
  static GRJCA_DEVICE void add(float (&sums)[4], const A& a, const B& b, int h) {
    const uint32_t words[2] = {b.words[2 * h], b.words[2 * h + 1]};
    multiply(T{}, sums, a.words, words);
  }
};

// float32. Exact: each operand is a sum of two numbers of TF32, and of their four products the three large ones are
// taken, which leaves an error of about 2^-22; they are added outside of the tensor cores, whose own sums are cut off.
template <bool kExact, int kMostRows>
struct Math<float, kExact, kMostRows> {
  static constexpr int kUnit = 8, kParts = kExact ? 2 : 1, kRows = kMostRows, kUnrolled = kExact ? 1 : 2;
  struct A {
    uint32_t words[kParts][4];
  };
  struct B {
    uint32_t words[kParts][4];
  };

  template <class Operand>
  static GRJCA_DEVICE void split(float x, Operand& to, int i) {
    to.words[0][i] = round_tf32(x);
    if constexpr (kExact) to.words[1][i] = round_tf32(x - float_of(to.words[0][i]));
  }

  template <Major kMajor>
  static GRJCA_DEVICE A load_a(const Thread& me, const float* p, int line) {
    const int g = me.g(), t = me.t();
    A a;
    GRJCA_UNROLL
    for (int i = 0; i < 4; ++i) split(read_shared(p + place<kMajor>(g + i % 2 * 8, t + i / 2 * 4, line)), a, i);
    return a;
  }
  template <Major kMajor>
  static GRJCA_DEVICE B load_b(const Thread& me, const float* p, int line) {
    const int g = me.g(), t = me.t();
    B b;
    GRJCA_UNROLL
    for (int i = 0; i < 4; ++i) split(read_shared(p + place<kMajor>(g + i / 2 * 8, t + i % 2 * 4, line)), b, i);
    return b;
  }

  // A lane's sums are of columns 2 t and 2 t + 1, while as operands they count as terms t and t + 4: the other operand
  // is loaded in that order too.
  static GRJCA_DEVICE A chain(const float (*sums)[4]) {
    A a;
    split(sums[0][0], a, 0);
    split(sums[0][2], a, 1);
    split(sums[0][1], a, 2);
    split(sums[0][3], a, 3);
    return a;
  }
  template <Major kMajor>
  static GRJCA_DEVICE B load_chained(const Thread& me, const float* p, int line) {
    const int g = me.g(), t = me.t();
    B b;
    GRJCA_UNROLL
    for (int i = 0; i < 4; ++i) split(read_shared(p + place<kMajor>(g + i / 2 * 8, 2 * t + i % 2, line)), b, i);
    return b;
  }

  static GRJCA_DEVICE B ones() {
    B b{};
    for (int i = 0; i < 4; ++i) b.words[0][i] = bits_of(1);
    return b;
  }

  static GRJCA_DEVICE void add(float (&sums)[4], const A& a, const B& b, int h) {
    const uint32_t high[2] = {b.words[0][2 * h], b.words[0][2 * h + 1]};
    if constexpr (kExact) {
      const uint32_t low[2] = {b.words[1][2 * h], b.words[1][2 * h + 1]};
      float part[4] = {};
      multiply(Tf32{}, part, a.words[1], high);
      multiply(Tf32{}, part, a.words[0], low);
      multiply(Tf32{}, part, a.words[0], high);
      GRJCA_UNROLL
      for (int i = 0; i < 4; ++i) sums[i] += part[i];
    } else {
      multiply(Tf32{}, sums, a.words[0], high);
    }
  }
};

template <class T, bool kExact>
using ForwardMath = Math<T, kExact, kExact ? 64 : 128>;
template <class T, bool kExact>
using BackwardMath = Math<T, kExact, kExact ? 64 : 96>;

}  // namespace grjca::cuda
