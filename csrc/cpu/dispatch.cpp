// Chooses the instruction set at run time.
#include <cstring>

#include "kernels.h"

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
  decltype(&baseline::forward_workspace) forward_workspace, backward_workspace;
  decltype(&baseline::forward) forward;
  decltype(&baseline::backward) backward;
};

#define GRJCA_KERNELS(isa) isa::forward_workspace, isa::backward_workspace, isa::forward, isa::backward

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

}  // namespace

const char* const* instruction_sets() {
  static const char* names[5] = {};
  int n = 0;
  for (const Kernels& kernels : kAll)
    if (kernels.runs_here()) names[n++] = kernels.name;
  return names;
}

size_t forward_workspace(const Problem& p, const Resources& r) { return chosen(p, r).forward_workspace(p, r); }
size_t backward_workspace(const Problem& p, const Resources& r) { return chosen(p, r).backward_workspace(p, r); }
void forward(const Problem& p, const Tensors& t, const ForwardOutputs& o, const Resources& r) {
  chosen(p, r).forward(p, t, o, r);
}
void backward(const Problem& p, const Tensors& t, const BackwardTensors& g, const Resources& r) {
  chosen(p, r).backward(p, t, g, r);
}

}  // namespace grjca::cpu
