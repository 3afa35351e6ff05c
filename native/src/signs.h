// The rows of a head as a screen keeps them: along a few directions, where most of what logits vary by lies, in 8 bits;
// along others signs, which are columns of their own. A column belongs to a direction and adds or takes away its size
// there: a direction that matters more has several, each the sign of what those before it leave. With them comes how far
// off a row's logit is: the standard deviation over some text.
//
// A tile holds sixteen rows (lanes are rows; those beyond the last are zero):
//   codes       [4][16 rows]: of a direction, c stands for code_step * (c - 128)
//   signs       [columns/32][4][16 rows]: a bit a column, 1 is positive; byte j has columns 4 j and on in its lower
//               half, the first one in its lowest bit, and columns 16 + 4 j and on in its upper half
//   scales      [16] bfloat16, of the signs
//   deviations  [16] bfloat16; of rows beyond the last minus infinity
#pragma once
#include <cstdint>
#include <vector>

#include "memory.h"
#include "packed.h"

namespace fallow {

struct SignColumn {
  int direction;
  float size;
};

struct PackedSigns {
  static constexpr int directions = 4;  // in 8 bits, the first ones
  static constexpr int group = 32;
  static constexpr float code_step = 1.f / 24.f;  // rows along a direction have a mean square of 1: codes reach 5.3

  int out_features = 0;
  int in_features = 0;  // directions in all
  std::vector<SignColumn> columns;  // a multiple of 32
  int tiles = 0;
  Memory memory;  // its own, until it is moved to an arena
  uint8_t* data = nullptr;
  size_t bytes = 0;

  int groups() const { return static_cast<int>(columns.size()) / group; }
  static constexpr size_t codes_bytes = static_cast<size_t>(directions) * lanes;
  static constexpr size_t group_bytes = static_cast<size_t>(group) * lanes / 8;
  size_t table_bytes() const { return columns.size() * 4; }  // of a row of activations: kernels.h, sign_tables
  size_t scales_at() const { return codes_bytes + groups() * group_bytes; }
  size_t deviations_at() const { return scales_at() + lanes * sizeof(uint16_t); }
  size_t tile_bytes() const { return deviations_at() + lanes * sizeof(uint16_t); }
  uint8_t* tile(int t) const { return data + static_cast<size_t>(t) * tile_bytes(); }
  const uint16_t* deviations(int t) const { return reinterpret_cast<const uint16_t*>(tile(t) + deviations_at()); }

  PackedSigns() = default;
  PackedSigns(int out_features, int in_features, std::vector<SignColumn> columns);  // throws std::invalid_argument
  // Rows [first, first + count): [count][directions], [columns][count], [count], [count]. Throws std::invalid_argument.
  void put_rows(int first, int count, const float* along, const bool* positive, const float* row_scales, const float* row_deviations);
  void move_to(Arena& arena);
};

}  // namespace fallow
