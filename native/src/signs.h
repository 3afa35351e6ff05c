// The rows of a head as a screen keeps them, for two looks. For the first one there are the numbers along a few
// directions, where most of what logits vary by lies, in 8 bits, and signs along the next; for the second one signs along
// all others too, and then along all of them the sign of what the first signs leave. Columns of zeros are padding. With
// each look comes how far off a row's logit is then: the standard deviation over some text.
//
// A tile holds sixteen rows (lanes are rows; those beyond the last are zero). Of the first look:
//   codes       [4][16 rows][4]: c stands for code_step * (c - 128)
//   signs       [first/32][8][16 rows]: a bit a column, 1 is positive; 4 bits a row, so that 8 bytes hold 4 columns
//   scales      [16] bfloat16, of the signs
//   deviations  [16] bfloat16; of rows beyond the last minus infinity
// And of the second look, behind the first look of all tiles:
//   others      [(in_features - first)/32][8][16 rows]: signs of the other columns
//   left        [in_features/32][8][16 rows]: signs of what those of all columns leave
//   scales      [2][16] bfloat16, of others and of left
//   deviations  [16] bfloat16; of rows beyond the last minus infinity
//   differences [16] bfloat16: the standard deviation of what the second look changes
#pragma once
#include <cstdint>

#include "memory.h"
#include "packed.h"

namespace fallow {

struct PackedSigns {
  static constexpr int directions = 16;
  static constexpr int group = 32;
  static constexpr float code_step = 1.f / 24.f;  // rows along a direction have a mean square of 1: codes reach 5.3
  static constexpr int looks = 2;

  int out_features = 0;
  int in_features = 0;  // a multiple of 32
  int first = 0;        // columns of the first look, a multiple of 32
  int tiles = 0;
  Memory memory;  // its own, until it is moved to an arena
  uint8_t* data = nullptr;
  size_t bytes = 0;

  static constexpr size_t codes_bytes = static_cast<size_t>(directions) * lanes;
  static constexpr size_t group_bytes = static_cast<size_t>(group) * lanes / 8;
  static constexpr size_t numbers_bytes = lanes * sizeof(uint16_t);
  int first_groups() const { return first / group; }
  int other_groups() const { return (in_features - first) / group; }
  int groups() const { return in_features / group; }

  size_t scales_at() const { return codes_bytes + first_groups() * group_bytes; }
  size_t tile_bytes() const { return scales_at() + 2 * numbers_bytes; }
  uint8_t* tile(int t) const { return data + static_cast<size_t>(t) * tile_bytes(); }

  size_t left_at() const { return other_groups() * group_bytes; }
  size_t second_scales_at() const { return left_at() + groups() * group_bytes; }
  size_t second_bytes() const { return second_scales_at() + 4 * numbers_bytes; }
  uint8_t* second(int t) const { return data + static_cast<size_t>(tiles) * tile_bytes() + static_cast<size_t>(t) * second_bytes(); }

  const uint16_t* scales(int t) const { return numbers(tile(t) + scales_at(), 0); }
  const uint16_t* second_scales(int t, int which) const { return numbers(second(t) + second_scales_at(), which); }  // of others, of left
  // After one look (0) or two (1).
  const uint16_t* deviations(int t, int look) const { return look == 0 ? numbers(tile(t) + scales_at(), 1) : numbers(second(t) + second_scales_at(), 2); }
  const uint16_t* differences(int t) const { return numbers(second(t) + second_scales_at(), 3); }

  PackedSigns() = default;
  PackedSigns(int out_features, int in_features, int first);  // throws std::invalid_argument
  // Rows [begin, begin + count): [count][directions], [count][in_features], [looks][count]. Throws std::invalid_argument.
  void put_rows(int begin, int count, const float* along, const float* rest, const float* row_deviations);
  void move_to(Arena& arena);

 private:
  static uint16_t* numbers(uint8_t* at, int which) { return reinterpret_cast<uint16_t*>(at) + which * lanes; }
  // Writes a row's signs of these columns; returns their scale, the mean magnitude, as bfloat16 holds it.
  static float put_signs(const float* columns, int count, int lane, uint8_t* signs, uint16_t* scales);
};

}  // namespace fallow
