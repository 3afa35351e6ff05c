// Noise under which the largest logit is a draw from their distribution (the Gumbel-max trick; Maddison, Tarlow, Minka,
// arXiv 1411.0030, section 2): x + temperature * noise, noise of a Gumbel distribution, each token's own whatever the
// others are.
#pragma once
#include "../kernels.h"

namespace fallow::kernels {

// Sixteen numbers below 2^32 out of counters (the mixing steps of Wellons' lowbias32 and one more, with the second key).
template <class S>
inline typename S::I mixed(typename S::I h, NoiseKey key) {
  const auto times = [](typename S::I x, uint32_t factor) { return S::imul(x, S::set1_i32(static_cast<int32_t>(factor))); };
  h = S::iadd(times(h, 0x9e3779b1u), S::set1_i32(static_cast<int32_t>(key.first)));
  h = times(S::ixor(h, S::template shift_right<16>(h)), 0x21f0aaadu);
  h = times(S::ixor(h, S::template shift_right<15>(h)), 0x735a2d97u);
  h = S::ixor(S::ixor(h, S::template shift_right<15>(h)), S::set1_i32(static_cast<int32_t>(key.second)));
  h = times(h, 0x2c1b3c6du);
  return S::ixor(h, S::template shift_right<14>(h));
}

// The natural logarithm of normal positive x, absolute error below 1e-6 next to that of its exponent; of 1 exactly 0.
template <class S>
inline typename S::F log(typename S::F x) {
  const auto bits = S::bits_of(x);
  const auto exponent = S::to_float(S::isub(S::template shift_right<23>(bits), S::set1_i32(127)));
  const auto mantissa = S::float_of(S::ior(S::iand(bits, S::set1_i32(0x007fffff)), S::set1_i32(0x3f800000)));
  const auto t = S::sub(mantissa, S::set1(1.f));
  auto p = S::set1(-8.57466273e-3f);  // of log(1 + t) / t, a Chebyshev fit of degree 7
  for (const float c : {4.42141443e-2f, -1.07853606e-1f, 1.77570179e-1f, -2.44996101e-1f, 3.32761765e-1f, -4.99974489e-1f, 9.99999821e-1f}) {
    p = S::fma(p, t, S::set1(c));
  }
  return S::fma(p, t, S::mul(exponent, S::set1(0.693147182f)));
}

// Of tokens first to first + width - 1, width a multiple of sixteen: out = x + temperature * noise.
template <class S>
void perturb(const float* x, int first, int width, float temperature, NoiseKey key, float* out) {
  alignas(64) static constexpr int32_t steps[lanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  constexpr float small = 1.f / 64.f;
  for (int i = 0; i < width; i += lanes) {
    const auto counters = S::iadd(S::load_bytes(steps), S::set1_i32(first + i));
    // v is uniform in (0, 1), and -log(1 - v) has the exponential distribution whose small values decide: those come
    // from a series in v, what is beyond it from a logarithm that is 0 for them.
    const auto v = S::mul(S::add(S::to_float(S::template shift_right<1>(mixed<S>(counters, key))), S::set1(0.5f)), S::set1(0x1p-31f));
    const auto t = S::min(v, S::set1(small));
    const auto series = S::mul(t, S::fma(t, S::fma(t, S::set1(1.f / 3.f), S::set1(0.5f)), S::set1(1.f)));
    const auto quotient = S::max(S::div(S::sub(S::set1(1.f), v), S::sub(S::set1(1.f), t)), S::set1(0x1p-32f));
    const auto exponential = S::sub(series, log<S>(quotient));
    S::store(out + i, S::fma(S::set1(-temperature), log<S>(exponential), S::load(x + i)));
  }
}

}  // namespace fallow::kernels
