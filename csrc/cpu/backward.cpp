// The backward pass: chunk by chunk, the gates, then the iterations in reverse, each recomputed from its saved X^t.
// A name d_x is the gradient of the loss by x.
#include "gates.h"
#include "iteration.h"
#include "kernels.h"

namespace grjca::GRJCA_ISA {
namespace {

// Rows of C_m that one task of the correlation's backward takes, columns (as panels) it keeps on chip at a time, and
// terms after which a sum over the rows of a chunk is put aside, so that rounding does not grow with the batch.
constexpr int64_t kCorrelationRows = 128, kCorrelationColumns = 128, kTerms = 256;

// Parameters as the backward reads them: right operands of the products d_y W.
template <class R>
struct BackwardWeights {
  R* query;
  R *value[kMaxModalities], *output[kMaxModalities];

  static BackwardWeights plan(const Problem& p, Arena& arena) {
    BackwardWeights w{};
    const int64_t d = p.width();
    w.query = p.released ? arena.take<R>(panels<R>(d) * d * kPanel<R>) : nullptr;
    for (int m = 0; m < p.modalities; ++m) {
      w.value[m] = arena.take<R>(panels<R>(p.widths[m]) * p.widths[m] * kPanel<R>);
      w.output[m] = arena.take<R>(panels<R>(d) * p.widths[m] * kPanel<R>);
    }
    return w;
  }

  template <class S>
  void fill(const Problem& p, const void* const* parameters, int t, int threads) {
    const ParameterIndex index{p};
    const auto packed = [&](R* to, int i, int64_t rows, int64_t columns) {
      const S* const from = static_cast<const S*>(parameters[i]);
      parallel_for(threads, panels<R>(columns), [=](int64_t q, int) {
        pack_rows(to + q * rows * kPanel<R>, from + q * kPanel<R>, columns, rows, columns - q * kPanel<R>);
      });
    };
    if (p.released) packed(query, index.query(t), p.width(), p.width());
    for (int m = 0; m < p.modalities; ++m) {
      packed(value[m], index.value(t, m), p.widths[m], p.widths[m]);
      packed(output[m], index.output(t, m), p.widths[m], p.width());
    }
  }
};

template <class R>
struct Workspace {
  int64_t samples;  // of a chunk
  int64_t rows;     // of a chunk, at most
  PackedLayer<R> weights[kMaxIterations];
  BackwardWeights<R> backward_weights[kMaxIterations];
  GateParameters<R> gates[kMaxModalities];
  R** parameters;  // gradients, summed in arithmetic type; null where none is asked for
  Chunk chunk;
  Activations<R> a;
  R* d_state[kMaxIterations + 1];  // d X^t, [rows, ld]
  R* d_logits;                     // [rows, modalities * ways]
  R* d_update;                     // d (H W_h^T + b_h), [rows, ld]; d V and d K replace it, transposed
  R* d_attended;                   // d (V C) as panels, [modality][panel][row][kPanel]
  R* d_attended_t;                 // the same transposed, [modality][sample][panel of frames][d][kPanel]
  R* joint_t;                      // J^T, [sample][panel of frames][d][kPanel]
  R *d_key_t, *d_value_t;          // [d, frames_ld], K and V transposed
  R* d_joint_parts;                // [block of C rows][panel][row][kPanel]
  R* d_joint;                      // their sum, [rows, ld]
  int64_t frames_ld;
  R* scratch;
  int64_t scratch_step;
  size_t bytes;

  static constexpr int64_t kBudget = 64 << 20;

  static int64_t correlation_blocks(const Problem& p) {
    int64_t n = 0;
    for (int m = 0; m < p.modalities; ++m) n += blocks(p.widths[m], kCorrelationRows);
    return n;
  }

  void plan_chunk(const Problem& p, Arena& arena) {
    const int64_t d = p.width(), d_panels = panels<R>(d) * kPanel<R>;
    const int64_t transposed = samples * panels<R>(p.length) * d * kPanel<R>;
    rows = samples * p.length;
    frames_ld = leading<R>(rows);
    chunk.start = arena.take<int64_t>(samples + 1);
    a = Activations<R>::plan(p, rows, arena);
    for (int t = 0; t <= p.iterations; ++t) d_state[t] = arena.take<R>(rows * a.ld);
    d_logits = arena.take<R>(rows * p.modalities * p.all_ways());
    d_update = arena.take<R>(rows * a.ld);
    d_attended = arena.take<R>(p.modalities * d_panels * rows);
    d_attended_t = arena.take<R>(p.modalities * transposed);
    joint_t = arena.take<R>(transposed);
    d_key_t = arena.take<R>(d * frames_ld);
    d_value_t = arena.take<R>(d * frames_ld);
    d_joint_parts = arena.take<R>(correlation_blocks(p) * d_panels * rows);
    d_joint = arena.take<R>(rows * a.ld);
  }

  static Workspace plan(const Problem& p, const Resources& resources) {
    Workspace w{};
    Arena sizing(nullptr);
    w.samples = 1;
    w.plan_chunk(p, sizing);
    w.samples = samples_per_chunk(p.batch, static_cast<int64_t>(sizing.used()), kBudget);
    Arena arena(Arena::align(resources.workspace));
    for (int t = 0; t < p.layers(); ++t) {
      w.weights[t] = PackedLayer<R>::plan(p, arena);
      w.backward_weights[t] = BackwardWeights<R>::plan(p, arena);
    }
    for (int m = 0; m < p.modalities; ++m) w.gates[m] = GateParameters<R>::plan(p, m, arena);
    w.parameters = arena.take<R*>(ParameterIndex{p}.count());
    each_parameter(p, [&](int i, int64_t size) {
      R* const sums = arena.take<R>(size);
      if (w.parameters) w.parameters[i] = sums;
    });
    w.plan_chunk(p, arena);
    int64_t scratch = larger(Iteration<R>::scratch_size(p), 2 * kCorrelationRows * kCorrelationColumns);
    scratch = larger(scratch, (kTerms + p.length) * kPanel<R>);
    for (int m = 0; m < p.modalities; ++m)
      scratch = larger(scratch, Frame<R>::scratch_size(p.widths[m], p.iterations) +
                                    FrameGradient<R>::scratch_size(p.widths[m], p.iterations) + p.all_ways());
    w.scratch_step = blocks(scratch, 64) * 64;
    w.scratch = arena.take<R>(w.scratch_step * resources.threads);
    w.bytes = arena.used();
    return w;
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
      if (p.released) linear(index.query(t), d, d);
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

template <class S, class R = Compute<S>>
struct Backward {
  const Problem& p;
  const Tensors& tensors;
  const BackwardTensors& gradients;
  int threads;
  const Workspace<R>& w;
  const Chunk& chunk;

  R* thread_scratch(int thread) const { return w.scratch + thread * w.scratch_step; }
  R* sums(int i) const { return w.parameters[i]; }

  template <class T>
  T* frame_of(const View& view, int64_t b, int64_t l) const {
    return view.data ? static_cast<T*>(view.data) + (chunk.first + b) * view.sample + l * view.frame : nullptr;
  }

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

  // One modality of X^t at a frame, t from 0. Returns the norm that X^0 was divided by.
  R load_state(R* to, int t, int m, int64_t b, int64_t l) const {
    if (t == 0)
      return initial_row(p, to, frame_of<const S>(tensors.features[m], b, l), tensors.features[m].column, p.widths[m]);
    const int64_t frame = ((t - 1) * p.batch + chunk.first + b) * p.length + l;
    load_row(to, static_cast<const S*>(tensors.iterates) + frame * p.width() + p.offset(m), 1, p.widths[m]);
    return 1;
  }

  void load_states(int t) const {
    each_frame([&](int64_t b, int64_t l, int64_t row, int) {
      if (row < 0) return;
      for (int m = 0; m < p.modalities; ++m) load_state(w.a.x + row * w.a.ld + p.offset(m), t, m, b, l);
    });
  }

  // ---- gates

  void gates_backward() const {
    each_frame([&](int64_t b, int64_t l, int64_t row, int thread) {
      if (row < 0) return;
      for (int m = 0; m < p.modalities; ++m) frame_backward(m, b, l, row, thread_scratch(thread));
    });
    for (int t = 1; t <= p.iterations && p.gates(); ++t) {
      if (p.gating != Gating::hierarchical && t < p.iterations) continue;
      load_states(t);
      for (int m = 0; m < p.modalities; ++m) {
        if (p.gating == Gating::hierarchical) gate_gradient(m, t - 1);
        if (t == p.iterations) gate_gradient(m, p.gates() - 1);
      }
    }
  }

  void frame_backward(int m, int64_t b, int64_t l, int64_t row, R* scratch) const {
    const int64_t n = p.widths[m];
    Frame<R> frame(p, w.gates[m], n, scratch);
    scratch += Frame<R>::scratch_size(n, p.iterations);
    for (int t = 0; t <= p.iterations; ++t) load_state(frame.state[t], t, m, b, l);
    frame.forward();
    FrameGradient<R> gradient(frame, scratch);
    R* const d_values = scratch + FrameGradient<R>::scratch_size(n, p.iterations);
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
    gradient.backward(d_gates ? d_values : nullptr, w.d_logits + (row * p.modalities + m) * p.all_ways());
    for (int t = 0; t <= p.iterations; ++t)
      std::memcpy(w.d_state[t] + row * w.a.ld + p.offset(m), gradient.d_state[t], n * sizeof(R));
  }

  void gate_gradient(int m, int g) const {
    const int64_t ld = p.modalities * p.all_ways();
    int64_t way = m * p.all_ways();
    for (int i = 0; i < g; ++i) way += p.ways(i);
    const int i = ParameterIndex{p}.gate(m, g);
    weight_gradient(sums(i), p.ways(g), {w.d_logits + way, 1, ld}, w.a.x + p.offset(m), w.a.ld, p.widths[m]);
    if (p.released) column_sums(sums(i + 1), w.d_logits + way, ld, p.ways(g));
  }

  // ---- sums over the rows of the chunk

  // sums [out, in] += A B, A [out, rows] and B [rows, in].
  void weight_gradient(R* sums, int64_t out, Left<R> a, const R* b, int64_t ld, int64_t in) const {
    if (!sums) return;
    const int64_t out_blocks = blocks(out, kRowBlock), rows = chunk.rows();
    parallel_for(threads, panels<R>(in) * out_blocks, [&](int64_t task, int thread) {
      const int64_t column = task / out_blocks * kPanel<R>, i = task % out_blocks * kRowBlock;
      R *const panel = thread_scratch(thread), *const to = sums + i * in + column;
      for (int64_t k = 0; k < rows; k += kTerms) {
        const int64_t terms = smaller(kTerms, rows - k);
        pack_rows(panel, b + k * ld + column, ld, terms, in - column);
        product<R>(smaller(kRowBlock, out - i), in - column, {a.data + i * a.row + k * a.column, a.row, a.column},
                   panel, terms, [=](int64_t r, int64_t c, Vector<R> v) { add(to + r * in + c, v, in - column - c); });
      }
    });
  }

  static GRJCA_INLINE void add(R* to, Vector<R> v, int64_t lanes) {
    store_some<R>(to, load_some<R>(to, lanes) + v, lanes);
  }

  void column_sums(R* sums, const R* from, int64_t ld, int64_t columns) const {
    if (!sums) return;
    const int64_t rows = chunk.rows();
    parallel_for(threads, blocks(columns, kLanes<R>), [&](int64_t task, int) {
      const int64_t c = task * kLanes<R>, lanes = columns - c;
      for (int64_t k = 0; k < rows; k += kTerms) {
        Vector<R> part{};
        for (int64_t r = k; r < smaller(k + kTerms, rows); ++r) part += load_some<R>(from + r * ld + c, lanes);
        add(sums + c, part, lanes);
      }
    });
  }

  void row_sums(R* sums, const R* from, int64_t ld, int64_t count) const {
    if (!sums) return;
    const int64_t rows = chunk.rows();
    parallel_for(threads, blocks(count, kFrames), [&](int64_t task, int) {
      for (int64_t i = task * kFrames; i < smaller((task + 1) * kFrames, count); ++i)
        for (int64_t k = 0; k < rows; k += kTerms) {
          Vector<R> part{};
          const int64_t end = smaller(k + kTerms, rows);
          for (int64_t r = k; r < end; r += kLanes<R>) part += load_some<R>(from + i * ld + r, end - r);
          sums[i] += sum<R>(part);
        }
    });
  }

  // ---- one iteration

  void iteration_backward(const Iteration<R>& iteration) const {
    load_states(iteration.t);
    iteration.project_joint();
    iteration.mix_time();
    iteration.project_value();
    iteration.attend();
    output_backward(iteration);
    attended_backward(iteration.t);
    transpose_joint(iteration);
    correlation_backward(iteration);
    each_frame([&](int64_t, int64_t, int64_t row, int) {  // the residual
      if (row >= 0) add_scaled(w.d_state[iteration.t] + row * w.a.ld, R(1), w.d_state[iteration.t + 1] + row * w.a.ld, p.width());
    });
    value_backward(iteration.t);
    key_backward(iteration);
    joint_backward(iteration.t);
  }

  // d_update = d X^(t+1) through dropout and relu; gradients of W_h and b_h.
  void output_backward(const Iteration<R>& iteration) const {
    R* const d_update = w.d_update;
    const R* const d_next = w.d_state[iteration.t + 1];
    if (p.released) iteration.project_output(d_update);
    iteration.each_output([&](int64_t at, int64_t lanes, Vector<R> factor) {
      Vector<R> d = load_some<R>(d_next + at, lanes);
      if (p.released) d = load_some<R>(d_update + at, lanes) <= 0 ? Vector<R>{} : d * factor;
      store_some<R>(d_update + at, d, lanes);
    });
    const ParameterIndex index{p};
    for (int m = 0; m < p.modalities; ++m) {
      const int i = index.output(iteration.t, m);
      const R* const d_m = d_update + p.offset(m);
      weight_gradient(sums(i), p.widths[m], {d_m, 1, w.a.ld}, w.a.hidden + m * p.width(), w.a.hidden_ld, p.width());
      if (p.released) column_sums(sums(i + 1), d_m, w.a.ld, p.widths[m]);
    }
  }

  R* d_attended_panel(int m, int64_t q) const {
    return w.d_attended + (m * panels<R>(p.width()) + q) * chunk.rows() * kPanel<R>;
  }
  int64_t transposed_step() const { return panels<R>(p.length) * p.width() * kPanel<R>; }  // from sample to sample
  R* d_attended_t(int m, int64_t b) const { return w.d_attended_t + (m * w.samples + b) * transposed_step(); }
  R* joint_t(int64_t b) const { return w.joint_t + b * transposed_step(); }

  // d (V C) = d H through relu and tanh, as panels and as transposed panels.
  void attended_backward(int t) const {
    const int64_t d = p.width(), rows = chunk.rows(), all = panels<R>(d);
    const BackwardWeights<R>& weights = w.backward_weights[p.shared ? 0 : t];
    for (int m = 0; m < p.modalities; ++m) {
      R* const to = d_attended_panel(m, 0);
      const R* const hidden = w.a.hidden + m * d;
      project<R>(threads, rows, p.widths[m], {w.d_update + p.offset(m), w.a.ld, 1}, weights.output[m], d,
                 [=](int64_t r, int64_t c, Vector<R> v) {
                   const Vector<R> h = load_some<R>(hidden + r * w.a.hidden_ld + c, d - c);
                   if (p.released) v *= 1 - h * h;
                   store(to + (c / kPanel<R> * rows + r) * kPanel<R> + c % kPanel<R>, h <= 0 ? Vector<R>{} : v);
                 });
    }
    parallel_for(threads, chunk.samples * p.modalities * all, [&](int64_t task, int) {
      const int64_t b = task / all / p.modalities, q = task % all;
      const int m = static_cast<int>(task / all % p.modalities);
      transpose_panel(d_attended_t(m, b), d_attended_panel(m, q) + chunk.start[b] * kPanel<R>, q, chunk.frames(b));
    });
  }

  void transpose_joint(const Iteration<R>& iteration) const {
    const int64_t all = panels<R>(p.width());
    parallel_for(threads, chunk.samples * all, [&](int64_t task, int) {
      const int64_t b = task / all, q = task % all;
      transpose_panel(joint_t(b), iteration.joint_panel(q, b), q, chunk.frames(b));
    });
  }

  // Panel q [frames][kPanel] of a matrix [frames, d] to its place in the panels [panel of frames][d][kPanel] of the
  // transposed matrix.
  void transpose_panel(R* to, const R* from, int64_t q, int64_t frames) const {
    const int64_t d = p.width(), columns = smaller(kPanel<R>, d - q * kPanel<R>);
    for (int64_t l = 0; l < frames; l += kPanel<R>)
      pack_columns(to + (l / kPanel<R> * d + q * kPanel<R>) * kPanel<R>, from + l * kPanel<R>, kPanel<R>, columns,
                   frames - l);
  }

  // From d (V C): d V and d K (transposed) and, in parts, d J. C is recomputed block by block and never leaves scratch.
  void correlation_backward(const Iteration<R>& iteration) const {
    const int64_t all = Workspace<R>::correlation_blocks(p);
    parallel_for(threads, chunk.samples * all, [&](int64_t task, int thread) {
      int64_t i = task % all;
      int m = 0;
      while (i >= blocks(p.widths[m], kCorrelationRows)) i -= blocks(p.widths[m++], kCorrelationRows);
      R* const d_joint_part = w.d_joint_parts + task % all * panels<R>(p.width()) * chunk.rows() * kPanel<R>;
      correlation_block(iteration, task / all, m, i * kCorrelationRows, d_joint_part, thread_scratch(thread));
    });
  }

  // Rows [i, i + kCorrelationRows) of C_m of sample b.
  void correlation_block(const Iteration<R>& iteration, int64_t b, int m, int64_t i, R* d_joint_part,
                         R* scratch) const {
    constexpr int64_t kPanels = kCorrelationColumns / kPanel<R>;
    const int64_t d = p.width(), n = chunk.frames(b), start = chunk.start[b], rows_of_chunk = chunk.rows();
    const int64_t rows = smaller(kCorrelationRows, p.widths[m] - i), ld = w.a.ld;
    const int64_t place = start * ld + p.offset(m) + i, block = rows * kPanel<R>;
    const int64_t transposed = (p.offset(m) + i) * w.frames_ld + start;
    R* const correlations = scratch;                                      // drop(tanh(K J)), [panel][row][kPanel]
    R* const d_scores = scratch + kCorrelationRows * kCorrelationColumns;  // d (K J), the same
    for (int64_t first = 0; first < panels<R>(d); first += kPanels) {
      const int64_t count = smaller(kPanels, panels<R>(d) - first);
      for (int64_t q = first; q < first + count; ++q) {
        const int64_t columns = smaller(kPanel<R>, d - q * kPanel<R>);
        R* const correlation = correlations + (q - first) * block;
        R* const d_score = d_scores + (q - first) * block;
        iteration.correlate(b, m, q, i, rows, correlation);
        for (int64_t e = 0; e < block; ++e) d_score[e] = 1 - correlation[e] * correlation[e];
        iteration.drop_correlation(b, m, q, i, rows, correlation);
        iteration.drop_correlation(b, m, q, i, rows, d_score);
        product<R>(rows, columns, {w.a.value + place, 1, ld}, d_attended_panel(m, q) + start * kPanel<R>, n,
                   [=](int64_t r, int64_t c, Vector<R> v) {
                     R* const at = d_score + r * kPanel<R> + c;
                     store(at, load(at) * v);
                   });
        R* const d_joint = d_joint_part + (q * rows_of_chunk + start) * kPanel<R>;
        product<R>(n, columns, {w.a.key + place, ld, 1}, d_score, rows,
                   [=](int64_t l, int64_t c, Vector<R> v) { store(d_joint + l * kPanel<R> + c, v); });
      }
      const int64_t column = first * kPanel<R>, terms = smaller(kCorrelationColumns, d - column);
      for (int64_t l = 0; l < n; l += kPanel<R>) {
        const int64_t at = (l / kPanel<R> * d + column) * kPanel<R>;
        accumulate(w.d_value_t + transposed + l, rows, n - l, correlations, block, d_attended_t(m, b) + at, terms,
                   first > 0);
        accumulate(w.d_key_t + transposed + l, rows, n - l, d_scores, block, joint_t(b) + at, terms, first > 0);
      }
    }
  }

  // to [rows, frames] (+)= A B, A in panels of columns `split` apart, B a panel [terms][kPanel].
  void accumulate(R* to, int64_t rows, int64_t frames, const R* a, int64_t split, const R* b, int64_t terms,
                  bool add_to) const {
    const int64_t ld = w.frames_ld, whole = terms / kPanel<R>;
    const auto keep = [=](int64_t r, int64_t c, Vector<R> v) {
      if (add_to)
        add(to + r * ld + c, v, frames - c);
      else
        store_some<R>(to + r * ld + c, v, frames - c);
    };
    if (whole) product<R>(rows, frames, {a, kPanel<R>, 1, split}, b, kPanel<R>, keep, whole);
    if (terms % kPanel<R> == 0) return;
    const auto add_rest = [=](int64_t r, int64_t c, Vector<R> v) { add(to + r * ld + c, v, frames - c); };
    const Left<R> rest{a + whole * split, kPanel<R>, 1};
    const R* const b_rest = b + whole * kPanel<R> * kPanel<R>;
    if (whole)
      product<R>(rows, frames, rest, b_rest, terms % kPanel<R>, add_rest);
    else
      product<R>(rows, frames, rest, b_rest, terms % kPanel<R>, keep);
  }

  // d X += d V W_v; gradients of W_v and b_v.
  void value_backward(int t) const {
    const ParameterIndex index{p};
    for (int m = 0; m < p.modalities; ++m) {
      const int64_t d_m = p.widths[m], ld = w.a.ld;
      const R* const d_value = w.d_value_t + p.offset(m) * w.frames_ld;
      R* const d_x = w.d_state[t] + p.offset(m);
      project<R>(threads, chunk.rows(), d_m, {d_value, 1, w.frames_ld},
                 w.backward_weights[p.shared ? 0 : t].value[m], d_m,
                 [=](int64_t r, int64_t c, Vector<R> v) { add(d_x + r * ld + c, v, d_m - c); });
      const int i = index.value(t, m);
      weight_gradient(sums(i), d_m, {d_value, w.frames_ld, 1}, w.a.x + p.offset(m), ld, d_m);
      if (p.released) row_sums(sums(i + 1), d_value, w.frames_ld, d_m);
    }
  }

  // d X += (d K W_k)^T; gradients of W_k and b_k. K was divided by sqrt(d).
  void key_backward(const Iteration<R>& iteration) const {
    const R scale = static_cast<R>(1 / sqrt(static_cast<double>(p.width())));
    const int64_t ld = w.a.ld, frames_ld = w.frames_ld, length = p.length;
    iteration.each_modality_panel([&](int64_t b, int m, int64_t column, int64_t columns, int thread) {
      const int64_t n = chunk.frames(b), row = p.offset(m) + column;
      R* const panel = thread_scratch(thread);
      pack_columns(panel, w.d_key_t + row * frames_ld + chunk.start[b], frames_ld, n, columns);
      R* const d_x = w.d_state[iteration.t] + chunk.start[b] * ld + row;
      product<R>(n, columns, {iteration.weights.key[m], 1, length}, panel, n,
                 [=](int64_t l, int64_t c, Vector<R> v) { add(d_x + l * ld + c, v * scale, columns - c); });
    });
    for (int m = 0; m < p.modalities; ++m) {
      const int i = ParameterIndex{p}.key(iteration.t, m);
      if (sums(i)) key_weight_gradient(sums(i), m, scale);
      if (p.released && sums(i + 1)) key_bias_gradient(sums(i + 1), m, scale);
    }
  }

  // sums [l, l'] += sum over samples of d K^T X^T, a panel of l at a time: first transposed in scratch, then added.
  void key_weight_gradient(R* sums, int m, R scale) const {
    const int64_t length = p.length, d_m = p.widths[m];
    parallel_for(threads, panels<R>(length), [&](int64_t q, int thread) {
      const int64_t column = q * kPanel<R>, columns = smaller(kPanel<R>, length - column);
      R *const panel = thread_scratch(thread), *const sum_t = panel + kTerms * kPanel<R>;
      std::memset(sum_t, 0, length * kPanel<R> * sizeof(R));
      for (int64_t b = 0; b < chunk.samples; ++b) {
        const int64_t n = chunk.frames(b), start = chunk.start[b];
        if (column >= n) continue;
        for (int64_t k = 0; k < d_m; k += kTerms) {
          const int64_t terms = smaller(kTerms, d_m - k);
          const R* const d_key = w.d_key_t + (p.offset(m) + k) * w.frames_ld + start + column;
          pack_rows(panel, d_key, w.frames_ld, terms, smaller(columns, n - column));
          product<R>(n, smaller(columns, n - column), {w.a.x + start * w.a.ld + p.offset(m) + k, w.a.ld, 1}, panel, terms,
                     [=](int64_t r, int64_t c, Vector<R> v) {
                       R* const at = sum_t + r * kPanel<R> + c;
                       store(at, load(at) + v);
                     });
        }
      }
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < length; ++r) sums[(column + c) * length + r] += sum_t[r * kPanel<R> + c] * scale;
    });
  }

  void key_bias_gradient(R* sums, int m, R scale) const {
    parallel_for(threads, blocks(p.length, kLanes<R>), [&](int64_t task, int) {
      const int64_t l = task * kLanes<R>;
      for (int64_t b = 0; b < chunk.samples; ++b) {
        const int64_t lanes = chunk.frames(b) - l;
        if (lanes <= 0) continue;
        Vector<R> part{};
        for (int64_t i = 0; i < p.widths[m]; ++i)
          part += load_some<R>(w.d_key_t + (p.offset(m) + i) * w.frames_ld + chunk.start[b] + l, lanes);
        add(sums + l, part * scale, smaller(lanes, p.length - l));
      }
    });
  }

  // d J = the sum of its parts; d X += d J W_q; gradients of W_q and b_q.
  void joint_backward(int t) const {
    const int64_t d = p.width(), rows = chunk.rows(), ld = w.a.ld, step = panels<R>(d) * rows * kPanel<R>;
    R* const d_x = w.d_state[t];
    R* const d_joint = p.released ? w.d_joint : d_x;
    parallel_for(threads, panels<R>(d) * blocks(rows, kRowBlock), [&](int64_t task, int) {
      const int64_t q = task % panels<R>(d), first = task / panels<R>(d) * kRowBlock;
      for (int64_t r = first; r < smaller(first + kRowBlock, rows); ++r)
        for (int64_t c = 0; c < smaller(kPanel<R>, d - q * kPanel<R>); c += kLanes<R>) {
          const R* const part = w.d_joint_parts + (q * rows + r) * kPanel<R> + c;
          R* const at = d_joint + r * ld + q * kPanel<R> + c;
          const int64_t lanes = d - q * kPanel<R> - c;
          Vector<R> total = p.released ? Vector<R>{} : load_some<R>(at, lanes);
          for (int64_t i = 0; i < Workspace<R>::correlation_blocks(p); ++i) total += load(part + i * step);
          store_some<R>(at, total, lanes);
        }
    });
    if (!p.released) return;
    project<R>(threads, rows, d, {d_joint, ld, 1}, w.backward_weights[p.shared ? 0 : t].query, d,
               [=](int64_t r, int64_t c, Vector<R> v) { add(d_x + r * ld + c, v, d - c); });
    const int i = ParameterIndex{p}.query(t);
    weight_gradient(sums(i), d, {d_joint, 1, ld}, w.a.x, ld, d);
    column_sums(sums(i + 1), d_joint, ld, d);
  }

  // ---- results

  void write_features() const {
    each_frame([&](int64_t b, int64_t l, int64_t row, int thread) {
      for (int m = 0; m < p.modalities; ++m) {
        const View& view = gradients.features[m];
        S* const to = frame_of<S>(view, b, l);
        if (!to) continue;
        if (row < 0)
          clear_row(to, view.column, p.widths[m]);
        else
          write_feature(to, view.column, m, b, l, w.d_state[0] + row * w.a.ld + p.offset(m), thread_scratch(thread));
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

template <class S>
void run(const Problem& p, const Tensors& tensors, const BackwardTensors& gradients, const Resources& resources) {
  using R = Compute<S>;
  auto w = Workspace<R>::plan(p, resources);
  const int threads = resources.threads;
  for (int t = 0; t < p.layers(); ++t) {
    w.weights[t].template fill<S>(p, tensors.parameters, t, threads);
    w.backward_weights[t].template fill<S>(p, tensors.parameters, t, threads);
  }
  for (int m = 0; m < p.modalities; ++m) w.gates[m].template fill<S>(p, m, tensors.parameters);
  Workspace<R>::each_parameter(p, [&](int i, int64_t size) {
    if (!gradients.parameters[i]) w.parameters[i] = nullptr;
    if (w.parameters[i]) std::memset(w.parameters[i], 0, size * sizeof(R));
  });
  Chunk& chunk = w.chunk;
  for (chunk.first = 0; chunk.first < p.batch; chunk.first += w.samples) {
    chunk.samples = smaller(w.samples, p.batch - chunk.first);
    chunk.place(p, tensors.lengths);
    const Backward<S> backward{p, tensors, gradients, threads, w, chunk};
    backward.gates_backward();
    for (int t = p.iterations - 1; t >= 0; --t)
      backward.iteration_backward({p, chunk, w.weights[p.shared ? 0 : t], w.a, tensors.seed, t, threads, w.scratch,
                                   w.scratch_step});
    backward.write_features();
  }
  Workspace<R>::each_parameter(p, [&](int i, int64_t size) {
    if (w.parameters[i]) store_row(static_cast<S*>(gradients.parameters[i]), 1, w.parameters[i], size);
  });
}

}  // namespace

void backward(const Problem& p, const Tensors& tensors, const BackwardTensors& gradients, const Resources& resources) {
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
}

size_t backward_workspace(const Problem& p, const Resources& resources) {
  Resources measuring = resources;
  measuring.workspace = nullptr;
  return p.dtype == Dtype::float64 ? Workspace<double>::plan(p, measuring).bytes
                                   : Workspace<float>::plan(p, measuring).bytes;
}

}  // namespace grjca::GRJCA_ISA
