// The Python module grjca_kernels._native: calls in, and no mathematics.
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

#include "cpu/phases.h"
#include "grjca.h"
#include "tensors.h"

namespace py = pybind11;
using namespace grjca;
using namespace grjca::python;

namespace {

using Host = std::tuple<py::object, int, std::optional<std::string>,
                        cpu::PhaseTimes*>;             // workspace, threads, instruction set, clock
using Device = std::tuple<uintptr_t, uintptr_t, int>;  // workspace, stream, device

template <class T>
T* pointer(uintptr_t address) {
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

Problem problem(const std::string& dtype, int64_t batch, int64_t length, const std::vector<int64_t>& widths,
                int iterations, const std::string& gating, const std::string& form, double dropout, double temperature,
                bool normalize, bool shared, const std::string& joint, bool /* reduced: of the launch */, int keep) {
  if (widths.size() < 2 || widths.size() > kMaxModalities)
    throw py::value_error("widths: expected 2 to 4 modalities, got " + std::to_string(widths.size()) + ".");
  if (iterations < 1 || iterations > kMaxIterations)
    throw py::value_error("iterations: expected 1 to 16, got " + std::to_string(iterations) + ".");
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
  p.projected = named<bool>("joint", joint, {{"projected", true}, {"raw", false}}) && p.released;
  p.dtype = dtype_of(dtype);
  p.dropout = dropout;
  p.temperature = temperature;
  p.normalize = normalize;
  p.shared = shared;
  p.keep = keep;
  return p;
}

// Runs the handlers of signals that have arrived. After Ctrl-C a Python exception is set, and without_lock() throws it.
bool signalled() {
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool raised = PyErr_CheckSignals() != 0;
  PyGILState_Release(state);
  return raised;
}

Resources resources(void* workspace, int threads, const std::optional<std::string>& instruction_set,
                    cpu::PhaseTimes* times = nullptr) {
  if (threads < 1) throw py::value_error("threads: expected at least 1, got " + std::to_string(threads) + ".");
  if (!instruction_set) return {workspace, threads, nullptr, signalled, times};
  for (auto name = cpu::instruction_sets(); *name; ++name)
    if (*instruction_set == *name) return {workspace, threads, *name, signalled, times};
  throw py::value_error("instruction_set: this processor does not run '" + *instruction_set + "'.");
}

Resources resources(const Host& host) {
  const auto& [workspace, threads, instruction_set, times] = host;
  return resources(python::look(workspace).data, threads, instruction_set, times);
}

// ---- the tensors of a Call, and of Gradients: grjca_kernels/call.py

// The name of one tensor, for error messages.
struct Name {
  const Problem& p;
  const char* what;
  int index;

  [[noreturn]] void wrong(const std::string& expected) const {
    throw py::value_error(std::string(what) + "[" + std::to_string(index) + "]: expected " + expected + ".");
  }
};

// Finds a tensor's elements. Python words the refusal of a tensor that has elements but no memory.
Seen look(const Name& name, py::handle tensor) {
  const Seen seen = python::look(tensor);
  if (!seen.data && seen.elements() != 0)
    py::module_::import("grjca_kernels.problem").attr("refuse_memory")(name.what, name.index, tensor);
  return seen;
}

py::sequence sequence(const char* what, size_t expected, py::handle tensors) {
  const auto found = py::reinterpret_borrow<py::sequence>(tensors);
  if (found.size() != expected)
    throw py::value_error(std::string(what) + ": expected " + std::to_string(expected) + " tensors, got " +
                          std::to_string(found.size()) + ".");
  return found;
}

// [B, L, columns] of every modality, or None; with `steps`, [T, B, L, columns].
template <class Columns>
void set_views(const Problem& p, const char* what, py::handle tensors, Columns columns, View (&to)[kMaxModalities],
               int64_t (*steps)[kMaxModalities] = nullptr) {
  const int first = steps ? 1 : 0;
  const py::sequence given = sequence(what, p.modalities, tensors);
  for (int m = 0; m < p.modalities; ++m) {
    const py::object tensor = given[m];
    if (tensor.is_none()) continue;
    const Name name{p, what, m};
    const Seen seen = look(name, tensor);
    const int64_t* const shape = seen.shape + first;
    const bool fits = seen.dimensions == first + 3 && shape[0] == p.batch && shape[1] == p.length &&
                      shape[2] == columns(m) && (!steps || seen.shape[0] == p.iterations);
    if (!fits) name.wrong("a tensor of the shape that the problem gives it");
    to[m] = {seen.data, seen.strides[first], seen.strides[first + 1], seen.strides[first + 2]};
    if (steps) (*steps)[m] = seen.strides[0];
  }
}

// Addresses in the order of problem.flatten(), null where None stands; what is not contiguous is copied into `copies`.
std::vector<void*> parameters(const Problem& p, const char* what, py::handle tensors, std::vector<py::object>* copies) {
  const py::sequence given = sequence(what, ParameterIndex{p}.count(), tensors);
  std::vector<void*> addresses;
  addresses.reserve(given.size());
  for (size_t i = 0; i < given.size(); ++i) {
    py::object tensor = given[i];
    if (tensor.is_none()) {
      addresses.push_back(nullptr);
      continue;
    }
    const Name name{p, what, static_cast<int>(i)};
    Seen seen = look(name, tensor);
    if (!seen.contiguous()) {
      if (!copies) name.wrong("a contiguous tensor");
      copies->push_back(tensor.attr("contiguous")());
      seen = look(name, copies->back());
    }
    addresses.push_back(seen.data);
  }
  return addresses;
}

void* address(const Problem& p, const char* what, int64_t elements, py::handle tensor, bool int64 = false) {
  if (tensor.is_none()) return nullptr;
  const Name name{p, what, 0};
  const Seen seen = look(name, tensor);
  if (seen.elements() != elements || !seen.contiguous()) name.wrong("a contiguous tensor of the size of the problem");
  if (int64 && !is_int64(seen, tensor)) name.wrong("int64, as the forward was given");
  return seen.data;
}

// The inputs of both directions. A seed on the host is read here; the address of any other seed is passed on.
struct Read {
  std::vector<py::object> copies;
  std::vector<void*> weights;
  Tensors tensors{};
  const uint64_t* seed;

  Read(const Problem& p, py::handle call, bool on_host)
      : weights(parameters(p, "parameters", call.attr("parameters"), &copies)) {
    set_views(p, "features", call.attr("features"), [&](int m) { return p.widths[m]; }, tensors.features);
    tensors.parameters = weights.data();
    tensors.lengths = static_cast<const int64_t*>(address(p, "lengths", p.batch, call.attr("lengths"), true));
    tensors.iterates = address(p, "iterates", p.iterations * p.batch * p.length * p.width(), call.attr("iterates"));
    seed = static_cast<const uint64_t*>(address(p, "seed", 1, call.attr("seed"), true));
    tensors.seed = on_host && seed ? *seed : 0;
  }
  Read(const Read&) = delete;

  // Finds what the forward keeps for the backward beside the iterates.
  void look_at_kept(const Problem& p, py::handle call, const Resources& r) {
    tensors.kept = address(p, "kept", static_cast<int64_t>(cpu::kept_bytes(p, r)), call.attr("kept"));
    if (p.keep && !tensors.kept) throw py::value_error("kept: expected the tensor that the forward filled, got None.");
  }
};

ForwardOutputs outputs_of(const Problem& p, py::handle call) {
  ForwardOutputs to{};
  const py::object gates = call.attr("gates");
  set_views(p, "outputs", call.attr("outputs"), [&](int m) { return p.widths[m]; }, to.outputs);
  if (py::len(gates)) set_views(p, "gates", gates, [&](int) { return p.all_ways(); }, to.gates);
  return to;
}

// The further inputs and the outputs of a backward.
struct Written {
  std::vector<void*> weights;
  BackwardTensors tensors{};

  Written(const Problem& p, py::handle gradients)
      : weights(parameters(p, "gradients.parameters", gradients.attr("parameters"), nullptr)) {
    const auto width = [&](int m) { return p.widths[m]; };
    const auto ways = [&](int) { return p.all_ways(); };
    set_views(p, "gradients.outputs", gradients.attr("outputs"), width, tensors.outputs);
    set_views(p, "gradients.iterates", gradients.attr("iterates"), width, tensors.iterates, &tensors.iterates_step);
    set_views(p, "gradients.gates", gradients.attr("gates"), ways, tensors.gates);
    set_views(p, "gradients.features", gradients.attr("features"), width, tensors.features);
    tensors.parameters = weights.data();
  }
};

// Runs `compute` while other Python threads go on. It returns false where signalled() has set an exception.
template <class F>
void without_lock(F compute) {
  bool whole = false;
  {
    const py::gil_scoped_release release;
    whole = compute();
  }
  if (!whole) throw py::error_already_set();
}

void cpu_forward(const Problem& p, py::handle call, const Host& host) {
  Read read(p, call, true);
  const ForwardOutputs to = outputs_of(p, call);
  const Resources r = resources(host);
  read.look_at_kept(p, call, r);
  without_lock([&] { return cpu::forward(p, read.tensors, to, r); });
}

void cpu_backward(const Problem& p, py::handle call, py::handle gradients, const Host& host) {
  Read read(p, call, true);
  const Written written(p, gradients);
  const Resources r = resources(host);
  read.look_at_kept(p, call, r);
  without_lock([&] { return cpu::backward(p, read.tensors, written.tensors, r); });
}

// ---- CUDA; setup.py defines GRJCA_CUDA as the architectures where nvcc compiles csrc/cuda

#ifdef GRJCA_CUDA

// A launch and its problem.
struct CudaLaunch {
  Problem p;
  cuda::Launch launch;

  CudaLaunch(const Problem& problem, bool tf32, bool backward, bool weights, int resident, int sharing)
      : p(problem), launch(problem, tf32, backward, weights, {resident, sharing}) {}
};

cuda::Resources resources(const Read& read, const Device& device, bool together) {
  const auto& [workspace, stream, index] = device;
  return {pointer<void>(workspace), read.seed, pointer<void>(stream), index, together};
}

void cuda_forward(const CudaLaunch& of, py::handle call, const Device& device, bool together) {
  const Read read(of.p, call, false);
  const ForwardOutputs to = outputs_of(of.p, call);
  const cuda::Resources r = resources(read, device, together);
  const py::gil_scoped_release release;
  of.launch.forward(read.tensors, to, r);
}

void cuda_backward(const CudaLaunch& of, py::handle call, py::handle gradients, const Device& device, bool together) {
  const Read read(of.p, call, false);
  const Written written(of.p, gradients);
  const cuda::Resources r = resources(read, device, together);
  const py::gil_scoped_release release;
  of.launch.backward(read.tensors, written.tensors, r);
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
        const cuda::Resident resident = cuda::resident(dtype_of(dtype), tf32, backward, device);
        return std::pair(resident.blocks, resident.sharing);
      },
      py::arg("dtype"), py::arg("tf32"), py::arg("backward"), py::arg("device"));
  py::class_<cuda::PhaseCost>(module, "PhaseCost")
      .def_readonly("phase", &cuda::PhaseCost::phase)
      .def_readonly("rows", &cuda::PhaseCost::rows)
      .def_readonly("columns", &cuda::PhaseCost::columns)
      .def_readonly("times", &cuda::PhaseCost::times)
      .def_readonly("tasks", &cuda::PhaseCost::tasks)
      .def_readonly("turns", &cuda::PhaseCost::turns)
      .def_readonly("trips", &cuda::PhaseCost::trips)
      .def_readonly("bytes", &cuda::PhaseCost::bytes)
      .def_readonly("microseconds", &cuda::PhaseCost::microseconds);
  module.def(
      "cost_table",
      [](const Problem& problem, bool backward, bool weights, int programs, int multiprocessors, int chunk, int rows,
         int columns, int tile_weights, int parts, int key_parts) {
        return cuda::table(problem, backward, weights,
                           {programs, multiprocessors, chunk, rows, columns, tile_weights, parts, key_parts});
      },
      py::arg("problem"), py::kw_only(), py::arg("backward"), py::arg("weights"), py::arg("programs"),
      py::arg("multiprocessors"), py::arg("chunk"), py::arg("rows"), py::arg("columns"), py::arg("tile_weights"),
      py::arg("parts"), py::arg("key_parts"));
  py::class_<CudaLaunch>(module, "CudaLaunch")
      .def(py::init<const Problem&, bool, bool, bool, int, int>(), py::kw_only(), py::arg("problem"), py::arg("tf32"),
           py::arg("backward"), py::arg("weights"), py::arg("resident"), py::arg("sharing"))
      .def_property_readonly("workspace_bytes", [](const CudaLaunch& of) { return of.launch.workspace_bytes(); })
      .def("plan",
           [](const CudaLaunch& of) {
             py::dict plan;
             for (const auto& [name, number] : of.launch.numbers()) plan[name] = number;
             return plan;
           })
      .def("table", [](const CudaLaunch& of) { return of.launch.table(); })
      .def("forward", &cuda_forward)
      .def("backward", &cuda_backward);
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
      "Native kernels of grjca_kernels. Internal: called by grjca_kernels.native, cpu and cuda, which own every check.";
  module.attr("interface") = 5;  // of native.py
  py::class_<Problem>(module, "Problem").def(py::init(&problem));
  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (auto name = cpu::instruction_sets(); *name; ++name) names.emplace_back(*name);
    return names;
  });
  module.def("cpu_kept_bytes", [](const Problem& p, const std::optional<std::string>& instruction_set) {
    return cpu::kept_bytes(p, resources(nullptr, 1, instruction_set));
  });
  module.def("cpu_workspace",
             [](const Problem& p, bool backward, int threads, const std::optional<std::string>& instruction_set) {
               const Resources r = resources(nullptr, threads, instruction_set);
               return backward ? cpu::backward_workspace(p, r) : cpu::forward_workspace(p, r);
             });
  py::class_<cpu::PhaseTimes>(module, "PhaseTimes")
      .def(py::init())
      .def_property_readonly("seconds", [](const cpu::PhaseTimes& times) {
        py::dict seconds;
        int i = 0;
#define GRJCA_NAME(name) seconds[#name] = 1e-9 * static_cast<double>(times.nanoseconds[i++]);
        GRJCA_CPU_PHASES(GRJCA_NAME)
#undef GRJCA_NAME
        return seconds;
      });
  module.def("use_tensors", &use_tensors);
  module.def("likeness", &likeness);
  module.def("cpu_forward", &cpu_forward);
  module.def("cpu_backward", &cpu_backward);
  define_cuda(module);
}
