#include "signs.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "bits.h"

namespace fallow {

PackedSigns::PackedSigns(int out_features, int in_features, std::vector<SignColumn> given)
    : out_features(out_features), in_features(in_features), columns(std::move(given)), tiles((out_features + lanes - 1) / lanes) {
  if (out_features <= 0 || in_features < directions || columns.empty() || columns.size() % group != 0) {
    throw std::invalid_argument("a screen needs rows, directions, and columns in multiples of " + std::to_string(group) + ", not " +
                                std::to_string(columns.size()));
  }
  const auto is_known = [&](const SignColumn& c) { return c.direction >= 0 && c.direction < in_features; };
  if (!std::all_of(columns.begin(), columns.end(), is_known)) throw std::invalid_argument("a column of the screen is along a direction that there is not");
  bytes = static_cast<size_t>(tiles) * tile_bytes();
  memory = Memory(bytes);
  data = memory.data();
  const int beyond = tiles * lanes - out_features;
  auto* deviations_of_last = reinterpret_cast<uint16_t*>(tile(tiles - 1) + deviations_at());
  constexpr uint16_t minus_infinity = 0xff80;
  std::fill(deviations_of_last + lanes - beyond, deviations_of_last + lanes, minus_infinity);
}

void PackedSigns::put_rows(int first, int count, const float* along, const bool* positive, const float* row_scales,
                           const float* row_deviations) {
  if (first < 0 || count < 0 || first > out_features - count) throw std::invalid_argument("the screen has fewer rows");
  for (int i = 0; i < count; ++i) {
    uint8_t* t = tile((first + i) / lanes);
    const int lane = (first + i) % lanes;
    for (int k = 0; k < directions; ++k) {
      const float code = std::nearbyint(along[i * directions + k] / code_step);
      t[k * lanes + lane] = static_cast<uint8_t>(128 + static_cast<int>(code > -128.f ? std::min(code, 127.f) : -128.f));
    }
    reinterpret_cast<uint16_t*>(t + scales_at())[lane] = float_to_bf16(row_scales[i]);
    reinterpret_cast<uint16_t*>(t + deviations_at())[lane] = float_to_bf16(row_deviations[i]);
  }
  for (size_t k = 0; k < columns.size(); ++k) {
    const size_t bit = k % group / 16 * 4 + k % 4;
    const size_t at = codes_bytes + k / group * group_bytes + k % 16 / 4 * lanes;
    for (int i = 0; i < count; ++i) {
      uint8_t& byte = tile((first + i) / lanes)[at + (first + i) % lanes];
      byte = static_cast<uint8_t>((byte & ~(1u << bit)) | (static_cast<unsigned>(positive[k * count + i]) << bit));
    }
  }
}

void PackedSigns::move_to(Arena& arena) {
  data = arena.keep(data, bytes);
  memory = Memory();
}

}  // namespace fallow
