// The gates in reverse: the gradients that Y_m, the gate values and the iterates send back to X^0..X^T.
#pragma once

#include "gates.h"
#include "iteration_backward.h"

namespace grjca::cuda {

// The gate values of a frame, in float32, and the gradients of the logits before the division by tau:
// [row of the chunk, modality, way].
GRJCA_DEVICE float* values_of(const Common& a, const Team& team, int64_t row, int m) {
  return reinterpret_cast<float*>(workspace_of(a, team) + a.plan.values) + (row * a.p.modalities + m) * a.p.all_ways();
}
template <class T>
GRJCA_DEVICE T* d_logits_of(const Common& a, const Team& team, int64_t row, int m) {
  return reinterpret_cast<T*>(workspace_of(a, team) + a.plan.d_logits) + (row * a.p.modalities + m) * a.p.all_ways();
}

template <class T>
struct FrameBackward : Frame<T> {
  const BackwardArguments& b;
  int sample;
  using Frame<T>::a;
  using Frame<T>::team;
  using Frame<T>::me;
  using Frame<T>::s;
  using Frame<T>::l;
  using Frame<T>::m;
  using Frame<T>::width;
  using Frame<T>::hierarchical;

  GRJCA_DEVICE FrameBackward(const BackwardArguments& args, const Team& team_, const Thread& thread, int s_, int l_,
                             int m_)
      : Frame<T>(args, team_, thread, s_, l_, m_), b(args), sample(team_.first + s_) {}

  // Columns of a gradient that the caller passed; zeros if there is none.
  GRJCA_DEVICE StoredColumns<T> incoming(const View& view, int64_t step, int c) const {
    View from = view;
    if (view.data) from.data = static_cast<T*>(view.data) + step;
    return load_stored<T>(from, sample, l, c, width);
  }

  // The row in which gates_backward stores d Y_m after its relu.
  GRJCA_DEVICE T* d_mixture_row() const {
    return slot<T>(a, team, a.plan.slots.d_mixture) + this->row() * a.plan.width + a.plan.offsets[m];
  }
  GRJCA_DEVICE StoredColumns<T> stored_d_mixture(int c) const {
    return a.p.gates() > 0 ? load_stored(d_mixture_row() + c, width - c) : incoming(b.d_outputs[m], 0, c);
  }
  GRJCA_DEVICE void store_d_mixture(const Ways& values) const {
    this->each_columns([&](int c) {
      Columns<T> d = incoming(b.d_outputs[m], 0, c).wide();
      const Columns<T> y = this->mixture(values, c);
      d.each([&](float& x, int i) { x = where_positive(y.x[i], x); });
      store_columns(d_mixture_row() + c, width - c, 1, d);
    });
  }

  // In "hierarchical": the gradient by Z^t before its relu; d is the one by the sum that Y is relu of.
  GRJCA_DEVICE Columns<T> d_stage(const Ways& values, int t, int c, Columns<T> d) const {
    const Columns<T> z = this->stage(values, t, c);
    const float value = values.get(this->last_way() + t - 1);
    d.each([&](float& x, int i) { x = where_positive(z.x[i], value * x); });
    return d;
  }

  // Computes the gradients of the logits of gate g from its softmax; `values` holds its ways.
  GRJCA_DEVICE void logits(const Ways& values, int g, T* to) const {
    const int ways = a.p.ways(g);
    const bool of_stage = hierarchical && g < a.p.iterations, of_stages = hierarchical && !of_stage;
    float d_values[kMaxWays] = {};
    this->each_columns([&](int c) {
      Columns<T> d = stored_d_mixture(c).wide();
      if (of_stage) d = d_stage(values, g + 1, c, d);
      GRJCA_UNROLL
      for (int first = 0; first < kMaxWays; first += kAtOnce) {
        StoredColumns<T> x[kAtOnce];
        GRJCA_UNROLL
        for (int w = first; w < first + kAtOnce; ++w)
          x[w - first] =
              w < ways && !of_stages ? this->stored_state(of_stage ? w : this->state_of_way(w), c) : StoredColumns<T>{};
        GRJCA_UNROLL
        for (int w = first; w < first + kAtOnce && w < kMaxWays; ++w)
          if (w < ways) d_values[w] += dot(of_stages ? this->choice(values, w, c) : x[w - first].wide(), d);
      }
    });
    float along = 0;
    GRJCA_UNROLL
    for (int w = 0; w < kMaxWays; ++w)
      if (w < ways) {
        d_values[w] = sum_of_warp(d_values[w]);
        if (b.d_gates[m].data) d_values[w] += widen(*element<T>(b.d_gates[m], sample, l, first_way(g) + w));
        along += values.get(first_way(g) + w) * d_values[w];
      }
    GRJCA_UNROLL
    for (int w = 0; w < kMaxWays; ++w)
      if (w < ways) {
        const float value = values.get(first_way(g) + w);
        if (me.lane() == 0)
          to[first_way(g) + w] = narrow_to<T>(value * (d_values[w] - along) / static_cast<float>(a.p.temperature));
      }
  }

  // What state_gradient needs from memory.
  struct Incoming {
    StoredColumns<T> mixture, iterate;
  };
  GRJCA_DEVICE Incoming load(int t, int c) const {
    Incoming to{};
    if (c >= width) return to;
    to.mixture = stored_d_mixture(c);
    if (t > 0) to.iterate = incoming(b.d_iterates[m], (t - 1) * b.d_iterates_step[m], c);
    return to;
  }

  // d X_m^t but for what the iterations add.
  GRJCA_DEVICE Columns<T> state_gradient(const Ways& values, const Ways& d_logits, int t, int c,
                                         const Incoming& loaded) const {
    const int last = a.p.iterations;
    const Columns<T> d_y = loaded.mixture.wide();
    Columns<T> d;
    const auto add = [&](float factor, Columns<T> x) { x.each([&](float& y, int i) { d.x[i] += factor * y; }); };
    if (a.p.gating == Gating::none) {
      if (t == last) d = d_y;
    } else if (hierarchical) {
      GRJCA_LOOP
      for (int u = t > 1 ? t : 1; u <= last; ++u) add(values.get(first_way(u - 1) + t), d_stage(values, u, c, d_y));
    } else if (a.p.gating == Gating::flat) {
      add(values.get(t), d_y);
    } else if (t == 0 || t == last) {
      add(values.get(t == 0 ? 0 : 1), d_y);
    }
    GRJCA_LOOP
    for (int g = 0; g < a.p.gates(); ++g)
      if (state_of_gate(a.p, g) == t) {
        GRJCA_LOOP
        for (int w = 0; w < a.p.ways(g); ++w) add(d_logits.get(first_way(g) + w), this->gate_weights(g, w, c).wide());
      }
    add(1, loaded.iterate.wide());
    return d;
  }
};

// Values distributed over the lanes of a warp, read from where one of them, or another warp earlier, has put them.
template <class S>
GRJCA_DEVICE Ways load_ways(const Thread& me, const S* from, int n) {
  Ways all{me};
  all.each([&](float& x, int way) { x = way < n ? widen(from[way]) : 0; });
  return all;
}

// Recomputes the gate values and computes the gradients of their logits.
template <class T>
GRJCA_DEVICE void gates_backward(const BackwardArguments& a, const Team& team) {
  if (a.p.gates() == 0) return;
  each_frame(a, team, [&](const Thread& me, int s, int l, int m) {
    const FrameBackward<T> frame(a, team, me, s, l, m);
    const bool present = l < frames_of(a, team.first + s);
    const int ways = a.p.all_ways(), lane = me.lane();
    const Frame<T> one[1] = {frame};
    const bool is_present[1] = {present};
    Ways computed[1] = {{me}};
    gate_values<T>(one, is_present, computed);
    Ways& values = computed[0];
    float* const to = values_of(a, team, frame.row(), m);
    values.each([&](float& x, int way) {
      if (way < ways) to[way] = x;
    });
    T* const d_logits = d_logits_of<T>(a, team, frame.row(), m);
    if (present) {
      frame.store_d_mixture(values);
      GRJCA_LOOP
      for (int g = 0; g < a.p.gates(); ++g) frame.logits(values, g, d_logits);
    } else {
      for (int w = lane; w < ways; w += kWarp) d_logits[w] = narrow_to<T>(0);
    }
  });
}

// d X^t, but for what the iterations add. A warp has the frames that gates_backward gave it.
template <class T>
GRJCA_DEVICE void states_backward(const BackwardArguments& a, const Team& team, int t) {
  T* const to = writable(d_state<T>(a, team, t), 0);
  warp_barrier();
  each_frames<2>(a, team, [&](const Thread& me, const FrameAt(&at)[2]) {
    const FrameBackward<T> frames[2] = {{a, team, me, at[0].s, at[0].l, at[0].m},
                                        {a, team, me, at[1].s, at[1].l, at[1].m}};
    const int ways = a.p.all_ways();
    Ways values[2] = {{me}, {me}}, d_logits[2] = {{me}, {me}};
    bool present[2];
    int widest = 0;
    GRJCA_UNROLL
    for (int n = 0; n < 2; ++n) {
      present[n] = at[n].exists && at[n].l < frames_of(a, team.first + at[n].s);
      widest = widest < frames[n].width ? frames[n].width : widest;
      if (!present[n]) continue;
      values[n] = load_ways(me, values_of(a, team, frames[n].row(), at[n].m), ways);
      d_logits[n] = load_ways(me, d_logits_of<T>(a, team, frames[n].row(), at[n].m), ways);
    }
    each_columns<T>(me, widest, [&](int c) {
      typename FrameBackward<T>::Incoming loaded[2];
      GRJCA_UNROLL
      for (int n = 0; n < 2; ++n) loaded[n] = present[n] ? frames[n].load(t, c) : typename FrameBackward<T>::Incoming{};
      GRJCA_UNROLL
      for (int n = 0; n < 2; ++n) {
        if (!at[n].exists) continue;
        Columns<T> d;
        if (present[n]) d = frames[n].state_gradient(values[n], d_logits[n], t, c, loaded[n]);
        store_columns(to + frames[n].row() * a.plan.width + a.plan.offsets[at[n].m] + c, frames[n].width - c, 1, d);
      }
    });
  });
}

}  // namespace grjca::cuda
