// Runs the kernels of csrc/cuda on the CPU, lane by lane: requests on standard input, answers on standard output, until
// the input ends. tests/support/emulated_cuda.py writes both formats.
//
// Every buffer is an allocation of its own, so AddressSanitizer sees what is read or written beyond it.
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "backward.h"
#include "forward.h"
#include "plan.h"

namespace {

using namespace grjca;
using namespace grjca::cuda;

// Set by the build: the type of the elements, and for float whether products are of true float32.
using Element = GRJCA_EMULATOR_ELEMENT;
constexpr bool kExact = GRJCA_EMULATOR_EXACT;

void read_bytes(void* to, size_t n) {
  if (std::fread(to, 1, n, stdin) != n) std::exit(0);
}

struct Request {
  std::vector<int64_t> numbers;
  std::vector<std::vector<char>> buffers;
  size_t next = 0;

  Request() {
    int64_t counts[2];
    read_bytes(counts, sizeof counts);
    numbers.resize(counts[0]);
    read_bytes(numbers.data(), counts[0] * 8);
    std::vector<int64_t> sizes(counts[1]);
    read_bytes(sizes.data(), counts[1] * 8);
    for (const int64_t size : sizes) {
      buffers.emplace_back(size);
      read_bytes(buffers.back().data(), size);
    }
  }

  int64_t number() { return numbers.at(next++); }
  double real() {
    const int64_t bits = number();
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  void* address() {
    const int64_t buffer = number(), offset = number();
    return buffer < 0 ? nullptr : buffers.at(buffer).data() + offset;
  }
  View view() {
    View v{};
    v.data = address();
    v.sample = number();
    v.frame = number();
    v.column = number();
    return v;
  }
  void views(View (&to)[kMaxModalities], int n) {
    for (int m = 0; m < n; ++m) to[m] = view();
  }
};

Problem problem_of(Request& r) {
  Problem p{};
  p.batch = r.number();
  p.length = r.number();
  p.modalities = static_cast<int>(r.number());
  for (int m = 0; m < p.modalities; ++m) p.widths[m] = r.number();
  p.iterations = static_cast<int>(r.number());
  p.gating = static_cast<Gating>(r.number());
  p.released = r.number();
  p.projected = r.number();
  p.normalize = r.number();
  p.shared = r.number();
  p.dropout = r.real();
  p.temperature = r.real();
  return p;
}

// The chosen launch, with a tile, a chunk or a number of parts that a test wants instead.
struct LaunchOverrides {
  int resident, chunk, tile, parts;
  uint32_t order;
  bool apart;  // every step a launch of its own
};

template <class A, class F>
void launch(A& a, const LaunchOverrides& overrides, int steps, F kernel) {
  std::vector<char> workspace(a.plan.workspace_bytes, static_cast<char>(0xFF));
  a.workspace = workspace.data();
  a.counters = reinterpret_cast<uint32_t*>(a.workspace + a.plan.counters_at);
  std::fill_n(a.counters, a.plan.teams + 1, 0u);
  const int stride = overrides.apart ? 1 : steps;
  for (int step = 0; step < steps; step += stride) {
    a.first_step = step;
    a.last_step = step + stride;
    emulator::run({a.plan.blocks, kThreads, kSharedBytes, overrides.order}, [&] { kernel(a); });
  }
  for (int i = 0; i < a.plan.teams + 1; ++i)
    if (a.counters[i] & 0x7FFFFFFFu) throw std::runtime_error("a barrier's counter was left in the middle of a count");
}

void common(Request& r, Common& a, LaunchOverrides& overrides) {
  a.p = problem_of(r);
  overrides.resident = static_cast<int>(r.number());
  overrides.chunk = static_cast<int>(r.number());
  overrides.tile = static_cast<int>(r.number());
  overrides.parts = static_cast<int>(r.number());
  overrides.order = static_cast<uint32_t>(r.number());
  overrides.apart = r.number();
  r.views(a.features, a.p.modalities);
  const int64_t parameters = r.number();
  for (int64_t i = 0; i < parameters; ++i) a.parameters[i] = r.address();
  a.lengths = static_cast<const int64_t*>(r.address());
  a.seed = static_cast<const uint64_t*>(r.address());
  a.iterates = r.address();
}

template <class M>
Target target(const LaunchOverrides& overrides) {
  return {sizeof(Element), M::kRows, overrides.resident};
}

void set_tile(Plan& plan, const LaunchOverrides& overrides, int most) {
  if (!overrides.tile) return;
  plan.tile_weights = std::min(overrides.tile, most);
  std::fill_n(plan.tile, plan.phases, Tile{plan.tile_weights, plan.tile_weights});
}

void forward(Request& r) {
  ForwardArguments a{};
  LaunchOverrides overrides{};
  common(r, a, overrides);
  r.views(a.to.outputs, a.p.modalities);
  r.views(a.to.gates, a.p.modalities);
  a.plan = plan_forward(a.p, target<ForwardMath<Element, kExact>>(overrides), overrides.chunk);
  set_tile(a.plan, overrides, ForwardMath<Element, kExact>::kRows);
  const int rounds = tiles(a.plan.chunks, a.plan.teams);
  launch(a, overrides, rounds * a.plan.steps, forward_kernel<Element, kExact>);
}

void backward(Request& r) {
  BackwardArguments a{};
  LaunchOverrides overrides{};
  common(r, a, overrides);
  r.views(a.d_outputs, a.p.modalities);
  r.views(a.d_iterates, a.p.modalities);
  for (int m = 0; m < a.p.modalities; ++m) a.d_iterates_step[m] = r.number();
  r.views(a.d_gates, a.p.modalities);
  r.views(a.d_features, a.p.modalities);
  const int64_t parameters = r.number();
  for (int64_t i = 0; i < parameters; ++i) {
    a.d_parameters[i] = r.address();
    a.weights = a.weights || a.d_parameters[i];
  }
  a.plan =
      plan_backward(a.p, target<BackwardMath<Element, kExact>>(overrides), a.weights, overrides.chunk, overrides.parts);
  set_tile(a.plan, overrides, BackwardMath<Element, kExact>::kRows);
  place_gradients(a);
  launch(a, overrides, a.plan.chunks * a.plan.steps + (a.plan.parts > 0), backward_kernel<Element, kExact>);
}

void answer(const std::string& fault, const Request& r) {
  const int64_t size = static_cast<int64_t>(fault.size());
  std::fwrite(&size, 8, 1, stdout);
  std::fwrite(fault.data(), 1, fault.size(), stdout);
  if (fault.empty())
    for (const auto& buffer : r.buffers) std::fwrite(buffer.data(), 1, buffer.size(), stdout);
  std::fflush(stdout);
}

}  // namespace

int main() {
  for (;;) {
    Request request;
    std::string fault;
    try {
      if (request.number() == 0)
        forward(request);
      else
        backward(request);
    } catch (const std::exception& error) {
      fault = error.what();
    }
    answer(fault, request);
  }
}
