// The work done frame by frame: input normalisation and the gates, forward and backward, for one modality of one frame.
#pragma once

#include <math.h>

#include "storage.h"
#include "vector.h"
#include "workspace.h"

namespace grjca::GRJCA_ISA {

constexpr double kSmallestNorm = 1e-12;

template <class R>
inline R norm(const R* x, int64_t n) {
  const R length = static_cast<R>(sqrt(static_cast<double>(dot(x, x, n))));
  const R smallest = static_cast<R>(kSmallestNorm);
  return length < smallest ? smallest : length;
}

template <class R>
inline void add_scaled(R* y, R factor, const R* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

// X^0 of one frame: the features, divided by their norm if asked for. Returns the divisor.
template <class R, class S>
inline R initial_row(const Problem& p, R* to, const S* from, int64_t step, int64_t n) {
  load_row(to, from, step, n);
  if (!p.normalize) return 1;
  const R length = norm(to, n);
  for (int64_t i = 0; i < n; ++i) to[i] /= length;
  return length;
}

// Gate parameters of one modality in arithmetic type.
template <class R>
struct GateParameters {
  R *weight[kMaxGates], *bias[kMaxGates];

  static GateParameters plan(const Problem& p, int m, Arena& arena) {
    GateParameters g{};
    for (int i = 0; i < p.gates(); ++i) {
      g.weight[i] = arena.take<R>(p.ways(i) * p.widths[m]);
      g.bias[i] = arena.take<R>(p.ways(i));
    }
    return g;
  }

  template <class S>
  void fill(const Problem& p, int m, const void* const* parameters) {
    const ParameterIndex index{p};
    for (int i = 0; i < p.gates(); ++i) {
      const void* const* of_gate = parameters + index.gate(m, i);
      load_row(weight[i], static_cast<const S*>(of_gate[0]), 1, p.ways(i) * p.widths[m]);
      std::memset(bias[i], 0, p.ways(i) * sizeof(R));
      if (p.released) load_row(bias[i], static_cast<const S*>(of_gate[1]), 1, p.ways(i));
    }
  }
};

// One frame of one modality: the states X^0..T, mixed into Y. All pointers are to rows of n values.
template <class R>
struct Frame {
  const Problem& p;
  const GateParameters<R>& gates;
  int64_t n;
  R* state[kMaxIterations + 1];
  R* mixed[kMaxIterations + 1];             // Z^t ("hierarchical"), t from 1
  R* y;                                     // Y
  R values[kMaxGates][kMaxIterations + 1];  // of each gate, each way

  static int64_t scratch_size(int64_t n, int iterations) { return (2 * iterations + 2) * leading<R>(n); }

  Frame(const Problem& problem, const GateParameters<R>& parameters, int64_t width, R* scratch)
      : p(problem), gates(parameters), n(width) {
    const int64_t ld = leading<R>(n);
    for (int t = 0; t <= p.iterations; ++t) state[t] = scratch + t * ld;
    for (int t = 1; t <= p.iterations; ++t) mixed[t] = scratch + (p.iterations + t) * ld;
    y = scratch + (2 * p.iterations + 1) * ld;
  }

  R* last() const { return state[p.iterations]; }

  // The rows that gate g chooses from, the row it is computed from, and the row it writes.
  void roles(int g, R* const*& choices, R*& input, R*& output) {
    output = y;
    input = last();
    choices = state;
    if (p.gating == Gating::dynamic) {
      ends_[0] = state[0];
      ends_[1] = last();
      choices = ends_;
    } else if (p.gating == Gating::hierarchical && g < p.iterations) {
      input = state[g + 1];
      output = mixed[g + 1];
    } else if (p.gating == Gating::hierarchical) {
      choices = mixed + 1;
    }
  }

  void forward() {
    if (p.gating == Gating::none) std::memcpy(y, last(), n * sizeof(R));
    for (int g = 0; g < p.gates(); ++g) {
      R* const* choices;
      R *input, *output;
      roles(g, choices, input, output);
      gate(g, input);
      std::memset(output, 0, n * sizeof(R));
      for (int i = 0; i < p.ways(g); ++i) add_scaled(output, values[g][i], choices[i], n);
      for (int64_t i = 0; i < n; ++i) output[i] = output[i] < 0 ? 0 : output[i];
    }
  }

  // G = softmax((x W_g^T + b_g) / tau)
  void gate(int g, const R* input) {
    const R tau = static_cast<R>(p.temperature);
    const int ways = p.ways(g);
    R* const value = values[g];
    R most = -INFINITY, total = 0;
    for (int i = 0; i < ways; ++i) {
      value[i] = (dot(input, gates.weight[g] + i * n, n) + gates.bias[g][i]) / tau;
      most = value[i] < most ? most : value[i];
    }
    for (int i = 0; i < ways; ++i) {
      value[i] = static_cast<R>(exp(value[i] - most));
      total += value[i];
    }
    for (int i = 0; i < ways; ++i) value[i] /= total;
  }

 private:
  R* ends_[2];
};

// The backward of a Frame whose forward has run. Gradients of the states are added to d_state, those of the gates'
// logits (before division by tau) are written to d_logits.
template <class R>
struct FrameGradient {
  Frame<R>& f;
  R* d_state[kMaxIterations + 1];
  R* d_mixed[kMaxIterations + 1];
  R* d_y;

  static int64_t scratch_size(int64_t n, int iterations) { return (2 * iterations + 2) * leading<R>(n); }

  FrameGradient(Frame<R>& frame, R* scratch) : f(frame) {
    const int64_t ld = leading<R>(f.n);
    for (int t = 0; t <= f.p.iterations; ++t) d_state[t] = scratch + t * ld;
    for (int t = 1; t <= f.p.iterations; ++t) d_mixed[t] = scratch + (f.p.iterations + t) * ld;
    d_y = scratch + (2 * f.p.iterations + 1) * ld;
    std::memset(scratch, 0, scratch_size(f.n, f.p.iterations) * sizeof(R));
  }

  // d_y is set; d_values holds the incoming gradient of the gate values, all ways one after another, or is null.
  void backward(const R* d_values, R* d_logits) {
    const Problem& p = f.p;
    if (p.gating == Gating::none) add_scaled(d_state[p.iterations], R(1), d_y, f.n);
    int first_way = p.all_ways();
    for (int g = p.gates() - 1; g >= 0; --g) {
      first_way -= p.ways(g);
      gate_backward(g, d_values ? d_values + first_way : nullptr, d_logits + first_way);
    }
  }

 private:
  void gate_backward(int g, const R* d_values, R* d_logits) {
    const Problem& p = f.p;
    const int64_t n = f.n;
    const int ways = p.ways(g);
    R* const* choices;
    R *input, *output;
    f.roles(g, choices, input, output);
    const bool stage = p.gating == Gating::hierarchical && g < p.iterations;
    const bool last = p.gating == Gating::hierarchical && !stage;
    R* const d_output = stage ? d_mixed[g + 1] : d_y;
    R* const d_input = d_state[stage ? g + 1 : p.iterations];
    for (int64_t i = 0; i < n; ++i) d_output[i] = output[i] <= 0 ? 0 : d_output[i];
    const R* const value = f.values[g];
    R mean = 0;
    for (int i = 0; i < ways; ++i) {
      R* const d_choice = last ? d_mixed[i + 1] : p.gating == Gating::dynamic && i ? d_state[p.iterations] : d_state[i];
      add_scaled(d_choice, value[i], d_output, n);
      d_logits[i] = dot(d_output, choices[i], n) + (d_values ? d_values[i] : 0);
      mean += value[i] * d_logits[i];
    }
    for (int i = 0; i < ways; ++i) {
      d_logits[i] = value[i] * (d_logits[i] - mean) / static_cast<R>(p.temperature);
      add_scaled(d_input, d_logits[i], f.gates.weight[g] + i * n, n);
    }
  }
};

}  // namespace grjca::GRJCA_ISA
