// The Python module grjca_kernels._native: addresses, sizes and strides in, no tensors and no mathematics.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "grjca.h"

namespace py = pybind11;
using namespace grjca;

namespace {

using Address = uintptr_t;
using Strided = std::optional<std::tuple<Address, int64_t, int64_t, int64_t>>;  // address; sample, frame, column

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class Enum>
Enum named(const char* what, const std::string& name, std::initializer_list<std::pair<const char*, Enum>> choices) {
  for (const auto& [key, value] : choices)
    if (name == key) return value;
  throw py::value_error(std::string(what) + ": unknown to the native code: '" + name + "'.");
}

Dtype dtype_of(const std::string& name) {
  return named<Dtype>("dtype", name,
                      {{"float32", Dtype::float32},
                       {"float64", Dtype::float64},
                       {"bfloat16", Dtype::bfloat16},
                       {"float16", Dtype::float16}});
}

Problem problem(int64_t batch, int64_t length, const std::vector<int64_t>& widths, int iterations,
                const std::string& gating, const std::string& form, const std::string& dtype, double dropout,
                double temperature, bool normalize, bool shared) {
  if (widths.size() < 2 || widths.size() > kMaxModalities)
    throw py::value_error("widths: expected 2 to 4 modalities, got " + std::to_string(widths.size()) + ".");
  if (iterations < 1 || iterations > kMaxIterations)
    throw py::value_error("iterations: expected 1 to 8, got " + std::to_string(iterations) + ".");
  if (batch < 0 || length < 1) throw py::value_error("batch, length: expected batch >= 0 and length >= 1.");
  Problem p{};
  p.batch = batch;
  p.length = length;
  p.modalities = static_cast<int>(widths.size());
  for (size_t m = 0; m < widths.size(); ++m) {
    if (widths[m] < 1) throw py::value_error("widths: expected positive widths.");
    p.widths[m] = widths[m];
  }
  p.iterations = iterations;
  p.gating = named<Gating>("gating", gating,
                           {{"none", Gating::none},
                            {"dynamic", Gating::dynamic},
                            {"flat", Gating::flat},
                            {"hierarchical", Gating::hierarchical}});
  p.released = named<bool>("form", form, {{"released", true}, {"paper", false}});
  p.dtype = dtype_of(dtype);
  p.dropout = dropout;
  p.temperature = temperature;
  p.normalize = normalize;
  p.shared = shared;
  return p;
}

void set_views(const char* what, const Problem& p, const std::vector<Strided>& from, View (&to)[kMaxModalities]) {
  if (static_cast<int>(from.size()) != p.modalities)
    throw py::value_error(std::string(what) + ": expected one entry per modality, " + std::to_string(p.modalities) +
                          ", got " + std::to_string(from.size()) + ".");
  for (int m = 0; m < p.modalities; ++m)
    if (from[m]) {
      const auto& [address, sample, frame, column] = *from[m];
      to[m] = {pointer<void>(address), sample, frame, column};
    }
}

std::vector<void*> addresses(const char* what, const Problem& p, const std::vector<Address>& from) {
  const int expected = ParameterIndex{p}.count();
  if (static_cast<int>(from.size()) != expected)
    throw py::value_error(std::string(what) + ": expected " + std::to_string(expected) + " tensors, got " +
                          std::to_string(from.size()) + ".");
  std::vector<void*> to;
  for (const Address address : from) to.push_back(pointer<void>(address));
  return to;
}

Resources resources(Address workspace, int threads, const std::optional<std::string>& instruction_set) {
  if (threads < 1) throw py::value_error("threads: expected at least 1, got " + std::to_string(threads) + ".");
  if (!instruction_set) return {pointer<void>(workspace), threads, nullptr};
  for (auto name = cpu::instruction_sets(); *name; ++name)
    if (*instruction_set == *name) return {pointer<void>(workspace), threads, *name};
  throw py::value_error("instruction_set: this processor does not run '" + *instruction_set + "'.");
}

Tensors tensors(const Problem& p, const std::vector<Strided>& features, void* const* parameters, Address lengths,
                uint64_t seed, Address iterates) {
  Tensors t{};
  set_views("features", p, features, t.features);
  t.parameters = parameters;
  t.lengths = pointer<const int64_t>(lengths);
  t.seed = seed;
  t.iterates = pointer<void>(iterates);
  return t;
}

ForwardOutputs outputs_of(const Problem& p, const std::vector<Strided>& outputs, const std::vector<Strided>& gates) {
  ForwardOutputs to{};
  set_views("outputs", p, outputs, to.outputs);
  set_views("gates", p, gates, to.gates);
  return to;
}

BackwardTensors gradients_of(const Problem& p, const std::vector<Strided>& outputs,
                             const std::vector<Strided>& iterates, const std::vector<int64_t>& iterates_steps,
                             const std::vector<Strided>& gates, const std::vector<Strided>& features,
                             void* const* parameters) {
  BackwardTensors g{};
  set_views("grad_outputs", p, outputs, g.outputs);
  set_views("grad_iterates", p, iterates, g.iterates);
  for (size_t m = 0; m < iterates_steps.size() && m < kMaxModalities; ++m) g.iterates_step[m] = iterates_steps[m];
  set_views("grad_gates", p, gates, g.gates);
  set_views("grad_features", p, features, g.features);
  g.parameters = parameters;
  return g;
}

void cpu_forward(const Problem& p, const std::vector<Strided>& features, const std::vector<Address>& parameters,
                 Address lengths, uint64_t seed, Address iterates, const std::vector<Strided>& outputs,
                 const std::vector<Strided>& gates, Address workspace, int threads,
                 const std::optional<std::string>& instruction_set) {
  const auto weights = addresses("parameters", p, parameters);
  const Tensors t = tensors(p, features, weights.data(), lengths, seed, iterates);
  const ForwardOutputs to = outputs_of(p, outputs, gates);
  const Resources r = resources(workspace, threads, instruction_set);
  const py::gil_scoped_release release;
  cpu::forward(p, t, to, r);
}

void cpu_backward(const Problem& p, const std::vector<Strided>& features, const std::vector<Address>& parameters,
                  Address lengths, uint64_t seed, Address iterates, const std::vector<Strided>& grad_outputs,
                  const std::vector<Strided>& grad_iterates, const std::vector<int64_t>& grad_iterates_steps,
                  const std::vector<Strided>& grad_gates, const std::vector<Strided>& grad_features,
                  const std::vector<Address>& grad_parameters, Address workspace, int threads,
                  const std::optional<std::string>& instruction_set) {
  const auto weights = addresses("parameters", p, parameters);
  const auto gradients = addresses("grad_parameters", p, grad_parameters);
  const Tensors t = tensors(p, features, weights.data(), lengths, seed, iterates);
  const BackwardTensors g =
      gradients_of(p, grad_outputs, grad_iterates, grad_iterates_steps, grad_gates, grad_features, gradients.data());
  const Resources r = resources(workspace, threads, instruction_set);
  const py::gil_scoped_release release;
  cpu::backward(p, t, g, r);
}

// ---- CUDA; setup.py defines GRJCA_CUDA as the architectures where nvcc compiles csrc/cuda

#ifdef GRJCA_CUDA

// A launch and the problem it is of.
struct CudaLaunch {
  Problem p;
  cuda::Launch launch;

  CudaLaunch(const Problem& problem, bool tf32, bool backward, bool weights, int resident)
      : p(problem), launch(problem, tf32, backward, weights, resident) {}
};

cuda::Resources cuda_resources(Address workspace, Address counters, Address seed, Address stream, int device,
                               bool together) {
  return {pointer<void>(workspace),
          pointer<void>(counters),
          pointer<const uint64_t>(seed),
          pointer<void>(stream),
          device,
          together};
}

bool cuda_forward(const CudaLaunch& of, const std::vector<Strided>& features, const std::vector<Address>& parameters,
                  Address lengths, Address seed, Address iterates, const std::vector<Strided>& outputs,
                  const std::vector<Strided>& gates, Address workspace, Address counters, Address stream, int device,
                  bool together) {
  const auto weights = addresses("parameters", of.p, parameters);
  const Tensors t = tensors(of.p, features, weights.data(), lengths, 0, iterates);
  const ForwardOutputs to = outputs_of(of.p, outputs, gates);
  const cuda::Resources r = cuda_resources(workspace, counters, seed, stream, device, together);
  const py::gil_scoped_release release;
  return of.launch.forward(t, to, r);
}

bool cuda_backward(const CudaLaunch& of, const std::vector<Strided>& features, const std::vector<Address>& parameters,
                   Address lengths, Address seed, Address iterates, const std::vector<Strided>& grad_outputs,
                   const std::vector<Strided>& grad_iterates, const std::vector<int64_t>& grad_iterates_steps,
                   const std::vector<Strided>& grad_gates, const std::vector<Strided>& grad_features,
                   const std::vector<Address>& grad_parameters, Address workspace, Address counters, Address stream,
                   int device, bool together) {
  const auto weights = addresses("parameters", of.p, parameters);
  const auto gradients = addresses("grad_parameters", of.p, grad_parameters);
  const Tensors t = tensors(of.p, features, weights.data(), lengths, 0, iterates);
  const BackwardTensors g =
      gradients_of(of.p, grad_outputs, grad_iterates, grad_iterates_steps, grad_gates, grad_features, gradients.data());
  const cuda::Resources r = cuda_resources(workspace, counters, seed, stream, device, together);
  const py::gil_scoped_release release;
  return of.launch.backward(t, g, r);
}

void define_cuda(py::module_& module) {
  module.attr("cuda_architectures") = GRJCA_CUDA;
  module.def("cuda_why_not", [] {
    const std::string reason = cuda::why_not();
    return reason.empty() ? std::nullopt : std::optional(reason);
  });
  module.def(
      "cuda_resident",
      [](const std::string& dtype, bool tf32, bool backward, int device) {
        return cuda::resident(dtype_of(dtype), tf32, backward, device);
      },
      py::arg("dtype"), py::arg("tf32"), py::arg("backward"), py::arg("device"));
  py::class_<CudaLaunch>(module, "CudaLaunch")
      .def(py::init<const Problem&, bool, bool, bool, int>(), py::kw_only(), py::arg("problem"), py::arg("tf32"),
           py::arg("backward"), py::arg("weights"), py::arg("resident"))
      .def_property_readonly("workspace_bytes", [](const CudaLaunch& of) { return of.launch.workspace_bytes(); })
      .def_property_readonly("counters", [](const CudaLaunch& of) { return of.launch.counters(); })
      .def("plan",
           [](const CudaLaunch& of) {
             py::dict plan;
             for (const auto& [name, number] : of.launch.numbers()) plan[name] = number;
             return plan;
           })
      .def("forward", &cuda_forward, py::kw_only(), py::arg("features"), py::arg("parameters"), py::arg("lengths"),
           py::arg("seed"), py::arg("iterates"), py::arg("outputs"), py::arg("gates"), py::arg("workspace"),
           py::arg("counters"), py::arg("stream"), py::arg("device"), py::arg("together"))
      .def("backward", &cuda_backward, py::kw_only(), py::arg("features"), py::arg("parameters"), py::arg("lengths"),
           py::arg("seed"), py::arg("iterates"), py::arg("grad_outputs"), py::arg("grad_iterates"),
           py::arg("grad_iterates_steps"), py::arg("grad_gates"), py::arg("grad_features"), py::arg("grad_parameters"),
           py::arg("workspace"), py::arg("counters"), py::arg("stream"), py::arg("device"), py::arg("together"));
}

#else

void define_cuda(py::module_& module) {
  module.attr("cuda_architectures") = "";
  module.def("cuda_why_not", [] {
    return std::optional<std::string>(
        "it was built without nvcc; install the CUDA toolkit, 12.1 or later, then this package again.");
  });
}

#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() =
      "Native kernels of grjca_kernels. Internal: called by grjca_kernels.cpu and cuda, which own every check.";
  py::class_<Problem>(module, "Problem")
      .def(py::init(&problem), py::kw_only(), py::arg("batch"), py::arg("length"), py::arg("widths"),
           py::arg("iterations"), py::arg("gating"), py::arg("form"), py::arg("dtype"), py::arg("dropout"),
           py::arg("temperature"), py::arg("normalize"), py::arg("shared"));
  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (auto name = cpu::instruction_sets(); *name; ++name) names.emplace_back(*name);
    return names;
  });
  module.def(
      "cpu_workspace",
      [](const Problem& p, bool backward, int threads, const std::optional<std::string>& instruction_set) {
        const Resources r = resources(0, threads, instruction_set);
        return backward ? cpu::backward_workspace(p, r) : cpu::forward_workspace(p, r);
      },
      py::arg("problem"), py::arg("backward"), py::arg("threads"), py::arg("instruction_set"));
  module.def("cpu_forward", &cpu_forward, py::kw_only(), py::arg("problem"), py::arg("features"), py::arg("parameters"),
             py::arg("lengths"), py::arg("seed"), py::arg("iterates"), py::arg("outputs"), py::arg("gates"),
             py::arg("workspace"), py::arg("threads"), py::arg("instruction_set"));
  module.def("cpu_backward", &cpu_backward, py::kw_only(), py::arg("problem"), py::arg("features"),
             py::arg("parameters"), py::arg("lengths"), py::arg("seed"), py::arg("iterates"), py::arg("grad_outputs"),
             py::arg("grad_iterates"), py::arg("grad_iterates_steps"), py::arg("grad_gates"), py::arg("grad_features"),
             py::arg("grad_parameters"), py::arg("workspace"), py::arg("threads"), py::arg("instruction_set"));
  define_cuda(module);
}
