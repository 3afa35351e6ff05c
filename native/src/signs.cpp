#include "signs.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "bits.h"

namespace fallow {

PackedSigns::PackedSigns(int out_features, int in_features)
    : out_features(out_features), in_features(in_features), tiles((out_features + lanes - 1) / lanes) {
  if (out_features <= 0 || in_features <= 0 || in_features % group != 0) {
    throw std::invalid_argument("a screen needs rows, and columns in multiples of " + std::to_string(group) + ", not " + std::to_string(in_features));
  }
  bytes = static_cast<size_t>(tiles) * tile_bytes();
  memory = Memory(bytes);
  data = memory.data();
  const int beyond = tiles * lanes - out_features;
  auto* deviations_of_last = reinterpret_cast<uint16_t*>(tile(tiles - 1) + deviations_at());
  constexpr uint16_t minus_infinity = 0xff80;
  std::fill(deviations_of_last + lanes - beyond, deviations_of_last + lanes, minus_infinity);
}

void PackedSigns::put_rows(int first, int count, const float* along, const float* rest, const float* row_deviations) {
  if (first < 0 || count < 0 || first > out_features - count) throw std::invalid_argument("the screen has fewer rows");
  for (int i = 0; i < count; ++i) {
    uint8_t* t = tile((first + i) / lanes);
    const int lane = (first + i) % lanes;
    for (int k = 0; k < directions; ++k) {
      const float code = std::nearbyint(along[i * directions + k] / code_step);
      t[k / 4 * 64 + lane * 4 + k % 4] = static_cast<uint8_t>(128 + static_cast<int>(code > -128.f ? std::min(code, 127.f) : -128.f));
    }
    double total = 0;
    int count = 0;  // columns of zeros are padding
    for (int k = 0; k < in_features; ++k) {
      const float x = rest[static_cast<size_t>(i) * in_features + k];
      total += std::fabs(x);
      count += x != 0.f;
      const int bit = k % group / 16 * 4 + k % 4;
      uint8_t& byte = t[codes_bytes + k / group * group_bytes + k % 16 / 4 * lanes + lane];
      byte = static_cast<uint8_t>((byte & ~(1u << bit)) | (static_cast<unsigned>(x > 0.f) << bit));
    }
    reinterpret_cast<uint16_t*>(t + scales_at())[lane] = float_to_bf16(static_cast<float>(total / std::max(count, 1)));
    reinterpret_cast<uint16_t*>(t + deviations_at())[lane] = float_to_bf16(row_deviations[i]);
  }
}

void PackedSigns::move_to(Arena& arena) {
  data = arena.keep(data, bytes);
  memory = Memory();
}

}  // namespace fallow
