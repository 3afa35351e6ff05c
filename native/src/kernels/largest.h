// Which of some numbers are the largest.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../kernels.h"

namespace fallow::kernels {

// Whole numbers in the order of their floats; NaN is beyond infinity, on the side of its sign.
FALLOW_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
FALLOW_INLINE uint32_t in_order(float value) {
  const uint32_t bits = bits_of(value);
  return bits ^ ((0u - (bits >> 31)) | 0x80000000u);
}

// The greatest number that `count` > 0 of number(0) to number(n - 1) reach, or one below it that no others do.
template <class S, class Number>
uint32_t greatest(int n, int count, const Number& number) {
  uint32_t found = 0;  // one bit after the other
  for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    const uint32_t at_least = found | bit;
    int reached = 0;
    for (int i = 0; i < n; ++i) reached += number(i) >= at_least;
    if (reached >= count) found = at_least;
    if (reached == count) break;
  }
  return found;
}

// A number that `count` > 0 of n values, none negative, reach, and more only where several are equal to it.
template <class S>
float largest(const float* values, int n, int count) {
  const uint32_t found = greatest<S>(n, count, [&](int i) { return bits_of(values[i]); });
  float result;
  std::memcpy(&result, &found, 4);
  return result;
}

// The places of the `count` largest of n values, in order; of several that are equal the first ones. Returns how many there
// are: n at most. out: room for one more.
template <class S>
int list_largest(const float* values, int n, int count, int32_t* out) {
  if (std::min(count, n) <= 0) return 0;
  auto* numbers = reinterpret_cast<uint32_t*>(out);  // until their places are written over them
  for (int i = 0; i < n; ++i) numbers[i] = in_order(values[i]);
  const uint32_t least = greatest<S>(n, std::min(count, n), [&](int i) { return numbers[i]; });
  int equals = std::min(count, n);
  for (int i = 0; i < n; ++i) equals -= numbers[i] > least;
  int listed = 0;
  for (int i = 0; i < n; ++i) {  // without branches, which nobody could foretell
    const uint32_t number = numbers[i];
    const bool equal = number == least && equals > 0;
    out[listed] = i;
    listed += static_cast<int>(number > least || equal);
    equals -= static_cast<int>(equal);
  }
  return listed;
}

}  // namespace fallow::kernels
