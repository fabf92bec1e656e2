// Tests emulator.h itself: each primitive against a direct formula, each detector by a kernel with the mistake it is
// for.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <initializer_list>

#include "device.h"

namespace grjca::cuda {
namespace {

using emulator::Launch;

constexpr std::initializer_list<uint32_t> kOrders = {0, 1, 2, 3, 4, 5};

int failures = 0;

void expect(bool right, const std::string& what) {
  if (right) return;
  ++failures;
  std::fprintf(stderr, "check_emulator: %s\n", what.c_str());
}

void expect_fault(const std::string& what, const Launch& launch, const char* part,
                  const std::function<void()>& kernel) {
  try {
    emulator::run(launch, kernel);
  } catch (const std::runtime_error& error) {
    expect(std::string(error.what()).find(part) != std::string::npos,
           what + ": wanted \"" + part + "\", got \"" + error.what() + "\"");
    return;
  }
  expect(false, what + ": no fault");
}

struct Random {
  uint64_t state = 88172645463325252u;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  }
  float value() { return static_cast<float>(static_cast<int>(bits() >> 8) - (1 << 23)) * 0x1p-22f; }
};

template <class T>
T* shared_at(size_t byte) {
  return reinterpret_cast<T*>(shared_memory() + byte);
}

// ---- numbers

// The value nearest to x of a format that ends in a bit of weight `step`, ties to even.
double nearest(double x, double step) { return std::nearbyint(x / step) * step; }
double step_of(double x, int mantissa, int smallest) {
  int exponent = 0;
  std::frexp(x, &exponent);
  return std::ldexp(1.0, std::max(exponent - 1 - mantissa, smallest));
}

void check_narrow(float x) {
  BFloat16 b;
  Float16 h;
  narrow(x, b);
  narrow(x, h);
  if (std::isnan(x)) {
    expect(std::isnan(widen(b)) && std::isnan(widen(h)), "narrow of NaN");
    return;
  }
  const double wide = x;
  if (std::fabs(wide) < 0x1p127)
    expect(widen(b) == nearest(wide, step_of(wide, 7, -133)), "narrow to BFloat16 of " + std::to_string(x));
  const double half =
      std::fabs(wide) >= 65520.0 ? std::copysign(INFINITY, wide) : nearest(wide, step_of(wide, 10, -24));
  expect(widen(h) == half && std::signbit(widen(h)) == std::signbit(x), "narrow to Float16 of " + std::to_string(x));
}

void check_round_tf32(float x) {
  const double step = step_of(x, 10, -136), cut = std::fabs(static_cast<double>(x)) / step;
  const double want = std::copysign(std::floor(cut + 0.5) * step, x);
  expect(float_of(round_tf32(x)) == static_cast<float>(want) && (round_tf32(x) & 0x1FFFu) == 0,
         "round_tf32 of " + std::to_string(x));
}

void check_numbers() {
  Random random;
  for (int i = 0; i < 200000; ++i) {
    const float x = float_of(random.bits());
    check_narrow(x);
    check_narrow(random.value() * 0x1p-14f);
    if (std::isfinite(x)) check_round_tf32(x);
    expect(multiply_high(random.bits(), 1u << 31) < 1u << 31, "multiply_high");
  }
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    Float16 h;
    narrow(widen(Float16{static_cast<uint16_t>(bits)}), h);
    expect(h.bits == ((bits & 0x7FFFu) > 0x7C00u ? 0x7FFFu : bits), "Float16 there and back");
    check_narrow(float_of(bits << 16 | 0x8000u));  // ties of BFloat16
    check_round_tf32(float_of((bits & 0x7EFFu) << 16 | 0x1000u));
  }
  expect(widen(Float16{0x3C00}) == 1.0f && widen(Float16{0x0001}) == 0x1p-24f && widen(Float16{0xFBFF}) == -65504.0f,
         "widen of Float16");
  expect(widen(BFloat16{0xC040}) == -3.0f, "widen of BFloat16");
  expect(round_tf32(NAN) == 0x7FFFFFFFu && round_tf32(-INFINITY) == 0xFF800000u, "round_tf32 of what is not finite");
  expect(float_of(round_tf32(-1.0f - 0x1p-11f)) == -1.0f - 0x1p-10f, "round_tf32 takes ties away from zero");
  expect(multiply_high(0xFFFFFFFFu, 0xFFFFFFFFu) == 0xFFFFFFFEu && multiply_high(1u << 31, 6) == 3, "multiply_high");
}

void check_tanh() {
  float most = 0;
  for (int i = -4000; i <= 4000; ++i) {
    const float x = static_cast<float>(i) / 400, y = tanh_approximate(x);
    expect(std::fabs(y) <= 1.0f && y == tanh_approximate(x), "tanh_approximate lies within 1 and repeats itself");
    if (i != 0) most = std::max(most, std::fabs(y / std::tanh(x) - 1));
  }
  expect(most > 0x1p-12f && most < 0x1.01p-11f, "tanh_approximate is off by up to 2^-11");
  expect(bits_of(tanh_approximate(-0.0f)) == 0x80000000u && bits_of(tanh_approximate(0.0f)) == 0 &&
             std::isnan(tanh_approximate(NAN)),
         "tanh_approximate of zero and NaN");
}

// ---- warps

template <class T>
float element_value(uint32_t bits) {
  if constexpr (std::is_same_v<T, Tf32>)
    return float_of(bits & ~0x1FFFu);
  else
    return widen(T{static_cast<uint16_t>(bits)});
}

template <class T>
uint32_t random_element(Random& random) {
  if constexpr (std::is_same_v<T, Tf32>) return bits_of(random.value());  // low bits and all
  if constexpr (std::is_same_v<T, BFloat16>) return bits_of(random.value()) >> 16;
  Float16 h;
  narrow(random.value(), h);
  return h.bits;
}

// The registers are filled by the indices of the PTX ISA, element by element, not as emulator.h reads them.
template <class T>
void check_multiply() {
  constexpr int kDepth = std::is_same_v<T, Tf32> ? 8 : 16;
  Random random;
  uint32_t a[16][16], b[16][8];
  float d[16][8], result[16][8];
  for (auto& row : a)
    for (auto& x : row) x = random_element<T>(random);
  for (auto& row : b)
    for (auto& x : row) x = random_element<T>(random);
  for (auto& row : d)
    for (auto& x : row) x = random.value();
  emulator::run({1, 32, 0, 2}, [&] {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    float dd[4] = {d[g][2 * t], d[g][2 * t + 1], d[g + 8][2 * t], d[g + 8][2 * t + 1]};
    if constexpr (kDepth == 8) {
      const uint32_t aa[4] = {a[g][t], a[g + 8][t], a[g][t + 4], a[g + 8][t + 4]}, bb[2] = {b[t][g], b[t + 4][g]};
      multiply(T{}, dd, aa, bb);
    } else {
      const auto pair = [](uint32_t low, uint32_t high) { return low | high << 16; };
      const uint32_t aa[4] = {pair(a[g][2 * t], a[g][2 * t + 1]), pair(a[g + 8][2 * t], a[g + 8][2 * t + 1]),
                              pair(a[g][2 * t + 8], a[g][2 * t + 9]), pair(a[g + 8][2 * t + 8], a[g + 8][2 * t + 9])};
      const uint32_t bb[2] = {pair(b[2 * t][g], b[2 * t + 1][g]), pair(b[2 * t + 8][g], b[2 * t + 9][g])};
      multiply(T{}, dd, aa, bb);
    }
    result[g][2 * t] = dd[0];
    result[g][2 * t + 1] = dd[1];
    result[g + 8][2 * t] = dd[2];
    result[g + 8][2 * t + 1] = dd[3];
  });
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      double sum = d[m][n];
      for (int k = 0; k < kDepth; ++k)
        sum += static_cast<double>(element_value<T>(a[m][k])) * static_cast<double>(element_value<T>(b[k][n]));
      expect(std::fabs(sum - result[m][n]) <= std::fabs(sum) * 0x1p-23, "multiply, depth " + std::to_string(kDepth));
    }
}

template <bool kTransposed>
void check_load_matrices() {
  constexpr int kStride = 48;  // bytes from row to row
  emulator::run({2, 64, 64 * kStride, 3}, [] {
    for (int i = 0; i < 8; ++i)
      write_shared(shared_at<uint16_t>(thread_index() * kStride + 2 * i),
                   static_cast<uint16_t>(thread_index() * 8 + i));
    warp_barrier();  // each warp reads what it wrote
    uint32_t to[4];
    load_matrices<kTransposed>(to, shared_at<char>(thread_index() * kStride));
    const uint32_t g = lane_index() / 4, t = lane_index() % 4;
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t first = (warp_index() * 32 + 8 * i) * 8;
      const uint32_t low = kTransposed ? first + 2 * t * 8 + g : first + g * 8 + 2 * t;
      expect(to[i] == (low | (low + (kTransposed ? 8 : 1)) << 16), "load_matrices");
    }
  });
}

void check_shuffles() {
  for (const uint32_t order : kOrders)
    emulator::run({2, 96, 0, order}, [] {
      for (int mask = 1; mask < 32; mask *= 2) {
        const float got = shuffle_xor(static_cast<float>(thread_index()), mask);
        expect(got == static_cast<float>(thread_index() ^ mask), "shuffle_xor");
      }
      const int source = (lane_index() * 5 + 3) % 32;
      const uint32_t got = shuffle(static_cast<uint32_t>(thread_index()), source);
      expect(got == static_cast<uint32_t>(warp_index() * 32 + source), "shuffle");
    });
}

// ---- copies, barriers, blocks

template <int kBytes>
void check_copies() {
  constexpr int kGroups = 3;
  alignas(16) static char from[kGroups * 32 * kBytes];
  for (size_t i = 0; i < sizeof from; ++i) from[i] = static_cast<char>(i * 7 + 1);
  emulator::run({1, 32, sizeof from, 1}, [] {
    const auto at = [](int group) { return (group * 32 + lane_index()) * kBytes; };
    const int valid = lane_index() % (kBytes + 1);
    const auto check = [&](int group) {
      for (int i = 0; i < kBytes; ++i)
        expect(read_shared(shared_memory() + at(group) + i) == (i < valid ? from[at(group) + i] : 0), "copy_async");
    };
    for (int group = 0; group < kGroups; ++group) {
      copy_async<kBytes>(shared_memory() + at(group), valid == 0 ? nullptr : from + at(group), valid);
      copy_commit();
    }
    expect(shared_memory()[at(0)] == '\xFF', "copy_async leaves poison until it is waited for");
    copy_wait<2>();
    check(0);
    expect(shared_memory()[at(1)] == '\xFF' && shared_memory()[at(2)] == '\xFF', "copy_wait leaves pending groups");
    copy_wait<0>();
    for (int group = 1; group < kGroups; ++group) check(group);
  });
}

// A sum over the block by shared memory, several times over, with each thread reading what others wrote.
void check_block_barrier() {
  for (const uint32_t order : kOrders)
    emulator::run({3, 128, 128 * sizeof(int), order}, [] {
      int mine = thread_index() + block_index();
      for (int step = 1; step < 128; step *= 2) {
        write_shared(shared_at<int>(4 * thread_index()), mine);
        block_barrier();
        mine += read_shared(shared_at<int>(4 * (thread_index() ^ step)));
        block_barrier();
      }
      expect(mine == 128 * 127 / 2 + 128 * block_index(), "block_barrier");
    });
}

void grid_barrier(uint32_t* counter, uint32_t blocks) {
  block_barrier();
  if (thread_index() == 0) {
    const uint32_t turn = add_and_fetch_old(counter, 1) / blocks;
    while (read_relaxed(counter) / blocks == turn) pause();
  }
  block_barrier();
}

void check_grid_barrier() {
  for (const uint32_t order : kOrders) {
    uint32_t counter = 0;
    std::vector<int> seen(3 * 64, 0);
    emulator::run({3, 64, 0, order}, [&] {
      for (int step = 1; step <= 10; ++step) {
        seen[block_index() * 64 + thread_index()] = step;
        grid_barrier(&counter, 3);
        for (const int other : seen) expect(other == step, "grid barrier");
        grid_barrier(&counter, 3);
      }
    });
    expect(counter == 60, "add_and_fetch_old counts");
  }
}

// Without the barrier of the grid some order must show that a block read what another had not yet written.
void check_orders() {
  int wrong = 0;
  for (const uint32_t order : kOrders) {
    std::vector<int> seen(3, 0);
    emulator::run({3, 32, 0, order}, [&] {
      if (thread_index() == 0) seen[block_index()] = 1;
      block_barrier();
      if (thread_index() == 0) wrong += seen[(block_index() + 1) % 3] == 0;
    });
  }
  expect(wrong > 0, "orders of the schedule show a missing barrier of the grid");
}

// ---- detectors

const Launch kOne = {1, 32, 1024, 0}, kFour = {1, 128, 1024, 0};

void check_races(uint32_t order) {
  Launch four = kFour;
  four.order = order;
  const auto mine = [] { return shared_at<float>(4 * thread_index()); };
  expect_fault("read without block_barrier", four, "race in shared memory at byte", [=] {
    write_shared(mine(), 1.0f);
    block_barrier();
    write_shared(mine(), 2.0f);
    read_shared(shared_at<float>(4 * (thread_index() ^ 32)));
  });
  expect_fault("warp_barrier where block_barrier is due", four, "without a barrier", [=] {
    write_shared(mine(), 1.0f);
    block_barrier();
    read_shared(shared_at<float>(4 * (thread_index() ^ 32)));
    warp_barrier();
    write_shared(mine(), 2.0f);
  });
  expect_fault("a shuffle where warp_barrier is due", four, "race in shared memory", [=] {
    write_shared(mine(), 1.0f);
    shuffle_xor(1.0f, 1);
    read_shared(shared_at<float>(4 * (thread_index() ^ 1)));
  });
  expect_fault("two writers", four, "writes (", [=] { write_shared(shared_at<float>(0), 1.0f); });
  expect_fault("load_matrices without warp_barrier", four, "race in shared memory", [] {
    uint32_t to[4];
    for (int i = 0; i < 2; ++i) write_shared(shared_at<double>(16 * lane_index() + 8 * i), 0.0);
    load_matrices<false>(to, shared_at<char>(16 * lane_index()));
  });
  expect_fault("a copy over what others read", four, "race in shared memory", [=] {
    alignas(16) static const char from[16] = {};
    write_shared(mine(), 1.0f);
    block_barrier();
    read_shared(shared_at<float>(4 * (127 - thread_index())));
    copy_async<4>(mine(), from, 4);
    copy_commit();
    copy_wait<0>();
  });
}

void check_ordered(uint32_t order) {
  emulator::run({2, 128, 1024, order}, [] {
    for (int i = 0; i < 3; ++i) {
      write_shared(shared_at<float>(4 * thread_index()), 1.0f);
      warp_barrier();
      read_shared(shared_at<float>(4 * (thread_index() ^ 1)));
      read_shared(shared_at<float>(4 * thread_index()));
      warp_barrier();
    }
    block_barrier();
    for (int i = 0; i < 4; ++i) read_shared(shared_at<float>(4 * ((thread_index() + 32 * i) % 128)));
    block_barrier();
    write_shared(shared_at<float>(4 * (127 - thread_index())), 1.0f);
  });
}

// The cell's few words must tell the same as the whole history of accesses to it.
void check_cells() {
  struct Past {
    emulator::Access access;
    bool writes;
  };
  Random random;
  int races = 0;
  const auto touch = [&](std::vector<Past>& history, const emulator::Access& now, bool writes) {
    bool want = false, got = false;
    for (const Past& past : history)
      want |= (past.writes || writes) &&
              emulator::concurrent(past.access.thread, past.access.epoch, past.access.warp_epoch, now);
    try {
      writes ? emulator::note_write(0, 2, now) : emulator::note_read(0, 2, now);
    } catch (const std::runtime_error&) {
      got = true;
    }
    expect(got == want, want ? "a race that the cells miss" : "a race that is none");
    races += got;
    history.push_back({now, writes});
    return !got;
  };
  const auto play = [&] {
    constexpr uint16_t kThreads[] = {0, 1, 2, 32, 33, 64};
    uint32_t epoch = 1, warp_epochs[3] = {1, 1, 1};
    std::vector<Past> history;
    for (bool ordered = true; ordered;) {
      const uint32_t choice = random.bits() % 16, warp = random.bits() % 3;
      const uint16_t thread = kThreads[random.bits() % 6];
      if (choice == 0) ++epoch;
      if (choice >= 1 && choice <= 4) ++warp_epochs[warp];
      if (choice >= 5) ordered = touch(history, {thread, epoch, warp_epochs[thread / kWarp], 1}, choice >= 14);
    }
  };
  emulator::strict = false;
  emulator::run({1, 32, 2, 0}, [&] {
    for (int i = 0; lane_index() == 0 && i < 5000; ++i) {
      emulator::current->block->cells[0] = {};
      play();
    }
  });
  emulator::strict = true;
  expect(races == 5000, "each play ends in a race");
}

void check_copy_faults() {
  alignas(16) static const char from[64] = {};
  expect_fault("a read before copy_wait", kOne, "still being copied", [] {
    copy_async<4>(shared_at<char>(4 * lane_index()), from, 4);
    copy_commit();
    read_shared(shared_at<float>(4 * lane_index()));
  });
  expect_fault("copy_wait before copy_commit", kOne, "still being copied", [] {
    copy_async<4>(shared_at<char>(4 * lane_index()), from, 4);
    copy_wait<0>();
    read_shared(shared_at<float>(4 * lane_index()));
  });
  expect_fault("copy_wait without a barrier", kOne, "race in shared memory at byte", [] {
    copy_async<4>(shared_at<char>(4 * lane_index()), from, 4);
    copy_commit();
    copy_wait<0>();
    read_shared(shared_at<float>(4 * (lane_index() & 30)));
  });
  expect_fault("a barrier before copy_wait", kOne, "still being copied", [] {
    copy_async<4>(shared_at<char>(4 * lane_index()), from, 4);
    copy_commit();
    block_barrier();
    read_shared(shared_at<float>(4 * (lane_index() ^ 1)));
    copy_wait<0>();
  });
  expect_fault("copies nobody waits for", kOne, "unwaited copies", [] {
    copy_async<4>(shared_at<char>(4 * lane_index()), from, 4);
    copy_commit();
  });
  expect_fault("a copy to a misaligned address", kOne, "no multiple of 16",
               [] { copy_async<16>(shared_at<char>(16 * lane_index() + 8), from, 16); });
  expect_fault("a copy from a misaligned address", kOne, "no multiple of 8",
               [] { copy_async<8>(shared_at<char>(16 * lane_index() + 8), from + 4, 8); });
  expect_fault("a copy of too many bytes", kOne, "valid bytes",
               [] { copy_async<8>(shared_at<char>(8 * lane_index()), from, 9); });
  expect_fault("a copy to what isn't shared memory", kOne, "copy_async at", [] {
    alignas(16) char local[16];
    copy_async<8>(local, from, 8);
  });
#if defined(GRJCA_EMULATOR_ASAN)
  const std::unique_ptr<char[]> few(new char[8]);
  expect_fault("a copy from beyond an allocation", kOne, "not all of which are allocated",
               [&] { copy_async<16>(shared_at<char>(16 * lane_index()), few.get(), 9); });
#endif
}

void check_memory_faults() {
  expect_fault("a read past the end", kOne, "which has 1024", [] { read_shared(shared_at<float>(1024)); });
  expect_fault("a write past the end", kOne, "which has 1024", [] { write_shared(shared_at<double>(1024), 1.0); });
  expect_fault("a misaligned read", kOne, "no multiple of 8", [] { read_shared(shared_at<double>(4)); });
  expect_fault("an uninitialised read", kOne, "uninitialised shared memory read",
               [] { read_shared(shared_at<float>(4)); });
  const auto row_at = [](int byte) {
    return [byte] {
      uint32_t to[4];
      if (lane_index() == 0)
        for (int i = 0; i < 128; ++i) write_shared(shared_at<double>(8 * i), 0.0);
      warp_barrier();
      load_matrices<true>(to, shared_at<char>(lane_index() == 31 ? byte : 16 * lane_index()));
    };
  };
  expect_fault("a row past the end", kOne, "thread 31 of block 0 touches 16 bytes at byte 1024", row_at(1024));
  expect_fault("a row before the start", kOne, "at byte -16", row_at(-16));
  expect_fault("a misaligned row", kOne, "no multiple of 16", row_at(8));
  emulator::strict = false;
  emulator::run(kOne, [] { expect(std::isnan(read_shared(shared_at<float>(4))), "shared memory starts as NaN"); });
  emulator::strict = true;
}

void check_divergence(uint32_t order) {
  Launch one = kOne, four = kFour;
  one.order = four.order = order;
  expect_fault("two block barriers", four, "block barrier at", [] {
    if (warp_index() == 2)
      block_barrier();
    else
      block_barrier();
  });
  expect_fault("a thread that ends before a block barrier", four, "has ended", [] {
    if (thread_index() != 77) block_barrier();
  });
  expect_fault("a warp that ends before a block barrier", four, "block barrier at", [] {
    if (warp_index() != 1) block_barrier();
  });
  expect_fault("two kinds of collective", one, "lanes diverge", [] {
    if (lane_index() < 16)
      shuffle_xor(1.0f, 1);
    else
      warp_barrier();
  });
  expect_fault("one kind at two lines", one, "lanes diverge", [] {
    if (lane_index() < 16)
      warp_barrier();
    else
      warp_barrier();
  });
  expect_fault("lanes with unlike numbers of steps", one, "lanes diverge", [] {
    for (int i = 0; i <= lane_index() / 31; ++i) warp_barrier();
  });
  expect_fault("a block barrier beside a collective", one, "lanes diverge", [] {
    if (lane_index() == 3)
      block_barrier();
    else
      warp_barrier();
  });
}

void check_deadlocks(uint32_t order) {
  uint32_t counter = 0;
  expect_fault("a counter that nobody raises", {3, 64, 0, order}, "deadlock", [&] {
    block_barrier();
    if (thread_index() == 0 && block_index() != 1) add_and_fetch_old(&counter, 1);
    if (thread_index() == 0)
      while (read_relaxed(&counter) < 3) pause();
    block_barrier();
  });
  expect_fault("a spin without pause", {1, 32, 0, order}, "without pause()", [&] {
    while (read_relaxed(&counter) != 100) {
    }
  });
}

void check_exceptions() {
  try {
    emulator::run(kFour, [] {
      warp_barrier();
      if (thread_index() == 40) throw std::invalid_argument("thrown by a kernel");
      block_barrier();
    });
    expect(false, "an exception of a kernel comes out of run");
  } catch (const std::invalid_argument&) {
  }
  expect_fault("threads that aren't whole warps", {1, 48, 0, 0}, "not 1 of 48", [] {});
}

// ---- time

template <class Kernel>
void measure(const char* what, int repeats, const Launch& launch, const Kernel& kernel) {
  const auto start = std::chrono::steady_clock::now();
  emulator::run(launch, [&] {
    for (int i = 0; i < repeats; ++i) kernel();
  });
  const std::chrono::duration<double, std::micro> spent = std::chrono::steady_clock::now() - start;
  std::printf("%-32s %8.2f us\n", what, spent.count() / repeats);
}

void measure_all() {
  constexpr int kRepeats = 5000;
  measure("block_barrier of 128 threads", kRepeats, {1, 128, 0, 0}, [] { block_barrier(); });
  measure("warp_barrier", kRepeats, {1, 32, 0, 0}, [] { warp_barrier(); });
  measure("multiply of BFloat16", kRepeats, {1, 32, 0, 0}, [] {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    multiply(BFloat16{}, d, a, b);
  });
  emulator::strict = false;
  measure("load_matrices", kRepeats, {1, 32, 512, 0}, [] {
    uint32_t to[4];
    load_matrices<false>(to, shared_at<char>(16 * lane_index()));
  });
  emulator::strict = true;
  measure("write_shared and read_shared, x32", kRepeats, {1, 32, 128, 0}, [] {
    write_shared(shared_at<float>(4 * lane_index()), 1.0f);
    read_shared(shared_at<float>(4 * lane_index()));
  });
}

void check_all() {
  check_numbers();
  check_tanh();
  check_multiply<BFloat16>();
  check_multiply<Float16>();
  check_multiply<Tf32>();
  check_load_matrices<false>();
  check_load_matrices<true>();
  check_shuffles();
  check_copies<4>();
  check_copies<8>();
  check_copies<16>();
  check_block_barrier();
  check_grid_barrier();
  check_orders();
  for (const uint32_t order : kOrders) {
    check_races(order);
    check_ordered(order);
    check_divergence(order);
    check_deadlocks(order);
  }
  check_cells();
  check_copy_faults();
  check_memory_faults();
  check_exceptions();
}

}  // namespace
}  // namespace grjca::cuda

int main(int arguments, char**) {
  grjca::cuda::check_all();
  if (arguments > 1) grjca::cuda::measure_all();
  std::printf("check_emulator: %s\n", grjca::cuda::failures == 0 ? "all is right" : "FAILED");
  return grjca::cuda::failures == 0 ? 0 : 1;
}
