// The backward pass: chunk by chunk, the gates, then the iterations in reverse, each recomputed from its saved X^t.
// d_x is the gradient of the loss with respect to x.
#include "iteration_backward.h"
#include "kernels.h"

namespace grjca::GRJCA_ISA {
namespace {

// A Backward works on some samples. It adds to the iterations all that is in the storage type S: it reads states and
// gradients, goes through the gates first, and writes the gradients of the features.
template <class S>
struct Backward : IterationBackward<Operand<S>> {
  using Base = IterationBackward<Operand<S>>;
  using R = Compute<S>;
  using Base::a, Base::chunk, Base::p, Base::samples, Base::thread_scratch, Base::threads, Base::times;

  const Tensors& tensors;
  const BackwardTensors& gradients;
  const GateParameters<R>* gates;

  Backward(const Base& base, const Tensors& t, const BackwardTensors& g, const GateParameters<R>* parameters)
      : Base(base), tensors(t), gradients(g), gates(parameters) {}

  template <class T>
  T* frame_of(const View& view, int64_t b, int64_t l) const {
    return view.data ? static_cast<T*>(view.data) + (samples.first + b) * view.sample + l * view.frame : nullptr;
  }

  // One modality of X^t at a frame, t from 0. Returns the norm that X^0 was divided by.
  R load_state(R* to, int t, int m, int64_t b, int64_t l) const {
    if (t == 0)
      return initial_row(p, to, frame_of<const S>(tensors.features[m], b, l), tensors.features[m].column, p.widths[m]);
    const int64_t frame = ((t - 1) * p.batch + samples.first + b) * p.length + l;
    load_row(to, static_cast<const S*>(tensors.iterates) + frame * p.width() + p.offset(m), 1, p.widths[m]);
    return 1;
  }

  void load_states(int t) const {
    each_frame(p, samples, threads, [&](int64_t b, int64_t l, int64_t row, int) {
      if (row < 0) return;
      for (int m = 0; m < p.modalities; ++m) load_state(a.x + row * a.ld + p.offset(m), t, m, b, l);
    });
  }

  // ---- gates

  void gates_backward() const {
    const cpu::Timed timed(times, cpu::Phase::gates_backward);
    each_frame(p, samples, threads, [&](int64_t b, int64_t l, int64_t row, int thread) {
      if (row < 0) return;
      for (int m = 0; m < p.modalities; ++m) frame_backward(m, b, l, row, thread_scratch(thread));
    });
    if (p.gates()) load_states(p.iterations);  // for the gradients of their weights
  }

  void frame_backward(int m, int64_t b, int64_t l, int64_t row, R* space) const {
    const int64_t n = p.widths[m];
    Frame<R> frame(p, gates[m], n, space);
    space += Frame<R>::scratch_size(n, p.iterations);
    for (int t = 0; t <= p.iterations; ++t) load_state(frame.state[t], t, m, b, l);
    frame.forward();
    FrameGradient<R> gradient(frame, space);
    R* const d_values = space + FrameGradient<R>::scratch_size(n, p.iterations);
    if (const S* d_y = frame_of<const S>(gradients.outputs[m], b, l))
      load_row(gradient.d_y, d_y, gradients.outputs[m].column, n);
    const S* const d_gates = frame_of<const S>(gradients.gates[m], b, l);
    if (d_gates) load_row(d_values, d_gates, gradients.gates[m].column, p.all_ways());
    for (int t = 1; t <= p.iterations; ++t) {
      const View& view = gradients.iterates[m];
      if (!view.data) break;
      const S* const from = frame_of<const S>(view, b, l) + (t - 1) * gradients.iterates_step[m];
      for (int64_t i = 0; i < n; ++i) gradient.d_state[t][i] = widen(from[i * view.column]);
    }
    gradient.backward(d_gates ? d_values : nullptr, chunk.d_logits + (row * p.modalities + m) * p.all_ways());
    for (int t = 0; t <= p.iterations; ++t)
      std::memcpy(chunk.d_state[t] + row * a.ld + p.offset(m), gradient.d_state[t], n * sizeof(R));
  }

  void iteration_backward(int t) const {
    cpu::timed(times, cpu::Phase::load, [&] { load_states(t); });
    Base::run(t);
  }

  // ---- results

  void write_features() const {
    each_frame(p, samples, threads, [&](int64_t b, int64_t l, int64_t row, int thread) {
      for (int m = 0; m < p.modalities; ++m) {
        const View& view = gradients.features[m];
        S* const to = frame_of<S>(view, b, l);
        if (!to) continue;
        if (row < 0)
          clear_row(to, view.column, p.widths[m]);
        else
          write_feature(to, view.column, m, b, l, chunk.d_state[0] + row * a.ld + p.offset(m), thread_scratch(thread));
      }
    });
  }

  // Through x / max(|x|, eps): the part along x is taken out, except where eps was the larger.
  void write_feature(S* to, int64_t step, int m, int64_t b, int64_t l, R* d_x, R* x) const {
    const int64_t n = p.widths[m];
    if (p.normalize) {
      const R length = load_state(x, 0, m, b, l);
      if (length > static_cast<R>(kSmallestNorm) || length != length) add_scaled(d_x, -dot(d_x, x, n), x, n);
      for (int64_t i = 0; i < n; ++i) d_x[i] /= length;
    }
    store_row(to, step, d_x, n);
  }
};

// Adds the gradients of iteration t's weights, where t < T, and of the gates computed from X^t.
template <class S, class R = Compute<S>>
void add_sums(const Problem& p, const BackwardMemory<S>& w, const Activations<Operand<S>>& a, const Samples& chunk,
              int t, int threads) {
  const ParameterIndex index{p};
  const ChunkGradients<R>& g = w.gradients;
  const int64_t d = p.width();
  Sums<Operand<S>> sums(p, chunk);
  const auto to = [&](int i) { return w.parameters[i]; };
  const auto bias = [&](int i) { return p.released ? w.parameters[i + 1] : nullptr; };
  // Large tasks come first, so that no thread is left alone with one.
  if (t < p.iterations) {
    const int query = index.query(t);
    if (p.projected) sums.linear(to(query), bias(query), d, d, {g.d_joint, 1, a.ld}, a.x, a.ld);
    for (int m = 0; m < p.modalities; ++m) {
      const int output = index.output(t, m);
      sums.linear(to(output), bias(output), p.widths[m], d, {g.d_update + p.offset(m), 1, a.ld}, a.hidden + m * d,
                  a.hidden_ld);
    }
    for (int m = 0; m < p.modalities; ++m) {
      const int value = index.value(t, m);
      sums.linear(to(value), bias(value), p.widths[m], p.widths[m],
                  {g.d_value_t + p.offset(m) * g.frames_ld, g.frames_ld, 1}, a.x + p.offset(m), a.ld);
    }
    for (int m = 0; m < p.modalities; ++m) {
      const int key = index.key(t, m);
      sums.key(to(key), bias(key), p.widths[m], g.d_key_t + p.offset(m) * g.frames_ld, g.frames_ld, a.x + p.offset(m),
               a.ld, Iteration<Operand<S>>::key_scale(p));
    }
  }
  for (int m = 0; m < p.modalities; ++m) {
    int64_t way = m * p.all_ways();
    for (int k = 0; k < p.gates(); way += p.ways(k++)) {
      const int input = p.gating == Gating::hierarchical && k < p.iterations ? k + 1 : p.iterations;
      const int i = index.gate(m, k);
      if (input == t)
        sums.linear(to(i), bias(i), p.ways(k), p.widths[m], {g.d_logits + way, 1, p.modalities * p.all_ways()},
                    a.x + p.offset(m), a.ld);
    }
  }
  sums.run(threads, w.scratch, w.scratch_step);
}

// Several threads clear a sum before anything is added: it is new memory, whose pages the system has to clear first.
template <class R>
struct Cleared {
  static constexpr int64_t kSize = 1 << 14;
  R* to;
  int64_t size;

  void clear(int64_t task) const { std::memset(to + task * kSize, 0, smaller(kSize, size - task * kSize) * sizeof(R)); }
};

template <class S>
void run(const Problem& p, const Tensors& tensors, const BackwardTensors& gradients, const Resources& resources) {
  using R = Compute<S>;
  using E = Operand<S>;
  using Memory = BackwardMemory<S>;
  auto w = Memory::plan(p, resources);
  const int threads = resources.threads;
  {
    const cpu::Timed timed(resources.times, cpu::Phase::pack);
    for (int t = 0; t < p.layers(); ++t) w.weights[t].template fill<S>(p, tensors.parameters, t, threads);
    for (int m = 0; m < p.modalities; ++m) w.gates[m].template fill<S>(p, m, tensors.parameters);
    TaskList<Cleared<R>, ParameterIndex::kMost> sums;
    Memory::each_parameter(p, [&](int i, int64_t size) {
      if (sizeof(S) == sizeof(R) || !gradients.parameters[i])
        w.parameters[i] = static_cast<R*>(gradients.parameters[i]);
      if (w.parameters[i]) sums.add({w.parameters[i], size}, blocks(size, Cleared<R>::kSize));
    });
    sums.run(threads, [](const Cleared<R>& of, int64_t task, int) { of.clear(task); });
  }
  const Samples all = Samples::all(p, tensors.lengths, w.start);
  for (int64_t first = 0; first < p.batch; first += w.split.chunk) {
    const Samples chunk = all.part(first, w.split.chunk);
    for (int t = p.iterations; t >= 0; --t) {
      const auto kept = SavedActivations<E>::of(p, t < p.iterations ? tensors.kept : nullptr, t);
      parallel_for(w.split.workers, blocks(chunk.count, w.split.unit), [&](int64_t unit, int worker) {
        const int64_t begin = unit * w.split.unit, row = chunk.row(begin);
        const Samples samples = chunk.part(begin, w.split.unit);
        Activations<E> a = w.activations_of(row, worker);
        a.place(p, kept, samples.first, samples.start[0]);
        const ChunkGradients<R> of_unit = w.gradients.from_row(p, row, a.ld);
        const Transients<E> transients = w.transients_of(worker);
        R* const scratch = w.scratch + worker * w.scratch_step;
        const IterationBackward<E> iterations{p,       samples,        w.weights,      a,
                                              of_unit, transients,     tensors.seed,   w.split.threads_each,
                                              scratch, w.scratch_step, resources.times};
        const Backward<S> backward(iterations, tensors, gradients, w.gates);
        if (t == p.iterations) return backward.gates_backward();
        backward.iteration_backward(t);
        if (t == 0) backward.write_features();
      });
      const cpu::Timed timed(resources.times, cpu::Phase::sum_weights);
      Activations<E> a = w.activations;
      a.place(p, kept, first, chunk.start[0]);
      add_sums<S>(p, w, a, chunk, t, threads);
    }
  }
  Memory::each_parameter(p, [&](int i, int64_t size) {
    if (sizeof(S) < sizeof(R) && w.parameters[i])
      store_row(static_cast<S*>(gradients.parameters[i]), 1, w.parameters[i], size);
  });
}

}  // namespace

void backward(const Problem& p, const Tensors& tensors, const BackwardTensors& gradients, const Resources& resources) {
#ifdef __AVX512BF16__  // built for bfloat16 alone
  return run<BFloat16>(p, tensors, gradients, resources);
#else
  switch (p.dtype) {
    case Dtype::float32:
      return run<float>(p, tensors, gradients, resources);
    case Dtype::float64:
      return run<double>(p, tensors, gradients, resources);
    case Dtype::bfloat16:
      return run<BFloat16>(p, tensors, gradients, resources);
    case Dtype::float16:
      return run<Float16>(p, tensors, gradients, resources);
  }
#endif
}

size_t backward_workspace(const Problem& p, const Resources& resources) {
  Resources measuring = resources;
  measuring.workspace = nullptr;
  switch (p.dtype) {
    case Dtype::float32:
      return BackwardMemory<float>::plan(p, measuring).bytes;
    case Dtype::float64:
      return BackwardMemory<double>::plan(p, measuring).bytes;
    case Dtype::bfloat16:
      return BackwardMemory<BFloat16>::plan(p, measuring).bytes;
    default:
      return BackwardMemory<Float16>::plan(p, measuring).bytes;
  }
}

}  // namespace grjca::GRJCA_ISA
