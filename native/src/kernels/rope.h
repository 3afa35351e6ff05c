// Rotary position embedding (arXiv 2104.09864) of a token's queries and key, optional RMSNorm of each head before it,
// and the token's place in the KV cache.
#pragma once
#include <cstring>

#include "../bits.h"
#include "../kernels.h"
#include "../prefetch.h"
#include "normalise.h"

namespace fallow::kernels {



// One head: normalised where there is a weight, its first rotary_dim dimensions rotated by halves.
template <class S>
inline void rotate_head(const RopeTask& task, const float* x, const float* norm, float* out) {
  const int dim = task.layout.head_dim;
  if (norm != nullptr) {
    rms_norm<S>({x, norm, task.eps, dim}, out);
  } else {
    std::memcpy(out, x, sizeof(float) * dim);
  }
  const int half = task.rotary_dim / 2;
  const float* cosine = task.table + static_cast<size_t>(task.position) * task.rotary_dim;
  const float* sine = cosine + half;
  int i = 0;
  for (; i + lanes <= half; i += lanes) {
    const auto a = S::load(out + i);
    const auto b = S::load(out + half + i);
    const auto c = S::load(cosine + i);
    const auto s = S::load(sine + i);
    S::store(out + i, S::sub(S::mul(a, c), S::mul(b, s)));
    S::store(out + half + i, S::fma(b, c, S::mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = out[i];
    const float b = out[half + i];
    out[i] = a * cosine[i] - b * sine[i];
    out[half + i] = b * cosine[i] + a * sine[i];
  }
}

// Where a token's keys and values will be written: a cache line for every two dimensions of the keys.
inline void prefetch_slot(const KvLayout& layout, uint8_t* page, int position) {
  const int slot = position % page_size;
  for (int h = 0; h < layout.num_kv_heads; ++h) {
    const uint16_t* keys = layout.keys(page, h) + slot * 2;
    for (int d = 0; d < layout.padded_dim() / 2; ++d) prefetch_to_write(keys + static_cast<size_t>(d) * page_size * 2);
    const uint16_t* values = layout.values(page, h) + static_cast<size_t>(slot % (page_size / 2)) * layout.padded_dim() * 2;
    for (int d = 0; d < layout.padded_dim(); d += 32) prefetch_to_write(values + d * 2);
  }
}

template <class S>
void rope(const RopeTask& task) {
  const KvLayout& layout = task.layout;
  const int dim = layout.head_dim;
  const int padded_dim = layout.padded_dim();
  if (task.next_page != nullptr) prefetch_slot(layout, task.next_page, task.next_position);
  alignas(64) float head[max_head_dim] = {};
  alignas(64) uint16_t rounded[max_head_dim];
  const auto round_head = [&](uint16_t* out) {
    for (int d = 0; d < padded_dim; d += lanes) S::store_bf16(out + d, S::load(head + d));
  };
  for (int h = 0; h < layout.num_heads; ++h) {
    rotate_head<S>(task, task.qkv + h * dim, task.q_norm, head);
    round_head(task.queries + static_cast<size_t>(h) * padded_dim);
  }
  const int slot = task.position % page_size;
  for (int h = 0; h < layout.num_kv_heads; ++h) {
    rotate_head<S>(task, task.qkv + (layout.num_heads + h) * dim, task.k_norm, head);
    round_head(rounded);
    uint16_t* keys = layout.keys(task.page, h);
    for (int d = 0; d < padded_dim; d += 2) std::memcpy(keys + (static_cast<size_t>(d / 2) * page_size + slot) * 2, rounded + d, 4);
    const float* v = task.qkv + (layout.num_heads + layout.num_kv_heads + h) * dim;
    std::memcpy(head, v, sizeof(float) * dim);
    round_head(rounded);
    uint16_t* values = layout.values(task.page, h) + static_cast<size_t>(slot % (page_size / 2)) * padded_dim * 2 + slot / (page_size / 2);
    for (int d = 0; d < padded_dim; ++d) values[2 * d] = rounded[d];
  }
}

}  // namespace fallow::kernels
