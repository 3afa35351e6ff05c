// A screen's logits: out = codes x (activations along its first directions) + scales x (signs x the others). At a second
// look there are more signs.
//
// Limit: at one row the bytes of the screen; with many, as in a linear, one 64-byte integer dot product a cycle and core.
#pragma once
#include "../kernels.h"
#include "linear.h"

namespace fallow::kernels {

// The activations of some rows that a screen multiplies, and how far one lies from the next.
struct ScreenRows {
  const uint8_t* along;
  const uint8_t* rest;
  size_t along_stride, rest_stride;

  ScreenRows(const ScreenTask& task, int row)
      : along(task.along + row * task.along_format.row_bytes()),
        rest(task.rest + row * task.rest_format.row_bytes()),
        along_stride(task.along_format.row_bytes()),
        rest_stride(task.rest_format.row_bytes()) {}
};

// MR rows of activations by NR tiles: each sum is a chain of products, of which several are needed to fill their latency.
template <class S, int MR, int NR>
FALLOW_INLINE void add_codes(const ScreenTask& task, const ScreenRows& rows, const uint8_t* const (&tiles)[NR], typename S::I (&codes)[MR][NR]) {
  using I = typename S::I;
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) codes[m][n] = S::set1_i32(load_quad(rows.along + m * rows.along_stride + task.along_format.start_at(true)));
  }
  for (int q = 0; q < PackedSigns::directions / 4; ++q) {
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      const I c = S::load_bytes(tiles[n] + q * 64);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) codes[m][n] = S::dot_u8s8(codes[m][n], c, S::set1_i32(load_quad(rows.along + m * rows.along_stride + q * 4)));
    }
  }
}

// The signs at `bits`, of `count` groups of columns from `group` on. With every group fetch() is called: fetches that are
// made at once wait for each other.
template <class S, int MR, int NR, class Fetch>
FALLOW_INLINE void add_signs(const ScreenTask& task, const ScreenRows& rows, const uint8_t* const (&bits)[NR], int group, int count, const Fetch& fetch,
                             typename S::F (&signs)[MR][NR]) {
  using I = typename S::I;
  for (int i = 0; i < count; ++i) {
    fetch();
    const int g = group + i;
    I sum[MR][NR];
    // Twice what has a 1, less all: the start value of 8-bit codes is -128 times the sum of all.
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const I start = S::set1_i32(load_quad(rows.rest + m * rows.rest_stride + task.rest_format.start_at(true) + g * 4) / 128);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) sum[m][n] = start;
    }
#pragma GCC unroll 8
    for (int j = 0; j < PackedSigns::group / 4; ++j) {
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) {
        const I twos = S::twos(bits[n] + i * PackedSigns::group_bytes + j * 8);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          sum[m][n] = S::dot_u8s8(sum[m][n], twos, S::set1_i32(load_quad(rows.rest + m * rows.rest_stride + g * PackedSigns::group + j * 4)));
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const typename S::F scale = S::set1(reinterpret_cast<const float*>(rows.rest + m * rows.rest_stride + task.rest_format.scales_at())[g]);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) signs[m][n] = S::fma(S::to_float(sum[m][n]), scale, signs[m][n]);
    }
  }
}

// The first look at NR tiles from `tile` on, while with every group of columns `fetch` bytes from `next` on are fetched.
template <class S, int MR, int NR>
FALLOW_INLINE void screen_tiles(const ScreenTask& task, int row, int tile, const uint8_t* next, size_t fetch) {
  using F = typename S::F;
  const PackedSigns& w = *task.weights;
  const ScreenRows rows(task, row);
  const uint8_t* tiles[NR];
  const uint8_t* bits[NR];
  typename S::I codes[MR][NR];
  F signs[MR][NR];
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n) {
    tiles[n] = w.tile(tile + n);
    bits[n] = tiles[n] + PackedSigns::codes_bytes;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) signs[m][n] = S::zero();
  }
  add_codes<S, MR, NR>(task, rows, tiles, codes);
  const auto fetch_next = [&] {
    prefetch_run(next, fetch);
    next += fetch;
  };
  add_signs<S, MR, NR>(task, rows, bits, 0, w.first_groups(), fetch_next, signs);
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n) {
    const F scales = S::load_bf16(w.scales(tile + n));
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const F scale = S::set1(*reinterpret_cast<const float*>(rows.along + m * rows.along_stride + task.along_format.scales_at()) * PackedSigns::code_step);
      S::store(task.out + (row + m) * task.out_stride + (tile + n) * lanes, S::fma(S::to_float(codes[m][n]), scale, S::mul(signs[m][n], scales)));
    }
  }
}

template <class S>
void screen(const ScreenTask& task, int begin, int end) {
  constexpr size_t ahead = 8192;
  constexpr int together = S::max_rows >= 4 ? 4 : 1;  // tiles, of one row
  const PackedSigns& w = *task.weights;
  const auto a_group = [&](int tiles) { return ActivationFormat::align((tiles * w.tile_bytes() + w.first_groups() - 1) / w.first_groups()); };
  int tile = begin;
  for (; task.rows == 1 && tile + together <= end; tile += together) {
    screen_tiles<S, 1, together>(task, 0, tile, w.tile(tile) + ahead, a_group(together));
  }
  for (; tile < end; ++tile) {
    for (int row = 0; row < task.rows;) {
      const int take = std::min(S::max_rows, task.rows - row);
      const size_t fetch = row == 0 ? a_group(1) : 0;
      with_rows<S>(take, [&](auto rows) { screen_tiles<S, decltype(rows)::value, 1>(task, row, tile, w.tile(tile) + ahead, fetch); });
      row += take;
    }
  }
}

// A second look at NR tiles of the list, while the `following` next ones of it are fetched. Where it is not known what
// the first look gave, that is computed again, to the same bits.
template <class S, int NR>
FALLOW_INLINE void screen_tiles_again(const ScreenTask& task, const int32_t* list, int following, bool is_known) {
  using F = typename S::F;
  const PackedSigns& w = *task.weights;
  const ScreenRows rows(task, 0);
  const uint8_t* tiles[NR];
  const uint8_t* bits[3][NR];
  typename S::I codes[1][NR];
  F signs[3][1][NR];
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n) {
    tiles[n] = w.tile(list[n]);
    bits[0][n] = tiles[n] + PackedSigns::codes_bytes;
    bits[1][n] = w.second(list[n]);
    bits[2][n] = bits[1][n] + w.left_at();
    for (int k = 0; k < 3; ++k) signs[k][0][n] = S::zero();
  }
  size_t line = 0;
  const auto fetch_next = [&] {
    for (int n = 0; n < following; ++n) {
      if (!is_known && line < w.tile_bytes()) prefetch_far(w.tile(list[NR + n]) + line);
      if (line < w.second_bytes()) prefetch_far(w.second(list[NR + n]) + line);
    }
    line += cache_line;
  };
  if (!is_known) {
    add_codes<S, 1, NR>(task, rows, tiles, codes);
    add_signs<S, 1, NR>(task, rows, bits[0], 0, w.first_groups(), fetch_next, signs[0]);
  }
  add_signs<S, 1, NR>(task, rows, bits[1], w.first_groups(), w.other_groups(), fetch_next, signs[1]);
  add_signs<S, 1, NR>(task, rows, bits[2], 0, w.groups(), fetch_next, signs[2]);
  const F scale = S::set1(*reinterpret_cast<const float*>(rows.along + task.along_format.scales_at()) * PackedSigns::code_step);
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n) {
    F sum = S::load(task.out + list[n] * lanes);
    if (!is_known) sum = S::fma(S::to_float(codes[0][n]), scale, S::mul(signs[0][0][n], S::load_bf16(w.scales(list[n]))));
    sum = S::fma(signs[1][0][n], S::load_bf16(w.second_scales(list[n], 0)), sum);
    sum = S::fma(signs[2][0][n], S::load_bf16(w.second_scales(list[n], 1)), sum);
    S::store(task.out + list[n] * lanes, sum);
  }
}

template <class S>
void screen_again(const ScreenTask& task, const int32_t* list, int count, bool is_known) {
  constexpr int together = S::max_rows >= 4 ? 4 : 1;
  int i = 0;
  for (; i + together <= count; i += together) screen_tiles_again<S, together>(task, list + i, std::min(together, count - i - together), is_known);
  for (; i < count; ++i) screen_tiles_again<S, 1>(task, list + i, std::min(1, count - i - 1), is_known);
}

// Of each tile the largest logit after `margin` > 0 of its deviations: rows beyond the last have none.
template <class S>
void screened_peaks(const PackedSigns& w, int look, const float* logits, float margin, int begin, int end, float* peaks) {
  for (int tile = begin; tile < end; ++tile) {
    peaks[tile] = S::max_of(S::fma(S::load_bf16(w.deviations(tile, look)), S::set1(margin), S::load(logits + tile * lanes)));
  }
}

}  // namespace fallow::kernels
