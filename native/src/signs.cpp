#include "signs.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "bits.h"

namespace fallow {
PackedSigns::PackedSigns(int out_features, int in_features, std::vector<SignColumn> given, int first_columns)
    : out_features(out_features),
      in_features(in_features),
      columns(std::move(given)),
      first_columns(first_columns),
      tiles((out_features + lanes - 1) / lanes) {
  if (out_features <= 0 || in_features < directions || columns.empty() || columns.size() % group != 0) {
    throw std::invalid_argument("a screen needs rows, directions, and columns in multiples of " + std::to_string(group) + ", not " +
                                std::to_string(columns.size()));
  }
  if (first_columns <= 0 || end_column(1) <= first_columns || first_columns % group != 0) {
    throw std::invalid_argument("each look of a screen needs columns in multiples of " + std::to_string(group) + ", not the first one " +
                                std::to_string(first_columns) + " of " + std::to_string(columns.size()));
  }
  const auto is_known = [&](const SignColumn& c) { return c.direction >= 0 && c.direction < in_features; };
  if (!std::all_of(columns.begin(), columns.end(), is_known)) throw std::invalid_argument("a column of the screen is along a direction that there is not");
  bytes = static_cast<size_t>(tiles) * (tile_bytes(0) + tile_bytes(1));
  memory = Memory(bytes);
  data = memory.data();
  const int beyond = tiles * lanes - out_features;
  constexpr uint16_t minus_infinity = 0xff80;
  for (int look = 0; look < looks; ++look) {
    auto* deviations_of_last = reinterpret_cast<uint16_t*>(tile(look, tiles - 1) + deviations_at(look));
    std::fill(deviations_of_last + lanes - beyond, deviations_of_last + lanes, minus_infinity);
  }
}

void PackedSigns::put_rows(int first, int count, const float* along, const bool* positive, const float* row_scales,
                           const float* row_deviations) {
  if (first < 0 || count < 0 || first > out_features - count) throw std::invalid_argument("the screen has fewer rows");
  for (int i = 0; i < count; ++i) {
    const int lane = (first + i) % lanes;
    for (int k = 0; k < directions; ++k) {
      const float code = std::nearbyint(along[i * directions + k] / code_step);
      tile(0, (first + i) / lanes)[k * lanes + lane] = static_cast<uint8_t>(128 + static_cast<int>(code > -128.f ? std::min(code, 127.f) : -128.f));
    }
    for (int look = 0; look < looks; ++look) {
      uint8_t* t = tile(look, (first + i) / lanes);
      reinterpret_cast<uint16_t*>(t + scales_at(look))[lane] = float_to_bf16(row_scales[i]);
      reinterpret_cast<uint16_t*>(t + deviations_at(look))[lane] = float_to_bf16(row_deviations[static_cast<size_t>(look) * count + i]);
    }
  }
  for (int look = 0; look < looks; ++look) {
    for (int k = first_column(look); k < end_column(look); ++k) {
      const int of_look = k - first_column(look);
      const int bit = of_look % group / 16 * 4 + of_look % 4;
      const size_t at = signs_at(look) + of_look / group * group_bytes + static_cast<size_t>(of_look % 16 / 4) * lanes;
      for (int i = 0; i < count; ++i) {
        uint8_t& byte = tile(look, (first + i) / lanes)[at + (first + i) % lanes];
        byte = static_cast<uint8_t>((byte & ~(1u << bit)) | (static_cast<unsigned>(positive[static_cast<size_t>(k) * count + i]) << bit));
      }
    }
  }
}

void PackedSigns::move_to(Arena& arena) {
  data = arena.keep(data, bytes);
  memory = Memory();
}

}  // namespace fallow
