// The memory of the backward: the gradients that a chunk keeps until its sums are taken, and the intermediate results
// that one equation passes to the next. d_x is the gradient of the loss with respect to x.
#pragma once

#include "gates.h"
#include "iteration.h"
#include "sums.h"

namespace grjca::GRJCA_ISA {

// A task of the correlation's backward takes at most so many rows of C_m, and keeps so many columns on chip at a time.
// The sum of d J has one part for each task, so how many rows a task takes must follow from the shapes alone. Tasks of
// one or two samples take fewer, so that there are enough for some threads.
constexpr int64_t kCorrelationRows = kRowBlock, kCorrelationColumns = 256;
inline int64_t correlation_rows(const Problem& p) { return p.batch > 2 ? kCorrelationRows : kCorrelationRows / 2; }

// From this many frames on, tanh(K J) is held from attend() until d (V C) is there, instead of being computed anew: a
// value takes L products. Tried at L = 300, where it pays; the limit is an estimate.
constexpr int64_t kHeldFrom = 64;

// A chunk holds these gradients until its sums are taken. Rows are those of the chunk.
template <class R>
struct ChunkGradients {
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

  ChunkGradients from_row(const Problem& p, int64_t row, int64_t ld) const {
    ChunkGradients g = *this;
    for (int t = 0; t <= p.iterations; ++t) g.d_state[t] += row * ld;
    g.d_logits += row * p.modalities * p.all_ways();
    g.d_update += row * ld;
    g.d_key_t += row;
    g.d_value_t += row;
    g.d_joint += row * ld;
    return g;
  }
};

// Intermediate results that one equation passes to the next within a unit.
template <class E, class H = Held<E>, class R = Compute<E>>
struct Transients {
  H* d_attended;         // d (V C), [rows, hidden_ld]
  R* d_attended_panels;  // the same as panels, [modality][sample][panel][frames][kPanel]
  R* d_attended_t;       // the same transposed, [modality][sample][panel of frames][d][kPanel]
  R* joint_t;            // J^T, [sample][panel of frames][d][kPanel]
  R* d_joint_parts;      // [block of C rows, if several threads share a unit][panel][row][kPanel]

  static int64_t correlation_blocks(const Problem& p) {
    int64_t n = 0;
    for (int m = 0; m < p.modalities; ++m) n += blocks(p.widths[m], correlation_rows(p));
    return n;
  }

  void plan(const Problem& p, int64_t samples, bool shared, Arena& arena) {
    const int64_t rows = samples * p.length, joint = panels<R>(p.width()) * rows * kPanel<R>;
    const int64_t transposed = samples * panels<R>(p.length) * p.width() * kPanel<R>;
    d_attended = arena.take<H>(rows * Activations<E>::of(p).hidden_ld);
    d_attended_panels = arena.take<R>(p.modalities * joint);
    d_attended_t = arena.take<R>(p.modalities * transposed);
    joint_t = arena.take<R>(transposed);
    d_joint_parts = arena.take<R>((shared ? correlation_blocks(p) : 1) * joint);
  }
};

template <class S, class E = Operand<S>, class H = Held<S>, class R = Compute<S>>
struct BackwardMemory {
  Split split;
  LayerWeights<R> weights[kMaxIterations];
  GateParameters<R> gates[kMaxModalities];
  R** parameters;  // where gradients are summed, in arithmetic type; null where none is asked for
  int64_t* start;
  Activations<E> activations;
  ChunkGradients<R> gradients;
  Transients<E> transients;  // of the first worker, with J, K and V; the others' follow `step` bytes later
  int64_t step;
  R* scratch;
  int64_t scratch_step;
  size_t bytes;

  void plan_lasting(const Problem& p, int64_t rows, Arena& arena) {
    activations.plan_lasting(p, rows, arena);
    gradients.plan(p, rows, activations.ld, arena);
  }
  int64_t plan_passing(const Problem& p, int64_t samples, bool shared, void* base) {
    Arena arena(base);
    activations.plan_passing(p, samples * p.length, arena);
    transients.plan(p, samples, shared, arena);
    const bool attends = !p.keeps(Keep::hidden) && !p.keeps(Keep::correlation);
    if (attends && p.length >= kHeldFrom)
      activations.correlation = arena.take<H>(samples * p.width() * activations.held_ld);
    return static_cast<int64_t>(arena.used());
  }

  // Elements of scratch for each thread.
  static int64_t scratch_size(const Problem& p) {
    int64_t rows = 0, most = larger(Iteration<E>::scratch_size(p), Sums<E>::scratch_size(p));
    for (int m = 0; m < p.modalities; ++m) rows = larger(rows, smaller(kCorrelationRows, p.widths[m]));
    // A task needs two prepared operands, two blocks of C in an operand's type, panels of C, d (K J) and that packed,
    // and K once more.
    most = larger(most, 2 * prepared_size<R>(rows, p.length) + 2 * rows * leading<R>(kCorrelationColumns) +
                            3 * rows * kPanel<R> + prepared_size<R>(kRowBlock, rows));
    for (int m = 0; m < p.modalities; ++m)
      most = larger(most, Frame<R>::scratch_size(p.widths[m], p.iterations) +
                              FrameGradient<R>::scratch_size(p.widths[m], p.iterations) + p.all_ways());
    return blocks(most, 64) * 64;
  }

  static BackwardMemory plan(const Problem& p, const Resources& resources) {
    BackwardMemory w{};
    w.activations = Activations<E>::of(p);
    Arena of_sample(nullptr);
    w.plan_lasting(p, p.length, of_sample);
    w.split =
        Split::plan(p, static_cast<int64_t>(of_sample.used()), w.plan_passing(p, 1, true, nullptr), resources.threads);
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
    w.plan_lasting(p, w.split.chunk * p.length, arena);
    const bool shared = w.split.threads_each > 1;
    w.step = blocks(w.plan_passing(p, w.split.unit, shared, nullptr), 64) * 64;
    w.plan_passing(p, w.split.unit, shared, arena.take<char>(w.step * w.split.workers));
    w.scratch_step = scratch_size(p);
    w.scratch = arena.take<R>(w.scratch_step * resources.threads);
    w.bytes = arena.used();
    return w;
  }

  template <class T>
  T* of_worker(T* piece, int worker) const {
    return beyond(piece, worker * step);
  }
  // The activations and transients of a unit that begins at `row` of the chunk.
  Activations<E> activations_of(int64_t row, int worker) const {
    Activations<E> a = activations;
    a.x += row * a.ld;
    if (a.hidden) a.hidden += row * a.hidden_ld;
    a.joint_panels = of_worker(a.joint_panels, worker);
    for (H** piece : {&a.joint, &a.key, &a.value, &a.correlation}) *piece = of_worker(*piece, worker);
    return a;
  }
  Transients<E> transients_of(int worker) const {
    Transients<E> own = transients;
    own.d_attended = of_worker(own.d_attended, worker);
    for (R** piece : {&own.d_attended_panels, &own.d_attended_t, &own.joint_t, &own.d_joint_parts})
      *piece = of_worker(*piece, worker);
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
