// Sixteen lanes in portable C++: the reference that the other instruction sets are tested against.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bits.h"

namespace fallow {

struct Scalar {
  static constexpr const char* name = "scalar";
  static constexpr int max_rows = 1;

  struct F {
    float v[16];
  };
  struct I {
    int32_t v[16];
  };

  template <class Op>
  static F map(const Op& op) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = op(i);
    return r;
  }
  template <class Op>
  static I imap(const Op& op) {
    I r;
    for (int i = 0; i < 16; ++i) r.v[i] = op(i);
    return r;
  }
  // The 64 bytes of an I, changed one by one.
  template <class Op>
  static I bytes(const I& x, const Op& op) {
    uint8_t b[64];
    std::memcpy(b, x.v, 64);
    for (uint8_t& byte : b) byte = op(byte);
    I r;
    std::memcpy(r.v, b, 64);
    return r;
  }

  static F zero() { return set1(0.f); }
  static F set1(float x) {
    return map([=](int) { return x; });
  }
  static F load(const float* p) {
    F r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  static void store(float* p, const F& x) { std::memcpy(p, x.v, 64); }
  static F add(const F& a, const F& b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(const F& a, const F& b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(const F& a, const F& b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F abs(const F& a) {
    return map([&](int i) { return std::fabs(a.v[i]); });
  }
  static F div(const F& a, const F& b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
  }
  static F fma(const F& a, const F& b, const F& c) {
    return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static F max(const F& a, const F& b) {
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F min(const F& a, const F& b) {
    return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F reciprocal(const F& x) {
    return map([&](int i) { return 1.f / x.v[i]; });
  }
  // x - floor(x), zero for infinities; and x * 2^floor(e)
  static F above_floor(const F& x) {
    return map([&](int i) { return std::isinf(x.v[i]) ? 0.f : x.v[i] - std::floor(x.v[i]); });
  }
  static F scale_by_floor(const F& x, const F& e) {
    return map([&](int i) { return std::isnan(e.v[i]) ? e.v[i] : std::ldexp(x.v[i], static_cast<int>(std::floor(std::clamp(e.v[i], -160.f, 160.f)))); });
  }
  static F to_float(const I& x) {
    return map([&](int i) { return static_cast<float>(x.v[i]); });
  }
  static I to_int(const F& x) {
    constexpr int32_t none = std::numeric_limits<int32_t>::min();  // NaN and what does not fit, as x86 has it
    return imap([&](int i) { return std::fabs(x.v[i]) < 2147483520.f ? static_cast<int32_t>(std::nearbyint(x.v[i])) : none; });
  }
  static F keep_first(const F& x, int n, float fill) {
    return map([&](int i) { return i < n ? x.v[i] : fill; });
  }
  static F drop_first(const F& x, int n, float fill) {
    return map([&](int i) { return i < n ? fill : x.v[i]; });
  }
  static float sum(const F& x) {
    float v[16];
    std::memcpy(v, x.v, 64);
    for (int width = 8; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) v[i] += v[i + width];
    }
    return v[0];
  }
  static float max_of(const F& x) {
    float m = x.v[0];
    for (int i = 1; i < 16; ++i) m = x.v[i] > m ? x.v[i] : m;
    return m;
  }
  static F max_of_each(const F (&v)[16]) {
    return map([&](int i) { return max_of(v[i]); });
  }
  static F sum_of_each(const F (&v)[16]) {
    return map([&](int i) { return sum(v[i]); });
  }
  static I sum_of_each(const I (&v)[16]) {
    return imap([&](int i) {
      uint32_t total = 0;
      for (const int32_t x : v[i].v) total += static_cast<uint32_t>(x);
      return static_cast<int32_t>(total);
    });
  }

  static I izero() { return set1_i32(0); }
  static I load_bytes(const void* p) {
    I r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  static void store_bytes(void* p, const I& x) { std::memcpy(p, x.v, 64); }
  static I isub(const I& a, const I& b) {
    return imap([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i])); });
  }
  static I iadd(const I& a, const I& b) {
    return imap([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); });
  }
  template <int N>
  static I shift_left(const I& a) {
    return imap([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N); });
  }
  template <int N>
  static I shift_right(const I& a) {
    return imap([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> N); });
  }
  static I imul(const I& a, const I& b) {
    return imap([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) * static_cast<uint32_t>(b.v[i])); });
  }
  static I iand(const I& a, const I& b) {
    return imap([&](int i) { return a.v[i] & b.v[i]; });
  }
  static I ior(const I& a, const I& b) {
    return imap([&](int i) { return a.v[i] | b.v[i]; });
  }
  static I ixor(const I& a, const I& b) {
    return imap([&](int i) { return a.v[i] ^ b.v[i]; });
  }
  static I bits_of(const F& x) {
    I r;
    std::memcpy(r.v, x.v, 64);
    return r;
  }
  static F float_of(const I& x) {
    F r;
    std::memcpy(r.v, x.v, 64);
    return r;
  }
  static I set1_i32(int32_t x) {
    return imap([=](int) { return x; });
  }
  static I low_nibbles(const I& x) {
    return bytes(x, [](uint8_t b) { return static_cast<uint8_t>(b & 15); });
  }
  static I high_nibbles(const I& x) {
    return bytes(x, [](uint8_t b) { return static_cast<uint8_t>(b >> 4); });
  }
  // Every 128 bits are a table of sixteen signed bytes, and the places in it, 0 to 15, of sixteen that are looked up.
  static I look_up(const I& tables, const I& places) {
    uint8_t table[64];
    uint8_t b[64];
    std::memcpy(table, tables.v, 64);
    std::memcpy(b, places.v, 64);
    for (int i = 0; i < 64; ++i) b[i] = table[i / 16 * 16 + b[i]];
    return load_bytes(b);
  }
  static I add_bytes(const I& x, const I& y) {
    uint8_t a[64];
    uint8_t b[64];
    std::memcpy(a, x.v, 64);
    std::memcpy(b, y.v, 64);
    for (int i = 0; i < 64; ++i) a[i] = static_cast<uint8_t>(a[i] + b[i]);
    return load_bytes(a);
  }
  // Sums of signed bytes, in at least 16 bits.
  struct Sums {
    int32_t v[64];
  };
  static Sums no_sums() { return {}; }
  static Sums add_wide(Sums sums, const I& x) {
    int8_t b[64];
    std::memcpy(b, x.v, 64);
    for (int i = 0; i < 64; ++i) sums.v[i] += b[i];
    return sums;
  }
  // Lane i: the sum over the four 128 bits of what stands for byte i of each.
  static I sum_of_tables(const Sums& sums) {
    return imap([&](int i) { return sums.v[i] + sums.v[16 + i] + sums.v[32 + i] + sums.v[48 + i]; });
  }
  // Of four vectors a byte each at a time: in every 128 bits quad q of result i is made of their bytes 4 i + q.
  static void interleave_bytes(I (&v)[4]) {
    uint8_t from[4][64];
    uint8_t to[4][64];
    std::memcpy(from, v, sizeof(from));
    for (int b = 0; b < 64; ++b) {
      for (int c = 0; c < 4; ++c) to[b % 16 / 4][b / 16 * 16 + b % 4 * 4 + c] = from[c][b];
    }
    std::memcpy(v, to, sizeof(to));
  }
  // 16 bytes of each row, from `at` on, as four vectors: lane r of vector q holds bytes 4 q to 4 q + 3 of row r.
  static void transpose_quads(const uint8_t* const (&rows)[16], size_t at, uint8_t* out) {
    for (int q = 0; q < 4; ++q) {
      for (int r = 0; r < 16; ++r) std::memcpy(out + q * 64 + r * 4, rows[r] + at + q * 4, 4);
    }
  }
  static I dot_u8s8(const I& acc, const I& u, const I& s) {
    uint8_t a[64];
    int8_t b[64];
    std::memcpy(a, u.v, 64);
    std::memcpy(b, s.v, 64);
    return imap([&](int i) {
      int32_t total = 0;
      for (int j = 0; j < 4; ++j) total += int32_t{a[4 * i + j]} * int32_t{b[4 * i + j]};
      return static_cast<int32_t>(static_cast<uint32_t>(acc.v[i]) + static_cast<uint32_t>(total));
    });
  }
  static I dot_u4s8(const I& acc, const I& u, const I& s) { return dot_u8s8(acc, u, s); }

  // A bit for each lane whose magnitude is above `threshold`, or that is NaN.
  static unsigned beyond(const F& x, float threshold) {
    unsigned bits = 0;
    for (int i = 0; i < 16; ++i) bits |= static_cast<unsigned>(!(std::fabs(x.v[i]) <= threshold)) << i;
    return bits;
  }
  static I load_u8(const uint8_t* p) {
    return imap([=](int i) { return static_cast<int32_t>(p[i]); });
  }
  static F load_f16(const uint16_t* p) {
    return map([=](int i) { return f16_to_float(p[i]); });
  }
  static F load_bf16(const uint16_t* p) {
    return map([=](int i) { return bf16_to_float(p[i]); });
  }
  static void store_bf16(uint16_t* p, const F& x) {
    for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(x.v[i]);
  }
  static I pair_bf16(const F& even, const F& odd) {
    return imap([&](int i) { return static_cast<int32_t>(float_to_bf16(even.v[i]) | (uint32_t{float_to_bf16(odd.v[i])} << 16)); });
  }
  static F dot_bf16(const F& acc, const I& a, const I& b) {
    return map([&](int i) {
      const auto x = static_cast<uint32_t>(a.v[i]);
      const auto y = static_cast<uint32_t>(b.v[i]);
      const float high = bits_to_float(x & 0xffff0000u) * bits_to_float(y & 0xffff0000u);
      return acc.v[i] + bits_to_float(x << 16) * bits_to_float(y << 16) + high;
    });
  }
  static void store_s8(int8_t* p, const I& x) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(x.v[i] < -128 ? -128 : (x.v[i] > 127 ? 127 : x.v[i]));
  }
  static I even_only(const I& x) {
    return imap([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(x.v[i]) & 0xffffu); });
  }
};

}  // namespace fallow
