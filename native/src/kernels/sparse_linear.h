// Linears of which a step reads a part: rows whose gates let them work, or columns whose activations are not zero. What is
// computed is computed by the operations of linear.h in their order, so the result is that of the dense linear to the bits,
// with zeros in place of what rests; only what is read differs.
//
// Limit: the bytes of the rows or columns at work, and of scales and pairs of columns.
#pragma once
#include <algorithm>
#include <cstring>

#include "linear.h"

namespace fallow::kernels {

constexpr int most_rows = 64;        // that are taken at once
constexpr int most_single_rows = 2;  // rows that go through the columns one by one
constexpr int columns_ahead = 256;   // between fetching and use
constexpr int scales_ahead = 8;      // groups of them

// Brings the rows of a list one line after the other, a few lines at a time: more at once wait for each other.
struct RowCursor {
  const PackedLinear& w;
  const int32_t* list;
  int count;
  int next = 0;
  size_t line = 0;

  void fetch(int lines) {
    for (; lines > 0 && next < count; --lines) {
      prefetch_far(w.unit(list[next]) + line);
      line += cache_line;
      if (line < w.unit_bytes) continue;
      line = 0;
      ++next;
    }
  }
};

// Sixteen rows of weights as a tile, while those to come are fetched.
template <class S>
inline void gather_tile(const PackedLinear& w, const int32_t* rows, uint8_t* tile, RowCursor& ahead) {
  const uint8_t* units[lanes];
  for (int i = 0; i < lanes; ++i) units[i] = w.unit(rows[i]);
  const auto transpose = [&](size_t at, uint8_t* out) {
    ahead.fetch(4);  // 64 bytes for each of 64 that are read
    S::transpose_quads(units, at, out);
  };
  for (int g = 0; g < w.groups; ++g) transpose(static_cast<size_t>(g) * 16, tile + g * 256);
  const int per_quad = w.scales == Scales::f16 ? 8 : 4;
  for (int g = 0; g < w.groups; g += per_quad) {
    uint8_t* out = tile + w.scales_at;
    const size_t at = w.unit_scales_at + static_cast<size_t>(g) * 16 / per_quad;
    if (w.scales == Scales::f32) {
      transpose(at, out + g * lanes * 4);
      continue;
    }
    uint32_t twos[4][lanes];
    transpose(at, reinterpret_cast<uint8_t*>(twos));
    auto* scales = reinterpret_cast<uint16_t*>(out) + g * lanes;
    for (int q = 0; q < std::min(4, (w.groups - g + 1) / 2); ++q) {
      for (int i = 0; i < lanes; ++i) {
        scales[2 * q * lanes + i] = static_cast<uint16_t>(twos[q][i]);
        scales[(2 * q + 1) * lanes + i] = static_cast<uint16_t>(twos[q][i] >> 16);
      }
    }
  }
  for (int p = 0; p < w.pairs; p += 4) transpose(w.unit_pairs_at + static_cast<size_t>(p) * 4, tile + w.pairs_at + p * 64);
}

// Of rows [begin, end) those at work in any row of the task; their places in `out` hold activated gates, all others zero.
template <class S>
inline int list_at_work(const LinearTask& task, int begin, int end, int32_t* list) {
  int count = 0;
  for (int n = begin; n < end; n += lanes) {
    const unsigned all = end - n >= lanes ? 0xffffu : (1u << (end - n)) - 1;
    unsigned any = 0;
    for (int r = 0; r < task.rows; ++r) {
      const auto gates = activate<S>(S::load(task.gates + r * task.gates_stride + n), task.activation);
      const unsigned works = S::beyond(gates, task.threshold) & all;
      any |= works;
      float values[lanes];
      S::store(values, gates);
      float* out = task.out + r * task.out_stride + n;
      for (int i = 0; i < std::min(lanes, end - n); ++i) out[i] = (works >> i) & 1u ? values[i] : 0.f;
    }
    for (; any != 0; any &= any - 1) list[count++] = n + __builtin_ctz(any);
  }
  return count;
}

template <class S, Scales SC>
void rows_at_work(const LinearTask& task, int begin, int end, uint8_t* memory) {
  const PackedLinear& w = *task.weights;
  const SparseScratch scratch(w);
  int32_t* list = scratch.list(memory);
  const int count = list_at_work<S>(task, begin * lanes, std::min(end * lanes, w.out_features), list);
  if (count == 0) return;
  constexpr int pair = 2 * lanes;
  for (int i = count; i < (count + pair - 1) / pair * pair; ++i) list[i] = list[count - 1];
  RowCursor ahead{w, list, count};
  ahead.fetch(static_cast<int>(pair * w.unit_bytes / cache_line));
  PackedLinear shape;  // of what is computed at once
  shape.out_features = pair;
  shape.in_features = w.in_features;
  float products[most_rows * pair];
  float bias[pair];
  LinearTask part = task;
  part.weights = &shape;
  part.out = products;
  part.out_stride = pair;
  part.bias = task.bias == nullptr ? nullptr : bias;
  part.epilogue = Epilogue::store;
  TileSource t = source_of(task);
  const bool widen = task.rows > 6 * S::max_rows;
  for (int i = 0; i < count; i += pair) {
    for (int n = 0; n < 2; ++n) {
      uint8_t* tile = scratch.tile(memory, n);
      gather_tile<S>(w, list + i + n * lanes, tile, ahead);
      t.codes[n] = tile;
      t.scales[n] = tile + w.scales_at;
      t.weight_pairs[n] = tile + w.pairs_at;
      if (!widen) continue;
      uint8_t* wide = scratch.wide(memory, n);
      widen_codes<S>(tile, w.groups, wide);
      t.codes[n] = wide;
    }
    for (int k = 0; k < pair && task.bias != nullptr; ++k) bias[k] = task.bias[list[i + k]];
    for_row_blocks(task.rows, most_rows, [&](int first, int rows) {
      part.activations = task.activations + first * t.stride;
      for_row_blocks(rows, S::max_rows, [&](int row, int take) {
        with_rows<S>(take, [&](auto fixed) {
          constexpr int MR = decltype(fixed)::value;
          if (widen) {
            compute_tile<S, MR, Codes::q8, 32, SC, false>(part, t, row, {0, 1});
          } else {
            compute_tile<S, MR, Codes::q4, 32, SC, false>(part, t, row, {0, 1});
          }
        });
      });
      for (int r = 0; r < rows; ++r) {
        float* out = task.out + (first + r) * task.out_stride;
        for (int k = 0; k < std::min(pair, count - i); ++k) {
          float& value = out[list[i + k]];  // zero where it rests in this row, whatever its product is
          if (value != 0.f) value *= products[r * pair + k];
        }
      }
    });
  }
}

// The columns of each group whose activation is not zero, as their numbers; those of group g are list[starts[g], starts[g + 1]).
inline void list_columns(const int8_t* codes, int groups, int32_t* starts, int32_t* list) {
  int count = 0;
  for (int g = 0; g < groups; ++g) {
    starts[g] = count;
    for (int k = g * 32; k < g * 32 + 32; ++k) {
      list[count] = k;
      count += codes[k] != 0;
    }
  }
  starts[groups] = count;
}

// One row by one block of eight tiles. `list`: the columns whose activations are not zero, those of group g from starts[g] on.
template <class S, Scales SC>
FALLOW_NOINLINE void block_by_columns(const LinearTask& task, const TileSource& t, int row, int block, const int32_t* starts, const int32_t* list) {
  using I = typename S::I;
  using F = typename S::F;
  const PackedLinear& w = *task.weights;
  const uint8_t* unit = w.unit(block);
  const int count = starts[t.groups];
  const bool is_last = block + 1 == w.blocks();
  // Where few columns are at work, those of several blocks to come are on their way.
  int ahead_block = block + (count > 0 ? columns_ahead / count : 0);
  int ahead = count > 0 ? columns_ahead % count : 0;
  const auto fetch_column = [&] {
    if (ahead_block < w.blocks()) prefetch_far(w.column(ahead_block, list[ahead]));
    if (++ahead < count) return;
    ahead = 0;
    ++ahead_block;
  };
  F acc[block_tiles];
#pragma GCC unroll 8
  for (int n = 0; n < block_tiles; ++n) acc[n] = S::zero();
  for (int p = 0; p < t.pairs; ++p) {
    const uint8_t* pairs = unit + w.unit_pairs_at + static_cast<size_t>(p) * block_tiles * 64;
    const I a = S::set1_i32(load_quad(t.activations + t.pairs_at + p * 4));
#pragma GCC unroll 8
    for (int n = 0; n < block_tiles; ++n) acc[n] = S::dot_bf16(acc[n], S::load_bytes(pairs + n * 64), a);
  }
  const auto* codes = reinterpret_cast<const int8_t*>(t.activations);
  const auto* scales = reinterpret_cast<const float*>(t.activations + t.scales_at);
  constexpr size_t scale_bytes = static_cast<size_t>(block_tiles) * lanes * (SC == Scales::f16 ? 2 : 4);
  const size_t pair_bytes = ActivationFormat::align((w.unit_scales_at + t.groups - 1) / t.groups);
  for (int g = 0; g < t.groups; ++g) {
    if (g + scales_ahead < t.groups) prefetch_run(unit + w.unit_scales_at + (g + scales_ahead) * scale_bytes, scale_bytes);
    if (!is_last) prefetch_run(w.unit(block + 1) + g * pair_bytes, pair_bytes);
    if (starts[g] == starts[g + 1] && scales[g] == 0.f) continue;  // not where values were no numbers
    const I start = S::set1_i32(load_quad(t.activations + t.start_at + g * 4));
    I sum[block_tiles];
#pragma GCC unroll 8
    for (int n = 0; n < block_tiles; ++n) sum[n] = start;
    for (int i = starts[g]; i < starts[g + 1]; i += 4) {
      const int left = starts[g + 1] - i;
      I low[4];
      I high[4];
      uint8_t x[4] = {0, 0, 0, 0};  // beyond the last: its codes times zero
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const int column = list[i + std::min(c, left - 1)];
        const I both = S::load_bytes(w.column(block, column));
        if (c < left) fetch_column();
        low[c] = S::low_nibbles(both);
        high[c] = S::high_nibbles(both);
        if (c < left) x[c] = static_cast<uint8_t>(codes[column]);
      }
      const I xs = S::set1_i32(load_quad(x));
      S::interleave_bytes(low);
      S::interleave_bytes(high);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        sum[2 * c] = S::dot_u4s8(sum[2 * c], low[c], xs);
        sum[2 * c + 1] = S::dot_u4s8(sum[2 * c + 1], high[c], xs);
      }
    }
    const F s = S::set1(scales[g]);
#pragma GCC unroll 8
    for (int n = 0; n < block_tiles; ++n) {
      const F ws = load_scales<S, SC>(unit + w.unit_scales_at, g * block_tiles + n);
      acc[n] = S::fma(S::to_float(sum[n]), S::mul(ws, s), acc[n]);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < block_tiles; n += 2) {
    const int tile = block * block_tiles + n;
    if (tile >= w.tiles) break;
    F both[1][2] = {{acc[n], acc[n + 1]}};
    finish_tile<S, 1, 2>(task, row, {tile, tile + 1}, both);
  }
}

// A block of columns as eight tiles, their codes in 8 bits.
template <class S>
inline void widen_block(const PackedLinear& w, int block, const SparseScratch& scratch, uint8_t* memory) {
  using I = typename S::I;
  for (int k = 0; k < w.in_features; k += 4) {
    I low[4];
    I high[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const I both = S::load_bytes(w.column(block, k + c));
      low[c] = S::low_nibbles(both);
      high[c] = S::high_nibbles(both);
    }
    S::interleave_bytes(low);
    S::interleave_bytes(high);
    const size_t at = static_cast<size_t>(k) * lanes;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      S::store_bytes(scratch.wide(memory, 2 * c) + at, low[c]);
      S::store_bytes(scratch.wide(memory, 2 * c + 1) + at, high[c]);
    }
  }
  const size_t scale_bytes = lanes * (w.scales == Scales::f16 ? 2 : 4);
  const uint8_t* unit = w.unit(block);
  for (int n = 0; n < block_tiles; ++n) {
    uint8_t* tile = scratch.tile(memory, n);
    for (int g = 0; g < w.groups; ++g) std::memcpy(tile + w.scales_at + g * scale_bytes, unit + w.unit_scales_at + (static_cast<size_t>(g) * block_tiles + n) * scale_bytes, scale_bytes);
    for (int p = 0; p < w.pairs; ++p) std::memcpy(tile + w.pairs_at + p * 64, unit + w.unit_pairs_at + (static_cast<size_t>(p) * block_tiles + n) * 64, 64);
  }
}

template <class S, Scales SC>
void columns_at_work(const LinearTask& task, int begin, int end, uint8_t* memory) {
  const PackedLinear& w = *task.weights;
  const SparseScratch scratch(w);
  TileSource t = source_of(task);
  const int first = begin / block_tiles;
  const int last = (end + block_tiles - 1) / block_tiles;
  if (task.rows <= most_single_rows) {
    int32_t* list = scratch.list(memory);
    int32_t* starts = list + w.in_features + 1;
    for (int r = 0; r < task.rows; ++r) {
      t.activations = task.activations + r * t.stride;
      list_columns(reinterpret_cast<const int8_t*>(t.activations), t.groups, starts, list);
      for (int i = 0; i < std::min(columns_ahead, starts[t.groups]) && first < last; ++i) prefetch_far(w.column(first, list[i]));
      for (int block = first; block < last; ++block) block_by_columns<S, SC>(task, t, r, block, starts, list);
    }
    return;
  }
  for (int block = first; block < last; ++block) {
    widen_block<S>(w, block, scratch, memory);
    for (int n = 0; n < block_tiles && block * block_tiles + n < w.tiles; n += 2) {
      for (int i = 0; i < 2; ++i) {
        const uint8_t* tile = scratch.tile(memory, n + i);
        t.codes[i] = scratch.wide(memory, n + i);
        t.scales[i] = tile + w.scales_at;
        t.weight_pairs[i] = tile + w.pairs_at;
      }
      const int tile = block * block_tiles + n;
      for_row_blocks(task.rows, S::max_rows, [&](int row, int take) {
        with_rows<S>(take, [&](auto fixed) { compute_tile<S, decltype(fixed)::value, Codes::q8, 32, SC, false>(task, t, row, {tile, tile + 1}); });
      });
    }
  }
}

// Of weights that lie by rows or by columns, tiles [begin, end); of columns whole blocks of them. `scratch`:
// linear_scratch_bytes.
template <class S>
void sparse_linear(const LinearTask& task, int begin, int end, uint8_t* scratch) {
  const PackedLinear& w = *task.weights;
  const bool half = w.scales == Scales::f16;
  if (w.layout == Layout::rows) return half ? rows_at_work<S, Scales::f16>(task, begin, end, scratch) : rows_at_work<S, Scales::f32>(task, begin, end, scratch);
  half ? columns_at_work<S, Scales::f16>(task, begin, end, scratch) : columns_at_work<S, Scales::f32>(task, begin, end, scratch);
}

}  // namespace fallow::kernels
