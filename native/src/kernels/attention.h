// Attention of queries to the pages of a KV cache, a segment of pages at a time, with keys, queries, probabilities
// and values in bfloat16 and sums in float32.
//
// A query's result is a function of its own keys and of the fixed cut into segments: masked keys enter as exact
// zeros, and so do pages that it has not chosen, so neither the batch nor the chunk in which the query came changes a
// bit. Method: split softmax with running maximum and sum (arXiv 1805.02867, section 3.1).
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

// The pages of a segment that one of the queries reads.
struct PageList {
  int count = 0;
  int index[segment_pages];  // within the segment
  const uint16_t* keys[segment_pages + 1];  // after the last one those of the page to come, or null
  const uint16_t* values[segment_pages];
};

// What one query sees of a segment: tokens of its chosen pages, a bit each, within its bounds.
struct Sight {
  Visible tokens;
  unsigned pages;
};

// Softmax numerators of one query over the listed pages, in place as pairs of bfloat16 (j, j + 16). What it does not see
// becomes zero. Powers of two: `scale` includes log2(e), and so does the maximum that is returned.
template <class S>
inline Partial softmax_segment(float* scores, const PageList& pages, Sight see, float scale) {
  using F = typename S::F;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  unsigned listed = 0;
  for (int i = 0; i < pages.count; ++i) listed |= 1u << pages.index[i];
  if (see.tokens.low >= see.tokens.high || (see.pages & listed) == 0) {
    for (int v = 0; v < 2 * pages.count; ++v) S::store(scores + v * lanes, S::zero());
    return {-infinity, 0.f};
  }
  F peak = S::set1(-infinity);
  for (int i = 0; i < pages.count; ++i) {
    const bool chosen = see.pages >> pages.index[i] & 1;
    for (int v = 0; v < 2; ++v) {
      float* at = scores + i * page_size + v * lanes;
      const int first = pages.index[i] * page_size + v * lanes;
      F x = chosen ? S::load(at) : S::set1(-infinity);
      if (see.tokens.high < first + lanes) x = S::keep_first(x, see.tokens.high - first, -infinity);
      if (see.tokens.low > first) x = S::drop_first(x, see.tokens.low - first, -infinity);
      S::store(at, x);
      peak = S::max(peak, x);
    }
  }
  const float maximum = S::max_of(peak) * scale;
  F total = S::zero();
  for (int i = 0; i < pages.count; ++i) {
    float* at = scores + i * page_size;
    F p[2];
    for (int v = 0; v < 2; ++v) {
      p[v] = exp2<S>(S::fma(S::load(at + v * lanes), S::set1(scale), S::set1(-maximum)));
      total = S::add(total, p[v]);
    }
    S::store_bytes(at, S::pair_bf16(p[0], p[1]));
  }
  return {maximum, S::sum(total)};
}

// values[m][NB * 16 of padded_dim] = sum over the pages' pairs, from column `first` on. `filled`: tokens of the segment
// that exist.
template <class S, int MR, int NB>
FALLOW_NOINLINE void weigh_values(const float* probabilities, const PageList& pages, int filled, int padded_dim, int first, float* values) {
  typename S::F acc[MR][NB];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) acc[m][n] = S::zero();
  }
  for (int i = 0; i < pages.count; ++i) {
    const int count = std::min(page_size, filled - pages.index[i] * page_size);
    const int pairs = std::min(count, page_size / 2);
    for (int j = 0; j < pairs; ++j) {
      const uint16_t* v = pages.values[i] + (static_cast<size_t>(j) * padded_dim + first) * 2;
      typename S::I w[NB];
#pragma GCC unroll 4
      for (int n = 0; n < NB; ++n) w[n] = S::load_bytes(v + n * lanes * 2);
      if (j + page_size / 2 >= count) {
#pragma GCC unroll 4
        for (int n = 0; n < NB; ++n) w[n] = S::even_only(w[n]);  // the odd one is not written yet
      }
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const auto p = S::set1_i32(load_quad(probabilities + m * segment_tokens + i * page_size + j));
#pragma GCC unroll 4
        for (int n = 0; n < NB; ++n) acc[m][n] = S::dot_bf16(acc[m][n], w[n], p);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) S::store(values + static_cast<size_t>(m) * padded_dim + first + n * lanes, acc[m][n]);
  }
}

template <class S, int MR>
FALLOW_NOINLINE void attend_block(const uint16_t* const* queries, const PageList& pages, int filled, bool first, const Sight* see, float scale,
                         int padded_dim, Partial* partials, float* values, float* scores) {
  for (int i = 0; i < pages.count; ++i) {
    const uint16_t* const next[2] = {first ? pages.values[i] : nullptr, first ? pages.keys[i + 1] : nullptr};
    score_page<S, MR>(queries, pages.keys[i], padded_dim / 2, next, scores + i * page_size);
  }
  for (int m = 0; m < MR; ++m) partials[m] = softmax_segment<S>(scores + m * segment_tokens, pages, see[m], scale);
  for (int d = 0; d < padded_dim; d += 4 * lanes) {
    switch (std::min(4, (padded_dim - d) / lanes)) {
      case 1: weigh_values<S, MR, 1>(scores, pages, filled, padded_dim, d, values); break;
      case 2: weigh_values<S, MR, 2>(scores, pages, filled, padded_dim, d, values); break;
      case 3: weigh_values<S, MR, 3>(scores, pages, filled, padded_dim, d, values); break;
      default: weigh_values<S, MR, 4>(scores, pages, filled, padded_dim, d, values); break;
    }
  }
}

// The pages of a segment that row `row` has chosen.
inline unsigned chosen_pages(const AttentionTask& task, int segment, int row) {
  return task.chosen == nullptr ? 0xffu : task.chosen[row * task.chosen_stride + segment];
}

// How many queries from `first` on are computed together: of rows that have chosen the same pages, so that none computes
// what it does not read; the queries of a row that are too many by parts of nearly the same size.
inline int queries_together(const AttentionTask& task, int segment, int first, int group, int most) {
  int left = task.rows * group - first;
  if (task.chosen != nullptr) {
    const int row = first / group;
    int end = row + 1;
    while (end < task.rows && (end + 1 - row) * group <= most && chosen_pages(task, segment, end) == chosen_pages(task, segment, row)) ++end;
    left = end * group - first;
  }
  const int steps = (left + most - 1) / most;
  return (left + steps - 1) / steps;
}

// Those of [begin, end) that a row has chosen.
inline PageList list_pages(const AttentionTask& task, int segment, int begin, int end, int row) {
  const unsigned wanted = chosen_pages(task, segment, row);
  PageList pages;
  for (int page = begin; page < end; ++page) {
    if ((wanted >> page & 1) == 0) continue;
    uint8_t* p = task.pool + static_cast<size_t>(task.page_table[segment * segment_pages + page]) * task.page_stride;
    pages.index[pages.count] = page;
    pages.keys[pages.count] = task.layout.keys(p, task.kv_head);
    pages.values[pages.count] = task.layout.values(p, task.kv_head);
    ++pages.count;
  }
  pages.keys[pages.count] = task.next_keys;
  return pages;
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
  PageList pages;
  for (int first = 0; first < queries;) {
    const int take = queries_together(task, segment, first, group, S::max_rows);
    const uint16_t* q[8];
    Sight see[8];
    for (int m = 0; m < take; ++m) {
      const int row = (first + m) / group;
      const int head = task.kv_head * group + (first + m) % group;
      q[m] = task.queries + row * task.query_stride + static_cast<size_t>(head) * padded_dim;
      see[m] = {visible(task, segment, row), chosen_pages(task, segment, row)};
    }
    if (first == 0 || task.chosen != nullptr) pages = list_pages(task, segment, begin, end, first / group);
    Partial* partial = partials + first;
    float* value = values + static_cast<size_t>(first) * padded_dim;
    float* scores = scratch + static_cast<size_t>(first) * segment_tokens;
    with_rows<S>(take, [&](auto rows) {
      attend_block<S, decltype(rows)::value>(q, pages, filled, first == 0, see, task.scale * log2_e, padded_dim, partial, value, scores);
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
