// Sixteen lanes in AVX-512 (F, BW, DQ, VL, VNNI, BF16).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fallow {

struct Avx512 {
  static constexpr const char* name = "avx512";
  static constexpr int max_rows = 6;  // rows of a register tile, by two blocks of sixteen lanes

  using F = __m512;   // 16 float32
  using I = __m512i;  // 16 int32, 64 bytes, or 16 pairs of bfloat16

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  // 1 / x to within two units in the last place, for normal x with a normal reciprocal
  static F reciprocal(F x) {
    const F y = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(2.f)));
  }
  // x - floor(x), zero for infinities; and x * 2^floor(e)
  static F above_floor(F x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static F scale_by_floor(F x, F e) { return _mm512_scalef_ps(x, e); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static I to_int(F x) { return _mm512_cvtps_epi32(x); }
  // lanes with index >= n become `fill`
  static F keep_first(F x, int n, float fill) {
    const __mmask16 m = n >= 16 ? 0xffff : (n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1));
    return _mm512_mask_blend_ps(m, _mm512_set1_ps(fill), x);
  }
  // lanes with index < n become `fill`
  static F drop_first(F x, int n, float fill) {
    const __mmask16 m = n >= 16 ? 0xffff : (n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1));
    return _mm512_mask_blend_ps(m, x, _mm512_set1_ps(fill));
  }
  // Sum and maximum over lanes in one fixed tree.
  static float sum(F x) {
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  static float max_of(F x) {
    const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
  }

  // lane i of the result: the maximum, resp. the sum, over the lanes of v[i]
  static F max_of_each(const F (&v)[16]) {
    return reduce_each(v, [](F a, F b) { return _mm512_max_ps(a, b); });
  }
  static F sum_of_each(const F (&v)[16]) {
    return reduce_each(v, [](F a, F b) { return _mm512_add_ps(a, b); });
  }
  static I sum_of_each(const I (&v)[16]) {
    F f[16];
    for (int i = 0; i < 16; ++i) f[i] = _mm512_castsi512_ps(v[i]);
    return _mm512_castps_si512(reduce_each(
        f, [](F a, F b) { return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b))); }));
  }

  static I izero() { return _mm512_setzero_si512(); }
  static I load_bytes(const void* p) { return _mm512_loadu_si512(p); }
  static void store_bytes(void* p, I x) { _mm512_storeu_si512(p, x); }
  static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
  template <int N>
  static I shift_left(I a) {
    return _mm512_slli_epi32(a, N);
  }
  template <int N>
  static I shift_right(I a) {
    return _mm512_srli_epi32(a, N);
  }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I iand(I a, I b) { return _mm512_and_si512(a, b); }
  static I ior(I a, I b) { return _mm512_or_si512(a, b); }
  static I ixor(I a, I b) { return _mm512_xor_si512(a, b); }
  static I bits_of(F x) { return _mm512_castps_si512(x); }
  static F float_of(I x) { return _mm512_castsi512_ps(x); }
  static I set1_i32(int32_t x) { return _mm512_set1_epi32(x); }
  static I low_nibbles(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  static I high_nibbles(I x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
  // Every 128 bits are a table of sixteen signed bytes, and the places in it, 0 to 15, of sixteen that are looked up.
  static I look_up(I tables, I places) { return _mm512_shuffle_epi8(tables, places); }
  static I add_bytes(I a, I b) { return _mm512_add_epi8(a, b); }
  // Sums of signed bytes in 16 bits, of the even ones and of the odd ones.
  struct Sums {
    I even, odd;
  };
  static Sums no_sums() { return {izero(), izero()}; }
  static Sums add_wide(Sums sums, I x) {
    return {_mm512_add_epi16(sums.even, _mm512_maddubs_epi16(_mm512_set1_epi16(1), x)),
            _mm512_add_epi16(sums.odd, _mm512_maddubs_epi16(_mm512_set1_epi16(256), x))};
  }
  // Lane i: the sum over the four 128 bits of what stands for byte i of each.
  static I sum_of_tables(Sums sums) {
    const auto folded = [](I x) {
      const __m256i h = _mm256_add_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
      return _mm_add_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    };
    const __m128i even = folded(sums.even);
    const __m128i odd = folded(sums.odd);
    return _mm512_cvtepi16_epi32(_mm256_set_m128i(_mm_unpackhi_epi16(even, odd), _mm_unpacklo_epi16(even, odd)));
  }
  // Of four vectors a byte each at a time: in every 128 bits quad q of result i is made of their bytes 4 i + q.
  static void interleave_bytes(I (&v)[4]) {
    const I low[2] = {_mm512_unpacklo_epi8(v[0], v[1]), _mm512_unpacklo_epi8(v[2], v[3])};
    const I high[2] = {_mm512_unpackhi_epi8(v[0], v[1]), _mm512_unpackhi_epi8(v[2], v[3])};
    v[0] = _mm512_unpacklo_epi16(low[0], low[1]);
    v[1] = _mm512_unpackhi_epi16(low[0], low[1]);
    v[2] = _mm512_unpacklo_epi16(high[0], high[1]);
    v[3] = _mm512_unpackhi_epi16(high[0], high[1]);
  }
  // 16 bytes of each row, from `at` on, as four vectors: lane r of vector q holds bytes 4 q to 4 q + 3 of row r.
  static void transpose_quads(const uint8_t* const (&rows)[16], size_t at, uint8_t* out) {
    // Rows r, r + 4, r + 8 and r + 12 side by side.
    const auto every_fourth = [&](int r) {
      const auto load = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r + 4 * i] + at)); };
      I x = _mm512_broadcast_i32x4(load(0));
      x = _mm512_mask_broadcast_i32x4(x, 0x00f0, load(1));
      x = _mm512_mask_broadcast_i32x4(x, 0x0f00, load(2));
      return _mm512_mask_broadcast_i32x4(x, 0xf000, load(3));
    };
    const I a = every_fourth(0);
    const I b = every_fourth(1);
    const I c = every_fourth(2);
    const I d = every_fourth(3);
    const I low[2] = {_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d)};
    const I high[2] = {_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d)};
    store_bytes(out, _mm512_unpacklo_epi64(low[0], low[1]));
    store_bytes(out + 64, _mm512_unpackhi_epi64(low[0], low[1]));
    store_bytes(out + 128, _mm512_unpacklo_epi64(high[0], high[1]));
    store_bytes(out + 192, _mm512_unpackhi_epi64(high[0], high[1]));
  }
  // acc[lane] += sum over 4 bytes of unsigned u times signed s
  static I dot_u8s8(I acc, I u, I s) { return _mm512_dpbusd_epi32(acc, u, s); }
  static I dot_u4s8(I acc, I u, I s) { return _mm512_dpbusd_epi32(acc, u, s); }

  // A bit for each lane whose magnitude is above `threshold`, or that is NaN.
  static unsigned beyond(F x, float threshold) {
    return _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(threshold), _CMP_NLE_UQ);
  }
  static I load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_bf16(const uint16_t* p) {
    const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  }
  static void store_bf16(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
  // lane i holds the pair (even[i], odd[i]) rounded to bfloat16
  static I pair_bf16(F even, F odd) {
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
  }
  // acc[lane] += a.even * b.even + a.odd * b.odd over pairs of bfloat16
  static F dot_bf16(F acc, I a, I b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static void store_s8(int8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x)); }
  // keeps the even value of each pair of bfloat16, the odd one becomes 0
  static I even_only(I x) { return _mm512_and_si512(x, _mm512_set1_epi32(0xffff)); }

 private:
  // Halves the width of sixteen vectors four times, two vectors becoming one.
  template <class Op>
  static F reduce_each(const F (&v)[16], const Op& op) {
    F pairs[8];
    F quads[4];
    F halves[2];
    for (int i = 0; i < 8; ++i) {
      pairs[i] = op(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    }
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(pairs[2 * i]);
      const __m512d b = _mm512_castps_pd(pairs[2 * i + 1]);
      quads[i] = op(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; ++i) {
      halves[i] = op(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88), _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
    }
    return op(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88), _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
  }
};

}  // namespace fallow
