#include "signs.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "bits.h"

namespace fallow {

PackedSigns::PackedSigns(int out_features, int in_features, int first)
    : out_features(out_features), in_features(in_features), first(first), tiles((out_features + lanes - 1) / lanes) {
  if (out_features <= 0 || in_features <= 0 || in_features % group != 0) {
    throw std::invalid_argument("a screen needs rows, and columns in multiples of " + std::to_string(group) + ", not " + std::to_string(in_features));
  }
  if (first <= 0 || first > in_features || first % group != 0) {
    throw std::invalid_argument("the first look needs some of the columns, in multiples of " + std::to_string(group) + ", not " + std::to_string(first));
  }
  bytes = static_cast<size_t>(tiles) * (tile_bytes() + second_bytes());
  memory = Memory(bytes);
  data = memory.data();
  constexpr uint16_t minus_infinity = 0xff80;
  const int within = out_features - (tiles - 1) * lanes;
  for (uint8_t* at : {tile(tiles - 1) + scales_at() + numbers_bytes, second(tiles - 1) + second_scales_at() + 2 * numbers_bytes}) {
    std::fill(numbers(at, 0) + within, numbers(at, 1), minus_infinity);
  }
}

float PackedSigns::put_signs(const float* columns, int count, int lane, uint8_t* signs, uint16_t* scales) {
  double total = 0;
  int not_zero = 0;
  for (int k = 0; k < count; ++k) {
    total += std::fabs(columns[k]);
    not_zero += columns[k] != 0.f;
    const int bit = lane * 4 + k % 4;
    uint8_t& byte = signs[static_cast<size_t>(k / 4) * 8 + bit / 8];
    byte = static_cast<uint8_t>((byte & ~(1u << bit % 8)) | (static_cast<unsigned>(columns[k] > 0.f) << bit % 8));
  }
  scales[lane] = float_to_bf16(static_cast<float>(total / std::max(not_zero, 1)));
  return bf16_to_float(scales[lane]);
}

void PackedSigns::put_rows(int begin, int count, const float* along, const float* rest, const float* row_deviations) {
  if (begin < 0 || count < 0 || begin > out_features - count) throw std::invalid_argument("the screen has fewer rows");
  std::vector<float> left(in_features);
  for (int i = 0; i < count; ++i) {
    const int lane = (begin + i) % lanes;
    uint8_t* t = tile((begin + i) / lanes);
    uint8_t* again = second((begin + i) / lanes);
    for (int k = 0; k < directions; ++k) {
      const float code = std::nearbyint(along[i * directions + k] / code_step);
      t[k / 4 * 64 + lane * 4 + k % 4] = static_cast<uint8_t>(128 + static_cast<int>(code > -128.f ? std::min(code, 127.f) : -128.f));
    }
    const float* row = rest + static_cast<size_t>(i) * in_features;
    uint16_t* second_scales = numbers(again + second_scales_at(), 0);
    const float scale = put_signs(row, first, lane, t + codes_bytes, numbers(t + scales_at(), 0));
    const float others = put_signs(row + first, in_features - first, lane, again, second_scales);
    for (int k = 0; k < in_features; ++k) {
      const float kept = k < first ? scale : others;
      left[k] = row[k] == 0.f ? 0.f : row[k] - (row[k] > 0.f ? kept : -kept);
    }
    put_signs(left.data(), in_features, lane, again + left_at(), second_scales + lanes);
    const float once = row_deviations[i], twice = row_deviations[count + i];
    numbers(t + scales_at(), 1)[lane] = float_to_bf16(once);
    second_scales[2 * lanes + lane] = float_to_bf16(twice);
    second_scales[3 * lanes + lane] = float_to_bf16(std::sqrt(std::max(once * once - twice * twice, 0.f)));
  }
}

void PackedSigns::move_to(Arena& arena) {
  data = arena.keep(data, bytes);
  memory = Memory();
}

}  // namespace fallow
