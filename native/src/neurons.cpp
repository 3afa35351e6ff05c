#include "neurons.h"

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

}  // namespace

PackedNeurons pack_neurons(const RowSource* up, const RowSource& down, int count, const std::string& precision) {
  PackedNeurons w;
  w.count = count;
  w.in_features = down.rows;
  w.gated = up != nullptr;
  if (precision != "q8" && precision != "bf16") throw std::invalid_argument("precision " + precision + " is not known: q8 or bf16");
  w.codes = precision == "q8" ? Codes::q8 : Codes::bf16;
  if (count <= 0 || w.in_features <= 0) throw std::invalid_argument("a feed-forward network needs neurons and columns");
  if (up != nullptr && up->rows != count) throw std::invalid_argument("the up and the down projection differ in neurons");
  const int whole = w.codes == Codes::q8 ? PackedNeurons::group : lanes;
  if (w.in_features % whole != 0) {
    throw std::invalid_argument("neurons need columns in multiples of " + std::to_string(whole) + ", not " + std::to_string(w.in_features));
  }
  const size_t row = w.codes == Codes::q8 ? static_cast<size_t>(w.in_features) + 2 * sizeof(float) * w.groups() : static_cast<size_t>(w.in_features) * 2;
  w.row_bytes = (row + 63) / 64 * 64;
  w.bytes = static_cast<size_t>(count) * w.neuron_bytes();
  const std::vector<float> downs = values_of(down, count);
  const std::vector<float> ups = up == nullptr ? std::vector<float>() : values_of(*up, w.in_features);
  w.memory = Memory(w.bytes);
  w.data = w.memory.data();
  std::vector<float> column(w.in_features);
  CodedRow coded;
  for (int n = 0; n < count; ++n) {
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
