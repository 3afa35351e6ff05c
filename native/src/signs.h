// The rows of a head as a screen keeps them: along a few directions, where most of what logits vary by lies, in 8 bits;
// along others signs, which are columns of their own. A column belongs to a direction and adds or takes away its size
// there: a direction that matters more has several, each the sign of what those before it leave. There are two looks: the
// first one at the codes and the columns that matter most, of all rows; the second one at the other columns, of rows that
// are likely. What they read lies apart. With each comes how far off a row's logit is after it: the standard deviation
// over some text.
//
// A tile holds sixteen rows (lanes are rows; those beyond the last are zero):
//   codes       [4][16 rows], of the first look alone: of a direction, c stands for code_step * (c - 128)
//   signs       [columns/32][4][16 rows]: a bit a column, 1 is positive; byte j has columns 4 j and on in its lower
//               half, the first one in its lowest bit, and columns 16 + 4 j and on in its upper half
//   scales      [16] bfloat16, of the signs: the same in both looks
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
  std::vector<SignColumn> columns;  // those of the first look, and then those of the second: multiples of 32
  int first_columns = 0;            // how many the first look has
  int tiles = 0;
  Memory memory;  // its own, until it is moved to an arena
  uint8_t* data = nullptr;
  size_t bytes = 0;

  static constexpr int looks = 2;
  static constexpr size_t group_bytes = static_cast<size_t>(group) * lanes / 8;
  int first_column(int look) const { return look == 0 ? 0 : first_columns; }
  int end_column(int look) const { return look == 0 ? first_columns : static_cast<int>(columns.size()); }
  int groups(int look) const { return (end_column(look) - first_column(look)) / group; }
  size_t table_bytes() const { return columns.size() * 4; }  // of a row of activations: kernels.h, sign_tables
  size_t tables_at(int look) const { return static_cast<size_t>(first_column(look)) * 4; }
  static constexpr size_t signs_at(int look) { return look == 0 ? static_cast<size_t>(directions) * lanes : 0; }
  size_t scales_at(int look) const { return signs_at(look) + groups(look) * group_bytes; }
  size_t deviations_at(int look) const { return scales_at(look) + lanes * sizeof(uint16_t); }
  size_t tile_bytes(int look) const { return deviations_at(look) + lanes * sizeof(uint16_t); }
  uint8_t* tile(int look, int t) const { return data + (look == 0 ? 0 : tiles * tile_bytes(0)) + t * tile_bytes(look); }
  const uint16_t* deviations(int look, int t) const { return reinterpret_cast<const uint16_t*>(tile(look, t) + deviations_at(look)); }

  PackedSigns() = default;
  // Throws std::invalid_argument.
  PackedSigns(int out_features, int in_features, std::vector<SignColumn> columns, int first_columns);
  // Rows [first, first + count): [count][directions], [columns][count], [count], [looks][count]. Throws as above.
  void put_rows(int first, int count, const float* along, const bool* positive, const float* row_scales, const float* row_deviations);
  void move_to(Arena& arena);
};

}  // namespace fallow
