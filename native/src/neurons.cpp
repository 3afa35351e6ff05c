#include "neurons.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "bits.h"

namespace fallow {
namespace {

void put_row(const PackedNeurons& w, const float* values, uint8_t* out, CodedRow& coded) {
  if (w.codes == Codes::bf16) {
    auto* p = reinterpret_cast<uint16_t*>(out);
    for (int i = 0; i < w.in_features; ++i) p[i] = float_to_bf16(values[i]);
    return;
  }
  code_row_q8(values, w.in_features, PackedNeurons::group, coded);
  std::memcpy(out, coded.codes.data(), w.in_features);
  auto* scales = reinterpret_cast<float*>(out + w.in_features);
  for (int g = 0; g < w.groups(); ++g) {
    scales[g] = coded.scales[g];
    scales[w.groups() + g] = coded.offsets[g] - 128.f * coded.scales[g];  // of code 0
  }
}

// Of a gate row rounded to 8 bits, for hidden states of norm 1: some standard deviations of its product's error. Rounding the
// hidden states to 8 bits, 32 to a scale, adds at most so much: a step is the largest of a group over 127, an error a step over
// the root of 12.
float doubt_of(const float* row, int n, CodedRow& coded) {
  constexpr double deviations = 5;
  const double of_states = std::sqrt(PackedNeurons::group / 12.) / 127;
  code_row_q8(row, n, PackedNeurons::group, coded);
  double squares = 0, errors = 0;
  for (int i = 0; i < n; ++i) {
    const int g = i / PackedNeurons::group;
    const double kept = (coded.codes[i] - 128.) * coded.scales[g] + coded.offsets[g];
    squares += static_cast<double>(row[i]) * row[i];
    errors += (row[i] - kept) * (row[i] - kept);
  }
  return static_cast<float>(deviations * std::sqrt((errors + of_states * of_states * squares) / n));
}

}  // namespace

PackedNeurons pack_neurons(const RowSource* up, const RowSource& down, int count, const std::string& precision, const RowSource* gate) {
  PackedNeurons w;
  w.count = count;
  w.in_features = down.rows;
  w.gated = up != nullptr;
  w.rounded_gates = gate != nullptr;
  if (precision != "q8" && precision != "bf16") throw std::invalid_argument("precision " + precision + " is not known: q8 or bf16");
  w.codes = precision == "q8" ? Codes::q8 : Codes::bf16;
  if (count <= 0 || w.in_features <= 0) throw std::invalid_argument("a feed-forward network needs neurons and columns");
  if (gate != nullptr && (up == nullptr || gate->rows != count)) throw std::invalid_argument("the gate and the up projection differ in neurons");
  if (gate != nullptr && w.in_features % PackedNeurons::group != 0) throw std::invalid_argument("rounded gates need columns in multiples of 32");
  if (up != nullptr && up->rows != count) throw std::invalid_argument("the up and the down projection differ in neurons");
  const int whole = w.codes == Codes::q8 ? PackedNeurons::group : lanes;
  if (w.in_features % whole != 0) {
    throw std::invalid_argument("neurons need columns in multiples of " + std::to_string(whole) + ", not " + std::to_string(w.in_features));
  }
  const size_t row = w.codes == Codes::q8 ? static_cast<size_t>(w.in_features) + 2 * sizeof(float) * w.groups() : static_cast<size_t>(w.in_features) * 2;
  w.row_bytes = (row + 63) / 64 * 64;
  const size_t doubts = w.rounded_gates ? static_cast<size_t>(count + lanes - 1) / lanes * lanes * sizeof(float) : 0;
  w.bytes = static_cast<size_t>(count) * w.neuron_bytes() + doubts;
  const std::vector<float> downs = values_of(down, count);
  const std::vector<float> ups = up == nullptr ? std::vector<float>() : values_of(*up, w.in_features);
  const std::vector<float> gates = gate == nullptr ? std::vector<float>() : values_of(*gate, w.in_features);
  w.memory = Memory(w.bytes);
  w.data = w.memory.data();
  std::vector<float> column(w.in_features);
  CodedRow coded;
  for (int n = 0; n < count; ++n) {
    if (w.rounded_gates) {
      const float* row = gates.data() + static_cast<size_t>(n) * w.in_features;
      put_row(w, row, const_cast<uint8_t*>(w.gate(n)), coded);
      const_cast<float*>(w.doubts())[n] = doubt_of(row, w.in_features, coded);
    }
    if (w.gated) put_row(w, ups.data() + static_cast<size_t>(n) * w.in_features, const_cast<uint8_t*>(w.up(n)), coded);
    for (int i = 0; i < w.in_features; ++i) column[i] = downs[static_cast<size_t>(i) * count + n];
    put_row(w, column.data(), const_cast<uint8_t*>(w.down(n)), coded);
  }
  return w;
}

void PackedNeurons::move_to(Arena& arena) {
  data = arena.keep(data, bytes);
  memory = Memory();
}

}  // namespace fallow
