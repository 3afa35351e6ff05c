// Functions of single values, sixteen at a time.
#pragma once
#include "../kernels.h"

namespace fallow::kernels {

// 2^x, relative error below 2e-7: 2^floor(x) p(x - floor(x)), p the minimax polynomial of degree 5 with p(0) = 1.
template <class S>
inline typename S::F exp2(typename S::F x) {
  const auto r = S::above_floor(x);
  auto p = S::set1(1.867130166e-3f);
  p = S::fma(p, r, S::set1(9.017029777e-3f));
  p = S::fma(p, r, S::set1(5.579991266e-2f));
  p = S::fma(p, r, S::set1(2.401644439e-1f));
  p = S::fma(p, r, S::set1(6.931512952e-1f));
  p = S::fma(p, r, S::set1(1.f));
  return S::scale_by_floor(p, x);
}

constexpr float log2_e = 1.44269504f;

// x / (1 + exp(-z)). Beyond an exponent of 64 the quotient has no digit of x left.
template <class S>
inline typename S::F times_sigmoid(typename S::F x, typename S::F z) {
  const auto exponent = S::min(S::set1(64.f), S::mul(z, S::set1(-log2_e)));
  return S::mul(x, S::reciprocal(S::add(S::set1(1.f), exp2<S>(exponent))));
}

template <class S>
inline typename S::F silu(typename S::F x) {
  return times_sigmoid<S>(x, x);
}

// 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
template <class S>
inline typename S::F gelu_tanh(typename S::F x) {
  const auto cubic = S::mul(S::mul(x, x), x);
  return times_sigmoid<S>(x, S::mul(S::fma(cubic, S::set1(0.044715f), x), S::set1(1.5957691216f)));
}

// NaN stays NaN: of two values that do not compare, max is the second.
template <class S>
inline typename S::F relu(typename S::F x) {
  return S::max(S::zero(), x);
}

template <class S>
inline typename S::F relu2(typename S::F x) {
  const auto positive = relu<S>(x);
  return S::mul(positive, positive);
}

template <class S>
FALLOW_INLINE typename S::F activate(typename S::F x, Activation activation) {
  if (activation == Activation::silu) return silu<S>(x);
  return activation == Activation::gelu_tanh ? gelu_tanh<S>(x) : relu<S>(x);
}

template <class S>
void add(const float* x, float* out, int width) {
  int i = 0;
  for (; i + lanes <= width; i += lanes) S::store(out + i, S::add(S::load(out + i), S::load(x + i)));
  for (; i < width; ++i) out[i] += x[i];
}

template <class S>
void gate(const float* g, const float* up, float* out, int width, Activation activation) {
  for (int i = 0; i < width; i += lanes) {
    float tail_gate[lanes] = {};
    float tail_up[lanes] = {};
    const bool whole = i + lanes <= width;
    if (!whole) {
      for (int j = 0; j < width - i; ++j) {
        tail_gate[j] = g[i + j];
        tail_up[j] = up[i + j];
      }
    }
    const auto x = S::load(whole ? g + i : tail_gate);
    const auto y = S::mul(activate<S>(x, activation), S::load(whole ? up + i : tail_up));
    if (whole) {
      S::store(out + i, y);
    } else {
      S::store(tail_gate, y);
      for (int j = 0; j < width - i; ++j) out[i + j] = tail_gate[j];
    }
  }
}

// out = keep * x + again * first
template <class S>
void mix(const float* x, float keep, const float* first, float again, float* out, int width) {
  int i = 0;
  for (; i + lanes <= width; i += lanes) {
    S::store(out + i, S::fma(S::set1(keep), S::load(x + i), S::mul(S::set1(again), S::load(first + i))));
  }
  for (; i < width; ++i) out[i] = keep * x[i] + again * first[i];
}

// x = cap * tanh(x / cap) = 2 cap * sigmoid(2 x / cap) - cap
template <class S>
void soft_cap(float* x, int width, float cap) {
  for (int i = 0; i < width; i += lanes) {
    const auto doubled = times_sigmoid<S>(S::set1(2.f * cap), S::mul(S::load(x + i), S::set1(2.f / cap)));
    S::store(x + i, S::sub(doubled, S::set1(cap)));
  }
}

}  // namespace fallow::kernels
