// A feed-forward network whose neurons mostly rest: those at work one by one, in float32. Which ones work is up to each row,
// and so is the order of its sums: a row's result does not depend on the others, nor on who computes which neurons or columns.
//
// Limit: the bytes of the neurons at work; with many rows, two multiply-adds for each row, neuron at work and column.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../kernels.h"
#include "../prefetch.h"
#include "elementwise.h"

namespace fallow::kernels {

// Sixteen values of a row of neuron weights from `i` on.
template <class S, Codes CODES>
FALLOW_INLINE typename S::F neuron_weights(const PackedNeurons& w, const uint8_t* row, int i) {
  if constexpr (CODES == Codes::bf16) {
    return S::load_bf16(reinterpret_cast<const uint16_t*>(row) + i);
  } else {
    const auto* scales = reinterpret_cast<const float*>(row + w.in_features);
    const int g = i / PackedNeurons::group;
    return S::fma(S::to_float(S::load_u8(row + i)), S::set1(scales[g]), S::set1(scales[w.groups() + g]));
  }
}

template <class S, Codes CODES>
inline float neuron_product(const PackedNeurons& w, const uint8_t* row, const float* x) {
  typename S::F totals[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
  for (int i = 0, j = 0; i < w.in_features; i += lanes, j = (j + 1) % 4) {
    totals[j] = S::fma(neuron_weights<S, CODES>(w, row, i), S::load(x + i), totals[j]);
  }
  return S::sum(S::add(S::add(totals[0], totals[1]), S::add(totals[2], totals[3])));
}

// Of sixteen neurons from n on, of which those before `end` count: a bit for each beyond the threshold.
template <class S>
inline unsigned at_work(typename S::F values, float threshold, int n, int end) {
  const unsigned all = end - n >= lanes ? 0xffffu : (1u << (end - n)) - 1;
  return S::beyond(values, threshold) & all;
}

// Calls f(i) for the bits of `mask`, from the lowest on.
template <class F>
inline void for_bits(unsigned mask, const F& f) {
  for (; mask != 0; mask &= mask - 1) f(__builtin_ctz(mask));
}

// Takes neurons [begin, end) in blocks of sixteen: mask(n, r) says which of the block from n on work in row r, fetch(n) brings
// a neuron that works in any row, compute(n, r, mask) uses what was brought some blocks before.
template <class Mask, class Fetch, class Compute>
FALLOW_INLINE void for_blocks(int begin, int end, int rows, const Mask& mask, const Fetch& fetch, const Compute& compute) {
  const int ahead = std::max(1, 512 / std::max(rows, 1)) * lanes;  // few rows are done before anything arrives
  const auto bring = [&](int n) {
    unsigned any = 0;
    for (int r = 0; r < rows; ++r) any |= mask(n, r);
    for_bits(any, [&](int i) { fetch(n + i); });
  };
  for (int n = begin; n < std::min(end, begin + ahead); n += lanes) bring(n);
  for (int n = begin; n < end; n += lanes) {
    if (n + ahead < end) bring(n + ahead);
    for (int r = 0; r < rows; ++r) compute(n, r, mask(n, r));
  }
}

template <class S>
inline float norm_of(const float* x, int n) {
  auto squares = S::zero();
  for (int i = 0; i < n; i += lanes) squares = S::fma(S::load(x + i), S::load(x + i), squares);
  return std::sqrt(S::sum(squares));
}

// Of rounded gates, those that may be above the threshold: an exact gate is a product in float32, as an up row's.
template <class S, Codes CODES>
void neurons_of_rounded_gates(const NeuronTask& task, int begin, int end) {
  const PackedNeurons& w = *task.weights;
  for (int r = 0; r < task.rows; ++r) task.norms[r] = norm_of<S>(task.x + r * task.x_stride, w.in_features);
  for_blocks(
      begin, end, task.rows,
      [&](int n, int r) {
        const auto highest = S::fma(S::load(w.doubts() + n), S::set1(task.norms[r]), S::load(task.neurons + r * task.stride + n));
        return at_work<S>(activate<S>(highest, task.activation), task.threshold, n, end);
      },
      [&](int n) { prefetch_run(w.neuron(n), w.neuron_bytes()); },
      [&](int n, int r, unsigned mask) {
        const float* x = task.x + r * task.x_stride;
        float values[lanes] = {};
        for_bits(mask, [&](int i) {
          const float gate = neuron_product<S, CODES>(w, w.gate(n + i), x);
          if (!(gate <= task.threshold)) values[i] = gate * neuron_product<S, CODES>(w, w.up(n + i), x);
        });
        std::memcpy(task.neurons + r * task.stride + n, values, sizeof(values));
      });
}

template <class S, Codes CODES>
void neurons_at_work(const NeuronTask& task, int begin, int end) {
  const PackedNeurons& w = *task.weights;
  if (w.rounded_gates) return neurons_of_rounded_gates<S, CODES>(task, begin, end);
  const auto gates = [&](int n, int r) { return activate<S>(S::load(task.neurons + r * task.stride + n), task.activation); };
  for_blocks(
      begin, end, task.rows, [&](int n, int r) { return at_work<S>(gates(n, r), task.threshold, n, end); },
      [&](int n) { prefetch_run(w.neuron(n), w.neuron_bytes()); },
      [&](int n, int r, unsigned mask) {
        float activated[lanes];
        float values[lanes] = {};
        S::store(activated, gates(n, r));
        for_bits(mask, [&](int i) { values[i] = activated[i] * neuron_product<S, CODES>(w, w.up(n + i), task.x + r * task.x_stride); });
        std::memcpy(task.neurons + r * task.stride + n, values, sizeof(values));
      });
}

template <class S>
void neurons(const NeuronTask& task, int begin, int end) {
  if (task.weights->codes == Codes::bf16) return neurons_at_work<S, Codes::bf16>(task, begin, end);
  neurons_at_work<S, Codes::q8>(task, begin, end);
}

template <class S, Codes CODES>
void spread_columns(const SpreadTask& task, int begin, int end) {
  const PackedNeurons& w = *task.weights;
  const auto values = [&](int n, int r) { return task.neurons + r * task.stride + n; };
  for_blocks(
      0, w.count, task.rows, [&](int n, int r) { return at_work<S>(S::load(values(n, r)), task.threshold, n, w.count); },
      [&](int n) { prefetch_run(w.down(n), w.row_bytes); },
      [&](int n, int r, unsigned mask) {
        float* out = task.out + r * task.out_stride;
        for_bits(mask, [&](int i) {
          const uint8_t* row = w.down(n + i);
          const auto value = S::set1(values(n, r)[i]);
          for (int c = begin; c < end; c += lanes) S::store(out + c, S::fma(value, neuron_weights<S, CODES>(w, row, c), S::load(out + c)));
        });
      });
}

template <class S>
void spread(const SpreadTask& task, int begin, int end) {
  if (task.weights->codes == Codes::bf16) return spread_columns<S, Codes::bf16>(task, begin, end);
  spread_columns<S, Codes::q8>(task, begin, end);
}

}  // namespace fallow::kernels
