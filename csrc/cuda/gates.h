// The gates, and the outputs they mix; and both in reverse. A warp takes a frame of a modality, a lane some columns.
//
// The ways of all gates of a modality stand one after another, stages first.
#pragma once

#include "iteration.h"

namespace grjca::cuda {

constexpr int kMaxWays = kMaxIterations + 1;  // of a gate
constexpr int kAtOnce = 4;                    // ways that are loaded before the first is used

GRJCA_BOTH constexpr int first_way(int g) { return g * (g + 3) / 2; }
GRJCA_BOTH int state_of_gate(const Problem& p, int g) {  // t of the X^t that gate g is computed from
  return p.gating == Gating::hierarchical ? least(g + 1, p.iterations) : p.iterations;
}

// ---- values of all ways of a frame, distributed over the lanes of its warp

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
  GRJCA_DEVICE StoredColumns<T> stored_state(int t, int c) const { return load_stored(state_row(t) + c, width - c); }
  GRJCA_DEVICE Columns<T> state(int t, int c) const { return stored_state(t, c).wide(); }

  GRJCA_DEVICE const T* gate_parameter(int g, int bias) const { return parameter<T>(a, index_of(a).gate(m, g) + bias); }
  GRJCA_DEVICE StoredColumns<T> gate_weights(int g, int way, int c) const {
    return load_stored(gate_parameter(g, 0) + static_cast<int64_t>(way) * width + c, width - c);
  }

  template <class F>
  GRJCA_DEVICE void each_columns(F f) const {
    grjca::cuda::each_columns<T>(me, width, f);
  }

  // In "hierarchical": sum_s S^t_s X^s for s = 0..t, whose relu is Z^t.
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

  // The state that way i of the last gate chooses: X^t for this t, or with "hierarchical" Z^(i+1).
  GRJCA_DEVICE int state_of_way(int i) const { return a.p.gating == Gating::dynamic && i > 0 ? a.p.iterations : i; }
  GRJCA_DEVICE Columns<T> choice(const Ways& values, int i, int c) const {
    if (!hierarchical) return state(state_of_way(i), c);
    Columns<T> z = stage(values, i + 1, c);
    z.each([](float& x, int) { x = relu(x); });
    return z;
  }

  // sum_i G_i choice_i, whose relu is Y.
  GRJCA_DEVICE Columns<T> mixture(const Ways& values, int c) const {
    Columns<T> sum;
    const int ways = a.p.ways(last_gate());
    const auto add = [&](int i, Columns<T> x) {
      const float value = values.get(last_way() + i);
      x.each([&](float& y, int k) { sum.x[k] += value * y; });
    };
    if (hierarchical) {
      GRJCA_LOOP
      for (int i = 0; i < ways; ++i) add(i, choice(values, i, c));
      return sum;
    }
    GRJCA_LOOP
    for (int first = 0; first < ways; first += kAtOnce) {
      StoredColumns<T> x[kAtOnce];
      GRJCA_UNROLL
      for (int i = 0; i < kAtOnce; ++i)
        x[i] = first + i < ways ? stored_state(state_of_way(first + i), c) : StoredColumns<T>{};
      GRJCA_UNROLL
      for (int i = 0; i < kAtOnce; ++i)
        if (first + i < ways) add(first + i, x[i].wide());
    }
    return sum;
  }
};

// Computes G = softmax((x W_g^T + b_g) / tau) of every gate, for some frames.
template <class T, int kFrames>
GRJCA_DEVICE void gate_values(const Frame<T> (&frames)[kFrames], const bool (&present)[kFrames], Ways (&to)[kFrames]) {
  const Common& a = frames[0].a;
  GRJCA_LOOP
  for (int g = 0; g < a.p.gates(); ++g) {
    const int ways = a.p.ways(g);
    float logits[kFrames][kMaxWays] = {};
    int widest = 0;
    for (const Frame<T>& frame : frames) widest = widest < frame.width ? frame.width : widest;
    each_columns<T>(frames[0].me, widest, [&](int c) {
      StoredColumns<T> x[kFrames];
      GRJCA_UNROLL
      for (int n = 0; n < kFrames; ++n)
        x[n] = present[n] ? frames[n].stored_state(state_of_gate(a.p, g), c) : StoredColumns<T>{};
      GRJCA_UNROLL
      for (int first = 0; first < kMaxWays; first += kAtOnce)
        if (first < ways) {
          StoredColumns<T> weights[kFrames][kAtOnce];
          GRJCA_UNROLL
          for (int n = 0; n < kFrames; ++n) {
            GRJCA_UNROLL
            for (int w = first; w < first + kAtOnce; ++w)
              weights[n][w - first] = w < ways ? frames[n].gate_weights(g, w, c) : StoredColumns<T>{};
          }
          GRJCA_UNROLL
          for (int n = 0; n < kFrames; ++n) {
            GRJCA_UNROLL
            for (int w = first; w < first + kAtOnce && w < kMaxWays; ++w)
              if (w < ways) logits[n][w] += dot(x[n].wide(), weights[n][w - first].wide());
          }
        }
    });
    GRJCA_UNROLL
    for (int n = 0; n < kFrames; ++n) {
      float (&of)[kMaxWays] = logits[n];
      float greatest = 0, total = 0;
      GRJCA_UNROLL
      for (int w = 0; w < kMaxWays; ++w)
        if (w < ways) {
          const float bias = a.p.released ? widen(frames[n].gate_parameter(g, 1)[w]) : 0;
          of[w] = (sum_of_warp(of[w]) + bias) / static_cast<float>(a.p.temperature);
          greatest = w == 0 || greatest < of[w] ? of[w] : greatest;
        }
      GRJCA_UNROLL
      for (int w = 0; w < kMaxWays; ++w)
        if (w < ways) total += of[w] = exponential(of[w] - greatest);
      GRJCA_UNROLL
      for (int w = 0; w < kMaxWays; ++w)
        if (w < ways) to[n].set(first_way(g) + w, present[n] ? of[w] / total : 0);
    }
  }
}

// Computes Y_m, and the gate values if asked for. A warp takes two frames at a time, as it has no registers for more.
template <class T>
GRJCA_DEVICE void gate(const Common& a, const Team& team, const ForwardOutputs& to) {
  each_frames<2>(a, team, [&](const Thread& me, const FrameAt(&at)[2]) {
    const Frame<T> frames[2] = {{a, team, me, at[0].s, at[0].l, at[0].m}, {a, team, me, at[1].s, at[1].l, at[1].m}};
    Ways values[2] = {{me}, {me}};
    bool present[2];
    GRJCA_UNROLL
    for (int n = 0; n < 2; ++n) present[n] = at[n].exists && at[n].l < frames_of(a, team.first + at[n].s);
    gate_values<T>(frames, present, values);
    const bool gated = a.p.gates() > 0;
    GRJCA_UNROLL
    for (int n = 0; n < 2; ++n) {
      const Frame<T>& frame = frames[n];
      const int sample = team.first + frame.s;
      if (!at[n].exists) continue;
      frame.each_columns([&](int c) {
        Columns<T> sum;
        if (present[n]) sum = gated ? frame.mixture(values[n], c) : frame.state(a.p.iterations, c);
        if (gated) sum.each([](float& x, int) { x = relu(x); });
        store_columns(to.outputs[frame.m], sample, frame.l, c, frame.width, sum);
      });
      if (to.gates[frame.m].data)
        values[n].each([&](float& x, int w) {
          if (w < a.p.all_ways()) *element<T>(to.gates[frame.m], sample, frame.l, w) = narrow_to<T>(x);
        });
    }
  });
}

}  // namespace grjca::cuda
