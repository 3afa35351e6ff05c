// out = activations x weights: integer dot products of groups, scaled and summed in float32; or bf16.
//
// Every output is computed by the same operations in the same order whatever the number of rows, so a token's result
// does not depend on what else is in the batch. Limit: one 64-byte integer dot product a cycle and core.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "../activations.h"
#include "../kernels.h"
#include "../prefetch.h"
#include "elementwise.h"

namespace fallow::kernels {

inline int32_t load_quad(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

// Calls f with `rows` as a constant, for rows from 1 to the most that a register tile holds.
template <class S, int ROWS = S::max_rows, class F>
inline void with_rows(int rows, const F& f) {
  if constexpr (ROWS == 1) {
    f(std::integral_constant<int, 1>{});
  } else if (rows == ROWS) {
    f(std::integral_constant<int, ROWS>{});
  } else {
    with_rows<S, ROWS - 1>(rows, f);
  }
}

// Calls f(row, rows) for blocks of `most` rows or fewer, of even sizes: 8 rows are 4 + 4, not 6 + 2.
template <class F>
inline void for_row_blocks(int rows, int most, const F& f) {
  for (int row = 0; row < rows;) {
    const int left = rows - row;
    const int blocks = (left + most - 1) / most;
    const int take = (left + blocks - 1) / blocks;
    f(row, take);
    row += take;
  }
}

using TilePair = std::array<int, 2>;

// The pointers of one register tile: MR rows of activations by NR tiles of sixteen weight rows.
struct TileSource {
  const uint8_t* activations;
  size_t stride;  // bytes between rows of activations
  size_t scales_at, start_at, pairs_at;
  int groups, pairs;
  const uint8_t* codes[2];  // 8-bit codes, one 64-byte quad after the other; or packed 4-bit codes
  const uint8_t* scales[2];
  const uint8_t* weight_pairs[2];
  const uint8_t* next;  // of the tiles two pairs on, what is still to be fetched while these are computed
  size_t fetch;         // bytes of it a step
  const uint8_t* page;  // the same of a page that attention will read
  size_t page_fetch;
};

// Where the fetching of pages is: a page takes `calls` register tiles of `step` bytes a step each.
struct PageCursor {
  PageCursor(const PagesAhead& ahead, int steps, int tiles) : ahead(ahead) {
    if (ahead.count == 0 || tiles == 0) return;
    calls = std::max(1, tiles / ahead.count);
    step = ActivationFormat::align((ahead.bytes + static_cast<size_t>(calls) * steps - 1) / (static_cast<size_t>(calls) * steps));
    tile_bytes = step * steps;
  }
  void next(TileSource& t) {
    if (page >= ahead.count || calls == 0) {
      t.page_fetch = 0;
      return;
    }
    t.page = ahead.pool + static_cast<size_t>(ahead.pages[page]) * ahead.page_stride + done * tile_bytes;
    t.page_fetch = step;
    if (++done * tile_bytes >= ahead.bytes) {
      done = 0;
      ++page;
    }
  }

  const PagesAhead& ahead;
  int calls = 0;
  size_t step = 0;
  size_t tile_bytes = 0;
  int page = 0;
  size_t done = 0;
};

template <class S, Scales SC>
inline typename S::F load_scales(const uint8_t* p, int g) {
  if constexpr (SC == Scales::f16) return S::load_f16(reinterpret_cast<const uint16_t*>(p) + g * lanes);
  return S::load(reinterpret_cast<const float*>(p) + g * lanes);
}

template <class S, int MR, int NR>
FALLOW_INLINE void start_with_pairs(const TileSource& t, typename S::F (&acc)[MR][NR]) {
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < NR; ++n) acc[m][n] = S::zero();
  }
  for (int p = 0; p < t.pairs; ++p) {
    typename S::I w[NR];
#pragma GCC unroll 2
    for (int n = 0; n < NR; ++n) w[n] = S::load_bytes(t.weight_pairs[n] + p * 64);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const auto a = S::set1_i32(load_quad(t.activations + m * t.stride + t.pairs_at + p * 4));
#pragma GCC unroll 2
      for (int n = 0; n < NR; ++n) acc[m][n] = S::dot_bf16(acc[m][n], w[n], a);
    }
  }
}

// A step's part of the tiles to come.
FALLOW_INLINE void fetch_next(const TileSource& t, int step) {
  const uint8_t* p = t.next + step * t.fetch;
  for (size_t line = 0; line < t.fetch; line += cache_line) prefetch_far(p + line);
  const uint8_t* page = t.page + step * t.page_fetch;
  for (size_t line = 0; line < t.page_fetch; line += cache_line) prefetch_far(page + line);
}

// CODES: how the codes lie in memory (q4 or q8). FETCH: a part of the tiles to come is fetched with every group.
template <class S, int MR, int NR, Codes CODES, int GROUP, Scales SC, bool FETCH>
FALLOW_INLINE void quantised_tile(const TileSource& t, typename S::F (&acc)[MR][NR]) {
  using I = typename S::I;
  using F = typename S::F;
  constexpr int quads = GROUP / 4;
  constexpr int group_bytes = CODES == Codes::q4 ? GROUP * lanes / 2 : GROUP * lanes;
  start_with_pairs<S, MR, NR>(t, acc);
  for (int g = 0; g < t.groups; ++g) {
    I sum[MR][NR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const I start = S::set1_i32(load_quad(t.activations + m * t.stride + t.start_at + g * 4));
#pragma GCC unroll 2
      for (int n = 0; n < NR; ++n) sum[m][n] = start;
    }
    const uint8_t* codes[NR];
#pragma GCC unroll 2
    for (int n = 0; n < NR; ++n) codes[n] = t.codes[n] + static_cast<size_t>(g) * group_bytes;
    if constexpr (FETCH) fetch_next(t, g);
    const uint8_t* a = t.activations + g * GROUP;
    if constexpr (CODES == Codes::q4) {
#pragma GCC unroll 4
      for (int j = 0; j < quads / 2; ++j) {
        I low[NR];
        I high[NR];
#pragma GCC unroll 2
        for (int n = 0; n < NR; ++n) {
          const I both = S::load_bytes(codes[n] + j * 64);
          low[n] = S::low_nibbles(both);
          high[n] = S::high_nibbles(both);
        }
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          const I x = S::set1_i32(load_quad(a + m * t.stride + j * 4));
          const I y = S::set1_i32(load_quad(a + m * t.stride + GROUP / 2 + j * 4));
#pragma GCC unroll 2
          for (int n = 0; n < NR; ++n) sum[m][n] = S::dot_u4s8(S::dot_u4s8(sum[m][n], low[n], x), high[n], y);
        }
      }
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < quads; ++j) {
        I w[NR];
#pragma GCC unroll 2
        for (int n = 0; n < NR; ++n) w[n] = S::load_bytes(codes[n] + j * 64);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          const I x = S::set1_i32(load_quad(a + m * t.stride + j * 4));
#pragma GCC unroll 2
          for (int n = 0; n < NR; ++n) sum[m][n] = S::dot_u8s8(sum[m][n], w[n], x);
        }
      }
    }
    const auto* scale = reinterpret_cast<const float*>(t.activations + t.scales_at) + g;
    F ws[NR];
#pragma GCC unroll 2
    for (int n = 0; n < NR; ++n) ws[n] = load_scales<S, SC>(t.scales[n], g);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const F s = S::set1(*reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(scale) + m * t.stride));
#pragma GCC unroll 2
      for (int n = 0; n < NR; ++n) acc[m][n] = S::fma(S::to_float(sum[m][n]), S::mul(ws[n], s), acc[m][n]);
    }
  }
}

template <class S, int MR, int NR, bool FETCH>
FALLOW_INLINE void bf16_tile(const TileSource& t, int in_pairs, typename S::F (&acc)[MR][NR]) {
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < NR; ++n) acc[m][n] = S::zero();
  }
#pragma GCC unroll 2
  for (int k = 0; k < in_pairs; ++k) {
    typename S::I w[NR];
#pragma GCC unroll 2
    for (int n = 0; n < NR; ++n) w[n] = S::load_bytes(t.codes[n] + static_cast<size_t>(k) * 64);
    if constexpr (FETCH) fetch_next(t, k);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const auto a = S::set1_i32(load_quad(t.activations + m * t.stride + k * 4));
#pragma GCC unroll 2
      for (int n = 0; n < NR; ++n) acc[m][n] = S::dot_bf16(acc[m][n], w[n], a);
    }
  }
}

// Puts a register tile where it belongs. Column tiles beyond out_features are dropped.
template <class S, int MR, int NR>
FALLOW_INLINE void finish_tile(const LinearTask& task, int row, const TilePair& tile, typename S::F (&acc)[MR][NR]) {
  using F = typename S::F;
  if (task.bias != nullptr) {
#pragma GCC unroll 2
    for (int n = 0; n < NR; ++n) {
      const F b = S::load(task.bias + tile[n] * lanes);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[m][n] = S::add(acc[m][n], b);
    }
  }
  if (is_gate(task.epilogue)) {
    if constexpr (NR == 2) {
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const F gate = activate<S>(acc[m][0], activation_of(task.epilogue));
        S::store(task.out + (row + m) * task.out_stride + tile[0] / 2 * lanes, S::mul(gate, acc[m][1]));
      }
    }
    return;
  }
  if (task.epilogue == Epilogue::relu2) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
      for (int n = 0; n < NR; ++n) acc[m][n] = relu2<S>(acc[m][n]);
    }
  }
#pragma GCC unroll 2
  for (int n = 0; n < NR; ++n) {
    const int column = tile[n] * lanes;
    const int width = std::min(lanes, task.weights->out_features - column);
    if (width <= 0) continue;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      float* out = task.out + (row + m) * task.out_stride + column;
      if (width == lanes) {
        S::store(out, task.epilogue == Epilogue::add ? S::add(S::load(out), acc[m][n]) : acc[m][n]);
        continue;
      }
      float part[lanes];
      S::store(part, acc[m][n]);
      for (int i = 0; i < width; ++i) out[i] = task.epilogue == Epilogue::add ? out[i] + part[i] : part[i];
    }
  }
}

template <class S, int MR, Codes CODES, int GROUP, Scales SC, bool FETCH>
FALLOW_NOINLINE void compute_tile(const LinearTask& task, TileSource& t, int row, const TilePair& tile) {
  t.activations = task.activations + static_cast<size_t>(row) * t.stride;
  typename S::F acc[MR][2];
  if constexpr (CODES == Codes::bf16) {
    bf16_tile<S, MR, 2, FETCH>(t, (task.weights->in_features + 1) / 2, acc);
  } else {
    quantised_tile<S, MR, 2, CODES, GROUP, SC, FETCH>(t, acc);
  }
  finish_tile<S, MR, 2>(task, row, tile, acc);
}

// All rows by a pair of tiles. The pair to come is fetched evenly over the register tiles, a cache line a step or more.
template <class S, Codes CODES, int GROUP, Scales SC>
inline void compute_rows(const LinearTask& task, TileSource& t, PageCursor& pages, const TilePair& tile, int steps) {
  const size_t pair_bytes = 2 * task.weights->tile_bytes;
  const size_t steps_in_all = static_cast<size_t>(steps) * ((task.rows + S::max_rows - 1) / S::max_rows);
  t.fetch = ActivationFormat::align((pair_bytes + steps_in_all - 1) / steps_in_all);
  const uint8_t* end = t.next + pair_bytes;
  for_row_blocks(task.rows, S::max_rows, [&](int row, int take) {
    pages.next(t);
    with_rows<S>(take, [&](auto rows) {
      constexpr int MR = decltype(rows)::value;
      if (t.next < end || t.page_fetch > 0) {
        compute_tile<S, MR, CODES, GROUP, SC, true>(task, t, row, tile);
      } else {
        compute_tile<S, MR, CODES, GROUP, SC, false>(task, t, row, tile);
      }
    });
    t.next += steps * t.fetch;
  });
}

// 4-bit codes of a tile as 8-bit quads in the order in which the 8-bit kernel reads them.
template <class S>
inline void widen_codes(const uint8_t* packed, int groups, uint8_t* out) {
  for (int g = 0; g < groups; ++g, packed += 256, out += 512) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto both = S::load_bytes(packed + j * 64);
      S::store_bytes(out + j * 64, S::low_nibbles(both));
      S::store_bytes(out + 256 + j * 64, S::high_nibbles(both));
    }
  }
}

inline TileSource source_of(const LinearTask& task) {
  const PackedLinear& w = *task.weights;
  TileSource t{};
  t.stride = task.format.row_bytes();
  t.scales_at = task.format.scales_at();
  t.start_at = task.format.start_at(w.codes == Codes::q8);
  t.pairs_at = task.format.pairs_at();
  t.groups = w.groups;
  t.pairs = w.pairs;
  return t;
}

template <class S, Codes CODES, int GROUP, Scales SC>
void linear_tiles(const LinearTask& task, int begin, int end, uint8_t* scratch) {
  const PackedLinear& w = *task.weights;
  TileSource t = source_of(task);
  const int steps = CODES == Codes::bf16 ? (w.in_features + 1) / 2 : w.groups;
  // Widening pays once the codes are used by more than one register tile.
  const bool widen = CODES == Codes::q4 && task.rows > 6 * S::max_rows;
  PageCursor pages(task.ahead, steps, (end - begin) / 2 * ((task.rows + S::max_rows - 1) / S::max_rows));
  for (int i = begin; i < end; i += 2) {
    const bool all = task.tiles == nullptr;
    const TilePair tile{all ? i : task.tiles[i], all ? i + 1 : task.tiles[i + 1]};
    // Of a list the next pair but one is seldom in one piece: what follows its first tile is fetched in vain.
    t.next = w.tile(all ? i + 4 : task.tiles[std::min(i + 4, end - 2)]);
    for (int n = 0; n < 2; ++n) {
      const uint8_t* p = w.tile(tile[n]);
      t.codes[n] = p;
      t.scales[n] = p + w.scales_at;
      t.weight_pairs[n] = p + w.pairs_at;
      if (widen) {
        uint8_t* wide = scratch + static_cast<size_t>(n) * w.in_features * lanes;
        widen_codes<S>(p, w.groups, wide);
        t.codes[n] = wide;
      }
    }
    if (widen) {
      compute_rows<S, Codes::q8, GROUP, SC>(task, t, pages, tile, steps);
    } else {
      compute_rows<S, CODES, GROUP, SC>(task, t, pages, tile, steps);
    }
  }
}

// Tiles [begin, end) of the weights, or of the list of them; begin even. `scratch`: 32 bytes a column.
template <class S>
void linear(const LinearTask& task, int begin, int end, uint8_t* scratch) {
  const PackedLinear& w = *task.weights;
  if (w.codes == Codes::bf16) return linear_tiles<S, Codes::bf16, 0, Scales::none>(task, begin, end, scratch);
  if (w.codes == Codes::q4) {
    if (w.scales == Scales::f16) return linear_tiles<S, Codes::q4, 32, Scales::f16>(task, begin, end, scratch);
    return linear_tiles<S, Codes::q4, 32, Scales::f32>(task, begin, end, scratch);
  }
  if (w.group == 16) return linear_tiles<S, Codes::q8, 16, Scales::f32>(task, begin, end, scratch);
  if (w.scales == Scales::f16) return linear_tiles<S, Codes::q8, 32, Scales::f16>(task, begin, end, scratch);
  return linear_tiles<S, Codes::q8, 32, Scales::f32>(task, begin, end, scratch);
}

}  // namespace fallow::kernels
