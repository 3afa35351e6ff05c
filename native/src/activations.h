// A token's activations as the linear kernels read them: one row of bytes a token.
//
// Quantised: codes int8 [in_features], then for each group a float32 scale and the two start values of the integer
// sum, then the token's pairs. An activation is scale * code + midpoint, the midpoint being zero unless asymmetric
// (rounded to bfloat16, so that the product with the pairs of the weights is exact in it). Weights are unsigned:
// sum w * code starts from -zero * (sum of the codes).
// bf16: bfloat16 [in_features], padded with a zero to an even count.
#pragma once
#include <cstddef>
#include <cstdint>

#include "packed.h"

namespace fallow {

struct ActivationFormat {
  Codes codes = Codes::q8;  // q8: quantised, bf16: rounded
  int in_features = 0;
  int group = 32;
  Pairs pairs_kind = Pairs::none;  // which values face the pairs of the weights
  bool asymmetric = false;

  // What activations must look like for these weights.
  static ActivationFormat of(const PackedLinear& w) {
    const bool sums = w.pairs_kind == Pairs::sums || w.pairs_kind == Pairs::both;
    if (w.codes == Codes::bf16) return {Codes::bf16, w.in_features, 32, w.pairs_kind, sums};
    return {Codes::q8, w.in_features, w.group, w.pairs_kind, sums};
  }

  int groups() const { return codes == Codes::bf16 ? 1 : in_features / group; }
  int pairs() const { return pair_count(pairs_kind, groups()); }
  static constexpr size_t align(size_t n) { return (n + 63) / 64 * 64; }
  size_t scales_at() const { return align(in_features); }
  size_t start_at(bool eight_bit) const { return scales_at() + static_cast<size_t>(groups()) * (eight_bit ? 8 : 4); }
  size_t pairs_at() const { return scales_at() + static_cast<size_t>(groups()) * 12; }
  size_t row_bytes() const {
    if (codes == Codes::bf16) return align((static_cast<size_t>(in_features) + 1) / 2 * 4);
    return align(pairs_at() + static_cast<size_t>(pairs()) * 4);
  }
};

}  // namespace fallow
