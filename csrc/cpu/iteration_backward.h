// One iteration in reverse, equation by equation, on the rows of some samples. d_x is the gradient of the loss with
// respect to x.
#pragma once

#include "backward_memory.h"
#include "iteration.h"
#include "phases.h"
#include "sums.h"

namespace grjca::GRJCA_ISA {

template <class E>
struct IterationBackward {
  using R = Compute<E>;
  using H = Held<E>;

  const Problem& p;
  const Samples& samples;
  const LayerWeights<R>* weights;
  const Activations<E>& a;
  const ChunkGradients<R>& chunk;
  const Transients<E>& transients;
  uint64_t seed;
  int threads;
  R* scratch;  // scratch_size() of BackwardMemory for each thread
  int64_t scratch_step;
  cpu::PhaseTimes* times;

  R* thread_scratch(int thread) const { return scratch + thread * scratch_step; }
  const LayerWeights<R>& layer(int t) const { return weights[p.shared ? 0 : t]; }
  Iteration<E> iteration(int t) const { return {p, samples, layer(t), a, seed, t, threads, scratch, scratch_step}; }

  // Computes, from X^t and d X^(t+1), d X^t and all that the sums of the weights' gradients read.
  void run(int t) const {
    using P = cpu::Phase;
    const Iteration<E> forward = iteration(t);
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

  // Computes what the forward did not keep.
  void recompute(const Iteration<E>& forward) const {
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
  void output_backward(const Iteration<E>& iteration) const {
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
    return transients.d_attended_panels +
           ((m * samples.rows() + samples.row(b)) * all + q * samples.frames(b)) * kPanel<R>;
  }
  int64_t transposed_step() const { return panels<R>(p.length) * p.width() * kPanel<R>; }  // from sample to sample
  R* d_attended_t(int m, int64_t b) const {
    return transients.d_attended_t + (m * samples.count + b) * transposed_step();
  }
  R* joint_t(int64_t b) const { return transients.joint_t + b * transposed_step(); }

  // d (V C) = d H through relu and tanh, as panels and as transposed panels.
  void attended_backward(int t) const {
    const int64_t d = p.width(), all = panels<R>(d), frames = panels<R>(p.length), ld = a.hidden_ld;
    for (int m = 0; m < p.modalities; ++m) {
      H* const to = transients.d_attended + m * d;
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
      const H* const from = transients.d_attended + samples.row(b) * ld + m * d;
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

  // Writes panel q of the transpose [panel of frames][d][kPanel] of the matrix `from` [frames, d].
  void transpose(R* to, const H* from, int64_t ld, int64_t q, int64_t frames) const {
    const int64_t l = q * kPanel<R>, d = p.width();
    if (l < frames) pack_columns<E>(to + l * d, from + l * ld, ld, d, frames - l);
  }

  // From d (V C): d V and d K (transposed) and, in parts, d J, block by block of C.
  void correlation_backward(const Iteration<E>& iteration) const {
    const int64_t all = Transients<E>::correlation_blocks(p), most = correlation_rows(p);
    parallel_for(threads, samples.count * all, [&](int64_t task, int thread) {
      int64_t i = task % all;
      int m = 0;
      while (i >= blocks(p.widths[m], most)) i -= blocks(p.widths[m++], most);
      // One thread comes to the blocks in their order, and several would wait for each other to add to one sum.
      const int64_t part = threads > 1 ? task % all : 0, size = panels<R>(p.width()) * samples.rows() * kPanel<R>;
      const bool add_to = threads == 1 && task % all > 0;
      correlation_block(iteration, task / all, m, i * most, transients.d_joint_parts + part * size, add_to,
                        thread_scratch(thread));
    });
  }
  int64_t joint_parts() const { return threads > 1 ? Transients<E>::correlation_blocks(p) : 1; }

  // Takes the rows of C_m of sample b from i on.
  void correlation_block(const Iteration<E>& iteration, int64_t b, int m, int64_t i, R* d_joint_part, bool add_to,
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

  // Writes A B to [rows, frames], or adds it. B stands in panels of frames, of whose d rows these are `terms`.
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
  void key_backward(const Iteration<E>& forward) const {
    const R scale = Iteration<E>::key_scale(p);
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
          const R* const part = transients.d_joint_parts + (q * rows + r) * kPanel<R> + c;
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
};

}  // namespace grjca::GRJCA_ISA
