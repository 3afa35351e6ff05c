// Sixteen lanes in two AVX2 registers (with FMA and F16C).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "bits.h"

namespace fallow {

struct Avx2 {
  static constexpr const char* name = "avx2";
  static constexpr int max_rows = 2;

  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F abs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
  }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F reciprocal(F x) { return div(set1(1.f), x); }
  // x - floor(x), zero for infinities; and x * 2^floor(e)
  static F above_floor(F x) { return {above_floor(x.a), above_floor(x.b)}; }
  static F scale_by_floor(F x, F e) { return {scale_by_floor(x.a, e.a), scale_by_floor(x.b, e.b)}; }
  static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
  static F keep_first(F x, int n, float fill) {
    const I m = first(n);
    const __m256 f = _mm256_set1_ps(fill);
    return {_mm256_blendv_ps(f, x.a, _mm256_castsi256_ps(m.a)), _mm256_blendv_ps(f, x.b, _mm256_castsi256_ps(m.b))};
  }
  static F drop_first(F x, int n, float fill) {
    const I m = first(n);
    const __m256 f = _mm256_set1_ps(fill);
    return {_mm256_blendv_ps(x.a, f, _mm256_castsi256_ps(m.a)), _mm256_blendv_ps(x.b, f, _mm256_castsi256_ps(m.b))};
  }
  static float sum(F x) {
    const __m256 h = _mm256_add_ps(x.a, x.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  static float max_of(F x) {
    const __m256 h = _mm256_max_ps(x.a, x.b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
  }
  static F max_of_each(const F (&v)[16]) {
    alignas(32) float m[16];
    for (int i = 0; i < 16; ++i) m[i] = max_of(v[i]);
    return load(m);
  }
  static F sum_of_each(const F (&v)[16]) {
    alignas(32) float s[16];
    for (int i = 0; i < 16; ++i) s[i] = sum(v[i]);
    return load(s);
  }
  static I sum_of_each(const I (&v)[16]) {
    alignas(32) int32_t s[16];
    for (int i = 0; i < 16; ++i) {
      const __m256i h = _mm256_add_epi32(v[i].a, v[i].b);
      __m128i q = _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
      q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
      s[i] = _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
    }
    return load_bytes(s);
  }

  static I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I load_bytes(const void* p) {
    const auto* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static void store_bytes(void* p, I x) {
    auto* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, x.a);
    _mm256_storeu_si256(q + 1, x.b);
  }
  static I isub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  static I iadd(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  template <int N>
  static I shift_left(I x) {
    return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
  }
  template <int N>
  static I shift_right(I x) {
    return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
  }
  static I imul(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
  static I iand(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
  static I ior(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static I ixor(I x, I y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
  static I bits_of(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
  static F float_of(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
  static I set1_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static I low_nibbles(I x) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
  }
  // Every 128 bits are a table of sixteen signed bytes, and the places in it, 0 to 15, of sixteen that are looked up.
  static I look_up(I tables, I places) { return {_mm256_shuffle_epi8(tables.a, places.a), _mm256_shuffle_epi8(tables.b, places.b)}; }
  static I add_bytes(I x, I y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
  struct Sums {
    I even, odd;
  };
  static Sums no_sums() { return {izero(), izero()}; }
  static Sums add_wide(Sums sums, I x) {
    const __m256i evens = _mm256_set1_epi16(1);
    const __m256i odds = _mm256_set1_epi16(256);
    return {{_mm256_add_epi16(sums.even.a, _mm256_maddubs_epi16(evens, x.a)), _mm256_add_epi16(sums.even.b, _mm256_maddubs_epi16(evens, x.b))},
            {_mm256_add_epi16(sums.odd.a, _mm256_maddubs_epi16(odds, x.a)), _mm256_add_epi16(sums.odd.b, _mm256_maddubs_epi16(odds, x.b))}};
  }
  static I sum_of_tables(Sums sums) {
    const auto folded = [](I x) {
      const __m256i h = _mm256_add_epi16(x.a, x.b);
      return _mm_add_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    };
    const __m128i even = folded(sums.even);
    const __m128i odd = folded(sums.odd);
    return {_mm256_cvtepi16_epi32(_mm_unpacklo_epi16(even, odd)), _mm256_cvtepi16_epi32(_mm_unpackhi_epi16(even, odd))};
  }
  static void interleave_bytes(I (&v)[4]) {
    const auto halves = [](__m256i (&h)[4]) {
      const __m256i low[2] = {_mm256_unpacklo_epi8(h[0], h[1]), _mm256_unpacklo_epi8(h[2], h[3])};
      const __m256i high[2] = {_mm256_unpackhi_epi8(h[0], h[1]), _mm256_unpackhi_epi8(h[2], h[3])};
      h[0] = _mm256_unpacklo_epi16(low[0], low[1]);
      h[1] = _mm256_unpackhi_epi16(low[0], low[1]);
      h[2] = _mm256_unpacklo_epi16(high[0], high[1]);
      h[3] = _mm256_unpackhi_epi16(high[0], high[1]);
    };
    __m256i a[4];
    __m256i b[4];
    for (int i = 0; i < 4; ++i) a[i] = v[i].a, b[i] = v[i].b;
    halves(a);
    halves(b);
    for (int i = 0; i < 4; ++i) v[i] = {a[i], b[i]};
  }
  // 16 bytes of each row, from `at` on, as four vectors: lane r of vector q holds bytes 4 q to 4 q + 3 of row r.
  static void transpose_quads(const uint8_t* const (&rows)[16], size_t at, uint8_t* out) {
    const auto load = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + at)); };
    for (int r = 0; r < 16; r += 4) {
      const __m128i a = load(r);
      const __m128i b = load(r + 1);
      const __m128i c = load(r + 2);
      const __m128i d = load(r + 3);
      const __m128i ab[2] = {_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b)};
      const __m128i cd[2] = {_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d)};
      const auto put = [&](int q, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out + q * 64 + r * 4), x); };
      for (int half = 0; half < 2; ++half) {
        put(2 * half, _mm_unpacklo_epi64(ab[half], cd[half]));
        put(2 * half + 1, _mm_unpackhi_epi64(ab[half], cd[half]));
      }
    }
  }
  static I high_nibbles(I x) { return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
  static I dot_u8s8(I acc, I u, I s) { return {dot_u8s8(acc.a, u.a, s.a), dot_u8s8(acc.b, u.b, s.b)}; }
  // u up to 15: products of two fit 16 bits
  static I dot_u4s8(I acc, I u, I s) {
    const __m256i one = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(u.a, s.a), one)),
            _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(u.b, s.b), one))};
  }

  // A bit for each lane whose magnitude is above `threshold`, or that is NaN.
  static unsigned beyond(F x, float threshold) {
    const F magnitude = abs(x);
    const __m256 t = _mm256_set1_ps(threshold);
    const auto bits = [&](__m256 v) { return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, t, _CMP_NLE_UQ))); };
    return bits(magnitude.a) | bits(magnitude.b) << 8;
  }
  static I load_u8(const uint8_t* p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(codes), _mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8))};
  }
  static F load_f16(const uint16_t* p) {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  }
  static F load_bf16(const uint16_t* p) {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return {widen_bf16(_mm_loadu_si128(q)), widen_bf16(_mm_loadu_si128(q + 1))};
  }
  static void store_bf16(uint16_t* p, F x) {
    const __m256i packed = _mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  static I pair_bf16(F even, F odd) {
    return {_mm256_or_si256(round_bf16(even.a), _mm256_slli_epi32(round_bf16(odd.a), 16)),
            _mm256_or_si256(round_bf16(even.b), _mm256_slli_epi32(round_bf16(odd.b), 16))};
  }
  static F dot_bf16(F acc, I x, I y) { return {dot_bf16(acc.a, x.a, y.a), dot_bf16(acc.b, x.b, y.b)}; }
  static void store_s8(int8_t* p, I x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
  static I even_only(I x) {
    const __m256i m = _mm256_set1_epi32(0xffff);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
  }

 private:
  static I first(int n) {
    const __m256i count = _mm256_set1_epi32(n);
    return {_mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
            _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
  }
  // Within the exponents that change a float; NaN stays NaN.
  static __m256 bounded(__m256 x) { return _mm256_max_ps(_mm256_set1_ps(-160.f), _mm256_min_ps(_mm256_set1_ps(160.f), x)); }
  static __m256 above_floor(__m256 x) {
    x = bounded(x);
    return _mm256_sub_ps(x, _mm256_floor_ps(x));
  }
  // In two steps, so that results below the normal range are reached without an exponent out of range.
  static __m256 scale_by_floor(__m256 x, __m256 e) {
    const __m256 n = _mm256_floor_ps(bounded(e));
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    const auto power = [](__m256i e) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23)); };
    const __m256 y = _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(whole, half)));
    return _mm256_blendv_ps(y, n, _mm256_cmp_ps(n, n, _CMP_UNORD_Q));
  }
  static __m256i dot_u8s8(__m256i acc, __m256i u, __m256i s) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }
  static __m256 widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  // The upper sixteen bits, rounded to nearest even, in the lower half of each lane; NaN stays NaN.
  static __m256i round_bf16(__m256 x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    const __m256 unordered = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(nan), unordered));
  }
  static __m256 dot_bf16(__m256 acc, __m256i x, __m256i y) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const auto low_float = [](__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); };
    const auto high_float = [&](__m256i v) { return _mm256_castsi256_ps(_mm256_and_si256(v, high)); };
    return _mm256_fmadd_ps(high_float(x), high_float(y), _mm256_fmadd_ps(low_float(x), low_float(y), acc));
  }
};

}  // namespace fallow
