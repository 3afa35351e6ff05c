// What of a row's values lies above a threshold that the row itself sets, or beyond one that is given; the largest of them.
#pragma once
#include <algorithm>
#include <cmath>

#include "../kernels.h"
#include "elementwise.h"
#include "largest.h"

namespace fallow::kernels {

// The sum over a row of term(vector), or term(value) at its end, in an order that the width alone decides.
template <class S, class Term>
inline float row_sum(const float* x, int width, const Term& term) {
  typename S::F totals[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
  int i = 0;
  for (int j = 0; i + lanes <= width; i += lanes, j = (j + 1) % 4) totals[j] = S::add(totals[j], term.of(S::load(x + i)));
  float sum = S::sum(S::add(S::add(totals[0], totals[1]), S::add(totals[2], totals[3])));
  for (; i < width; ++i) sum += term.of(x[i]);
  return sum;
}

template <class S>
struct Value {
  typename S::F of(typename S::F x) const { return x; }
  float of(float x) const { return x; }
};

template <class S>
struct SquareAbout {
  float mean;
  typename S::F of(typename S::F x) const {
    const auto distance = S::sub(x, S::set1(mean));
    return S::mul(distance, distance);
  }
  float of(float x) const { return (x - mean) * (x - mean); }
};

// Spark Transformer's statistical top-k (arXiv 2506.06644, section 3).
template <class S>
void above_threshold(float* x, int width, float quantile) {
  const auto count = static_cast<float>(width);
  const float mean = row_sum<S>(x, width, Value<S>{}) / count;
  const float deviation = std::sqrt(row_sum<S>(x, width, SquareAbout<S>{mean}) / count);
  const float threshold = mean + quantile * deviation;
  int i = 0;
  for (; i + lanes <= width; i += lanes) S::store(x + i, relu<S>(S::sub(S::load(x + i), S::set1(threshold))));
  for (; i < width; ++i) x[i] = x[i] < threshold ? 0.f : x[i] - threshold;  // NaN stays NaN
}

template <class S>
void zero_within(float* x, int width, float threshold) {
  for (int i = 0; i < width; ++i) x[i] = std::fabs(x[i]) <= threshold ? 0.f : x[i];
}

// What is not among the `count` values whose activations are the largest in magnitude becomes zero; where the last of them
// has equals that are not, so do all of these. scratch: the width, rounded up to lanes.
template <class S>
void keep_largest(float* x, int width, int count, Activation activation, float* scratch) {
  if (count >= width) return;
  float last[lanes] = {};
  for (int i = 0; i < width; i += lanes) {
    const bool whole = i + lanes <= width;
    if (!whole) std::copy(x + i, x + width, last);
    S::store(scratch + i, S::abs(activate<S>(S::load(whole ? x + i : last), activation)));
  }
  if (count == 0) {
    std::fill(x, x + width, 0.f);
    return;
  }
  const float least = largest<S>(scratch, width, count);
  const bool has_equals = std::count_if(scratch, scratch + width, [&](float v) { return !(v < least); }) > count;
  for (int i = 0; i < width; ++i) {
    if (scratch[i] < least || (has_equals && scratch[i] == least)) x[i] = 0.f;  // NaN stays NaN
  }
}

}  // namespace fallow::kernels
