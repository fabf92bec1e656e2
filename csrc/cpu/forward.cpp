// The forward pass: chunk by chunk, all iterations, then the gates.
#include "kernels.h"

#include "gates.h"
#include "iteration.h"

namespace grjca::GRJCA_ISA {
namespace {

template <class R>
struct Workspace {
  int64_t samples;  // of a chunk
  PackedLayer<R> weights[kMaxIterations];
  GateParameters<R> gates[kMaxModalities];
  Chunk chunk;
  Activations<R> activations;
  R* scratch;
  int64_t scratch_step;
  size_t bytes;

  static constexpr int64_t kBudget = 24 << 20;

  static Workspace plan(const Problem& p, const Resources& resources) {
    Workspace w{};
    Arena sizing(nullptr);
    Activations<R>::plan(p, p.length, sizing);
    w.samples = samples_per_chunk(p.batch, static_cast<int64_t>(sizing.used()), kBudget);
    Arena arena(Arena::align(resources.workspace));
    for (int t = 0; t < p.layers(); ++t) w.weights[t] = PackedLayer<R>::plan(p, arena);
    for (int m = 0; m < p.modalities; ++m) w.gates[m] = GateParameters<R>::plan(p, m, arena);
    w.chunk.start = arena.take<int64_t>(w.samples + 1);
    w.activations = Activations<R>::plan(p, w.samples * p.length, arena);
    int64_t frame = 0;
    for (int m = 0; m < p.modalities; ++m)
      frame = larger(frame, Frame<R>::scratch_size(p.widths[m], p.iterations) + p.all_ways());
    w.scratch_step = blocks(larger(frame, Iteration<R>::scratch_size(p)), 64) * 64;
    w.scratch = arena.take<R>(w.scratch_step * resources.threads);
    w.bytes = arena.used();
    return w;
  }
};

template <class S, class R = Compute<S>>
struct Forward {
  const Problem& p;
  const Tensors& tensors;
  const ForwardOutputs& outputs;
  int threads;
  const Workspace<R>& w;
  const Chunk& chunk;

  // f(sample, frame, row or -1 where the frame is absent, thread)
  template <class F>
  void each_frame(F f) const {
    const int64_t groups = blocks(p.length, kFrames);
    parallel_for(threads, chunk.samples * groups, [&](int64_t task, int thread) {
      const int64_t b = task / groups, begin = task % groups * kFrames;
      for (int64_t l = begin; l < smaller(begin + kFrames, p.length); ++l)
        f(b, l, l < chunk.frames(b) ? chunk.start[b] + l : -1, thread);
    });
  }

  const S* feature(int m, int64_t b, int64_t l) const {
    const View& x = tensors.features[m];
    return static_cast<const S*>(x.data) + (chunk.first + b) * x.sample + l * x.frame;
  }

  S* iterate(int t, int64_t b, int64_t l) const {  // X^(t+1), all modalities
    return static_cast<S*>(tensors.iterates) + ((t * p.batch + chunk.first + b) * p.length + l) * p.width();
  }

  void load_features() const {
    each_frame([&](int64_t b, int64_t l, int64_t row, int) {
      if (row < 0) return;
      for (int m = 0; m < p.modalities; ++m)
        initial_row(p, w.activations.x + row * w.activations.ld + p.offset(m), feature(m, b, l),
                    tensors.features[m].column, p.widths[m]);
    });
  }

  // X^(t+1) = X^t + U, rounded to the storage type, from which the next iteration goes on.
  void add_residual(const Iteration<R>& iteration, R* update) const {
    R* const x = w.activations.x;
    const int64_t ld = w.activations.ld;
    iteration.each_output([&](int64_t at, int64_t lanes, Vector<R> factor) {
      Vector<R> u = load_some<R>(update + at, lanes);
      if (p.released) u = relu<R>(u) * factor;
      store_some<R>(x + at, load_some<R>(x + at, lanes) + u, lanes);
    });
    each_frame([&](int64_t b, int64_t l, int64_t row, int) {
      S* const to = iterate(iteration.t, b, l);
      if (row < 0) return clear_row(to, 1, p.width());
      store_row(to, 1, x + row * ld, p.width());
      if constexpr (sizeof(S) < sizeof(R)) load_row(x + row * ld, to, 1, p.width());
    });
  }

  void write_outputs() const {
    each_frame([&](int64_t b, int64_t l, int64_t row, int thread) {
      for (int m = 0; m < p.modalities; ++m) write_output(m, b, l, row, w.scratch + thread * w.scratch_step);
    });
  }

  void write_output(int m, int64_t b, int64_t l, int64_t row, R* scratch) const {
    const View &output = outputs.outputs[m], &gates = outputs.gates[m];
    S* const y = static_cast<S*>(output.data) + (chunk.first + b) * output.sample + l * output.frame;
    S* const g = static_cast<S*>(gates.data) + (chunk.first + b) * gates.sample + l * gates.frame;
    if (row < 0) {
      clear_row(y, output.column, p.widths[m]);
      if (gates.data) clear_row(g, gates.column, p.all_ways());
      return;
    }
    Frame<R> frame(p, w.gates[m], p.widths[m], scratch);
    initial_row(p, frame.state[0], feature(m, b, l), tensors.features[m].column, p.widths[m]);
    for (int t = 0; t < p.iterations; ++t)
      load_row(frame.state[t + 1], iterate(t, b, l) + p.offset(m), 1, p.widths[m]);
    frame.forward();
    store_row(y, output.column, frame.y, p.widths[m]);
    if (!gates.data) return;
    int64_t way = 0;
    for (int i = 0; i < p.gates(); way += p.ways(i++))
      store_row(g + way * gates.column, gates.column, frame.values[i], p.ways(i));
  }
};

template <class S>
void run(const Problem& p, const Tensors& tensors, const ForwardOutputs& outputs, const Resources& resources) {
  using R = Compute<S>;
  auto w = Workspace<R>::plan(p, resources);
  for (int t = 0; t < p.layers(); ++t) w.weights[t].template fill<S>(p, tensors.parameters, t, resources.threads);
  for (int m = 0; m < p.modalities; ++m) w.gates[m].template fill<S>(p, m, tensors.parameters);
  Chunk& chunk = w.chunk;
  for (chunk.first = 0; chunk.first < p.batch; chunk.first += w.samples) {
    chunk.samples = smaller(w.samples, p.batch - chunk.first);
    chunk.place(p, tensors.lengths);
    const Forward<S> forward{p, tensors, outputs, resources.threads, w, chunk};
    forward.load_features();
    for (int t = 0; t < p.iterations; ++t) {
      const Iteration<R> iteration{p,     chunk,        w.weights[p.shared ? 0 : t], w.activations, tensors.seed, t,
                                   resources.threads, w.scratch,    w.scratch_step};
      iteration.project_joint();
      iteration.mix_time();
      iteration.project_value();
      iteration.attend();
      R* const update = w.activations.value;  // V is not needed any more
      iteration.project_output(update);
      forward.add_residual(iteration, update);
    }
    forward.write_outputs();
  }
}

}  // namespace

void forward(const Problem& p, const Tensors& tensors, const ForwardOutputs& outputs, const Resources& resources) {
  switch (p.dtype) {
    case Dtype::float32:
      return run<float>(p, tensors, outputs, resources);
    case Dtype::float64:
      return run<double>(p, tensors, outputs, resources);
    case Dtype::bfloat16:
      return run<BFloat16>(p, tensors, outputs, resources);
    case Dtype::float16:
      return run<Float16>(p, tensors, outputs, resources);
  }
}

size_t forward_workspace(const Problem& p, const Resources& resources) {
  Resources measuring = resources;
  measuring.workspace = nullptr;
  return p.dtype == Dtype::float64 ? Workspace<double>::plan(p, measuring).bytes
                                   : Workspace<float>::plan(p, measuring).bytes;
}

}  // namespace grjca::GRJCA_ISA
