// The forward pass: for every unit of samples, all iterations and then the gates.
#include "gates.h"
#include "iteration.h"
#include "kernels.h"
#include "phases.h"

namespace grjca::GRJCA_ISA {
namespace {

template <class S, class R = Compute<S>>
struct Workspace {
  Split split;
  LayerWeights<R> weights[kMaxIterations];
  GateParameters<R> gates[kMaxModalities];
  int64_t* start;
  Activations<Operand<S>> activations;  // of the first worker; the others' follow `activations_step` bytes later
  int64_t activations_step;
  R* update;  // U, [rows, ld]; of the workers as the activations
  R* scratch;
  int64_t scratch_step;
  size_t bytes;

  static R* plan_unit(const Problem& p, int64_t rows, Activations<Operand<S>>& a, Arena& arena) {
    a.plan_lasting(p, rows, arena);
    a.plan_passing(p, rows, arena);
    return arena.take<R>(rows * a.ld);
  }

  static Workspace plan(const Problem& p, const Resources& resources) {
    Workspace w{};
    w.activations = Activations<Operand<S>>::of(p);
    Arena of_sample(nullptr);
    plan_unit(p, p.length, w.activations, of_sample);
    w.split = Split::plan(p, 0, static_cast<int64_t>(of_sample.used()), resources.threads);
    Arena arena(Arena::align(resources.workspace));
    for (int t = 0; t < p.layers(); ++t) w.weights[t] = LayerWeights<R>::plan(p, false, arena);
    for (int m = 0; m < p.modalities; ++m) w.gates[m] = GateParameters<R>::plan(p, m, arena);
    w.start = arena.take<int64_t>(p.batch + 1);
    Arena of_unit(nullptr);
    plan_unit(p, w.split.unit * p.length, w.activations, of_unit);
    w.activations_step = blocks(of_unit.used(), 64) * 64;
    Arena placed(arena.take<char>(w.activations_step * w.split.workers));
    w.update = plan_unit(p, w.split.unit * p.length, w.activations, placed);
    int64_t frame = 0;
    for (int m = 0; m < p.modalities; ++m)
      frame = larger(frame, Frame<R>::scratch_size(p.widths[m], p.iterations) + p.all_ways());
    w.scratch_step = blocks(larger(frame, Iteration<R>::scratch_size(p)), 64) * 64;
    w.scratch = arena.take<R>(w.scratch_step * resources.threads);
    w.bytes = arena.used();
    return w;
  }

  template <class T>
  T* of_worker(T* piece, int worker) const {
    return beyond(piece, worker * activations_step);
  }
  Activations<Operand<S>> of_worker(int worker) const {
    Activations<Operand<S>> a = activations;
    for (R** piece : {&a.x, &a.joint_panels}) *piece = of_worker(*piece, worker);
    for (Held<S>** piece : {&a.joint, &a.key, &a.value, &a.hidden}) *piece = of_worker(*piece, worker);
    return a;
  }
};

template <class S, class R = Compute<S>>
struct Forward {
  const Problem& p;
  const Tensors& tensors;
  const ForwardOutputs& outputs;
  const Samples& samples;
  const GateParameters<R>* gates;
  const Activations<Operand<S>>& a;
  int threads;
  R* scratch;
  int64_t scratch_step;

  const S* feature(int m, int64_t b, int64_t l) const {
    const View& x = tensors.features[m];
    return static_cast<const S*>(x.data) + (samples.first + b) * x.sample + l * x.frame;
  }

  S* iterate(int t, int64_t b, int64_t l) const {  // X^(t+1), all modalities
    return static_cast<S*>(tensors.iterates) + ((t * p.batch + samples.first + b) * p.length + l) * p.width();
  }

  void load_features() const {
    each_frame(p, samples, threads, [&](int64_t b, int64_t l, int64_t row, int) {
      if (row < 0) return;
      for (int m = 0; m < p.modalities; ++m)
        initial_row(p, a.x + row * a.ld + p.offset(m), feature(m, b, l), tensors.features[m].column, p.widths[m]);
    });
  }

  // X^(t+1) = X^t + U, rounded to the storage type, from which the next iteration goes on.
  void add_residual(const Iteration<Operand<S>>& iteration, R* update) const {
    R* const x = a.x;
    const int64_t ld = a.ld;
    iteration.each_output([&](int64_t at, int64_t lanes, Vector<R> factor, int64_t signs, int64_t k) {
      Vector<R> u = load_some<R>(update + at, lanes);
      if (a.signs) iteration.keep_signs(signs, lanes, k, u);
      if (p.released) u = relu<R>(u) * factor;
      store_some<R>(x + at, load_some<R>(x + at, lanes) + u, lanes);
    });
    each_frame(p, samples, threads, [&](int64_t b, int64_t l, int64_t row, int) {
      S* const to = iterate(iteration.t, b, l);
      if (row < 0) return clear_row(to, 1, p.width());
      store_row(to, 1, x + row * ld, p.width());
      if constexpr (sizeof(S) < sizeof(R)) load_row(x + row * ld, to, 1, p.width());
    });
  }

  void write_outputs() const {
    each_frame(p, samples, threads, [&](int64_t b, int64_t l, int64_t row, int thread) {
      for (int m = 0; m < p.modalities; ++m) write_output(m, b, l, row, scratch + thread * scratch_step);
    });
  }

  void write_output(int m, int64_t b, int64_t l, int64_t row, R* frame_scratch) const {
    const View &output = outputs.outputs[m], &values = outputs.gates[m];
    S* const y = static_cast<S*>(output.data) + (samples.first + b) * output.sample + l * output.frame;
    S* const g = static_cast<S*>(values.data) + (samples.first + b) * values.sample + l * values.frame;
    if (row < 0) {
      clear_row(y, output.column, p.widths[m]);
      if (values.data) clear_row(g, values.column, p.all_ways());
      return;
    }
    Frame<R> frame(p, gates[m], p.widths[m], frame_scratch);
    initial_row(p, frame.state[0], feature(m, b, l), tensors.features[m].column, p.widths[m]);
    for (int t = 0; t < p.iterations; ++t) load_row(frame.state[t + 1], iterate(t, b, l) + p.offset(m), 1, p.widths[m]);
    frame.forward();
    store_row(y, output.column, frame.y, p.widths[m]);
    if (!values.data) return;
    int64_t way = 0;
    for (int i = 0; i < p.gates(); way += p.ways(i++))
      store_row(g + way * values.column, values.column, frame.values[i], p.ways(i));
  }
};

template <class S>
void run(const Problem& p, const Tensors& tensors, const ForwardOutputs& outputs, const Resources& resources) {
  using R = Compute<S>;
  using P = cpu::Phase;
  auto w = Workspace<S>::plan(p, resources);
  cpu::timed(resources.times, P::pack, [&] {
    for (int t = 0; t < p.layers(); ++t) w.weights[t].template fill<S>(p, tensors.parameters, t, resources.threads);
    for (int m = 0; m < p.modalities; ++m) w.gates[m].template fill<S>(p, m, tensors.parameters);
  });
  const Samples all = Samples::all(p, tensors.lengths, w.start);
  parallel_for(w.split.workers, blocks(p.batch, w.split.unit), [&](int64_t unit, int worker) {
    const Samples samples = all.part(unit * w.split.unit, w.split.unit);
    Activations<Operand<S>> a = w.of_worker(worker);
    R* const update = w.of_worker(w.update, worker);
    R* const scratch = w.scratch + worker * w.scratch_step;
    const Forward<S> forward{p, tensors, outputs, samples, w.gates, a, w.split.threads_each, scratch, w.scratch_step};
    const auto in = [&](P phase, auto f) { cpu::timed(resources.times, phase, f); };
    in(P::load, [&] { forward.load_features(); });
    for (int t = 0; t < p.iterations; ++t) {
      a.place(p, SavedActivations<Operand<S>>::of(p, tensors.kept, t), samples.first, samples.start[0] - all.start[0]);
      const Iteration<Operand<S>> iteration{
          p, samples, w.weights[p.shared ? 0 : t], a, tensors.seed, t, w.split.threads_each, scratch, w.scratch_step};
      in(P::project_joint, [&] {
        iteration.project_joint();
        iteration.pack_joint();
      });
      in(P::project_key, [&] { iteration.project_key(); });
      in(P::project_value, [&] { iteration.project_value(); });
      in(P::attend, [&] { iteration.attend(); });
      in(P::output, [&] {
        iteration.project_output(update);
        forward.add_residual(iteration, update);
      });
    }
    in(P::gate, [&] { forward.write_outputs(); });
  });
}

}  // namespace

void forward(const Problem& p, const Tensors& tensors, const ForwardOutputs& outputs, const Resources& resources) {
#ifdef __AVX512BF16__  // built for bfloat16 alone
  return run<BFloat16>(p, tensors, outputs, resources);
#else
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
#endif
}

size_t kept_bytes(const Problem& p) {
  const int64_t of_iteration = p.dtype == Dtype::float64    ? SavedActivations<double>::bytes(p)
                               : p.dtype == Dtype::bfloat16 ? SavedActivations<Held<BFloat16>>::bytes(p)
                                                            : SavedActivations<float>::bytes(p);
  return p.keep ? p.iterations * of_iteration : 0;
}

size_t forward_workspace(const Problem& p, const Resources& resources) {
  Resources measuring = resources;
  measuring.workspace = nullptr;
  switch (p.dtype) {
    case Dtype::float32:
      return Workspace<float>::plan(p, measuring).bytes;
    case Dtype::float64:
      return Workspace<double>::plan(p, measuring).bytes;
    case Dtype::bfloat16:
      return Workspace<BFloat16>::plan(p, measuring).bytes;
    default:
      return Workspace<Float16>::plan(p, measuring).bytes;
  }
}

}  // namespace grjca::GRJCA_ISA
