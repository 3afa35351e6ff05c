// RMSNorm (arXiv 1910.07467) and the conversion of activations into what the linear kernels read.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../bits.h"
#include "../kernels.h"

namespace fallow::kernels {

template <class S>
inline float mean_square(const float* x, int width) {
  typename S::F totals[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
  int i = 0;
  for (; i + 4 * lanes <= width; i += 4 * lanes) {
    for (int j = 0; j < 4; ++j) {
      const auto v = S::load(x + i + j * lanes);
      totals[j] = S::fma(v, v, totals[j]);
    }
  }
  for (; i + lanes <= width; i += lanes) {
    const auto v = S::load(x + i);
    totals[0] = S::fma(v, v, totals[0]);
  }
  float sum = S::sum(S::add(S::add(totals[0], totals[1]), S::add(totals[2], totals[3])));
  for (; i < width; ++i) sum += x[i] * x[i];
  return sum / static_cast<float>(width);
}

template <class S>
void rms_norm(const NormTask& task, float* out) {
  const float scale = 1.f / std::sqrt(mean_square<S>(task.x, task.width) + task.eps);
  const auto shifted = [&](auto has_shift) {
    int i = 0;
    for (; i + lanes <= task.width; i += lanes) {
      auto y = S::mul(S::mul(S::load(task.x + i), S::set1(scale)), S::load(task.weight + i));
      if constexpr (decltype(has_shift)::value) y = S::add(y, S::load(task.shift + i));
      S::store(out + i, y);
    }
    for (; i < task.width; ++i) out[i] = task.x[i] * scale * task.weight[i] + (task.shift != nullptr ? task.shift[i] : 0.f);
  };
  if (task.shift != nullptr) return shifted(std::true_type{});
  shifted(std::false_type{});
}

// A group's scale, midpoint and codes. Symmetric: scale = max|x| / 127. Asymmetric: codes span [minimum, maximum].
// Sixteen groups at a time, so that what is computed once a group is a vector operation too.
template <class S, int GROUP>
inline void quantise_groups(const float* x, const ActivationFormat& f, uint8_t* row, int begin, int end) {
  using F = typename S::F;
  using I = typename S::I;
  constexpr int vectors = GROUP / lanes;
  const auto at = [&](size_t offset, int g) { return row + offset + static_cast<size_t>(g) * 4; };
  for (int first = begin; first < end; first += lanes) {
    const int count = std::min(lanes, end - first);
    const float* values = x + first * GROUP;
    // The largest of each group's values, negated or made positive first.
    const auto largest = [&](const auto& of) {
      F high[lanes];
      for (int g = 0; g < count; ++g) {
        high[g] = of(S::load(values + g * GROUP));
        for (int i = 1; i < vectors; ++i) high[g] = S::max(high[g], of(S::load(values + g * GROUP + i * lanes)));
      }
      for (int g = count; g < lanes; ++g) high[g] = S::zero();
      return S::max_of_each(high);
    };
    alignas(64) float middle[lanes] = {};
    F peak;
    if (!f.asymmetric) {
      peak = largest([](F v) { return S::abs(v); });
    } else {
      peak = largest([](F v) { return v; });
      const F lowest = largest([](F v) { return S::sub(S::zero(), v); });
      alignas(64) uint16_t rounded[lanes];
      S::store_bf16(rounded, S::mul(S::sub(peak, lowest), S::set1(0.5f)));
      const F centre = S::load_bf16(rounded);
      S::store(middle, centre);
      peak = S::max(S::sub(peak, centre), S::add(lowest, centre));
    }
    // Groups of all zeros have no scale: a tiny divisor keeps the quotient finite.
    const F scale = S::mul(peak, S::set1(1.f / 127.f));
    alignas(64) float inverse[lanes];
    S::store(inverse, S::div(S::set1(127.f), S::max(peak, S::set1(1e-30f))));
    I totals[lanes];
    for (int g = 0; g < count; ++g) {
      totals[g] = S::izero();
      for (int i = 0; i < vectors; ++i) {
        F v = S::load(values + g * GROUP + i * lanes);
        if (f.asymmetric) v = S::sub(v, S::set1(middle[g]));
        const I q = S::to_int(S::mul(v, S::set1(inverse[g])));
        S::store_s8(reinterpret_cast<int8_t*>(row) + (first + g) * GROUP + i * lanes, q);
        totals[g] = S::iadd(totals[g], q);
      }
    }
    for (int g = count; g < lanes; ++g) totals[g] = S::izero();
    const I sum = S::sum_of_each(totals);
    const I negative = S::isub(S::izero(), sum);
    const F real_sum = S::mul(scale, S::to_float(sum));
    const auto put = [&](uint8_t* out, const void* from) { std::memcpy(out, from, static_cast<size_t>(count) * 4); };
    alignas(64) float buffer[lanes];
    S::store(buffer, scale);
    put(at(f.scales_at(), first), buffer);
    S::store_bytes(buffer, S::template shift_left<3>(negative));
    put(at(f.start_at(false), first), buffer);
    S::store_bytes(buffer, S::template shift_left<7>(negative));
    put(at(f.start_at(true), first), buffer);
    const F centre = S::load(middle);
    if (f.pairs_kind == Pairs::offsets) {
      alignas(64) uint16_t halves[lanes];
      S::store_bf16(halves, real_sum);
      std::memcpy(row + f.pairs_at() + static_cast<size_t>(first) * 2, halves, static_cast<size_t>(count) * 2);
    } else if (f.pairs_kind == Pairs::sums) {
      S::store_bytes(buffer, S::pair_bf16(centre, centre));
      put(at(f.pairs_at(), first), buffer);
    } else if (f.pairs_kind == Pairs::both) {
      alignas(64) uint32_t sums[lanes];
      S::store_bytes(buffer, S::pair_bf16(centre, centre));
      S::store_bytes(sums, S::pair_bf16(real_sum, S::zero()));
      for (int g = 0; g < count; ++g) {
        std::memcpy(at(f.pairs_at(), 2 * (first + g)), buffer + g, 4);
        std::memcpy(at(f.pairs_at(), 2 * (first + g) + 1), sums + g, 4);
      }
    }
  }
  const int groups = f.groups();
  if (end == groups && groups % 2 == 1 && f.pairs_kind == Pairs::offsets) {
    std::memset(row + f.pairs_at() + static_cast<size_t>(groups) * 2, 0, 2);
  }
}

template <class S>
void quantise(const float* x, const ActivationFormat& f, uint8_t* row, int begin, int end) {
  if (f.codes == Codes::bf16) {
    if (begin >= end) return;
    auto* out = reinterpret_cast<uint16_t*>(row);
    int i = 0;
    for (; i + lanes <= f.in_features; i += lanes) S::store_bf16(out + i, S::load(x + i));
    for (; i < f.in_features; ++i) out[i] = float_to_bf16(x[i]);
    if (f.in_features % 2 == 1) out[f.in_features] = 0;
    return;
  }
  if (f.group == 16) return quantise_groups<S, 16>(x, f, row, begin, end);
  quantise_groups<S, 32>(x, f, row, begin, end);
}

}  // namespace fallow::kernels
