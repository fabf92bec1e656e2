// The backward pass: chunk by chunk, the gates, then the iterations in reverse, each recomputed from its saved X^t.
// A name d_x is the gradient of the loss by x.
#include "backward_memory.h"
#include "iteration.h"
#include "kernels.h"
#include "phases.h"
#include "sums.h"

namespace grjca::GRJCA_ISA {
namespace {

// The work on some samples: all equations of an iteration in reverse, up to the sums over the batch.
template <class S>
struct Backward {
  using R = Compute<S>;
  using E = Operand<S>;
  using H = Held<S>;

  const Problem& p;
  const Tensors& tensors;
  const BackwardTensors& gradients;
  const Samples& samples;
  const LayerWeights<R>* weights;
  const GateParameters<R>* gates;
  const Activations<S>& a;
  const ChunkGradients<R>& chunk;
  const Transients<S>& passing;
  int threads;
  R* scratch;
  int64_t scratch_step;
  cpu::PhaseTimes* times;

  R* thread_scratch(int thread) const { return scratch + thread * scratch_step; }
  const LayerWeights<R>& layer(int t) const { return weights[p.shared ? 0 : t]; }
  Iteration<S> iteration(int t) const {
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

  // ---- one iteration

  void iteration_backward(int t) const {
    using P = cpu::Phase;
    const Iteration<S> forward = iteration(t);
    timed(P::load, [&] { load_states(t); });
    recompute(forward);
    timed(P::output_backward, [&] { output_backward(forward); });
    timed(P::attended_backward, [&] { attended_backward(t); });
    timed(P::correlation_backward, [&] { correlation_backward(forward); });
    timed(P::load, [&] {
      each_frame(p, samples, threads, [&](int64_t, int64_t, int64_t row, int) {  // the residual
        if (row >= 0) add_scaled(chunk.d_state[t] + row * a.ld, R(1), chunk.d_state[t + 1] + row * a.ld, p.width());
      });
    });
    timed(P::value_backward, [&] { value_backward(t); });
    timed(P::key_backward, [&] { key_backward(forward); });
    timed(P::joint_backward, [&] { joint_backward(t); });
  }

  template <class F>
  void timed(cpu::Phase phase, F f) const {
    cpu::timed(times, phase, f);
  }

  // What the forward did not keep.
  void recompute(const Iteration<S>& forward) const {
    using P = cpu::Phase;
    const bool correlated = p.keeps(Keep::correlation);
    timed(P::project_joint, [&] {
      if (!p.keeps(Keep::joint)) forward.project_joint();
      transpose_joint();
      if (!correlated) forward.pack_joint();
    });
    if (!p.keeps(Keep::key)) timed(P::project_key, [&] { forward.project_key(); });
    if (!p.keeps(Keep::value)) timed(P::project_value, [&] { forward.project_value(); });
    if (!p.keeps(Keep::hidden)) timed(P::attend, [&] { forward.attend(correlated); });
  }

  // d_update = d X^(t+1) through dropout and relu.
  void output_backward(const Iteration<S>& iteration) const {
    R* const d_update = chunk.d_update;
    const R* const d_next = chunk.d_state[iteration.t + 1];
    const bool signs = a.signs;
    if (p.released && !signs) iteration.project_output(d_update);
    iteration.each_output([&](int64_t at, int64_t lanes, Vector<R> factor, int64_t sign, int64_t k) {
      Vector<R> d = load_some<R>(d_next + at, lanes);
      if (p.released && signs)
        d = iteration.where_positive(sign, lanes, k, d * factor);
      else if (p.released)
        d = load_some<R>(d_update + at, lanes) <= 0 ? Vector<R>{} : d * factor;
      store_some<R>(d_update + at, d, lanes);
    });
  }

  R* d_attended_panel(int m, int64_t b, int64_t q) const {
    const int64_t all = panels<R>(p.width());
    return passing.d_attended_panels +
           ((m * samples.rows() + samples.row(b)) * all + q * samples.frames(b)) * kPanel<R>;
  }
  int64_t transposed_step() const { return panels<R>(p.length) * p.width() * kPanel<R>; }  // from sample to sample
  R* d_attended_t(int m, int64_t b) const { return passing.d_attended_t + (m * samples.count + b) * transposed_step(); }
  R* joint_t(int64_t b) const { return passing.joint_t + b * transposed_step(); }

  // d (V C) = d H through relu and tanh, as panels and as transposed panels.
  void attended_backward(int t) const {
    const int64_t d = p.width(), all = panels<R>(d), frames = panels<R>(p.length), ld = a.hidden_ld;
    for (int m = 0; m < p.modalities; ++m) {
      H* const to = passing.d_attended + m * d;
      const H* const hidden = a.hidden + m * d;
      iteration(t).project_rows(
          p.widths[m], Left<R>{chunk.d_update + p.offset(m), a.ld, 1}, layer(t).output_back[m], d,
          [=](int64_t r, int64_t c, Vector<R> v) {
            const Vector<R> h = load_some(hidden + r * ld + c, d - c);
            if (p.released) v *= 1 - h * h;
            store_some(to + r * ld + c, h <= 0 ? Vector<R>{} : v, d - c);
          },
          Fetched<H>{hidden, ld});
    }
    parallel_for(threads, samples.count * p.modalities * (all + frames), [&](int64_t task, int) {
      const int64_t b = task / (all + frames) / p.modalities, i = task % (all + frames), n = samples.frames(b);
      const int m = static_cast<int>(task / (all + frames) % p.modalities);
      const H* const from = passing.d_attended + samples.row(b) * ld + m * d;
      if (i < all)
        pack_rows<E>(d_attended_panel(m, b, i), from + i * kPanel<R>, ld, n, d - i * kPanel<R>);
      else
        transpose(d_attended_t(m, b), from, ld, i - all, n);
    });
  }

  void transpose_joint() const {
    const int64_t frames = panels<R>(p.length);
    parallel_for(threads, samples.count * frames, [&](int64_t task, int) {
      const int64_t b = task / frames;
      transpose(joint_t(b), a.joint + samples.row(b) * a.held_ld, a.held_ld, task % frames, samples.frames(b));
    });
  }

  // Panel q of the transposed matrix, [panel of frames][d][kPanel], of which `from` is [frames, d].
  void transpose(R* to, const H* from, int64_t ld, int64_t q, int64_t frames) const {
    const int64_t l = q * kPanel<R>, d = p.width();
    if (l < frames) pack_columns<E>(to + l * d, from + l * ld, ld, d, frames - l);
  }

  // From d (V C): d V and d K (transposed) and, in parts, d J, block by block of C.
  void correlation_backward(const Iteration<S>& iteration) const {
    const int64_t all = Transients<S>::correlation_blocks(p), most = correlation_rows(p);
    parallel_for(threads, samples.count * all, [&](int64_t task, int thread) {
      int64_t i = task % all;
      int m = 0;
      while (i >= blocks(p.widths[m], most)) i -= blocks(p.widths[m++], most);
      // One thread comes to the blocks in their order, and several would wait for each other to add to one sum.
      const int64_t part = threads > 1 ? task % all : 0, size = panels<R>(p.width()) * samples.rows() * kPanel<R>;
      const bool add_to = threads == 1 && task % all > 0;
      correlation_block(iteration, task / all, m, i * most, passing.d_joint_parts + part * size, add_to,
                        thread_scratch(thread));
    });
  }
  int64_t joint_parts() const { return threads > 1 ? Transients<S>::correlation_blocks(p) : 1; }

  // Rows of C_m of sample b from i on.
  void correlation_block(const Iteration<S>& iteration, int64_t b, int m, int64_t i, R* d_joint_part, bool add_to,
                         R* space) const {
    constexpr int64_t kPanels = kCorrelationColumns / kPanel<R>;
    const int64_t d = p.width(), n = samples.frames(b), start = samples.row(b), rows_of_unit = samples.rows();
    const int64_t rows = smaller(correlation_rows(p), p.widths[m] - i), ld = a.held_ld;
    const int64_t place = start * ld + p.offset(m) + i, block_ld = leading<R>(kCorrelationColumns);
    const int64_t transposed = (p.offset(m) + i) * chunk.frames_ld + start;
    const auto take = [&space](int64_t size) { return std::exchange(space, space + size); };
    E* const correlations = reinterpret_cast<E*>(take(rows * block_ld));  // drop(tanh(K J)), [row, block_ld]
    E* const d_scores = reinterpret_cast<E*>(take(rows * block_ld));      // d (K J), the same
    R* const tanhs = take(rows * kPanel<R>);                              // a panel of tanh(K J)
    R* const d_score = take(rows * kPanel<R>);                            // of d (K J)
    R* const packed = kPaired<E> ? take(rows * kPanel<R>) : d_score;
    const bool held = a.correlation;
    Prepared<R> key{};
    if (!held) key = prepare<E>(rows, Left<H>{a.key + place, 1, ld}, n, take(prepared_size<R>(rows, n)));
    const Prepared<R> value = prepare<E>(rows, Left<H>{a.value + place, 1, ld}, n, take(prepared_size<R>(rows, n)));
    for (int64_t first = 0; first < panels<R>(d); first += kPanels) {
      for (int64_t q = first; q < smaller(first + kPanels, panels<R>(d)); ++q) {
        const int64_t columns = smaller(kPanel<R>, d - q * kPanel<R>), column = (q - first) * kPanel<R>;
        if (held)
          iteration.load_correlation(b, m, q, i, rows, tanhs);
        else
          iteration.correlate(key, b, m, q, i, tanhs);
        iteration.drop_correlation(b, m, q, i, rows, [=](int64_t at, Vector<R> factor) {
          const Vector<R> c = load(tanhs + at);
          store<R>(d_score + at, (1 - c * c) * factor);
          store(correlations + at / kPanel<R> * block_ld + column + at % kPanel<R>, c * factor);
        });
        product<E>(value, columns, d_attended_panel(m, b, q), n, [=](int64_t r, int64_t c, Vector<R> v) {
          R* const at = d_score + r * kPanel<R> + c;
          const Vector<R> d_s = load(at) * v;
          store(at, d_s);
          store(d_scores + r * block_ld + column + c, d_s);
        });
        R* const d_joint = d_joint_part + (q * rows_of_unit + start) * kPanel<R>;
        pack<E>(packed, d_score, rows);
        product<E>(
            n, columns, Left<H>{a.key + place, ld, 1}, packed, 0, rows, space,
            [=](int64_t l, int64_t c, Vector<R> v) {
              R* const at = d_joint + l * kPanel<R> + c;
              store<R>(at, add_to ? load(at) + v : v);
            },
            Fetched<R>{d_joint, kPanel<R>});
      }
      const int64_t column = first * kPanel<R>, terms = smaller(kCorrelationColumns, d - column);
      const int64_t at = words<E>(column) * kPanel<R>;
      accumulate(chunk.d_value_t + transposed, rows, n, Left<E>{correlations, block_ld, 1}, d_attended_t(m, b) + at,
                 terms, first > 0, space);
      accumulate(chunk.d_key_t + transposed, rows, n, Left<E>{d_scores, block_ld, 1}, joint_t(b) + at, terms, first > 0,
                 space);
    }
  }

  // to [rows, frames] (+)= A B, B in panels of frames, of which these are `terms` of the d rows.
  void accumulate(R* to, int64_t rows, int64_t frames, Left<E> left, const R* b, int64_t terms, bool add_to,
                  R* space) const {
    const int64_t ld = chunk.frames_ld;
    product<E>(rows, frames, left, b, p.width() * kPanel<R>, terms, space, [=](int64_t r, int64_t c, Vector<R> v) {
      if (add_to)
        add<R>(to + r * ld + c, v, frames - c);
      else
        store_some<R>(to + r * ld + c, v, frames - c);
    });
  }

  // d X += d V W_v.
  void value_backward(int t) const {
    for (int m = 0; m < p.modalities; ++m) {
      const int64_t d_m = p.widths[m], ld = a.ld;
      R* const d_x = chunk.d_state[t] + p.offset(m);
      iteration(t).project_rows(
          d_m, Left<R>{chunk.d_value_t + p.offset(m) * chunk.frames_ld, 1, chunk.frames_ld}, layer(t).value_back[m],
          d_m, [=](int64_t r, int64_t c, Vector<R> v) { add<R>(d_x + r * ld + c, v, d_m - c); }, Fetched<R>{d_x, ld});
    }
  }

  // d X += (d K W_k)^T. K was divided by sqrt(d).
  void key_backward(const Iteration<S>& forward) const {
    const R scale = Iteration<S>::key_scale(p);
    const int64_t ld = a.ld, frames_ld = chunk.frames_ld;
    forward.each_modality_panel([&](int64_t b, int m, int64_t column, int64_t columns, int thread) {
      const int64_t n = samples.frames(b), row = p.offset(m) + column;
      R* const panel = thread_scratch(thread);
      pack_columns<E>(panel, chunk.d_key_t + row * frames_ld + samples.row(b), frames_ld, n, columns);
      R* const d_x = chunk.d_state[forward.t] + samples.row(b) * ld + row;
      product<E>(
          forward.weights.template key_columns<E>(p, m, n), columns, panel, n,
          [=](int64_t l, int64_t c, Vector<R> v) { add<R>(d_x + l * ld + c, v * scale, columns - c); },
          Fetched<R>{d_x, ld});
    });
  }

  // d J = the sum of its parts; d X += d J W_q.
  void joint_backward(int t) const {
    const int64_t d = p.width(), rows = samples.rows(), ld = a.ld, step = panels<R>(d) * rows * kPanel<R>;
    R* const d_x = chunk.d_state[t];
    R* const d_joint = p.projected ? chunk.d_joint : d_x;
    parallel_for(threads, panels<R>(d) * blocks(rows, kRowBlock), [&](int64_t task, int) {
      const int64_t q = task % panels<R>(d), first = task / panels<R>(d) * kRowBlock;
      for (int64_t r = first; r < smaller(first + kRowBlock, rows); ++r)
        for (int64_t c = 0; c < smaller(kPanel<R>, d - q * kPanel<R>); c += kLanes<R>) {
          const R* const part = passing.d_joint_parts + (q * rows + r) * kPanel<R> + c;
          R* const at = d_joint + r * ld + q * kPanel<R> + c;
          const int64_t lanes = d - q * kPanel<R> - c;
          Vector<R> total = load(part);
          for (int64_t i = 1; i < joint_parts(); ++i) total += load(part + i * step);
          p.projected ? store_some<R>(at, total, lanes) : add<R>(at, total, lanes);
        }
    });
    if (!p.projected) return;
    iteration(t).project_rows(
        d, Left<R>{d_joint, ld, 1}, layer(t).query_back, d,
        [=](int64_t r, int64_t c, Vector<R> v) { add<R>(d_x + r * ld + c, v, d - c); }, Fetched<R>{d_x, ld});
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
void add_sums(const Problem& p, const BackwardMemory<S>& w, const Activations<S>& a, const Samples& chunk, int t,
              int threads) {
  const ParameterIndex index{p};
  const ChunkGradients<R>& g = w.gradients;
  const int64_t d = p.width();
  Sums<S> sums(p, chunk);
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
               a.ld, Iteration<S>::key_scale(p));
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

// A sum before anything is added, which several threads clear: it is new memory, whose pages the system clears first.
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
      const auto kept = KeptPieces<Held<S>>::of(p, t < p.iterations ? tensors.kept : nullptr, t);
      parallel_for(w.split.workers, blocks(chunk.count, w.split.unit), [&](int64_t unit, int worker) {
        const int64_t begin = unit * w.split.unit, row = chunk.row(begin);
        const Samples samples = chunk.part(begin, w.split.unit);
        Activations<S> a = w.activations_of(row, worker);
        a.place(p, kept, samples.first, samples.start[0]);
        const ChunkGradients<R> of_unit = w.gradients.from_row(p, row, a.ld);
        const Transients<S> passing = w.transients_of(worker);
        R* const scratch = w.scratch + worker * w.scratch_step;
        const Backward<S> backward{p,
                                   tensors,
                                   gradients,
                                   samples,
                                   w.weights,
                                   w.gates,
                                   a,
                                   of_unit,
                                   passing,
                                   w.split.threads_each,
                                   scratch,
                                   w.scratch_step,
                                   resources.times};
        if (t == p.iterations) return backward.gates_backward();
        backward.iteration_backward(t);
        if (t == 0) backward.write_features();
      });
      const cpu::Timed timed(resources.times, cpu::Phase::sum_weights);
      Activations<S> a = w.activations;
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
