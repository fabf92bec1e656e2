// Chooses the instruction set at run time, and lets a call end early.
#include <cstring>

#include "kernels.h"
#include "stop.h"

GRJCA_DECLARE_KERNELS(baseline)
#ifdef GRJCA_X86
GRJCA_DECLARE_KERNELS(avx2)
GRJCA_DECLARE_KERNELS(avx512)
#endif
#ifdef GRJCA_AVX512BF16
GRJCA_DECLARE_KERNELS(avx512bf16)
#endif

namespace grjca::cpu {
namespace {

struct Kernels {
  const char* name;
  bool (*runs_here)();
  bool (*takes)(Dtype);
  decltype(&baseline::kept_bytes) kept_bytes;
  decltype(&baseline::forward_workspace) forward_workspace, backward_workspace;
  decltype(&baseline::forward) forward;
  decltype(&baseline::backward) backward;
};

#define GRJCA_KERNELS(isa) isa::kept_bytes, isa::forward_workspace, isa::backward_workspace, isa::forward, isa::backward

bool any(Dtype) { return true; }

#ifdef GRJCA_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best first. A row that does not take a dtype leaves it to the next.
const Kernels kAll[] = {
#ifdef GRJCA_AVX512BF16
    {"avx512bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); },
     [](Dtype dtype) { return dtype == Dtype::bfloat16; }, GRJCA_KERNELS(avx512bf16)},
#endif
#ifdef GRJCA_X86
    {"avx512", has_avx512, any, GRJCA_KERNELS(avx512)},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, any, GRJCA_KERNELS(avx2)},
#endif
    {"baseline", [] { return true; }, any, GRJCA_KERNELS(baseline)},
};

const Kernels& chosen(const Problem& p, const Resources& resources) {
  bool allowed = !resources.instruction_set;
  for (const Kernels& kernels : kAll) {
    allowed = allowed || !std::strcmp(resources.instruction_set, kernels.name);
    if (allowed && kernels.runs_here() && kernels.takes(p.dtype)) return kernels;
  }
  return kAll[sizeof kAll / sizeof kAll[0] - 1];  // bindings.cpp has refused unknown names
}

// Runs `compute` and says whether it ran to its end. Only a long call is ever stopped: one of kShort multiply-adds
// takes milliseconds, or a tenth of a second on a processor without vector instructions.
template <class F>
bool unless_stopped(const Problem& p, const Resources& r, F compute) {
  constexpr double kShort = 1 << 24;
  const double d = static_cast<double>(p.width()), frames = static_cast<double>(p.batch * p.length);
  if (!r.asked_to_stop || frames * d * (d + p.length) * p.iterations < kShort) return compute(), true;
  Stop stop(r.asked_to_stop);
  const Stop::Scope scope(&stop);
  compute();
  return !stop.was_reached();
}

}  // namespace

const char* const* instruction_sets() {
  static const char* names[5] = {};
  int n = 0;
  for (const Kernels& kernels : kAll)
    if (kernels.runs_here()) names[n++] = kernels.name;
  return names;
}

size_t kept_bytes(const Problem& p, const Resources& r) { return chosen(p, r).kept_bytes(p); }
size_t forward_workspace(const Problem& p, const Resources& r) { return chosen(p, r).forward_workspace(p, r); }
size_t backward_workspace(const Problem& p, const Resources& r) { return chosen(p, r).backward_workspace(p, r); }
bool forward(const Problem& p, const Tensors& t, const ForwardOutputs& o, const Resources& r) {
  return unless_stopped(p, r, [&] { chosen(p, r).forward(p, t, o, r); });
}
bool backward(const Problem& p, const Tensors& t, const BackwardTensors& g, const Resources& r) {
  return unless_stopped(p, r, [&] { chosen(p, r).backward(p, t, g, r); });
}

}  // namespace grjca::cpu
