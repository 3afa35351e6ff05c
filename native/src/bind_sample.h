// Sampling parameters as numpy arrays, checked.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "bind_kernels.h"
#include "sample.h"

namespace fallow {

using Int32Array = nanobind::ndarray<const int32_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
using FloatArray = nanobind::ndarray<const float, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
using RowBytes = nanobind::ndarray<const uint8_t, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
using WordRows = nanobind::ndarray<const uint32_t, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

struct SampleEdits {
  std::optional<Int32Array> bias_offsets, bias_tokens;
  std::optional<FloatArray> bias_values;
  std::optional<Int32Array> repeated_offsets, repeated_tokens;
  std::optional<WordRows> allowed;
};

// Arguments for `rows` rows of logits and the arrays that results go to.
struct SampleCall {
  SampleArgs args{};
  std::vector<int32_t> tokens, top_tokens;
  std::vector<float> logprobs, top_logprobs;
  std::vector<SamplingRow> sampling;

  // Throws std::invalid_argument where an array does not fit.
  SampleCall(int rows, int vocab, const RowBytes& parameters, const SampleEdits& edits);
  // (tokens, logprobs, top_tokens [rows][top], top_logprobs); leaves the call empty.
  nanobind::tuple take();
};

void bind_sample(nanobind::module_& m);

}  // namespace fallow
