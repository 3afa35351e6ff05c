// Which of some numbers are the largest.
#pragma once
#include <cstdint>
#include <cstring>

namespace fallow::kernels {

// A number that `count` of n values, none negative, reach; more where several are equal to it.
inline float largest(const float* values, int n, int count) {
  // Bits of such floats are in the order of the floats: the answer is found one bit after the other.
  uint32_t found = 0;
  for (uint32_t bit = 1u << 30; bit != 0; bit >>= 1) {
    const uint32_t at_least = found | bit;
    int reached = 0;
    for (int i = 0; i < n; ++i) {
      uint32_t bits;
      std::memcpy(&bits, values + i, 4);
      reached += bits >= at_least;
    }
    if (reached >= count) found = at_least;
    if (reached == count) break;
  }
  float result;
  std::memcpy(&result, &found, 4);
  return result;
}

}  // namespace fallow::kernels
