// From a problem to launches: which kernel, how many blocks, and the meaning of the CUDA runtime's errors.
#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "backward.h"
#include "kernels.h"
#include "plan.h"

namespace grjca::cuda {
namespace {

// ---- kernels

// The kernel of one direction.
struct Kernel {
  const void* (*address)();
  int rows;  // of a tile, at most
};

struct Kernels {
  Dtype dtype;
  bool tf32;
  int bytes;  // of an element
  Kernel forward, backward;

  const Kernel& of(bool of_backward) const { return of_backward ? backward : forward; }
};

template <class T, bool kExact>
constexpr Kernels kernels(Dtype dtype, const void* (*forward)(), const void* (*backward)()) {
  const bool tf32 = dtype == Dtype::float32 && !kExact;
  return {dtype, tf32, sizeof(T), {forward, ForwardMath<T, kExact>::kRows}, {backward, BackwardMath<T, kExact>::kRows}};
}

#define GRJCA_KERNELS(precision, dtype) \
  kernels<precision::Element, precision::kExact>(Dtype::dtype, precision::forward_address, precision::backward_address)

const Kernels kAll[] = {
    GRJCA_KERNELS(float32, float32),
    GRJCA_KERNELS(tf32, float32),
    GRJCA_KERNELS(bfloat16, bfloat16),
    GRJCA_KERNELS(float16, float16),
};

const Kernels& kernels_of(Dtype dtype, bool tf32) {
  for (const Kernels& kernels : kAll)
    if (kernels.dtype == dtype && kernels.tf32 == (tf32 && dtype == Dtype::float32)) return kernels;
  throw std::invalid_argument("the CUDA C++ kernels have no float64; convert, or use the reference.");
}

// ---- errors

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  std::string text =
      std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + "). ";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion ||
      error == cudaErrorInvalidDeviceFunction)
    text +=
        "The kernels were not built for this GPU; install grjca-kernels with its architecture in "
        "GRJCA_CUDA_ARCHITECTURES, or choose another backend.";
  else
    text +=
        "An earlier kernel may be the cause; with CUDA_LAUNCH_BLOCKING=1 in the environment, the error is raised "
        "where it arises.";
  throw std::runtime_error(text);
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// ---- launches

// While it lives, this thread may load kernels although it captures a stream. Nothing of that enters the graph.
class Relaxed {
 public:
  Relaxed() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "asking for a relaxed capture"); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

void set_common(Common& a, const Problem& p, const Plan& plan, const Tensors& t, const Resources& r) {
  a.p = p;
  a.plan = plan;
  std::copy_n(t.features, kMaxModalities, a.features);
  std::copy_n(t.parameters, ParameterIndex{p}.count(), a.parameters);
  a.lengths = t.lengths;
  a.seed = r.seed;
  a.iterates = t.iterates;
  a.workspace = static_cast<char*>(r.workspace);
  a.counters = reinterpret_cast<uint32_t*>(a.workspace + plan.counters_at);
}

// The driver takes all steps together only if the device can hold all blocks at once.
template <class Arguments>
void launch(const void* kernel, Arguments& a, int steps, const Resources& r) {
  check(cudaSetDevice(r.device), "choosing the device");
  const auto start = [&](auto call, int first, int last) {
    a.first_step = first;
    a.last_step = last;
    void* arguments[] = {&a};
    return call(kernel, dim3(a.plan.blocks), dim3(kThreads), arguments, kSharedBytes,
                static_cast<cudaStream_t>(r.stream));
  };
  if (!r.together) {
    for (int step = 0; step < steps; ++step)
      check(start([](auto... x) { return cudaLaunchKernel(x...); }, step, step + 1), "launching a step");
    return;
  }
  check(cudaMemsetAsync(a.counters, 0, (a.plan.teams + 1) * sizeof(uint32_t), static_cast<cudaStream_t>(r.stream)),
        "clearing the barriers' counters");
  const cudaError_t error = start([](auto... x) { return cudaLaunchCooperativeKernel(x...); }, 0, steps);
  if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported) {
    cudaGetLastError();
    throw std::runtime_error(std::string("CUDA: this GPU does not take all steps in one cooperative launch (") +
                             cudaGetErrorName(error) + "). " +
                             (error == cudaErrorNotSupported
                                  ? "It has none; choose another backend."
                                  : "Something else holds a part of it, such as a limit of MPS; lift that, or "
                                    "choose another backend."));
  }
  check(error, "launching the kernel");
}

}  // namespace

std::string why_not() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "no NVIDIA driver is found (libcuda.so.1); install one, or choose another backend.";
  // A driver runs what any toolkit of its major version made, but only from 12.1 on it takes more than 4 KB of
  // arguments.
  const int needed = std::max(CUDART_VERSION / 1000 * 1000, 12010);
  if (driver < needed)
    return "it was built with CUDA " + version(CUDART_VERSION) + " and needs a driver of CUDA " + version(needed) +
           " or later, and the NVIDIA driver here supports CUDA " + version(driver) +
           " at most; update the driver, or install this package again with CUDACXX naming an older nvcc, of 12.1 or "
           "later.";
  return "";
}

Resident resident(Dtype dtype, bool tf32, bool backward, int device) {
  const void* const kernel = kernels_of(dtype, tf32).of(backward).address();
  int blocks = 0, multiprocessors = 0;
  check(cudaSetDevice(device), "choosing the device");
  const Relaxed during_capture;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "asking for shared memory");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, kSharedBytes),
        "asking how many blocks fit");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "counting multiprocessors");
  if (blocks < 1) throw std::runtime_error("CUDA: no block of the kernel fits on this GPU; choose another backend.");
  return {blocks * multiprocessors, blocks};
}

std::vector<PhaseCost> described(const std::vector<planning::Row>& rows) {
#define GRJCA_NAME(name) #name,
  static const char* const names[] = {GRJCA_PHASES(GRJCA_NAME)};
#undef GRJCA_NAME
  std::vector<PhaseCost> all;
  for (const planning::Row& row : rows)
    all.push_back({names[static_cast<int>(row.phase)], row.tile.rows, row.tile.columns, row.times, row.cost.tasks,
                   row.cost.turns, row.cost.trips, row.cost.bytes, row.cost.clocks / costs::kClock * 1e6});
  return all;
}

std::vector<PhaseCost> table(const Problem& p, bool backward, bool weights, const OtherKernels& other) {
  return described(planning::table_of(p, backward, weights, other));
}

struct Launch::Parts {
  Problem p;
  Target target;
  Plan plan;
  const Kernels& kernels;
  bool backward, weights;
  int steps;
};

Launch::Launch(const Problem& p, bool tf32, bool backward, bool weights, const Resident& resident) {
  const Kernels& kernels = kernels_of(p.dtype, tf32);
  if (p.batch < 1) throw std::invalid_argument("batch: expected at least one sample to launch for.");
  if (resident.blocks < 1 || resident.sharing < 1)
    throw std::invalid_argument("resident, sharing: expected at least one block.");
  const Target target{kernels.bytes, kernels.of(backward).rows, resident.blocks, resident.sharing};
  const Plan plan = backward ? plan_backward(p, target, weights) : plan_forward(p, target);
  const int steps =
      backward ? plan.chunks * plan.steps + (plan.parts > 0) : tiles(plan.chunks, plan.teams) * plan.steps;
  parts_ = std::make_shared<const Parts>(Parts{p, target, plan, kernels, backward, weights, steps});
}

size_t Launch::workspace_bytes() const { return parts_->plan.workspace_bytes; }

void Launch::forward(const Tensors& t, const ForwardOutputs& to, const Resources& r) const {
  if (parts_->backward) throw std::invalid_argument("this launch was planned for the backward.");
  ForwardArguments a{};
  set_common(a, parts_->p, parts_->plan, t, r);
  a.to = to;
  launch(parts_->kernels.forward.address(), a, parts_->steps, r);
}

void Launch::backward(const Tensors& t, const BackwardTensors& g, const Resources& r) const {
  if (!parts_->backward) throw std::invalid_argument("this launch was planned for the forward.");
  BackwardArguments a{};
  set_common(a, parts_->p, parts_->plan, t, r);
  std::copy_n(g.outputs, kMaxModalities, a.d_outputs);
  std::copy_n(g.iterates, kMaxModalities, a.d_iterates);
  std::copy_n(g.iterates_step, kMaxModalities, a.d_iterates_step);
  std::copy_n(g.gates, kMaxModalities, a.d_gates);
  std::copy_n(g.features, kMaxModalities, a.d_features);
  std::copy_n(g.parameters, ParameterIndex{parts_->p}.count(), a.d_parameters);
  a.weights = parts_->weights;
  place_gradients(a);
  launch(parts_->kernels.backward.address(), a, parts_->steps, r);
}

std::vector<PhaseCost> Launch::table() const {
  return described(planning::table(parts_->plan, parts_->p, parts_->target));
}

#define GRJCA_NUMBER(name) {#name, static_cast<int64_t>(plan.name)}

std::vector<std::pair<const char*, int64_t>> Launch::numbers() const {
  const Plan& plan = parts_->plan;
  return {
      GRJCA_NUMBER(width),
      GRJCA_NUMBER(blocks),
      GRJCA_NUMBER(teams),
      GRJCA_NUMBER(team_blocks),
      GRJCA_NUMBER(chunk),
      GRJCA_NUMBER(chunks),
      GRJCA_NUMBER(frames),
      GRJCA_NUMBER(tile_weights),
      GRJCA_NUMBER(key_samples),
      GRJCA_NUMBER(streamed),
      GRJCA_NUMBER(phases),
      GRJCA_NUMBER(steps),
      GRJCA_NUMBER(slots.count),
      GRJCA_NUMBER(slot),
      GRJCA_NUMBER(team_bytes),
      GRJCA_NUMBER(correlations),
      GRJCA_NUMBER(d_scores),
      GRJCA_NUMBER(values),
      GRJCA_NUMBER(d_logits),
      GRJCA_NUMBER(parts),
      GRJCA_NUMBER(gradients),
      GRJCA_NUMBER(gradients_at),
      GRJCA_NUMBER(threshold),
      GRJCA_NUMBER(counters_at),
      GRJCA_NUMBER(workspace_bytes),
      {"all_steps", parts_->steps},
      {"threads", kThreads},
      {"shared", kSharedBytes},
      {"sharing", kSharing},
      {"bytes", parts_->kernels.bytes},
      {"rows", parts_->kernels.of(parts_->backward).rows},
  };
}

}  // namespace grjca::cuda
