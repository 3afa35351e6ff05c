// A screen's logits: out = codes x (activations along its first directions) + scales x (signs x those of its columns).
//
// Signs are products without a multiplication: of four columns there are sixteen sums, which a table of bytes holds, and
// one shuffle looks up those of sixteen rows in four tables (as T-MAC does, arXiv 2407.00088, section 3.1, and product
// quantisation in registers, arXiv 1704.07355). A table's bytes go to 31, so that four of them add up in a byte; what
// they are rounded by is a twelfth of the error that signs make anyway.
//
// Limit: the bytes of the first look; with many rows two shuffles for each 64 bytes of it and row.
#pragma once
#include <cmath>

#include "../kernels.h"
#include "linear.h"

namespace fallow::kernels {

constexpr float largest_entry = 31.f;

template <class S>
float fill_tables(const float* x, const SignColumn* columns, int count, int8_t* tables) {
  using F = typename S::F;
  const auto of = [&](int k) { return x[columns[k].direction] * columns[k].size; };
  float most = 0.f;
  for (int k = 0; k < count; k += 4) {
    const float all = (std::fabs(of(k)) + std::fabs(of(k + 1))) + (std::fabs(of(k + 2)) + std::fabs(of(k + 3)));
    most = all <= most || std::isnan(most) ? most : all;
  }
  alignas(64) float ones[4][lanes];
  for (int i = 0; i < lanes; ++i) {
    for (int bit = 0; bit < 4; ++bit) ones[bit][i] = (i >> bit & 1) != 0 ? 1.f : -1.f;
  }
  const F fit = S::set1(most > 0.f ? largest_entry / most : 0.f);
  for (int k = 0; k < count; k += 4, tables += lanes) {
    const auto signed_by = [&](int bit) { return S::mul(S::set1(of(k + bit)), S::load(ones[bit])); };
    const F sums = S::add(S::add(signed_by(0), signed_by(1)), S::add(signed_by(2), signed_by(3)));
    S::store_s8(tables, S::to_int(S::mul(sums, fit)));
  }
  return most / largest_entry;
}

template <class S>
void sign_tables(const PackedSigns& w, const float* x, int8_t* tables, float* steps) {
  for (int look = 0; look < PackedSigns::looks; ++look) {
    const int first = w.first_column(look);
    steps[look] = fill_tables<S>(x, w.columns.data() + first, w.end_column(look) - first, tables + w.tables_at(look));
  }
}

// The sums of signs of a tile for MR rows of activations. With every group of columns `fetch` bytes from `next` on are
// fetched: more at once would wait for each other.
template <class S, int MR>
FALLOW_INLINE void sum_signs(const uint8_t* signs, int groups, const int8_t* tables, size_t table_bytes, const uint8_t* next, size_t fetch,
                             typename S::I (&out)[MR]) {
  using I = typename S::I;
  constexpr int most_groups = 128;  // whose sums fit 16 bits: 8 x 31 of each group
  constexpr int group_tables = 8 * lanes;
  const auto of_group = [&](int g, int m, const I& low, const I& high) {
    const int8_t* t = tables + m * table_bytes + static_cast<size_t>(g) * group_tables;
    return S::add_bytes(S::look_up(S::load_bytes(t), low), S::look_up(S::load_bytes(t + 4 * lanes), high));
  };
  for (int m = 0; m < MR; ++m) out[m] = S::izero();
  for (int begin = 0; begin < groups; begin += most_groups) {
    const int end = std::min(begin + most_groups, groups);
    typename S::Sums sums[MR];
    for (int m = 0; m < MR; ++m) sums[m] = S::no_sums();
    int g = begin;
    for (; g + 2 <= end; g += 2) {
      prefetch_run(next + g * fetch, 2 * fetch);
      const I first = S::load_bytes(signs + g * PackedSigns::group_bytes);
      const I second = S::load_bytes(signs + (g + 1) * PackedSigns::group_bytes);
      const I low[2] = {S::low_nibbles(first), S::low_nibbles(second)};
      const I high[2] = {S::high_nibbles(first), S::high_nibbles(second)};
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) sums[m] = S::add_wide(sums[m], S::add_bytes(of_group(g, m, low[0], high[0]), of_group(g + 1, m, low[1], high[1])));
    }
    if (g < end) {
      prefetch_run(next + g * fetch, fetch);
      const I last = S::load_bytes(signs + g * PackedSigns::group_bytes);
      const I low = S::low_nibbles(last);
      const I high = S::high_nibbles(last);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) sums[m] = S::add_wide(sums[m], of_group(g, m, low, high));
    }
    for (int m = 0; m < MR; ++m) out[m] = S::iadd(out[m], S::sum_of_tables(sums[m]));
  }
}

// MR rows of activations by a tile.
template <class S, int MR>
FALLOW_INLINE void screen_tile(const ScreenTask& task, int row, int tile, const uint8_t* next, size_t fetch) {
  using F = typename S::F;
  using I = typename S::I;
  const PackedSigns& w = *task.weights;
  const float* x = task.x + row * task.x_stride;
  const uint8_t* t = w.tile(0, tile);
  F along[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) along[m] = S::zero();
#pragma GCC unroll 8
  for (int k = 0; k < PackedSigns::directions; ++k) {
    const F codes = S::to_float(S::isub(S::load_u8(t + k * lanes), S::set1_i32(128)));
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) along[m] = S::fma(codes, S::set1(x[m * task.x_stride + k] * PackedSigns::code_step), along[m]);
  }
  I signs[MR];
  sum_signs<S, MR>(t + w.signs_at(0), w.groups(0), task.tables + row * w.table_bytes(), w.table_bytes(), next, fetch, signs);
  const F scales = S::load_bf16(reinterpret_cast<const uint16_t*>(t + w.scales_at(0)));
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    const F step = S::set1(task.steps[(row + m) * PackedSigns::looks]);
    S::store(task.out[row + m] + tile * lanes, S::fma(S::to_float(signs[m]), S::mul(scales, step), along[m]));
  }
}

template <class S>
void screen(const ScreenTask& task, int begin, int end) {
  constexpr size_t ahead = 8192;
  const PackedSigns& w = *task.weights;
  const size_t a_group = (w.tile_bytes(0) + w.groups(0) - 1) / w.groups(0);
  for (int tile = begin; tile < end; ++tile) {
    for (int row = 0; row < task.rows;) {
      const int take = std::min(S::max_rows, task.rows - row);
      const size_t fetch = row == 0 ? a_group : 0;
      with_rows<S>(take, [&](auto rows) { screen_tile<S, decltype(rows)::value>(task, row, tile, w.tile(0, tile) + ahead, fetch); });
      row += take;
    }
  }
}

// Tiles lie apart: each is fetched while others before it are looked at.
template <class S>
void second_look(const SecondLookTask& task, const int32_t* tiles, int count) {
  using F = typename S::F;
  constexpr int ahead = 4;
  const PackedSigns& w = *task.weights;
  const size_t a_group = (w.tile_bytes(1) + w.groups(1) - 1) / w.groups(1);
  for (int i = 0; i < std::min(ahead, count); ++i) prefetch_run(w.tile(1, tiles[i]), w.tile_bytes(1));
  for (int i = 0; i < count; ++i) {
    const int tile = tiles[i];
    const uint8_t* t = w.tile(1, tile);
    const bool last = i + ahead >= count;
    typename S::I signs[1];
    sum_signs<S, 1>(t, w.groups(1), task.tables + w.tables_at(1), w.table_bytes(), last ? t : w.tile(1, tiles[i + ahead]), last ? 0 : a_group, signs);
    const F scales = S::mul(S::load_bf16(reinterpret_cast<const uint16_t*>(t + w.scales_at(1))), S::set1(task.step));
    S::store(task.out + tile * lanes, S::fma(S::to_float(signs[0]), scales, S::load(task.out + tile * lanes)));
  }
}

// Of each tile the largest logit after `margin` > 0 of its deviations: rows beyond the last have none.
template <class S>
void screened_peaks(const PackedSigns& w, int look, const float* logits, float margin, const int32_t* tiles, int count, float* peaks) {
  using F = typename S::F;
  for (int begin = 0; begin < count; begin += lanes) {
    F most[lanes];
    for (int i = 0; i < lanes; ++i) {
      const int tile = tiles[std::min(begin + i, count - 1)];
      most[i] = S::fma(S::load_bf16(w.deviations(look, tile)), S::set1(margin), S::load(logits + tile * lanes));
    }
    alignas(64) float found[lanes];
    S::store(found, S::max_of_each(most));
    std::copy_n(found, std::min(lanes, count - begin), peaks + begin);
  }
}

// What of values, after `margin` of their deviations, may reach a number in spite of rounding.
template <class S>
int list_reaching(const float* values, const float* deviations, int n, float margin, float reach, int32_t* out) {
  constexpr float rounding = 1e-5f;
  constexpr int together = 64;
  const auto reaches = [&](int i) {
    const float more = margin * deviations[i];
    return !(values[i] + more + rounding * (std::fabs(values[i]) + more) < reach);  // so does NaN
  };
  int listed = 0;
  for (int begin = 0; begin < n; begin += together) {
    const int end = std::min(begin + together, n);
    int any = 0;
    for (int i = begin; i < end; ++i) any |= static_cast<int>(reaches(i));
    for (int i = begin; any != 0 && i < end; ++i) {
      out[listed] = i;
      listed += static_cast<int>(reaches(i));
    }
  }
  return listed;
}

}  // namespace fallow::kernels
