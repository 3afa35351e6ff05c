// RMSNorm (arXiv 1910.07467) and the conversion of activations into what the linear kernels read.
#pragma once
#include <cmath>
#include <cstring>

#include "../bits.h"
#include "../kernels.h"

namespace fallow::kernels {

template <class S>
inline float mean_square(const float* x, int width) {
  auto total = S::zero();
  int i = 0;
  for (; i + lanes <= width; i += lanes) {
    const auto v = S::load(x + i);
    total = S::fma(v, v, total);
  }
  float sum = S::sum(total);
  for (; i < width; ++i) sum += x[i] * x[i];
  return sum / static_cast<float>(width);
}

template <class S>
void rms_norm(const NormTask& task, float* out) {
  const float scale = 1.f / std::sqrt(mean_square<S>(task.x, task.width) + task.eps);
  int i = 0;
  for (; i + lanes <= task.width; i += lanes) {
    S::store(out + i, S::mul(S::mul(S::load(task.x + i), S::set1(scale)), S::load(task.weight + i)));
  }
  for (; i < task.width; ++i) out[i] = task.x[i] * scale * task.weight[i];
}

// A group's scale, midpoint and codes. Symmetric: scale = max|x| / 127. Asymmetric: codes span [minimum, maximum].
template <class S, int GROUP>
inline void quantise_groups(const float* x, const ActivationFormat& f, uint8_t* row) {
  using F = typename S::F;
  constexpr int vectors = GROUP / lanes;
  const int groups = f.groups();
  auto* codes = reinterpret_cast<int8_t*>(row);
  auto* scales = reinterpret_cast<float*>(row + f.scales_at());
  auto* start4 = reinterpret_cast<int32_t*>(row + f.start_at(false));
  auto* start8 = reinterpret_cast<int32_t*>(row + f.start_at(true));
  auto* pairs = reinterpret_cast<uint16_t*>(row + f.pairs_at());
  for (int g = 0; g < groups; ++g) {
    F v[vectors];
    for (int i = 0; i < vectors; ++i) v[i] = S::load(x + g * GROUP + i * lanes);
    float middle = 0.f;
    if (f.asymmetric) {
      F high = v[0];
      F low = S::sub(S::zero(), v[0]);
      for (int i = 1; i < vectors; ++i) {
        high = S::max(high, v[i]);
        low = S::max(low, S::sub(S::zero(), v[i]));
      }
      middle = bf16_to_float(float_to_bf16(0.5f * (S::max_of(high) - S::max_of(low))));
      for (int i = 0; i < vectors; ++i) v[i] = S::sub(v[i], S::set1(middle));
    }
    F peak = S::abs(v[0]);
    for (int i = 1; i < vectors; ++i) peak = S::max(peak, S::abs(v[i]));
    const float largest = S::max_of(peak);
    const float scale = largest / 127.f;
    const F inverse = S::set1(largest > 1e-30f ? 127.f / largest : 0.f);
    auto total = S::izero();
    for (int i = 0; i < vectors; ++i) {
      const auto q = S::to_int(S::mul(v[i], inverse));
      S::store_s8(codes + g * GROUP + i * lanes, q);
      total = S::iadd(total, q);
    }
    const auto sum = static_cast<uint32_t>(S::isum(total));  // unsigned: NaN activations may wrap
    scales[g] = scale;
    start4[g] = static_cast<int32_t>(0u - 8u * sum);
    start8[g] = static_cast<int32_t>(0u - 128u * sum);
    const float real_sum = scale * static_cast<float>(static_cast<int32_t>(sum));
    if (f.pairs_kind == Pairs::offsets) pairs[g] = float_to_bf16(real_sum);
    if (f.pairs_kind == Pairs::sums) pairs[g] = float_to_bf16(middle);
    if (f.pairs_kind == Pairs::both) {
      pairs[2 * g] = float_to_bf16(middle);
      pairs[2 * g + 1] = float_to_bf16(real_sum);
    }
  }
  if (groups % 2 == 1 && (f.pairs_kind == Pairs::offsets || f.pairs_kind == Pairs::sums)) pairs[groups] = 0;
}

template <class S>
void quantise(const float* x, const ActivationFormat& f, uint8_t* row) {
  if (f.codes == Codes::bf16) {
    auto* out = reinterpret_cast<uint16_t*>(row);
    int i = 0;
    for (; i + lanes <= f.in_features; i += lanes) S::store_bf16(out + i, S::load(x + i));
    for (; i < f.in_features; ++i) out[i] = float_to_bf16(x[i]);
    if (f.in_features % 2 == 1) out[f.in_features] = 0;
    return;
  }
  if (f.group == 16) return quantise_groups<S, 16>(x, f, row);
  quantise_groups<S, 32>(x, f, row);
}

}  // namespace fallow::kernels
