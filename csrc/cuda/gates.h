// The gates, and the outputs they mix; and both in reverse. A warp takes a frame of a modality, a lane some columns.
//
// The ways of all gates of a modality stand one after another, stages first.
#pragma once

#include "iteration.h"

namespace grjca::cuda {

constexpr int kMaxWays = kMaxIterations + 1;  // of a gate

GRJCA_BOTH constexpr int first_way(int g) { return g * (g + 3) / 2; }
GRJCA_BOTH int state_of_gate(const Problem& p, int g) {  // t of the X^t that gate g is computed from
  return p.gating == Gating::hierarchical ? least(g + 1, p.iterations) : p.iterations;
}

// ---- values of all ways of a frame, shared out over the lanes of its warp

struct Ways {
  static constexpr int kMost = first_way(kMaxIterations) + kMaxIterations;  // of "hierarchical", all gates
  static constexpr int kOfLane = (kMost + kWarp - 1) / kWarp;

  Thread me;
  float x[kOfLane] = {};  // way i of all in lane i % kWarp

  // f(x, its way) for every one that this lane has.
  template <class F>
  GRJCA_DEVICE void each(F f) {
    GRJCA_UNROLL
    for (int i = 0; i < kOfLane; ++i) f(x[i], i * kWarp + me.lane());
  }

  GRJCA_DEVICE float get(int way) const {
    float found = x[0];
    GRJCA_UNROLL
    for (int i = 1; i < kOfLane; ++i) found = way < i * kWarp ? found : x[i];
    return float_of(shuffle(bits_of(found), way % kWarp));
  }
  GRJCA_DEVICE void set(int way, float to) {
    each([&](float& y, int of_y) { y = of_y == way ? to : y; });
  }
};

// ---- one frame of one modality

template <class T>
struct Frame {
  const Common& a;
  const Team& team;
  Thread me;
  int s, l, m, width;
  bool hierarchical;

  GRJCA_DEVICE Frame(const Common& a_, const Team& team_, const Thread& thread, int s_, int l_, int m_)
      : a(a_),
        team(team_),
        me(thread),
        s(s_),
        l(l_),
        m(m_),
        width(a_.plan.widths[m_]),
        hierarchical(a_.p.gating == Gating::hierarchical) {}

  GRJCA_DEVICE int64_t row() const { return s * a.plan.frames + l; }  // of the chunk
  GRJCA_DEVICE int last_gate() const { return a.p.gates() - 1; }
  GRJCA_DEVICE int last_way() const { return hierarchical ? first_way(a.p.iterations) : 0; }

  GRJCA_DEVICE const T* state_row(int t) const {
    const T* const x = t == 0 ? slot<T>(a, team, a.plan.slots.initial) + row() * a.plan.width
                              : static_cast<const T*>(a.iterates) +
                                    (((t - 1) * a.p.batch + team.first + s) * a.p.length + l) * a.plan.width;
    return x + a.plan.offsets[m];
  }
  GRJCA_DEVICE Columns<T> state(int t, int c) const { return load_columns(state_row(t) + c, width - c); }

  GRJCA_DEVICE const T* gate_parameter(int g, int bias) const { return parameter<T>(a, index_of(a).gate(m, g) + bias); }

  template <class F>
  GRJCA_DEVICE void each_columns(F f) const {
    grjca::cuda::each_columns<T>(me, width, f);
  }

  // G = softmax((x W_g^T + b_g) / tau) of every gate.
  GRJCA_DEVICE Ways values() const {
    Ways all{me};
    GRJCA_LOOP
    for (int g = 0; g < a.p.gates(); ++g) {
      const int ways = a.p.ways(g);
      const T* const weight = gate_parameter(g, 0);
      float logits[kMaxWays] = {};
      each_columns([&](int c) {
        const Columns<T> x = state(state_of_gate(a.p, g), c);
        GRJCA_UNROLL
        for (int w = 0; w < kMaxWays; ++w)
          if (w < ways) logits[w] += dot(x, load_columns(weight + static_cast<int64_t>(w) * width + c, width - c));
      });
      float greatest = 0, total = 0;
      GRJCA_UNROLL
      for (int w = 0; w < kMaxWays; ++w)
        if (w < ways) {
          const float bias = a.p.released ? widen(gate_parameter(g, 1)[w]) : 0;
          logits[w] = (sum_of_warp(logits[w]) + bias) / static_cast<float>(a.p.temperature);
          greatest = w == 0 || greatest < logits[w] ? logits[w] : greatest;
        }
      GRJCA_UNROLL
      for (int w = 0; w < kMaxWays; ++w)
        if (w < ways) total += logits[w] = exponential(logits[w] - greatest);
      GRJCA_UNROLL
      for (int w = 0; w < kMaxWays; ++w)
        if (w < ways) all.set(first_way(g) + w, logits[w] / total);
    }
    return all;
  }

  // Of "hierarchical": sum_s S^t_s X^s for s = 0..t, whose relu is Z^t.
  GRJCA_DEVICE Columns<T> stage(const Ways& values, int t, int c) const {
    Columns<T> sum;
    GRJCA_LOOP
    for (int i = 0; i <= t; ++i) {
      const float value = values.get(first_way(t - 1) + i);
      Columns<T> x = state(i, c);
      x.each([&](float& y, int k) { sum.x[k] += value * y; });
    }
    return sum;
  }

  // What way i of the last gate chooses.
  GRJCA_DEVICE Columns<T> choice(const Ways& values, int i, int c) const {
    if (hierarchical) {
      Columns<T> z = stage(values, i + 1, c);
      z.each([](float& x, int) { x = relu(x); });
      return z;
    }
    return state(a.p.gating == Gating::dynamic && i > 0 ? a.p.iterations : i, c);
  }

  // sum_i G_i choice_i, whose relu is Y.
  GRJCA_DEVICE Columns<T> mixture(const Ways& values, int c) const {
    Columns<T> sum;
    const auto add = [&](int i) {
      const float value = values.get(last_way() + i);
      Columns<T> x = choice(values, i, c);
      x.each([&](float& y, int k) { sum.x[k] += value * y; });
    };
    const int ways = a.p.ways(last_gate());
    if (hierarchical) {
      GRJCA_LOOP
      for (int i = 0; i < ways; ++i) add(i);
    } else {
      GRJCA_UNROLL_BY(4)  // four loads at once
      for (int i = 0; i < ways; ++i) add(i);
    }
    return sum;
  }
};

// Y_m, and the gate values if asked for.
template <class T>
GRJCA_DEVICE void gate(const Common& a, const Team& team, const ForwardOutputs& to) {
  each_frame(a, team, [&](const Thread& me, int s, int l, int m) {
    const Frame<T> frame(a, team, me, s, l, m);
    const int sample = team.first + s;
    const bool present = l < frames_of(a, sample), gated = a.p.gates() > 0;
    Ways values = present ? frame.values() : Ways{me};
    const View& y = to.outputs[m];
    frame.each_columns([&](int c) {
      Columns<T> sum;
      if (present) sum = gated ? frame.mixture(values, c) : frame.state(a.p.iterations, c);
      if (gated) sum.each([](float& x, int) { x = relu(x); });
      store_columns(y, sample, l, c, frame.width, sum);
    });
    if (to.gates[m].data)
      values.each([&](float& x, int w) {
        if (w < a.p.all_ways()) *element<T>(to.gates[m], sample, l, w) = narrow_to<T>(x);
      });
  });
}

}  // namespace grjca::cuda
