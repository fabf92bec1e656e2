// Tensors of Python as C++ sees them: by DLPack's C exchange API, or by their own methods where torch has none yet.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

namespace grjca::python {

namespace py = pybind11;

// ---- the exchange API, version 1 (github.com/dmlc/dlpack): what it lays down of memory

namespace dlpack {

struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t dimensions;
  DataType dtype;
  const int64_t *shape, *strides;  // of the tensor itself, and valid while it is
  uint64_t byte_offset;
};
struct ExchangeApi {
  uint32_t major, minor;
  const void* previous;
  void (*allocate)();
  void (*export_managed)();
  void (*import_managed)();
  int (*look)(void* tensor, Tensor* out);  // 0, or -1 with a Python exception
  void (*current_stream)();
};

}  // namespace dlpack

// torch.Tensor and torch.nn.Parameter, and the exchange API of both, or null.
struct TensorTypes {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  const dlpack::ExchangeApi* api = nullptr;

  bool plain(py::handle object) const { return Py_TYPE(object.ptr()) == parameter || Py_TYPE(object.ptr()) == tensor; }
};
inline TensorTypes types;

// Returns whether the exchange API exists and is to be used.
inline bool use_tensors(const py::type& tensor, const py::type& parameter, bool exchange) {
  types = {reinterpret_cast<PyTypeObject*>(tensor.ptr()), reinterpret_cast<PyTypeObject*>(parameter.ptr()), nullptr};
  if (!exchange || !py::hasattr(tensor, "__dlpack_c_exchange_api__")) return false;
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
  const void* const found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  const auto api = static_cast<const dlpack::ExchangeApi*>(found);
  if (api->major != 1 || !api->look) return false;
  types.api = api;
  return true;
}

// ---- one tensor

constexpr int kMaxDimensions = 4;

struct Seen {
  void* data;
  int dimensions;
  bool int64;  // set by the exchange API alone; ask is_int64()
  int64_t shape[kMaxDimensions], strides[kMaxDimensions];

  int64_t elements() const {
    int64_t n = 1;
    for (int i = 0; i < dimensions; ++i) n *= shape[i];
    return n;
  }
  bool contiguous() const {
    int64_t step = 1;
    for (int i = dimensions - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != step) return false;
      step *= shape[i];
    }
    return true;
  }
};

inline Seen look(py::handle tensor) {
  if (!types.tensor || !PyObject_TypeCheck(tensor.ptr(), types.tensor))
    throw py::type_error("expected a tensor, got " + std::string(Py_TYPE(tensor.ptr())->tp_name) + ".");
  Seen seen{};
  const auto set = [&](auto dimensions, auto shape, auto strides) {
    seen.dimensions = static_cast<int>(dimensions);
    if (seen.dimensions > kMaxDimensions) throw py::value_error("expected a tensor of at most 4 dimensions.");
    for (int i = 0; i < seen.dimensions; ++i) seen.shape[i] = shape(i), seen.strides[i] = strides(i);
  };
  if (types.api) {
    dlpack::Tensor found{};
    if (types.api->look(tensor.ptr(), &found) != 0) throw py::error_already_set();
    seen.data = static_cast<char*>(found.data) + found.byte_offset;
    seen.int64 = found.dtype.code == 0 && found.dtype.bits == 64;
    set(found.dimensions, [&](int i) { return found.shape[i]; }, [&](int i) { return found.strides[i]; });
  } else {
    seen.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    const py::tuple shape = tensor.attr("shape"), strides = tensor.attr("stride")();
    const auto number = [](const py::tuple& from) { return [&](int i) { return from[i].cast<int64_t>(); }; };
    set(shape.size(), number(shape), number(strides));
  }
  return seen;
}

inline bool is_int64(const Seen& seen, py::handle tensor) {
  return types.api ? seen.int64 : py::str(tensor.attr("dtype")).cast<std::string>() == "torch.int64";
}

// ---- many

// The dtype and device that all of them have, and the shape of each, as bytes that are equal where these are; None
// where they differ in dtype or device, are not plain tensors, or have no memory.
inline py::object likeness(const py::list& tensors) {
  std::string bytes;
  for (const py::handle tensor : tensors) {
    dlpack::Tensor found{};
    if (!types.api || !types.plain(tensor) || types.api->look(tensor.ptr(), &found) != 0) {
      PyErr_Clear();
      return py::none();
    }
    const int32_t of_all[] = {found.device.type, found.device.id, found.dtype.code, found.dtype.bits,
                              found.dtype.lanes};
    if (bytes.empty()) bytes.assign(reinterpret_cast<const char*>(of_all), sizeof of_all);
    if (std::memcmp(bytes.data(), of_all, sizeof of_all) != 0) return py::none();
    bytes.push_back(static_cast<char>(found.dimensions));
    bytes.append(reinterpret_cast<const char*>(found.shape), found.dimensions * sizeof(int64_t));
  }
  return py::bytes(bytes);
}

}  // namespace grjca::python
