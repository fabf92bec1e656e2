// What the backward holds while it runs, and where: what a chunk keeps until its sums are taken, and what only passes
// from equation to equation. A name d_x is the gradient of the loss by x.
#pragma once

#include "gates.h"
#include "iteration.h"
#include "sums.h"

namespace grjca::GRJCA_ISA {

// Rows of C_m that one task of the correlation's backward takes, and columns (as panels) it keeps on chip at a time.
constexpr int64_t kCorrelationRows = 128, kCorrelationColumns = 256;

// Elements of such a block of C.
template <class R>
int64_t correlation_size(const Problem& p) {
  int64_t rows = 0;
  for (int m = 0; m < p.modalities; ++m) rows = larger(rows, p.widths[m]);
  return smaller(kCorrelationRows, rows) * smaller(kCorrelationColumns, panels<R>(p.width()) * kPanel<R>);
}

// Frames from which on tanh(K J) is kept from attend() until d (V C) is there, instead of being computed anew: a value
// takes L products. Tried at L = 300, where it pays; the limit is an estimate.
constexpr int64_t kKeptFrom = 64;

// What a chunk keeps until its sums are taken. Rows are those of the chunk.
template <class R>
struct Kept {
  R* d_state[kMaxIterations + 1];  // d X^t, [rows, ld]
  R* d_logits;                     // [rows, modalities * ways]
  R* d_update;                     // d (H W_h^T + b_h), [rows, ld]
  R *d_key_t, *d_value_t;          // d K and d V transposed, [d, frames_ld]
  R* d_joint;                      // [rows, ld]
  int64_t frames_ld;

  void plan(const Problem& p, int64_t rows, int64_t ld, Arena& arena) {
    frames_ld = leading<R>(rows);
    for (int t = 0; t <= p.iterations; ++t) d_state[t] = arena.take<R>(rows * ld);
    d_logits = arena.take<R>(rows * p.modalities * p.all_ways());
    d_update = arena.take<R>(rows * ld);
    d_key_t = arena.take<R>(p.width() * frames_ld);
    d_value_t = arena.take<R>(p.width() * frames_ld);
    d_joint = arena.take<R>(rows * ld);
  }

  Kept from_row(const Problem& p, int64_t row, int64_t ld) const {
    Kept k = *this;
    for (int t = 0; t <= p.iterations; ++t) k.d_state[t] += row * ld;
    k.d_logits += row * p.modalities * p.all_ways();
    k.d_update += row * ld;
    k.d_key_t += row;
    k.d_value_t += row;
    k.d_joint += row * ld;
    return k;
  }
};

// What passes from equation to equation within a unit.
template <class R>
struct Passing {
  R* d_attended;     // d (V C) as panels, [modality][panel][row][kPanel]
  R* d_attended_t;   // the same transposed, [modality][sample][panel of frames][d][kPanel]
  R* joint_t;        // J^T, [sample][panel of frames][d][kPanel]
  R* d_joint_parts;  // [block of C rows][panel][row][kPanel]

  static int64_t correlation_blocks(const Problem& p) {
    int64_t n = 0;
    for (int m = 0; m < p.modalities; ++m) n += blocks(p.widths[m], kCorrelationRows);
    return n;
  }

  void plan(const Problem& p, int64_t samples, Arena& arena) {
    const int64_t rows = samples * p.length, joint = panels<R>(p.width()) * rows * kPanel<R>;
    const int64_t transposed = samples * panels<R>(p.length) * p.width() * kPanel<R>;
    d_attended = arena.take<R>(p.modalities * joint);
    d_attended_t = arena.take<R>(p.modalities * transposed);
    joint_t = arena.take<R>(transposed);
    d_joint_parts = arena.take<R>(correlation_blocks(p) * joint);
  }
};

template <class R>
struct BackwardMemory {
  Split split;
  LayerWeights<R> weights[kMaxIterations];
  GateParameters<R> gates[kMaxModalities];
  R** parameters;  // where gradients are summed, in arithmetic type; null where none is asked for
  int64_t* start;
  Activations<R> activations;
  Kept<R> kept;
  Passing<R> passing;  // of the first worker, with J, K and V; the others' follow `passing_step` later
  int64_t passing_step;
  R* scratch;
  int64_t scratch_step;
  size_t bytes;

  void plan_kept(const Problem& p, int64_t rows, Arena& arena) {
    activations.plan_kept(rows, arena);
    kept.plan(p, rows, activations.ld, arena);
  }
  int64_t plan_passing(const Problem& p, int64_t samples, R* base) {
    Arena arena(base);
    activations.plan_passing(p, samples * p.length, arena);
    passing.plan(p, samples, arena);
    if (p.length >= kKeptFrom)
      activations.correlation = arena.take<R>(samples * panels<R>(p.width()) * p.width() * kPanel<R>);
    return static_cast<int64_t>(arena.used());
  }

  template <class S>
  static BackwardMemory plan(const Problem& p, const Resources& resources) {
    BackwardMemory w{};
    w.activations = Activations<R>::of(p);
    Arena of_sample(nullptr);
    w.plan_kept(p, p.length, of_sample);
    w.split = Split::plan(p, static_cast<int64_t>(of_sample.used()), w.plan_passing(p, 1, nullptr), resources.threads);
    Arena arena(Arena::align(resources.workspace));
    for (int t = 0; t < p.layers(); ++t) w.weights[t] = LayerWeights<R>::plan(p, true, arena);
    for (int m = 0; m < p.modalities; ++m) w.gates[m] = GateParameters<R>::plan(p, m, arena);
    w.parameters = arena.take<R*>(ParameterIndex{p}.count());
    if constexpr (sizeof(S) < sizeof(R))  // else they are summed where they are wanted
      each_parameter(p, [&](int i, int64_t size) {
        R* const sums = arena.take<R>(size);
        if (w.parameters) w.parameters[i] = sums;
      });
    w.start = arena.take<int64_t>(p.batch + 1);
    w.plan_kept(p, w.split.chunk * p.length, arena);
    w.passing_step = w.plan_passing(p, w.split.unit, nullptr) / static_cast<int64_t>(sizeof(R));
    w.plan_passing(p, w.split.unit, arena.take<R>(w.passing_step * w.split.workers));
    int64_t scratch = larger(Iteration<R>::scratch_size(p), 2 * correlation_size<R>(p));
    scratch = larger(scratch, Sums<R>::scratch_size(p));
    for (int m = 0; m < p.modalities; ++m)
      scratch = larger(scratch, Frame<R>::scratch_size(p.widths[m], p.iterations) +
                                    FrameGradient<R>::scratch_size(p.widths[m], p.iterations) + p.all_ways());
    w.scratch_step = blocks(scratch, 64) * 64;
    w.scratch = arena.take<R>(w.scratch_step * resources.threads);
    w.bytes = arena.used();
    return w;
  }

  // The activations and passing values of a unit that begins at `row` of the samples.
  Activations<R> activations_of(int64_t row, int worker) const {
    Activations<R> a = activations;
    a.x += row * a.ld;
    a.hidden += row * a.hidden_ld;
    for (R** piece : {&a.joint, &a.key, &a.value}) *piece += worker * passing_step;
    if (a.correlation) a.correlation += worker * passing_step;
    return a;
  }
  Passing<R> passing_of(int worker) const {
    Passing<R> own = passing;
    for (R** piece : {&own.d_attended, &own.d_attended_t, &own.joint_t, &own.d_joint_parts})
      *piece += worker * passing_step;
    return own;
  }

  // f(index in the flat list, elements)
  template <class F>
  static void each_parameter(const Problem& p, F f) {
    const ParameterIndex index{p};
    const int64_t d = p.width();
    const auto linear = [&](int i, int64_t out, int64_t in) {
      f(i, out * in);
      if (p.released) f(i + 1, out);
    };
    for (int t = 0; t < p.layers(); ++t) {
      if (p.projected) linear(index.query(t), d, d);
      for (int m = 0; m < p.modalities; ++m) {
        linear(index.key(t, m), p.length, p.length);
        linear(index.value(t, m), p.widths[m], p.widths[m]);
        linear(index.output(t, m), p.widths[m], d);
      }
    }
    for (int m = 0; m < p.modalities; ++m)
      for (int g = 0; g < p.gates(); ++g) linear(index.gate(m, g), p.ways(g), p.widths[m]);
  }
};

}  // namespace grjca::GRJCA_ISA
