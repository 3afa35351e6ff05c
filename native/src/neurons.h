// The neurons of a feed-forward network one by one: what a neuron at work reads, its row of the up projection and its
// column of the down projection, lies together, so that one at rest costs nothing.
//
// Where gates come rounded to 8 bits (for ReLU: most are zero, and few bits tell), a neuron has its gate row too, and of every
// neuron `doubts` says how far its rounded gate may be off for hidden states of norm 1: what may be above zero is computed.
//
// A neuron has its gate row (where gates are rounded), its up row (where the network is gated) and its down column, one after
// the other, each of in_features values and 64-byte aligned:
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
  bool rounded_gates = false;  // has gate rows and doubts
  Codes codes = Codes::bf16;
  size_t row_bytes = 0;
  Memory memory;            // its own, until it is moved to an arena
  uint8_t* data = nullptr;
  size_t bytes = 0;

  static constexpr int group = 32;
  int groups() const { return in_features / group; }
  const uint8_t* neuron(int n) const { return data + n * neuron_bytes(); }
  const uint8_t* gate(int n) const { return neuron(n); }
  const uint8_t* up(int n) const { return neuron(n) + (rounded_gates ? row_bytes : 0); }
  const uint8_t* down(int n) const { return up(n) + (gated ? row_bytes : 0); }
  size_t neuron_bytes() const { return (1 + gated + rounded_gates) * row_bytes; }
  const float* doubts() const { return reinterpret_cast<const float*>(neuron(count)); }  // [count], and zeros up to a whole vector
  void move_to(Arena& arena);
};

// `up` [count][in_features] or null, `down` [in_features][count]; precision "q8" or "bf16". `gate`, where gates come rounded
// ("q8" of pack_linear), [count][in_features]. Throws std::invalid_argument.
PackedNeurons pack_neurons(const RowSource* up, const RowSource& down, int count, const std::string& precision, const RowSource* gate = nullptr);

}  // namespace fallow
