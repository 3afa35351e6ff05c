// Attention of queries to the pages of a KV cache, a segment of pages at a time, with keys, queries, probabilities
// and values in bfloat16 and sums in float32.
//
// A query's result is a function of its own keys and of the fixed cut into segments: masked keys enter as exact
// zeros, so neither the batch nor the chunk in which the query came changes a bit. Method: split softmax with running
// maximum and sum (arXiv 1805.02867, section 3.1).
#pragma once
#include <algorithm>
#include <limits>

#include "../kernels.h"
#include "../prefetch.h"
#include "elementwise.h"
#include "linear.h"

namespace fallow::kernels {

// The keys of a segment that a query may see: [low, high) counted from the segment's first token.
struct Visible {
  int low, high;
};

inline Visible visible(const AttentionTask& task, int segment, int row) {
  const int first = segment * segment_tokens;
  const int position = task.first_position + row;
  const int low = task.window > 0 ? std::max(0, position + 1 - task.window - first) : 0;
  return {std::min(low, segment_tokens), std::clamp(position + 1 - first, 0, segment_tokens)};
}

// `next`: two further runs of as many bytes as the keys, fetched from memory while these are computed, or null.
template <class S, int MR>
FALLOW_INLINE void score_page(const uint16_t* const* queries, const uint16_t* keys, int head_pairs, const uint16_t* const (&next)[2], float* scores) {
  typename S::F acc[MR][2];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) acc[m][0] = acc[m][1] = S::zero();
  for (int d = 0; d < head_pairs; ++d) {
    const auto k0 = S::load_bytes(keys + d * page_size * 2);
    const auto k1 = S::load_bytes(keys + d * page_size * 2 + 2 * lanes);
    for (const uint16_t* p : next) {
      if (p == nullptr) continue;
      prefetch_far(p + d * page_size * 2);
      prefetch_far(p + d * page_size * 2 + 2 * lanes);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const auto q = S::set1_i32(load_quad(queries[m] + 2 * d));
      acc[m][0] = S::dot_bf16(acc[m][0], k0, q);
      acc[m][1] = S::dot_bf16(acc[m][1], k1, q);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    S::store(scores + m * segment_tokens, acc[m][0]);
    S::store(scores + m * segment_tokens + lanes, acc[m][1]);
  }
}

// Softmax numerators of one query over vectors [begin, end) of its segment, in place as pairs of bfloat16 (j, j + 16).
// Powers of two: `scale` includes log2(e), and so does the maximum that is returned.
template <class S>
inline Partial softmax_segment(float* scores, int begin, int end, Visible see, float scale) {
  using F = typename S::F;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  if (see.low >= see.high) {
    for (int v = begin; v < end; ++v) S::store(scores + v * lanes, S::zero());
    return {-infinity, 0.f};
  }
  F peak = S::set1(-infinity);
  for (int v = begin; v < end; ++v) {
    F x = S::load(scores + v * lanes);
    if (see.high < (v + 1) * lanes) x = S::keep_first(x, see.high - v * lanes, -infinity);
    if (see.low > v * lanes) x = S::drop_first(x, see.low - v * lanes, -infinity);
    S::store(scores + v * lanes, x);
    peak = S::max(peak, x);
  }
  const float maximum = S::max_of(peak) * scale;
  F total = S::zero();
  for (int v = begin; v < end; v += 2) {
    F p[2];
    for (int i = 0; i < 2; ++i) {
      p[i] = exp2<S>(S::fma(S::load(scores + (v + i) * lanes), S::set1(scale), S::set1(-maximum)));
      total = S::add(total, p[i]);
    }
    S::store_bytes(scores + v * lanes, S::pair_bf16(p[0], p[1]));
  }
  return {maximum, S::sum(total)};
}

// values[m][NB * 16 of padded_dim] = sum over the pages' pairs. `filled`: tokens of the segment that exist.
template <class S, int MR, int NB>
FALLOW_NOINLINE void weigh_values(const float* probabilities, const uint16_t* const* pages, int begin, int end, int filled,
                         int padded_dim, float* values) {
  typename S::F acc[MR][NB];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) acc[m][n] = S::zero();
  }
  for (int page = begin; page < end; ++page) {
    const int count = std::min(page_size, filled - page * page_size);
    const int pairs = std::min(count, page_size / 2);
    for (int j = 0; j < pairs; ++j) {
      const uint16_t* v = pages[page] + static_cast<size_t>(j) * padded_dim * 2;
      typename S::I w[NB];
#pragma GCC unroll 4
      for (int n = 0; n < NB; ++n) w[n] = S::load_bytes(v + n * lanes * 2);
      if (j + page_size / 2 >= count) {
#pragma GCC unroll 4
        for (int n = 0; n < NB; ++n) w[n] = S::even_only(w[n]);  // the odd one is not written yet
      }
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const auto p = S::set1_i32(load_quad(probabilities + m * segment_tokens + page * page_size + j));
#pragma GCC unroll 4
        for (int n = 0; n < NB; ++n) acc[m][n] = S::dot_bf16(acc[m][n], w[n], p);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) S::store(values + static_cast<size_t>(m) * padded_dim + n * lanes, acc[m][n]);
  }
}

template <class S, int MR>
FALLOW_NOINLINE void attend_block(const uint16_t* const* queries, const uint16_t* const* keys, const uint16_t* const* values_at,
                         int begin, int end, int filled, bool first, const Visible* see, float scale, int head_pairs,
                         int padded_dim, Partial* partials, float* values, float* scores) {
  for (int page = begin; page < end; ++page) {
    const uint16_t* const next[2] = {first ? values_at[page] : nullptr, first && page + 1 < end ? keys[page + 1] : nullptr};
    score_page<S, MR>(queries, keys[page], head_pairs, next, scores + page * page_size);
  }
  for (int m = 0; m < MR; ++m) {
    partials[m] = softmax_segment<S>(scores + m * segment_tokens, begin * 2, end * 2, see[m], scale);
  }
  for (int d = 0; d < padded_dim; d += 4 * lanes) {
    const uint16_t* columns[segment_pages];
    for (int page = begin; page < end; ++page) columns[page] = values_at[page] + d * 2;
    switch (std::min(4, (padded_dim - d) / lanes)) {
      case 1: weigh_values<S, MR, 1>(scores, columns, begin, end, filled, padded_dim, values + d); break;
      case 2: weigh_values<S, MR, 2>(scores, columns, begin, end, filled, padded_dim, values + d); break;
      case 3: weigh_values<S, MR, 3>(scores, columns, begin, end, filled, padded_dim, values + d); break;
      default: weigh_values<S, MR, 4>(scores, columns, begin, end, filled, padded_dim, values + d); break;
    }
  }
}

template <class S>
void attention(const AttentionTask& task, int segment, Partial* partials, float* values, float* scratch) {
  const KvLayout& layout = task.layout;
  const int group = layout.num_heads / layout.num_kv_heads;
  const int padded_dim = layout.padded_dim();
  const int queries = task.rows * group;
  const int filled = visible(task, segment, task.rows - 1).high;
  const int begin = visible(task, segment, 0).low / page_size;
  const int end = (filled + page_size - 1) / page_size;
  const uint16_t* keys[segment_pages];
  const uint16_t* values_at[segment_pages];
  for (int page = begin; page < end; ++page) {
    uint8_t* p = task.pool + static_cast<size_t>(task.page_table[segment * segment_pages + page]) * task.page_stride;
    keys[page] = layout.keys(p, task.kv_head);
    values_at[page] = layout.values(p, task.kv_head);
  }
  for (int first = 0; first < queries;) {
    const int left = queries - first;
    const int steps = (left + S::max_rows - 1) / S::max_rows;
    const int take = (left + steps - 1) / steps;
    const uint16_t* q[8];
    Visible see[8];
    for (int m = 0; m < take; ++m) {
      const int row = (first + m) / group;
      const int head = task.kv_head * group + (first + m) % group;
      q[m] = task.queries + row * task.query_stride + static_cast<size_t>(head) * padded_dim;
      see[m] = visible(task, segment, row);
    }
    Partial* partial = partials + first;
    float* value = values + static_cast<size_t>(first) * padded_dim;
    float* scores = scratch + static_cast<size_t>(first) * segment_tokens;
    with_rows<S>(take, [&](auto rows) {
      attend_block<S, decltype(rows)::value>(q, keys, values_at, begin, end, filled, first == 0, see, task.scale * log2_e,
                                             padded_dim / 2, padded_dim, partial, value, scores);
    });
    first += take;
  }
}

template <class S>
void merge(Partial& state, float* state_values, const Partial& partial, const float* values, int padded_dim) {
  if (!(partial.sum > 0.f) && partial.sum == partial.sum) return;  // nothing visible; NaN goes on
  const float maximum = std::max(state.maximum, partial.maximum);
  const auto keep = exp2<S>(S::set1(state.maximum - maximum));
  const auto take = exp2<S>(S::set1(partial.maximum - maximum));
  if (state.sum == 0.f) {
    state = partial;
    for (int d = 0; d < padded_dim; d += lanes) S::store(state_values + d, S::load(values + d));
    return;
  }
  float factors[2 * lanes];
  S::store(factors, keep);
  S::store(factors + lanes, take);
  state.maximum = maximum;
  state.sum = state.sum * factors[0] + partial.sum * factors[lanes];
  for (int d = 0; d < padded_dim; d += lanes) {
    S::store(state_values + d, S::fma(S::load(values + d), take, S::mul(S::load(state_values + d), keep)));
  }
}

template <class S>
void finish(const Partial& state, const float* state_values, int head_dim, float* out) {
  const auto inverse = S::set1(1.f / state.sum);
  int d = 0;
  for (; d + lanes <= head_dim; d += lanes) S::store(out + d, S::mul(S::load(state_values + d), inverse));
  for (; d < head_dim; ++d) out[d] = state_values[d] * (1.f / state.sum);
}

}  // namespace fallow::kernels
