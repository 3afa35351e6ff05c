// A screen's logits: out = codes x (activations along its first directions) + scales x (signs x the others).
//
// Limit: at one row the bytes of the screen; with many, as in a linear, one 64-byte integer dot product a cycle and core.
#pragma once
#include "../kernels.h"
#include "linear.h"

namespace fallow::kernels {

// MR rows of activations by NR tiles: each sum is a chain of products, of which several are needed to fill their latency.
// With every group of columns `fetch` bytes from `next` on are fetched: more at once would wait for each other.
template <class S, int MR, int NR>
FALLOW_INLINE void screen_tiles(const ScreenTask& task, int row, int tile, const uint8_t* next, size_t fetch) {
  using F = typename S::F;
  using I = typename S::I;
  const PackedSigns& w = *task.weights;
  const size_t along_stride = task.along_format.row_bytes();
  const size_t rest_stride = task.rest_format.row_bytes();
  const uint8_t* along = task.along + row * along_stride;
  const uint8_t* rest = task.rest + row * rest_stride;
  const uint8_t* t[NR];
  I codes[MR][NR];
  F signs[MR][NR];
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n) {
    t[n] = w.tile(tile + n);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      codes[m][n] = S::set1_i32(load_quad(along + m * along_stride + task.along_format.start_at(true)));
      signs[m][n] = S::zero();
    }
  }
  for (int q = 0; q < PackedSigns::directions / 4; ++q) {
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      const I c = S::load_bytes(t[n] + q * 64);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) codes[m][n] = S::dot_u8s8(codes[m][n], c, S::set1_i32(load_quad(along + m * along_stride + q * 4)));
    }
  }
  for (int g = 0; g < w.groups(); ++g) {
    prefetch_run(next + g * fetch, fetch);
    const size_t bits = PackedSigns::codes_bytes + g * PackedSigns::group_bytes;
    I sum[MR][NR];
    // Twice what has a 1, less all: the start value of 8-bit codes is -128 times the sum of all.
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const I start = S::set1_i32(load_quad(rest + m * rest_stride + task.rest_format.start_at(true) + g * 4) / 128);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) sum[m][n] = start;
    }
#pragma GCC unroll 8
    for (int j = 0; j < PackedSigns::group / 4; ++j) {
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) {
        const I twos = S::twos(t[n] + bits + j * 8);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          sum[m][n] = S::dot_u8s8(sum[m][n], twos, S::set1_i32(load_quad(rest + m * rest_stride + g * PackedSigns::group + j * 4)));
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const F scale = S::set1(reinterpret_cast<const float*>(rest + m * rest_stride + task.rest_format.scales_at())[g]);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) signs[m][n] = S::fma(S::to_float(sum[m][n]), scale, signs[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n) {
    const F scales = S::load_bf16(reinterpret_cast<const uint16_t*>(t[n] + w.scales_at()));
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const float scale = *reinterpret_cast<const float*>(along + m * along_stride + task.along_format.scales_at()) * PackedSigns::code_step;
      S::store(task.out + (row + m) * task.out_stride + (tile + n) * lanes, S::fma(S::to_float(codes[m][n]), S::set1(scale), S::mul(signs[m][n], scales)));
    }
  }
}

template <class S>
void screen(const ScreenTask& task, int begin, int end) {
  constexpr size_t ahead = 8192;
  constexpr int together = S::max_rows >= 4 ? 4 : 1;  // tiles, of one row
  const PackedSigns& w = *task.weights;
  const auto a_group = [&](int tiles) { return ActivationFormat::align((tiles * w.tile_bytes() + w.groups() - 1) / w.groups()); };
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

// Of each tile the largest logit after `margin` > 0 of its deviations: rows beyond the last have none.
template <class S>
void screened_peaks(const PackedSigns& w, const float* logits, float margin, int begin, int end, float* peaks) {
  for (int tile = begin; tile < end; ++tile) {
    peaks[tile] = S::max_of(S::fma(S::load_bf16(w.deviations(tile)), S::set1(margin), S::load(logits + tile * lanes)));
  }
}

}  // namespace fallow::kernels
