// Which pages of a KV cache a query reads, by summaries of their keys.
//
// If the keys of a page were drawn from a normal distribution with the page's mean and variances, the mean of
// exp(q k) over them would be exp(q mean + q^2 variance / 2). So much of each head's attention is expected at a page;
// the pages with the most, summed over the heads of the group, are chosen.
#pragma once
#include <algorithm>
#include <limits>

#include "../bits.h"
#include "../kernels.h"
#include "../prefetch.h"
#include "elementwise.h"
#include "largest.h"
#include "linear.h"

namespace fallow::kernels {

template <class S>
void summarise(const KvLayout& layout, const uint16_t* keys, uint16_t* summary) {
  for (int d = 0; d < layout.padded_dim(); ++d) {
    const uint16_t* key = keys + static_cast<size_t>(d / 2) * page_size * 2 + d % 2;
    float sum = 0.f;
    for (int t = 0; t < page_size; ++t) sum += bf16_to_float(key[2 * t]);
    const float mean = sum / page_size;
    float squares = 0.f;
    for (int t = 0; t < page_size; ++t) {
      const float distance = bf16_to_float(key[2 * t]) - mean;
      squares += distance * distance;
    }
    summary[2 * d] = float_to_bf16(mean);
    summary[2 * d + 1] = float_to_bf16(squares / page_size);
  }
}

// In place exp2(x) / sum, of n values, padded to whole vectors.
template <class S>
inline void softmax(float* x, int n) {
  const int padded = (n + lanes - 1) / lanes * lanes;
  std::fill(x + n, x + padded, -std::numeric_limits<float>::infinity());
  auto peak = S::set1(-std::numeric_limits<float>::infinity());
  for (int i = 0; i < padded; i += lanes) peak = S::max(peak, S::load(x + i));
  const float maximum = S::max_of(peak);
  auto total = S::zero();
  for (int i = 0; i < padded; i += lanes) {
    const auto p = exp2<S>(S::sub(S::load(x + i), S::set1(maximum)));
    S::store(x + i, p);
    total = S::add(total, p);
  }
  const float inverse = 1.f / S::sum(total);
  for (int i = 0; i < padded; i += lanes) S::store(x + i, S::mul(S::load(x + i), S::set1(inverse)));
}

template <class S>
void choose_pages(const PageChoiceTask& task, uint8_t* chosen, float* scratch) {
  const KvLayout& layout = task.layout;
  const int n = task.end - task.first;
  if (task.count == 0) return;
  const auto choose = [&](int page) { chosen[page / segment_pages] |= static_cast<uint8_t>(1u << page % segment_pages); };
  if (n <= task.count) {
    for (int page = task.first; page < task.end; ++page) choose(page);
    return;
  }
  const int group = layout.num_heads / layout.num_kv_heads;
  const int padded_dim = layout.padded_dim();
  const int padded = (n + lanes - 1) / lanes * lanes;
  // What faces a summary: of each dimension q and scale q^2 / 2, a pair of bfloat16.
  float* factors = scratch;
  float* masses = factors + static_cast<size_t>(group) * padded_dim;  // [group][padded]
  float* sums = masses + static_cast<size_t>(group) * padded;
  for (int h = 0; h < group; ++h) {
    for (int d = 0; d < padded_dim; d += lanes) {
      const auto q = S::load_bf16(task.queries + static_cast<size_t>(h) * padded_dim + d);
      S::store_bytes(factors + static_cast<size_t>(h) * padded_dim + d, S::pair_bf16(q, S::mul(S::mul(q, q), S::set1(0.5f * task.scale))));
    }
  }
  const auto summary_of = [&](int i) {
    const int page = task.page_table[task.first + std::min(i, n - 1)];
    return task.summaries + (static_cast<size_t>(page) * layout.num_kv_heads + task.kv_head) * layout.summary_elements();
  };
  const auto summary_lines = static_cast<int>(layout.summary_elements() * sizeof(uint16_t) / cache_line);
  const int steps = group * padded_dim / lanes;
  const int lines_a_step = (lanes * summary_lines + steps - 1) / steps;
  for (int begin = 0; begin < n; begin += lanes) {
    const uint16_t* summary[lanes];
    for (int i = 0; i < lanes; ++i) summary[i] = summary_of(begin + i);
    int fetched = 0;  // lines of the next summaries
    for (int h = 0; h < group; ++h) {
      const float* factor = factors + static_cast<size_t>(h) * padded_dim;
      typename S::F acc[lanes];
      for (auto& a : acc) a = S::zero();
      for (int d = 0; d < padded_dim; d += lanes) {
        const auto f = S::load_bytes(factor + d);
        for (int i = 0; i < lines_a_step && fetched < lanes * summary_lines; ++i, ++fetched) {  // all at once would wait for each other
          prefetch_far(reinterpret_cast<const uint8_t*>(summary_of(begin + lanes + fetched / summary_lines)) + fetched % summary_lines * cache_line);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) acc[i] = S::dot_bf16(acc[i], S::load_bytes(summary[i] + 2 * d), f);
      }
      const auto exponents = S::mul(S::sum_of_each(acc), S::set1(task.scale * log2_e));
      S::store(masses + static_cast<size_t>(h) * padded + begin, exponents);
    }
  }
  std::fill(sums, sums + padded, 0.f);
  for (int h = 0; h < group; ++h) {
    float* mass = masses + static_cast<size_t>(h) * padded;
    softmax<S>(mass, n);
    for (int i = 0; i < padded; i += lanes) S::store(sums + i, S::add(S::load(sums + i), S::load(mass + i)));
  }
  // NaN, from keys that are no numbers, counts as nothing.
  for (int i = 0; i < n; ++i) sums[i] = sums[i] > 0.f ? sums[i] : 0.f;
  const float least = largest<S>(sums, n, task.count);
  int left = task.count;
  for (int i = 0; i < n; ++i) {
    if (sums[i] > least) choose(task.first + i), --left;
  }
  for (int i = 0; i < n && left > 0; ++i) {
    if (sums[i] == least) choose(task.first + i), --left;
  }
}

}  // namespace fallow::kernels
