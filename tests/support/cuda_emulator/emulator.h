// device.h on a host: every thread of a launch is a fiber of one OS thread, so the very source of a kernel runs under
// AddressSanitizer and UBSan. The model is stricter than a GPU: what a GPU may get right by luck is a fault here.
//
// What orders shared memory is block_barrier() and, within a warp, warp_barrier(); nothing else does. Global memory is
// ordinary memory, and its races are looked for by the order of the schedule only.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "device.h"

#if defined(__SANITIZE_ADDRESS__)
#define GRJCA_EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GRJCA_EMULATOR_ASAN 1
#endif
#endif
#if defined(GRJCA_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(GRJCA_EMULATOR_UCONTEXT)
#define GRJCA_EMULATOR_UCONTEXT 1  // or asked for, to test what other machines do
#endif
#if defined(GRJCA_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

// The checks of the shadow cells and the products see no pointer of a kernel: instrumenting them finds nothing.
#define GRJCA_EMULATOR_PLAIN __attribute__((no_sanitize("address"), no_sanitize("undefined")))
// Where the kernel calls a primitive.
#define GRJCA_EMULATOR_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace grjca::cuda::emulator {

struct Launch {
  int blocks, threads;
  size_t shared_bytes;
  uint32_t order;  // of blocks, warps and lanes: 0 the lowest first, 1 the highest first, else a seed of random picks
};

// Whether reading shared memory that this launch has never written is a fault.
inline bool strict = true;

// ---- where in the source

using Site = uint16_t;  // 0: nowhere

struct SiteEntry {
  const char* file;
  int line;
  Site site;
};
constexpr size_t kSites = 4096;
inline SiteEntry site_table[kSites];  // by hash of pointer and line
inline SiteEntry site_names[kSites];  // by site
inline size_t site_count = 0, site_entries = 0;

__attribute__((noinline)) inline Site add_site(SiteEntry& entry, const char* file, int line) {
  Site site = 1;
  while (site <= site_count && (site_names[site].line != line || std::strcmp(site_names[site].file, file) != 0)) ++site;
  if (++site_entries == kSites) throw std::runtime_error("emulator.h has no room for more call sites; raise kSites");
  if (site > site_count) site_count = site;
  entry = site_names[site] = {file, line, site};
  return site;
}

inline Site site_of(const char* file, int line) {
  size_t i = (reinterpret_cast<uintptr_t>(file) * 31 + static_cast<size_t>(line) * 7) % kSites;
  while (site_table[i].file != nullptr && (site_table[i].file != file || site_table[i].line != line))
    i = (i + 1) % kSites;
  return site_table[i].file != nullptr ? site_table[i].site : add_site(site_table[i], file, line);
}

inline std::string text_of(Site site) {
  if (site == 0) return "nowhere";
  return std::string(site_names[site].file) + ":" + std::to_string(site_names[site].line);
}

[[noreturn]] __attribute__((noinline)) inline void fault(const std::string& sentence) {
  throw std::runtime_error(sentence);
}

// ---- stacks and switches between them

constexpr size_t kStack = 256 * 1024, kGuard = 64 * 1024;  // a page or more of any system
constexpr int kMostFibers = 24576;                         // a stack is two of the 65530 mappings that Linux gives

// Kept from launch to launch; the system commits only the pages that a kernel touches.
inline std::vector<char*>& stacks() {
  static std::vector<char*> all;
  return all;
}

inline char* stack_of(size_t i) {
  while (stacks().size() <= i) {
    void* p =
        mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE) != 0)
      throw std::runtime_error("no memory for a fiber's stack");
    stacks().push_back(static_cast<char*>(p) + kGuard);
  }
  return stacks()[i];
}

#if !defined(GRJCA_EMULATOR_UCONTEXT)
using Context = void*;  // the stack pointer

#if defined(__clang__)
#define GRJCA_EMULATOR_OPAQUE noinline
#else
#define GRJCA_EMULATOR_OPAQUE noipa  // or GCC infers from the body that registers survive the call
#endif
__attribute__((naked, GRJCA_EMULATOR_OPAQUE)) inline void switch_context(Context* /*from*/, Context* /*to*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq (%rsi), %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
inline void make_context(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // the return address of `entry`, which aligns the stack as a call would
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;

inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// ---- the machine

enum Kind {
  kRunning,
  kPause,
  kBlockBarrier,
  kWarpBarrier,
  kShuffle,
  kShuffleXor,
  kLoadMatrices,
  kLoadMatricesTransposed,
  kMultiplyBFloat16,
  kMultiplyFloat16,
  kMultiplyTf32,
};
inline const char* name_of(Kind kind) {
  constexpr const char* names[] = {"running",
                                   "pause",
                                   "block_barrier",
                                   "warp_barrier",
                                   "shuffle",
                                   "shuffle_xor",
                                   "load_matrices<false>",
                                   "load_matrices<true>",
                                   "multiply of BFloat16",
                                   "multiply of Float16",
                                   "multiply of Tf32"};
  return names[kind];
}

constexpr uint16_t kNobody = 0xFFFF;

// The last accesses to two bytes of shared memory. Two readers suffice: of one warp in its latest epoch, or of two
// warps (whatever comes next, one of the two is in another warp than it).
struct Cell {
  uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
  uint16_t writer = kNobody, reader = kNobody, other_reader = kNobody, copier = kNobody;
  Site write_site = 0, read_site = 0, other_read_site = 0, copy_site = 0;
};

struct Block {
  int index = 0;
  std::unique_ptr<char[]> shared;
  std::vector<Cell> cells;
  uint32_t epoch = 1;  // one more at each block barrier
  int arrived = 0, ended = 0;
  int first_arrived = 0, last_ended = 0;
  Site site = 0;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  uint32_t epoch = 1;  // one more at each warp barrier
  uint32_t ready = 0xFFFFFFFFu, paused = 0;
  int arrived = 0, ended = 0, in_block_barrier = 0;
  int first_arrived = 0, last_ended = 0;
  Kind kind = kRunning;
  Site site = 0;
  void* arguments[kWarp] = {};
};

struct Copy {
  char* to;
  const char* from;
  int bytes, valid;
  Site site;
};

struct Fiber {
  Context context{};
  char* stack = nullptr;
  void* fake_stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0, lane = 0;
  Kind kind = kRunning;
  Site site = 0;
  bool ended = false;
  std::vector<Copy> copies;  // the oldest first
  std::vector<int> groups;   // how many copies each has, the oldest first
  int uncommitted = 0;
};

struct Machine {
  const Launch* launch;
  const std::function<void()>* kernel;
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  Context context{};
  const void* stack_bottom = nullptr;  // of run()'s caller, as AddressSanitizer tells
  size_t stack_size = 0;
  std::exception_ptr failure;
  int live = 0, idle_rounds = 0, reads_without_wait = 0;
  uint32_t random = 1;
};

inline Machine* machine = nullptr;
inline Fiber* current = nullptr;

inline std::string text_of(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.thread) + " of block " + std::to_string(fiber.block->index);
}
inline std::string text_of(Kind kind, Site site) { return std::string(name_of(kind)) + " at " + text_of(site); }
inline std::string lane_text(const Warp& warp, int lane) {
  return "lane " + std::to_string(lane) + " of warp " + std::to_string(warp.index) + " of block " +
         std::to_string(warp.block->index);
}

// From the fiber to run(), until it is this fiber's turn again.
inline void leave(bool for_good) {
  Fiber& self = *current;
#if defined(GRJCA_EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self.fake_stack, machine->stack_bottom, machine->stack_size);
#else
  static_cast<void>(for_good);
#endif
  switch_context(&self.context, &machine->context);
#if defined(GRJCA_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(self.fake_stack, &machine->stack_bottom, &machine->stack_size);
#endif
}

inline void resume(Fiber& fiber) {
  current = &fiber;
#if defined(GRJCA_EMULATOR_ASAN)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStack);
#endif
  switch_context(&machine->context, &fiber.context);
#if defined(GRJCA_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

inline void wait(Kind kind, Site site) {
  Fiber& self = *current;
  self.kind = kind;
  self.site = site;
  machine->reads_without_wait = 0;
  leave(false);
  self.kind = kRunning;
}

inline void end_thread(Fiber& self) {
  Block& block = *self.block;
  Warp& warp = *self.warp;
  if (!self.copies.empty())
    fault("unwaited copies: " + text_of(self) + " has ended with " + std::to_string(self.copies.size()) +
          " copies under way, the first from " + text_of(self.copies[0].site));
  if (warp.arrived > 0)
    fault("lanes diverge: " + lane_text(warp, self.lane) + " has ended, lane " + std::to_string(warp.first_arrived) +
          " waits in " + text_of(warp.kind, warp.site));
  if (block.arrived > 0)
    fault("block barrier at " + text_of(block.site) + ": " + text_of(self) + " has ended, thread " +
          std::to_string(block.first_arrived) + " waits");
  ++warp.ended;
  ++block.ended;
  warp.last_ended = self.lane;
  block.last_ended = self.thread;
  machine->idle_rounds = 0;
}

// Nothing may be thrown past it: below it on the stack there is no caller.
__attribute__((noinline)) inline void fiber_entry() {
#if defined(GRJCA_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &machine->stack_bottom, &machine->stack_size);
#endif
  try {
    (*machine->kernel)();
    end_thread(*current);
  } catch (...) {
    machine->failure = std::current_exception();
  }
  current->ended = true;
  --machine->live;
  leave(true);
  std::abort();
}

// ---- who runs next

inline uint32_t next_random(Machine& m) {
  m.random ^= m.random << 13;
  m.random ^= m.random >> 17;
  m.random ^= m.random << 5;
  return m.random;
}

inline bool wake_paused(Machine& m) {
  bool any = false;
  for (Warp& warp : m.warps) {
    any |= warp.paused != 0;
    warp.ready |= std::exchange(warp.paused, 0);
  }
  return any;
}

inline Warp* ready_warp(Machine& m) {
  const size_t n = m.warps.size();
  if (m.launch->order == 0) {
    for (size_t i = 0; i < n; ++i)
      if (m.warps[i].ready) return &m.warps[i];
    return nullptr;
  }
  if (m.launch->order == 1) {
    for (size_t i = n; i-- > 0;)
      if (m.warps[i].ready) return &m.warps[i];
    return nullptr;
  }
  if (next_random(m) % 16 == 0) wake_paused(m);
  uint32_t count = 0;
  for (const Warp& warp : m.warps) count += warp.ready != 0;
  if (count == 0) return nullptr;
  uint32_t skip = next_random(m) % count;
  for (Warp& warp : m.warps)
    if (warp.ready && skip-- == 0) return &warp;
  return nullptr;
}

inline void take_turn(Machine& m, Warp& warp) {
  const uint32_t lanes = std::exchange(warp.ready, 0);
  const int flip = m.launch->order == 0 ? 0 : m.launch->order == 1 ? kWarp - 1 : next_random(m) % kWarp;
  Fiber* fibers = &m.fibers[(&warp - m.warps.data()) * kWarp];
  for (int i = 0; i < kWarp && !m.failure; ++i)
    if (lanes >> (i ^ flip) & 1) resume(fibers[i ^ flip]);
}

inline std::string deadlock_text(const Machine& m) {
  struct Group {
    const Fiber* first;
    int count;
  };
  std::vector<Group> groups;
  for (const Fiber& fiber : m.fibers) {
    if (fiber.ended) continue;
    size_t i = 0;
    while (i < groups.size() && (groups[i].first->kind != fiber.kind || groups[i].first->site != fiber.site)) ++i;
    if (i == groups.size()) groups.push_back({&fiber, 0});
    ++groups[i].count;
  }
  std::string text = "deadlock:";
  for (const Group& group : groups)
    text += std::string(&group == groups.data() ? " " : ", ") + std::to_string(group.count) +
            " threads (the first: " + text_of(*group.first) + ") wait in " +
            text_of(group.first->kind, group.first->site);
  return text;
}

constexpr int kIdleRounds = 1000;

inline void schedule(Machine& m) {
  while (m.live > 0 && !m.failure) {
    if (Warp* warp = ready_warp(m))
      take_turn(m, *warp);
    else if (!wake_paused(m) || ++m.idle_rounds > kIdleRounds)
      fault(deadlock_text(m));
  }
  if (m.failure) std::rethrow_exception(m.failure);
}

// ---- launches

inline void prepare(Machine& m) {
  const Launch& launch = *m.launch;
  const int warps = launch.threads / kWarp;
  m.blocks.resize(launch.blocks);
  m.warps.resize(static_cast<size_t>(launch.blocks) * warps);
  m.fibers.resize(static_cast<size_t>(launch.blocks) * launch.threads);
  m.live = static_cast<int>(m.fibers.size());
  m.random = launch.order * 2654435761u | 1;
  for (int b = 0; b < launch.blocks; ++b) {
    Block& block = m.blocks[b];
    block.index = b;
    block.shared.reset(new char[launch.shared_bytes]);
    std::memset(block.shared.get(), 0xFF, launch.shared_bytes);  // NaN in every type
    block.cells.resize((launch.shared_bytes + 1) / 2);
  }
  for (size_t i = 0; i < m.warps.size(); ++i) {
    m.warps[i].block = &m.blocks[i / warps];
    m.warps[i].index = static_cast<int>(i % warps);
  }
  for (size_t i = 0; i < m.fibers.size(); ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.thread = static_cast<int>(i % launch.threads);
    fiber.lane = fiber.thread % kWarp;
    fiber.warp = &m.warps[i / kWarp];
    fiber.block = fiber.warp->block;
    fiber.stack = stack_of(i);
    make_context(fiber.context, fiber.stack, fiber_entry);
  }
}

struct Closing {
  const Machine& m;
  ~Closing() {
    machine = nullptr;
    current = nullptr;
#if defined(GRJCA_EMULATOR_ASAN)
    // Frames that never returned, fiber_entry's and those of an abandoned launch, leave red zones behind.
    const size_t stale = m.live > 0 || m.failure ? kStack : 4096;
    for (const Fiber& fiber : m.fibers)
      if (fiber.stack != nullptr) __asan_unpoison_memory_region(fiber.stack + kStack - stale, stale);
#endif
  }
};

// Runs `kernel` once for each thread of all blocks, which are alive together, as of a cooperative launch.
inline void run(const Launch& launch, const std::function<void()>& kernel) {
  if (machine != nullptr) throw std::runtime_error("emulator::run was called by a kernel that emulator::run runs");
  if (launch.blocks < 1 || launch.threads < kWarp || launch.threads > 1024 || launch.threads % kWarp != 0 ||
      launch.blocks > kMostFibers / launch.threads)
    throw std::runtime_error("emulator::run takes 1 block or more of 32, 64, ... 1024 threads, in all at most " +
                             std::to_string(kMostFibers) + ", not " + std::to_string(launch.blocks) + " of " +
                             std::to_string(launch.threads));
  Machine m{};
  m.launch = &launch;
  m.kernel = &kernel;
  const Closing closing{m};
  machine = &m;
  prepare(m);
  schedule(m);
}

// ---- shared memory

inline size_t shared_bytes() { return machine->launch->shared_bytes; }

[[noreturn]] __attribute__((noinline)) inline void misplaced(const char* what, Site site, int thread, intptr_t at,
                                                             size_t bytes, const std::string& why) {
  fault(std::string(what) + " at " + text_of(site) + ": thread " + std::to_string(thread) + " of block " +
        std::to_string(current->block->index) + " touches " + std::to_string(bytes) + " bytes at byte " +
        std::to_string(at) + " of shared memory, " + why);
}

// The byte of shared memory that p points to, if all `bytes` lie inside and are aligned.
inline size_t locate(const void* p, size_t bytes, size_t alignment, const char* what, Site site, int thread) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  const auto base = reinterpret_cast<uintptr_t>(current->block->shared.get());
  const size_t at = address - base;
  if (address < base || at + bytes > shared_bytes())
    misplaced(what, site, thread, at, bytes, "which has " + std::to_string(shared_bytes()));
  if (at % alignment != 0) misplaced(what, site, thread, at, bytes, "no multiple of " + std::to_string(alignment));
  return at;
}

// Who touches a cell: a lane of the current warp, which for a row of load_matrices isn't the current fiber.
struct Access {
  uint16_t thread;
  uint32_t epoch, warp_epoch;
  Site site;
};
inline Access access_by(const Fiber& fiber, int lane, Site site) {
  return {static_cast<uint16_t>(fiber.thread - fiber.lane + lane), fiber.block->epoch, fiber.warp->epoch, site};
}

GRJCA_EMULATOR_PLAIN inline bool same_warp(uint16_t a, uint16_t b) { return a / kWarp == b / kWarp; }

// Whether no barrier stands between an access by `thread` in these epochs and `now`.
GRJCA_EMULATOR_PLAIN inline bool concurrent(uint16_t thread, uint32_t epoch, uint32_t warp_epoch, const Access& now) {
  return thread != kNobody && thread != now.thread && epoch == now.epoch &&
         (!same_warp(thread, now.thread) || warp_epoch == now.warp_epoch);
}

[[noreturn]] __attribute__((noinline)) inline void race(const Cell& cell, const char* did, uint16_t thread, Site site,
                                                        const char* does, const Access& now) {
  const Block& block = *current->block;
  fault("race in shared memory at byte " + std::to_string((&cell - block.cells.data()) * 2) + " of block " +
        std::to_string(block.index) + ": thread " + std::to_string(thread) + " " + did + " (" + text_of(site) +
        "), thread " + std::to_string(now.thread) + " " + does + " (" + text_of(now.site) + ") without a barrier");
}
[[noreturn]] __attribute__((noinline)) inline void still_copied(const Cell& cell, const Access& now) {
  const Block& block = *current->block;
  fault("race in shared memory: byte " + std::to_string((&cell - block.cells.data()) * 2) + " of block " +
        std::to_string(block.index) + " is still being copied by thread " + std::to_string(cell.copier) + " (" +
        text_of(cell.copy_site) + ") when thread " + std::to_string(now.thread) + " touches it (" + text_of(now.site) +
        ")");
}
[[noreturn]] __attribute__((noinline)) inline void never_written(const Cell& cell, const Access& now) {
  const Block& block = *current->block;
  fault("uninitialised shared memory read at byte " + std::to_string((&cell - block.cells.data()) * 2) + " of block " +
        std::to_string(block.index) + " by thread " + std::to_string(now.thread) + " (" + text_of(now.site) + ")");
}

GRJCA_EMULATOR_PLAIN inline void note_reader(Cell& cell, const Access& now) {
  const bool other_elsewhere = cell.other_reader != kNobody && !same_warp(cell.other_reader, cell.reader);
  const bool mine = cell.reader != kNobody && same_warp(cell.reader, now.thread);
  if (cell.reader == kNobody || cell.read_epoch != now.epoch || (mine && cell.read_warp_epoch != now.warp_epoch)) {
    if (cell.read_epoch != now.epoch || !other_elsewhere) cell.other_reader = kNobody;
    cell.reader = now.thread;
    cell.read_site = now.site;
    cell.read_epoch = now.epoch;
    cell.read_warp_epoch = now.warp_epoch;
  } else if (cell.reader != now.thread && (mine ? cell.other_reader == kNobody : !other_elsewhere)) {
    cell.other_reader = now.thread;
    cell.other_read_site = now.site;
  }
}

GRJCA_EMULATOR_PLAIN inline void note_read(size_t at, size_t bytes, const Access& now) {
  Cell* cells = current->block->cells.data();
  for (size_t i = at / 2; i < (at + bytes + 1) / 2; ++i) {
    Cell& cell = cells[i];
    if (cell.copier != kNobody) still_copied(cell, now);
    if (cell.write_site == 0 && strict) never_written(cell, now);
    if (concurrent(cell.writer, cell.write_epoch, cell.write_warp_epoch, now))
      race(cell, "wrote", cell.writer, cell.write_site, "reads", now);
    note_reader(cell, now);
  }
}

GRJCA_EMULATOR_PLAIN inline void note_write(size_t at, size_t bytes, const Access& now) {
  Cell* cells = current->block->cells.data();
  for (size_t i = at / 2; i < (at + bytes + 1) / 2; ++i) {
    Cell& cell = cells[i];
    if (cell.copier != kNobody) still_copied(cell, now);
    if (concurrent(cell.writer, cell.write_epoch, cell.write_warp_epoch, now))
      race(cell, "wrote", cell.writer, cell.write_site, "writes", now);
    if (concurrent(cell.reader, cell.read_epoch, cell.read_warp_epoch, now))
      race(cell, "read", cell.reader, cell.read_site, "writes", now);
    if (concurrent(cell.other_reader, cell.read_epoch, cell.read_warp_epoch, now))
      race(cell, "read", cell.other_reader, cell.other_read_site, "writes", now);
    cell.writer = now.thread;
    cell.write_site = now.site;
    cell.write_epoch = now.epoch;
    cell.write_warp_epoch = now.warp_epoch;
    cell.reader = cell.other_reader = kNobody;
  }
}

template <class V>
constexpr size_t alignment_of() {
  return (sizeof(V) & (sizeof(V) - 1)) == 0 ? sizeof(V) : alignof(V);
}

// ---- asynchronous copies: what one does is done as late as is legal

inline std::string why_not(const Copy& copy) {
  const auto from = reinterpret_cast<uintptr_t>(copy.from);
  const auto base = reinterpret_cast<uintptr_t>(current->block->shared.get());
  if (copy.valid < 0 || copy.valid > copy.bytes)
    return "wants " + std::to_string(copy.valid) + " valid bytes of " + std::to_string(copy.bytes);
  if (copy.valid == 0) return {};
  if (from % copy.bytes != 0) return "copies from an address that is no multiple of " + std::to_string(copy.bytes);
  if (from >= base && from < base + shared_bytes()) return "copies from shared memory";
#if defined(GRJCA_EMULATOR_ASAN)
  if (__asan_region_is_poisoned(const_cast<char*>(copy.from), copy.valid) != nullptr)
    return "copies " + std::to_string(copy.valid) + " bytes, not all of which are allocated";
#endif
  return {};
}

inline void issue(const Copy& copy) {
  Fiber& self = *current;
  const size_t at = locate(copy.to, copy.bytes, copy.bytes, "copy_async", copy.site, self.thread);
  const std::string why = why_not(copy);
  if (!why.empty()) fault("copy_async at " + text_of(copy.site) + ": " + text_of(self) + " " + why);
  note_write(at, copy.bytes, access_by(self, self.lane, copy.site));
  for (int i = 0; i < copy.bytes / 2; ++i) {
    Cell& cell = self.block->cells[at / 2 + i];
    cell.copier = static_cast<uint16_t>(self.thread);
    cell.copy_site = copy.site;
  }
  std::memset(copy.to, 0xFF, copy.bytes);
  self.copies.push_back(copy);
  ++self.uncommitted;
}

inline void complete(const Copy& copy) {
  Fiber& self = *current;
  const size_t at = copy.to - self.block->shared.get();
  if (copy.valid > 0) std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
  for (int i = 0; i < copy.bytes / 2; ++i) self.block->cells[at / 2 + i].copier = kNobody;
  note_write(at, copy.bytes, access_by(self, self.lane, copy.site));
}

inline void complete_groups(size_t pending) {
  Fiber& self = *current;
  int copies = 0;
  size_t groups = 0;
  for (; self.groups.size() - groups > pending; ++groups)
    for (int i = 0; i < self.groups[groups]; ++i) complete(self.copies[copies++]);
  self.copies.erase(self.copies.begin(), self.copies.begin() + copies);
  self.groups.erase(self.groups.begin(), self.groups.begin() + groups);
}

// ---- what the lanes of a warp do together

[[noreturn]] __attribute__((noinline)) inline void diverge(const Fiber& self, Kind kind, Site site,
                                                           const std::string& other) {
  fault("lanes diverge: " + lane_text(*self.warp, self.lane) + " is in " + text_of(kind, site) + ", " + other);
}

inline void check_together(const Fiber& self, Kind kind, Site site) {
  const Warp& warp = *self.warp;
  if (warp.ended > 0) diverge(self, kind, site, "lane " + std::to_string(warp.last_ended) + " has ended");
  if (warp.in_block_barrier > 0)
    diverge(
        self, kind, site,
        std::to_string(warp.in_block_barrier) + " of its lanes are in block_barrier at " + text_of(warp.block->site));
  if (warp.arrived > 0 && (warp.kind != kind || warp.site != site))
    diverge(self, kind, site, "lane " + std::to_string(warp.first_arrived) + " in " + text_of(warp.kind, warp.site));
}

// The lane that comes last does the work of all; work(arguments) takes what each lane has brought.
template <class Argument, class Work>
void meet(Kind kind, Site site, Argument* argument, const Work& work) {
  Fiber& self = *current;
  Warp& warp = *self.warp;
  check_together(self, kind, site);
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.site = site;
    warp.first_arrived = self.lane;
  }
  warp.arguments[self.lane] = argument;
  if (++warp.arrived < kWarp) return wait(kind, site);
  warp.arrived = 0;
  Argument* arguments[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) arguments[lane] = static_cast<Argument*>(warp.arguments[lane]);
  work(arguments);
  warp.ready |= ~(1u << self.lane);
}

inline void arrive_at_block_barrier(Site site) {
  Fiber& self = *current;
  Block& block = *self.block;
  Warp& warp = *self.warp;
  if (warp.arrived > 0)
    diverge(self, kBlockBarrier, site,
            "lane " + std::to_string(warp.first_arrived) + " in " + text_of(warp.kind, warp.site));
  if (block.ended > 0)
    fault("block barrier at " + text_of(site) + ": thread " + std::to_string(block.last_ended) + " of block " +
          std::to_string(block.index) + " has ended, thread " + std::to_string(self.thread) + " waits");
  if (block.arrived > 0 && block.site != site)
    fault("block barrier at " + text_of(site) + ": " + text_of(self) + " waits there, thread " +
          std::to_string(block.first_arrived) + " at " + text_of(block.site));
  if (block.arrived == 0) {
    block.site = site;
    block.first_arrived = self.thread;
  }
  ++warp.in_block_barrier;
  if (++block.arrived < machine->launch->threads) return wait(kBlockBarrier, site);
  block.arrived = 0;
  ++block.epoch;
  const int warps = machine->launch->threads / kWarp;
  for (int i = 0; i < warps; ++i) {
    Warp& other = machine->warps[block.index * warps + i];
    other.ready = 0xFFFFFFFFu;
    other.in_block_barrier = 0;
  }
  warp.ready &= ~(1u << self.lane);
}

// ---- numbers

inline float float16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa | 1024), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline const float* float16_values() {
  static const std::vector<float> values = [] {
    std::vector<float> all(65536);
    for (int bits = 0; bits < 65536; ++bits) all[bits] = float16_value(static_cast<uint16_t>(bits));
    return all;
  }();
  return values.data();
}

template <class To, class From>
GRJCA_EMULATOR_PLAIN inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ---- tensor cores

struct Product {
  float* d;
  const uint32_t *a, *b;
};

// Elements of 16 x K and K x 8 operands from the registers of a warp, as the PTX ISA lays them out.
template <class T>
GRJCA_EMULATOR_PLAIN inline double element(uint32_t bits, int half) {
  const auto part = static_cast<uint16_t>(bits >> 16 * half);
  if constexpr (std::is_same_v<T, Tf32>)
    return bit_cast<float>(bits & 0xFFFFE000u);
  else if constexpr (std::is_same_v<T, BFloat16>)
    return bit_cast<float>(static_cast<uint32_t>(part) << 16);
  else
    return float16_values()[part];
}

// A model of mma.sync: products are exact, their sum with d is rounded once. Hardware keeps fewer bits of the sum.
template <class T>
GRJCA_EMULATOR_PLAIN inline void multiply_warp(Product* const (&lanes)[kWarp]) {
  constexpr int kPacked = std::is_same_v<T, Tf32> ? 1 : 2, kHalf = 4 * kPacked;
  double a[16][2 * kHalf], b[2 * kHalf][8];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int half = 0; half < kPacked; ++half) {
      const int g = lane / 4, k = kPacked * (lane % 4) + half;
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][k + kHalf * (i / 2)] = element<T>(lanes[lane]->a[i], half);
      for (int i = 0; i < 2; ++i) b[k + kHalf * i][g] = element<T>(lanes[lane]->b[i], half);
    }
  for (int m = 0; m < 16; ++m) {
    double sum[8];
    for (int n = 0; n < 8; ++n) sum[n] = lanes[m % 8 * 4 + n / 2]->d[n % 2 + m / 8 * 2];
    for (int k = 0; k < 2 * kHalf; ++k)
      for (int n = 0; n < 8; ++n) sum[n] += a[m][k] * b[k][n];
    for (int n = 0; n < 8; ++n) lanes[m % 8 * 4 + n / 2]->d[n % 2 + m / 8 * 2] = static_cast<float>(sum[n]);
  }
}

template <class T>
void multiply(Kind kind, Site site, float* d, const uint32_t* a, const uint32_t* b) {
  Product mine{d, a, b};
  meet(kind, site, &mine, [](auto& lanes) { multiply_warp<T>(lanes); });
}

struct Rows {
  uint32_t* to;
  const void* row;
};

template <bool kTransposed>
void load_warp(Rows* const (&lanes)[kWarp], Site site) {
  uint16_t rows[kWarp][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const void* row = lanes[lane]->row;
    const int thread = current->thread - current->lane + lane;
    const size_t at = locate(row, 16, 16, "load_matrices", site, thread);
    // Several lanes receive elements of a row; two of them make it unordered with a write by any one lane.
    const int r = lane % 8, reader = kTransposed ? r / 2 : 4 * r;
    note_read(at, 16, access_by(*current, reader, site));
    note_read(at, 16, access_by(*current, kTransposed ? reader + 4 : reader + 1, site));
    std::memcpy(rows[lane], row, 16);
  }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const uint32_t low = kTransposed ? rows[8 * i + t][g] : rows[8 * i + g][t];
      const uint32_t high = kTransposed ? rows[8 * i + t + 1][g] : rows[8 * i + g][t + 1];
      lanes[lane]->to[i] = low | high << 16;
    }
}

constexpr int kReadsWithoutWait = 10000000;

}  // namespace grjca::cuda::emulator

namespace grjca::cuda {

// ---- who

GRJCA_DEVICE int thread_index() { return emulator::current->thread; }
GRJCA_DEVICE int lane_index() { return emulator::current->lane; }
GRJCA_DEVICE int warp_index() { return emulator::current->warp->index; }
GRJCA_DEVICE int block_index() { return emulator::current->block->index; }
GRJCA_DEVICE Thread this_thread() { return {emulator::current->thread}; }
GRJCA_DEVICE int opaque_zero() { return 0; }

// ---- numbers

GRJCA_DEVICE uint32_t bits_of(float x) { return emulator::bit_cast<uint32_t>(x); }
GRJCA_DEVICE float float_of(uint32_t bits) { return emulator::bit_cast<float>(bits); }

GRJCA_DEVICE float widen(float x) { return x; }
GRJCA_DEVICE float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
GRJCA_DEVICE float widen(Float16 x) { return emulator::float16_values()[x.bits]; }

// Rounding to nearest, ties to even; NaN becomes the one NaN that cvt gives.
GRJCA_DEVICE void narrow(float x, float& to) { to = x; }
GRJCA_DEVICE void narrow(float x, BFloat16& to) {
  const uint32_t bits = bits_of(x);
  to.bits = static_cast<uint16_t>(x != x ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
GRJCA_DEVICE void narrow(float x, Float16& to) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u;
  const float magnitude = std::fabs(x);
  uint32_t rounded;
  if (x != x) {
    to.bits = 0x7FFF;
    return;
  }
  if (magnitude >= 65520.0f)
    rounded = 0x7C00u;
  else if (magnitude < 0x1p-14f)  // a multiple of 2^-24, which the sum rounds to
    rounded = bits_of(magnitude + 0.5f) - bits_of(0.5f);
  else
    rounded = (bits_of(magnitude) - (112u << 23) + 0xFFFu + (bits_of(magnitude) >> 13 & 1)) >> 13;
  to.bits = static_cast<uint16_t>(sign | rounded);
}

// To 10 bits of mantissa, ties away from zero.
GRJCA_DEVICE uint32_t round_tf32(float x) {
  if (x != x) return 0x7FFFFFFFu;
  return std::isinf(x) ? bits_of(x) : (bits_of(x) + 0x1000u) & 0xFFFFE000u;
}

// A model: off by up to 2^-11 of the value, which the ISA allows, by a hash of x.
GRJCA_DEVICE float tanh_approximate(float x) {
  uint32_t hash = bits_of(x) * 0x9E3779B1u;
  hash = (hash ^ hash >> 15) * 0x85EBCA77u;
  hash ^= hash >> 13;
  const float relative = (static_cast<float>(hash >> 8) * 0x1p-23f - 1.0f) * 0x1p-11f;
  const float y = std::tanh(x) * (1.0f + relative);
  return y > 1.0f ? 1.0f : y < -1.0f ? -1.0f : y;
}

GRJCA_DEVICE float exponential(float x) { return std::exp(x); }
GRJCA_DEVICE float divide_fast(float a, float b) { return b > 0x1p126f ? 0 : a / b; }
GRJCA_DEVICE float square_root(float x) { return std::sqrt(x); }
GRJCA_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

// ---- shared memory

GRJCA_DEVICE char* shared_memory() { return emulator::current->block->shared.get(); }

template <class V>
GRJCA_DEVICE V read_shared(const V* p, GRJCA_EMULATOR_HERE) {
  static_assert(std::is_trivially_copyable_v<V> && sizeof(V) <= 16, "one load of up to 16 bytes");
  const emulator::Site site = emulator::site_of(file, line);
  const emulator::Fiber& self = *emulator::current;
  const size_t at = emulator::locate(p, sizeof(V), emulator::alignment_of<V>(), "read_shared", site, self.thread);
  emulator::note_read(at, sizeof(V), emulator::access_by(self, self.lane, site));
  V value;
  std::memcpy(&value, p, sizeof(V));
  return value;
}
template <class V>
GRJCA_DEVICE void write_shared(V* p, V value, GRJCA_EMULATOR_HERE) {
  static_assert(std::is_trivially_copyable_v<V> && sizeof(V) <= 16, "one store of up to 16 bytes");
  const emulator::Site site = emulator::site_of(file, line);
  const emulator::Fiber& self = *emulator::current;
  const size_t at = emulator::locate(p, sizeof(V), emulator::alignment_of<V>(), "write_shared", site, self.thread);
  emulator::note_write(at, sizeof(V), emulator::access_by(self, self.lane, site));
  std::memcpy(p, &value, sizeof(V));
}

GRJCA_DEVICE uint32_t shared_address(const void* p, GRJCA_EMULATOR_HERE) {
  return static_cast<uint32_t>(
      emulator::locate(p, 0, 1, "shared_address", emulator::site_of(file, line), thread_index()));
}

template <int kBytes>
GRJCA_DEVICE void copy_async(void* to, const void* from, int valid, GRJCA_EMULATOR_HERE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async can copy");
  emulator::issue(
      {static_cast<char*>(to), static_cast<const char*>(from), kBytes, valid, emulator::site_of(file, line)});
}
GRJCA_DEVICE void copy_commit() {
  emulator::Fiber& self = *emulator::current;
  self.groups.push_back(std::exchange(self.uncommitted, 0));
}
template <int kPending>
GRJCA_DEVICE void copy_wait() {
  emulator::complete_groups(kPending);
}

template <bool kTransposed>
GRJCA_DEVICE void load_matrices(uint32_t (&to)[4], const void* row, GRJCA_EMULATOR_HERE) {
  const emulator::Site site = emulator::site_of(file, line);
  emulator::Rows mine{to, row};
  emulator::meet(kTransposed ? emulator::kLoadMatricesTransposed : emulator::kLoadMatrices, site, &mine,
                 [site](auto& all) { emulator::load_warp<kTransposed>(all, site); });
}

// ---- tensor cores

#define GRJCA_MULTIPLY(type)                                                                      \
  GRJCA_DEVICE void multiply(type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], \
                             GRJCA_EMULATOR_HERE) {                                               \
    emulator::multiply<type>(emulator::kMultiply##type, emulator::site_of(file, line), d, a, b);  \
  }
GRJCA_MULTIPLY(BFloat16)
GRJCA_MULTIPLY(Float16)
GRJCA_MULTIPLY(Tf32)
#undef GRJCA_MULTIPLY

// ---- together

GRJCA_DEVICE void block_barrier(GRJCA_EMULATOR_HERE) {
  emulator::arrive_at_block_barrier(emulator::site_of(file, line));
}
GRJCA_DEVICE void warp_barrier(GRJCA_EMULATOR_HERE) {
  emulator::Warp* warp = emulator::current->warp;
  emulator::meet(emulator::kWarpBarrier, emulator::site_of(file, line), warp, [](auto& all) { ++all[0]->epoch; });
}
GRJCA_DEVICE float shuffle_xor(float x, int mask, GRJCA_EMULATOR_HERE) {
  struct Value {
    float from, to;
    int mask;
  } mine{x, x, mask};
  emulator::meet(emulator::kShuffleXor, emulator::site_of(file, line), &mine, [](auto& all) {
    for (int lane = 0; lane < kWarp; ++lane) {
      const int source = lane ^ all[lane]->mask;
      if (source >= 0 && source < kWarp) all[lane]->to = all[source]->from;
    }
  });
  return mine.to;
}
GRJCA_DEVICE uint32_t shuffle(uint32_t x, int source, GRJCA_EMULATOR_HERE) {
  struct Value {
    uint32_t from, to;
    int source;
  } mine{x, x, source};
  emulator::meet(emulator::kShuffle, emulator::site_of(file, line), &mine, [](auto& all) {
    for (int lane = 0; lane < kWarp; ++lane) all[lane]->to = all[all[lane]->source & (kWarp - 1)]->from;
  });
  return mine.to;
}

// One OS thread runs them all: a plain access is atomic, and sees whatever was done before it.
GRJCA_DEVICE uint32_t add_and_fetch_old(uint32_t* counter, uint32_t n) {
  if (n != 0) emulator::machine->idle_rounds = 0;
  const uint32_t old = *counter;
  *counter = old + n;
  return old;
}
GRJCA_DEVICE uint32_t read_relaxed(const uint32_t* counter, GRJCA_EMULATOR_HERE) {
  if (++emulator::machine->reads_without_wait > emulator::kReadsWithoutWait)
    emulator::fault("deadlock: " + emulator::text_of(*emulator::current) + " reads a counter at " +
                    emulator::text_of(emulator::site_of(file, line)) + " again and again without pause()");
  return *const_cast<const volatile uint32_t*>(counter);
}
GRJCA_DEVICE void fence() {}
GRJCA_DEVICE void pause(GRJCA_EMULATOR_HERE) {
  emulator::current->warp->paused |= 1u << emulator::current->lane;
  emulator::wait(emulator::kPause, emulator::site_of(file, line));
}

}  // namespace grjca::cuda
