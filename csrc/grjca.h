// The bridge between Python and the kernels: what a problem is, and the entry points. Letters are those of
// grjca_kernels/operator.md. No torch here: addresses, sizes, strides (in elements), a thread count.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

// Always inlined: this header is compiled for several instruction sets, and the linker would keep any one of the
// copies.
#if defined(__CUDACC__)
#define GRJCA_INLINE __host__ __device__ __forceinline__
#else
#define GRJCA_INLINE inline __attribute__((always_inline))
#endif

namespace grjca {

constexpr int kMaxModalities = 4;
constexpr int kMaxIterations = 16;
constexpr int kMaxGates = kMaxIterations + 1;  // of one modality: a gate per stage and the last one

enum class Dtype { float32, float64, bfloat16, float16 };
enum class Gating { none, dynamic, flat, hierarchical };

// What a forward may keep for the backward beside X^t: bits of Problem::keep, the same as in grjca_kernels/keeping.py.
enum class Keep { joint = 1, key = 2, value = 4, hidden = 8, correlation = 16, signs = 32 };

struct Problem {
  int64_t batch, length;
  int modalities;
  int64_t widths[kMaxModalities];
  int iterations;
  Gating gating;
  Dtype dtype;
  bool released, projected, normalize, shared;  // projected: there is a W_q, never in the paper form
  double dropout, temperature;
  int keep;

  GRJCA_INLINE bool keeps(Keep piece) const { return keep & static_cast<int>(piece); }
  GRJCA_INLINE int64_t width() const {
    int64_t d = 0;
    for (int m = 0; m < modalities; ++m) d += widths[m];
    return d;
  }
  GRJCA_INLINE int64_t offset(int m) const {  // first column of modality m in the joint features
    int64_t o = 0;
    for (int i = 0; i < m; ++i) o += widths[i];
    return o;
  }
  GRJCA_INLINE int layers() const { return shared ? 1 : iterations; }
  GRJCA_INLINE int gates() const {
    return gating == Gating::none ? 0 : gating == Gating::hierarchical ? iterations + 1 : 1;
  }
  GRJCA_INLINE int ways(int g) const {
    if (gating == Gating::dynamic) return 2;
    if (gating == Gating::flat) return iterations + 1;
    return g < iterations ? g + 2 : iterations;
  }
  GRJCA_INLINE int all_ways() const {
    int n = 0;
    for (int g = 0; g < gates(); ++g) n += ways(g);
    return n;
  }
};

// The index of each parameter in the flat list of problem.flatten().
struct ParameterIndex {
  static constexpr int kMost = 2 * kMaxIterations * (3 * kMaxModalities + 1) + 2 * kMaxModalities * kMaxGates;
  const Problem& p;
  GRJCA_INLINE int per_linear() const { return p.released ? 2 : 1; }
  GRJCA_INLINE int per_layer() const { return per_linear() * (3 * p.modalities + (p.projected ? 1 : 0)); }
  GRJCA_INLINE int layer(int t) const { return (p.shared ? 0 : t) * per_layer(); }
  GRJCA_INLINE int query(int t) const { return layer(t); }
  GRJCA_INLINE int grouped(int t, int kind, int m) const {
    return layer(t) + per_linear() * ((p.projected ? 1 : 0) + kind * p.modalities + m);
  }
  GRJCA_INLINE int key(int t, int m) const { return grouped(t, 0, m); }
  GRJCA_INLINE int value(int t, int m) const { return grouped(t, 1, m); }
  GRJCA_INLINE int output(int t, int m) const { return grouped(t, 2, m); }
  GRJCA_INLINE int gate(int m, int g) const { return p.layers() * per_layer() + per_linear() * (m * p.gates() + g); }
  GRJCA_INLINE int count() const { return gate(p.modalities, 0); }
};

struct View {  // [B, L, columns]; data is null where a tensor is absent
  void* data;
  int64_t sample, frame, column;
};

struct Tensors {
  View features[kMaxModalities];
  const void* const* parameters;  // contiguous, in the order of problem.flatten()
  const int64_t* lengths;         // [B] or null
  uint64_t seed;
  void* iterates;  // [T, B, L, d], contiguous
  void* kept;      // of cpu::kept_bytes(); null where Problem::keep is 0
};

struct ForwardOutputs {
  View outputs[kMaxModalities];
  View gates[kMaxModalities];  // [B, L, all ways], or absent
};

struct BackwardTensors {
  View outputs[kMaxModalities];   // incoming gradients; absent ones are zero
  View iterates[kMaxModalities];  // the same, of the iterates: [T, B, L, d_m]
  int64_t iterates_step[kMaxModalities];
  View gates[kMaxModalities];
  View features[kMaxModalities];  // gradients to write; absent ones are not computed
  void* const* parameters;        // the same, contiguous
};

namespace cpu {
struct PhaseTimes;
}

struct Resources {
  void* workspace;
  int threads;
  const char* instruction_set;  // null: the best this processor has
  bool (*asked_to_stop)();      // the calling thread calls it every tenth of a second; null: the call runs to its end
  cpu::PhaseTimes* times;       // the call adds its own times to these; may be null
};

namespace cpu {

const char* const* instruction_sets();  // those this processor can run, best first, null-terminated
size_t kept_bytes(const Problem&, const Resources&);
size_t forward_workspace(const Problem&, const Resources&);
size_t backward_workspace(const Problem&, const Resources&);
// Both return false if they were asked to stop; their outputs then hold garbage.
bool forward(const Problem&, const Tensors&, const ForwardOutputs&, const Resources&);
bool backward(const Problem&, const Tensors&, const BackwardTensors&, const Resources&);

}  // namespace cpu

namespace cuda {

// The resources of one call. Launches run later, in stream order; no call waits or allocates memory.
struct Resources {
  void* workspace;       // on the device
  const uint64_t* seed;  // on the device; used instead of Tensors::seed
  void* stream;          // a cudaStream_t
  int device;
  bool together;  // all steps in one cooperative launch, or each in one of its own
};

std::string why_not();  // why the CUDA runtime cannot work here; empty if it can

// How many blocks of a kernel can be resident on a device, and on one of its multiprocessors.
struct Resident {
  int blocks, sharing;
};
// Call this before the first launch on a device: it prepares the kernel.
Resident resident(Dtype, bool tf32, bool backward, int device);

// The cost of a phase by the model of cuda/costs.h, which no GPU has confirmed.
struct PhaseCost {
  const char* phase;
  int rows, columns;    // of its tiles; 0 where it has none
  double times;         // how often it comes; all that follows is of one time
  double tasks, turns;  // of the grid; of the block that has most
  double trips;         // times that this block waits for something from L2 before it can go on
  double bytes;         // through L2, of all blocks
  double microseconds;  // with the barrier behind it
};

// A launch of the same phases by other kernels: Triton's, whose teams are the whole grid.
struct OtherKernels {
  int programs, multiprocessors, chunk, rows, columns, tile_weights, parts, key_parts;
};
std::vector<PhaseCost> table(const Problem&, bool backward, bool weights, const OtherKernels&);

// How to compute problems of one kind in one direction: a pure function of the constructor's arguments.
class Launch {
 public:
  Launch(const Problem&, bool tf32, bool backward, bool weights, const Resident&);
  size_t workspace_bytes() const;
  std::vector<std::pair<const char*, int64_t>> numbers() const;  // of the plan, for tests
  std::vector<PhaseCost> table() const;
  void forward(const Tensors&, const ForwardOutputs&, const Resources&) const;
  void backward(const Tensors&, const BackwardTensors&, const Resources&) const;

 private:
  struct Parts;
  std::shared_ptr<const Parts> parts_;
};

}  // namespace cuda
}  // namespace grjca
