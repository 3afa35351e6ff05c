// Functions of single values, sixteen at a time.
#pragma once
#include "../packed.h"

namespace fallow::kernels {

// exp(x), relative error below 2e-7: 2^n * p(r) with r in [-ln2/2, ln2/2]; 0 below -87.3, finite above.
template <class S>
inline typename S::F exp(typename S::F x) {
  using F = typename S::F;
  const F low = S::set1(-87.33f);
  x = S::min(S::max(x, low), S::set1(88.37f));
  const F n = S::round(S::mul(x, S::set1(1.44269504f)));
  F r = S::fma(n, S::set1(-0.693359375f), x);
  r = S::fma(n, S::set1(2.12194440e-4f), r);
  F p = S::set1(1.9875691500e-4f);
  p = S::fma(p, r, S::set1(1.3981999507e-3f));
  p = S::fma(p, r, S::set1(8.3334519073e-3f));
  p = S::fma(p, r, S::set1(4.1665795894e-2f));
  p = S::fma(p, r, S::set1(1.6666665459e-1f));
  p = S::fma(p, r, S::set1(5.0000001201e-1f));
  p = S::fma(S::mul(p, r), r, S::add(r, S::set1(1.f)));
  return S::scale2(p, n);
}

template <class S>
inline typename S::F silu(typename S::F x) {
  const auto one = S::set1(1.f);
  return S::div(x, S::add(one, exp<S>(S::sub(S::zero(), x))));
}

// 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
template <class S>
inline typename S::F gelu_tanh(typename S::F x) {
  const auto cubic = S::mul(S::mul(x, x), x);
  const auto inner = S::mul(S::fma(cubic, S::set1(0.044715f), x), S::set1(1.5957691216f));
  return S::div(x, S::add(S::set1(1.f), exp<S>(S::sub(S::zero(), inner))));
}

template <class S>
void add(const float* x, float* out, int width) {
  int i = 0;
  for (; i + lanes <= width; i += lanes) S::store(out + i, S::add(S::load(out + i), S::load(x + i)));
  for (; i < width; ++i) out[i] += x[i];
}

template <class S>
void gate(const float* g, const float* up, float* out, int width, bool gelu) {
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
    const auto y = S::mul(gelu ? gelu_tanh<S>(x) : silu<S>(x), S::load(whole ? up + i : tail_up));
    if (whole) {
      S::store(out + i, y);
    } else {
      S::store(tail_gate, y);
      for (int j = 0; j < width - i; ++j) out[i + j] = tail_gate[j];
    }
  }
}

}  // namespace fallow::kernels
