// The backward pass: chunk by chunk, the gates, then the iterations in reverse, each recomputed from its saved X^t.
// A name d_x is the gradient of the loss by x.
#include "backward_memory.h"
#include "iteration.h"
#include "kernels.h"
#include "sums.h"

namespace grjca::GRJCA_ISA {
namespace {

// The work on some samples: all equations of an iteration in reverse, up to the sums over the batch.
template <class S, class E = Operand<S>, class R = Compute<S>>
struct Backward {
  const Problem& p;
  const Tensors& tensors;
  const BackwardTensors& gradients;
  const Samples& samples;
  const LayerWeights<R>* weights;
  const GateParameters<R>* gates;
  const Activations<R>& a;
  const Kept<R>& kept;
  const Passing<R>& passing;
  int threads;
  R* scratch;
  int64_t scratch_step;

  R* thread_scratch(int thread) const { return scratch + thread * scratch_step; }
  const LayerWeights<R>& layer(int t) const { return weights[p.shared ? 0 : t]; }
  Iteration<E> iteration(int t) const {
    return {p, samples, layer(t), a, tensors.seed, t, threads, scratch, scratch_step};
  }

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
    gradient.backward(d_gates ? d_values : nullptr, kept.d_logits + (row * p.modalities + m) * p.all_ways());
    for (int t = 0; t <= p.iterations; ++t)
      std::memcpy(kept.d_state[t] + row * a.ld + p.offset(m), gradient.d_state[t], n * sizeof(R));
  }

  // ---- one iteration

  void iteration_backward(int t) const {
    const Iteration<E> forward = iteration(t);
    load_states(t);
    forward.project_joint();
    transpose_joint(forward);
    forward.pack_joint();
    forward.project_key();
    forward.project_value();
    forward.attend();
    output_backward(forward);
    attended_backward(t);
    correlation_backward(forward);
    each_frame(p, samples, threads, [&](int64_t, int64_t, int64_t row, int) {  // the residual
      if (row >= 0) add_scaled(kept.d_state[t] + row * a.ld, R(1), kept.d_state[t + 1] + row * a.ld, p.width());
    });
    value_backward(t);
    key_backward(forward);
    joint_backward(t);
  }

  // d_update = d X^(t+1) through dropout and relu.
  void output_backward(const Iteration<E>& iteration) const {
    R* const d_update = kept.d_update;
    const R* const d_next = kept.d_state[iteration.t + 1];
    if (p.released) iteration.project_output(d_update);
    iteration.each_output([&](int64_t at, int64_t lanes, Vector<R> factor) {
      Vector<R> d = load_some<R>(d_next + at, lanes);
      if (p.released) d = load_some<R>(d_update + at, lanes) <= 0 ? Vector<R>{} : d * factor;
      store_some<R>(d_update + at, d, lanes);
    });
  }

  R* d_attended_panel(int m, int64_t q) const {
    return passing.d_attended + (m * panels<R>(p.width()) + q) * samples.rows() * kPanel<R>;
  }
  int64_t transposed_step() const { return panels<R>(p.length) * p.width() * kPanel<R>; }  // from sample to sample
  R* d_attended_t(int m, int64_t b) const { return passing.d_attended_t + (m * samples.count + b) * transposed_step(); }
  R* joint_t(int64_t b) const { return passing.joint_t + b * transposed_step(); }

  // d (V C) = d H through relu and tanh, as panels and as transposed panels.
  void attended_backward(int t) const {
    const int64_t d = p.width(), rows = samples.rows(), all = panels<R>(d);
    for (int m = 0; m < p.modalities; ++m) {
      R* const to = d_attended_panel(m, 0);
      const R* const hidden = a.hidden + m * d;
      project<E>(threads, rows, p.widths[m], {kept.d_update + p.offset(m), a.ld, 1}, layer(t).output_back[m], d,
                 [=](int64_t r, int64_t c, Vector<R> v) {
                   const Vector<R> h = load_some<R>(hidden + r * a.hidden_ld + c, d - c);
                   if (p.released) v *= 1 - h * h;
                   store(to + (c / kPanel<R> * rows + r) * kPanel<R> + c % kPanel<R>, h <= 0 ? Vector<R>{} : v);
                 });
    }
    parallel_for(threads, samples.count * p.modalities * all, [&](int64_t task, int) {
      const int64_t b = task / all / p.modalities, q = task % all;
      const int m = static_cast<int>(task / all % p.modalities);
      R* const panel = d_attended_panel(m, q) + samples.row(b) * kPanel<R>;
      transpose_panel(d_attended_t(m, b), panel, q, samples.frames(b));
      pack<E>(panel, panel, samples.frames(b));
    });
  }

  void transpose_joint(const Iteration<E>& iteration) const {
    const int64_t all = panels<R>(p.width());
    parallel_for(threads, samples.count * all, [&](int64_t task, int) {
      const int64_t b = task / all, q = task % all;
      transpose_panel(joint_t(b), iteration.joint_panel(q, b), q, samples.frames(b));
    });
  }

  // Panel q [frames][kPanel] of a matrix [frames, d] to its place in the panels [panel of frames][d][kPanel] of the
  // transposed matrix.
  void transpose_panel(R* to, const R* from, int64_t q, int64_t frames) const {
    const int64_t d = p.width(), columns = smaller(kPanel<R>, d - q * kPanel<R>);
    for (int64_t l = 0; l < frames; l += kPanel<R>)
      pack_columns<E>(to + l * d + place_of<E>(q * kPanel<R>), from + l * kPanel<R>, kPanel<R>, columns, frames - l);
  }

  // From d (V C): d V and d K (transposed) and, in parts, d J, block by block of C.
  void correlation_backward(const Iteration<E>& iteration) const {
    const int64_t all = Passing<R>::correlation_blocks(p);
    parallel_for(threads, samples.count * all, [&](int64_t task, int thread) {
      int64_t i = task % all;
      int m = 0;
      while (i >= blocks(p.widths[m], kCorrelationRows)) i -= blocks(p.widths[m++], kCorrelationRows);
      R* const d_joint_part = passing.d_joint_parts + task % all * panels<R>(p.width()) * samples.rows() * kPanel<R>;
      correlation_block(iteration, task / all, m, i * kCorrelationRows, d_joint_part, thread_scratch(thread));
    });
  }

  // Rows [i, i + kCorrelationRows) of C_m of sample b.
  void correlation_block(const Iteration<E>& iteration, int64_t b, int m, int64_t i, R* d_joint_part,
                         R* scratch) const {
    constexpr int64_t kPanels = kCorrelationColumns / kPanel<R>;
    const int64_t d = p.width(), n = samples.frames(b), start = samples.row(b), rows_of_chunk = samples.rows();
    const int64_t rows = smaller(kCorrelationRows, p.widths[m] - i), ld = a.ld;
    const int64_t place = start * ld + p.offset(m) + i, block = rows * kPanel<R>;
    const int64_t transposed = (p.offset(m) + i) * kept.frames_ld + start;
    R* const correlations = scratch;                              // drop(tanh(K J)), [panel][row][kPanel]
    R* const d_scores = scratch + correlation_size<R>(p);         // d (K J), the same
    R packed[kPaired<E> ? kCorrelationRows * kPanel<R> / 2 : 1];  // a panel of that
    for (int64_t first = 0; first < panels<R>(d); first += kPanels) {
      const int64_t count = smaller(kPanels, panels<R>(d) - first);
      for (int64_t q = first; q < first + count; ++q) {
        const int64_t columns = smaller(kPanel<R>, d - q * kPanel<R>);
        R* const correlation = correlations + (q - first) * block;
        R* const d_score = d_scores + (q - first) * block;
        const R* const tanhs = a.correlation ? iteration.kept_correlation(b, m, q) + i * kPanel<R> : correlation;
        if (!a.correlation) iteration.correlate(b, m, q, i, rows, correlation);
        iteration.drop_correlation(b, m, q, i, rows, tanhs, correlation, d_score);
        product<E>(rows, columns, {a.value + place, 1, ld}, d_attended_panel(m, q) + start * kPanel<R>, n,
                   [=](int64_t r, int64_t c, Vector<R> v) {
                     R* const at = d_score + r * kPanel<R> + c;
                     store(at, load(at) * v);
                   });
        R* const d_joint = d_joint_part + (q * rows_of_chunk + start) * kPanel<R>;
        R* const panel = kPaired<E> ? packed : d_score;
        pack<E>(panel, d_score, rows);
        product<E>(n, columns, {a.key + place, ld, 1}, panel, rows,
                   [=](int64_t l, int64_t c, Vector<R> v) { store(d_joint + l * kPanel<R> + c, v); });
      }
      const int64_t column = first * kPanel<R>, terms = smaller(kCorrelationColumns, d - column);
      for (int64_t l = 0; l < n; l += kPanel<R>) {
        const int64_t at = l * d + place_of<E>(column);
        accumulate(kept.d_value_t + transposed + l, rows, n - l, correlations, block, d_attended_t(m, b) + at, terms,
                   first > 0);
        accumulate(kept.d_key_t + transposed + l, rows, n - l, d_scores, block, joint_t(b) + at, terms, first > 0);
      }
    }
  }

  // to [rows, frames] (+)= A B, A in panels of columns `split` apart, B a panel [terms][kPanel].
  void accumulate(R* to, int64_t rows, int64_t frames, const R* a, int64_t split, const R* b, int64_t terms,
                  bool add_to) const {
    const int64_t ld = kept.frames_ld, whole = terms / kPanel<R>;
    const auto keep = [=](int64_t r, int64_t c, Vector<R> v) {
      if (add_to)
        add<R>(to + r * ld + c, v, frames - c);
      else
        store_some<R>(to + r * ld + c, v, frames - c);
    };
    if (whole) product<E>(rows, frames, {a, kPanel<R>, 1, split}, b, kPanel<R>, keep, whole);
    if (terms % kPanel<R> == 0) return;
    const auto add_rest = [=](int64_t r, int64_t c, Vector<R> v) { add<R>(to + r * ld + c, v, frames - c); };
    const Left<R> rest{a + whole * split, kPanel<R>, 1};
    const R* const b_rest = b + place_of<E>(whole * kPanel<R>);
    if (whole)
      product<E>(rows, frames, rest, b_rest, terms % kPanel<R>, add_rest);
    else
      product<E>(rows, frames, rest, b_rest, terms % kPanel<R>, keep);
  }

  // d X += d V W_v.
  void value_backward(int t) const {
    for (int m = 0; m < p.modalities; ++m) {
      const int64_t d_m = p.widths[m], ld = a.ld;
      R* const d_x = kept.d_state[t] + p.offset(m);
      project<E>(threads, samples.rows(), d_m, {kept.d_value_t + p.offset(m) * kept.frames_ld, 1, kept.frames_ld},
                 layer(t).value_back[m], d_m,
                 [=](int64_t r, int64_t c, Vector<R> v) { add<R>(d_x + r * ld + c, v, d_m - c); });
    }
  }

  // d X += (d K W_k)^T. K was divided by sqrt(d).
  void key_backward(const Iteration<E>& forward) const {
    const R scale = Iteration<R>::key_scale(p);
    const int64_t ld = a.ld, frames_ld = kept.frames_ld;
    forward.each_modality_panel([&](int64_t b, int m, int64_t column, int64_t columns, int thread) {
      const int64_t n = samples.frames(b), row = p.offset(m) + column;
      R* const panel = thread_scratch(thread);
      pack_columns<E>(panel, kept.d_key_t + row * frames_ld + samples.row(b), frames_ld, n, columns);
      R* const d_x = kept.d_state[forward.t] + samples.row(b) * ld + row;
      product<E>(n, columns, {forward.weights.key[m], 1, p.length}, panel, n,
                 [=](int64_t l, int64_t c, Vector<R> v) { add<R>(d_x + l * ld + c, v * scale, columns - c); });
    });
  }

  // d J = the sum of its parts; d X += d J W_q.
  void joint_backward(int t) const {
    const int64_t d = p.width(), rows = samples.rows(), ld = a.ld, step = panels<R>(d) * rows * kPanel<R>;
    R* const d_x = kept.d_state[t];
    R* const d_joint = p.projected ? kept.d_joint : d_x;
    parallel_for(threads, panels<R>(d) * blocks(rows, kRowBlock), [&](int64_t task, int) {
      const int64_t q = task % panels<R>(d), first = task / panels<R>(d) * kRowBlock;
      for (int64_t r = first; r < smaller(first + kRowBlock, rows); ++r)
        for (int64_t c = 0; c < smaller(kPanel<R>, d - q * kPanel<R>); c += kLanes<R>) {
          const R* const part = passing.d_joint_parts + (q * rows + r) * kPanel<R> + c;
          R* const at = d_joint + r * ld + q * kPanel<R> + c;
          const int64_t lanes = d - q * kPanel<R> - c;
          Vector<R> total = p.projected ? Vector<R>{} : load_some<R>(at, lanes);
          for (int64_t i = 0; i < Passing<R>::correlation_blocks(p); ++i) total += load(part + i * step);
          store_some<R>(at, total, lanes);
        }
    });
    if (!p.projected) return;
    project<E>(threads, rows, d, {d_joint, ld, 1}, layer(t).query_back, d,
               [=](int64_t r, int64_t c, Vector<R> v) { add<R>(d_x + r * ld + c, v, d - c); });
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
          write_feature(to, view.column, m, b, l, kept.d_state[0] + row * a.ld + p.offset(m), thread_scratch(thread));
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
template <class E, class R = Compute<E>>
void add_sums(const Problem& p, const BackwardMemory<R>& w, const Samples& chunk, int t, R scale, int threads) {
  const ParameterIndex index{p};
  const Activations<R>& a = w.activations;
  const Kept<R>& kept = w.kept;
  const int64_t d = p.width();
  Sums<E> sums(p, chunk);
  const auto to = [&](int i) { return w.parameters[i]; };
  const auto bias = [&](int i) { return p.released ? w.parameters[i + 1] : nullptr; };
  for (int m = 0; m < p.modalities; ++m) {
    const int64_t offset = p.offset(m), d_m = p.widths[m], ways = p.modalities * p.all_ways();
    int way = m * p.all_ways();
    for (int g = 0; g < p.gates(); way += p.ways(g++)) {
      const int input = p.gating == Gating::hierarchical && g < p.iterations ? g + 1 : p.iterations;
      const int i = index.gate(m, g);
      if (input == t) sums.linear(to(i), bias(i), p.ways(g), d_m, kept.d_logits + way, ways, false, a.x + offset, a.ld);
    }
    if (t == p.iterations) continue;
    const int value = index.value(t, m), output = index.output(t, m), key = index.key(t, m);
    sums.linear(to(output), bias(output), d_m, d, kept.d_update + offset, a.ld, false, a.hidden + m * d, a.hidden_ld);
    sums.linear(to(value), bias(value), d_m, d_m, kept.d_value_t + offset * kept.frames_ld, kept.frames_ld, true,
                a.x + offset, a.ld);
    sums.key(to(key), bias(key), d_m, kept.d_key_t + offset * kept.frames_ld, kept.frames_ld, a.x + offset, a.ld,
             scale);
  }
  const int query = index.query(t);
  if (p.projected && t < p.iterations) sums.linear(to(query), bias(query), d, d, kept.d_joint, a.ld, false, a.x, a.ld);
  sums.run(threads, w.scratch, w.scratch_step);
}

template <class S>
void run(const Problem& p, const Tensors& tensors, const BackwardTensors& gradients, const Resources& resources) {
  using R = Compute<S>;
  auto w = BackwardMemory<R>::template plan<S>(p, resources);
  const int threads = resources.threads;
  for (int t = 0; t < p.layers(); ++t) w.weights[t].template fill<S>(p, tensors.parameters, t, threads);
  for (int m = 0; m < p.modalities; ++m) w.gates[m].template fill<S>(p, m, tensors.parameters);
  BackwardMemory<R>::each_parameter(p, [&](int i, int64_t size) {
    if (sizeof(S) == sizeof(R) || !gradients.parameters[i]) w.parameters[i] = static_cast<R*>(gradients.parameters[i]);
    if (w.parameters[i]) std::memset(w.parameters[i], 0, size * sizeof(R));
  });
  const Samples all = Samples::all(p, tensors.lengths, w.start);
  for (int64_t first = 0; first < p.batch; first += w.split.chunk) {
    const Samples chunk = all.part(first, w.split.chunk);
    for (int t = p.iterations; t >= 0; --t) {
      parallel_for(w.split.workers, blocks(chunk.count, w.split.unit), [&](int64_t unit, int worker) {
        const int64_t begin = unit * w.split.unit, row = chunk.row(begin);
        const Samples samples = chunk.part(begin, w.split.unit);
        const Activations<R> a = w.activations_of(row, worker);
        const Kept<R> kept = w.kept.from_row(p, row, a.ld);
        const Passing<R> passing = w.passing_of(worker);
        const Backward<S> backward{p,
                                   tensors,
                                   gradients,
                                   samples,
                                   w.weights,
                                   w.gates,
                                   a,
                                   kept,
                                   passing,
                                   w.split.threads_each,
                                   w.scratch + worker * w.scratch_step,
                                   w.scratch_step};
        if (t == p.iterations) return backward.gates_backward();
        backward.iteration_backward(t);
        if (t == 0) backward.write_features();
      });
      add_sums<Operand<S>>(p, w, chunk, t, Iteration<R>::key_scale(p), threads);
    }
  }
  BackwardMemory<R>::each_parameter(p, [&](int i, int64_t size) {
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
      return BackwardMemory<float>::plan<float>(p, measuring).bytes;
    case Dtype::float64:
      return BackwardMemory<double>::plan<double>(p, measuring).bytes;
    default:
      return BackwardMemory<float>::plan<BFloat16>(p, measuring).bytes;
  }
}

}  // namespace grjca::GRJCA_ISA
