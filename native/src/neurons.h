// The neurons of a feed-forward network one by one: what a neuron at work reads, its row of the up projection and its
// column of the down projection, lies together, so that one at rest costs nothing.
//
// A neuron has its up row (where the network is gated) and its down column, one after the other, each of in_features values
// and 64-byte aligned:
//   bf16    [in_features]
//   8-bit   codes [in_features], then for each group of 32 a float32 scale, then for each a float32 offset:
//           code c stands for scale * c + offset
#pragma once
#include <cstdint>
#include <string>

#include "packed.h"

namespace fallow {

struct PackedNeurons {
  int count = 0;
  int in_features = 0;  // a multiple of 16, of 32 for 8-bit codes
  bool gated = false;   // has up rows
  Codes codes = Codes::bf16;
  size_t row_bytes = 0;
  Memory memory;            // its own, until it is moved to an arena
  uint8_t* data = nullptr;
  size_t bytes = 0;

  static constexpr int group = 32;
  int groups() const { return in_features / group; }
  const uint8_t* neuron(int n) const { return data + n * neuron_bytes(); }
  const uint8_t* up(int n) const { return neuron(n); }
  const uint8_t* down(int n) const { return neuron(n) + (gated ? row_bytes : 0); }
  size_t neuron_bytes() const { return gated ? 2 * row_bytes : row_bytes; }
  void move_to(Arena& arena);
};

// `up` [count][in_features] or null, `down` [in_features][count]; precision "q8" or "bf16". Throws std::invalid_argument.
PackedNeurons pack_neurons(const RowSource* up, const RowSource& down, int count, const std::string& precision);

}  // namespace fallow
