#include "bind_sample.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace nb = nanobind;
using namespace nb::literals;

namespace fallow {
namespace {

// Offsets of the rows' parts of an array of `size` values.
const int32_t* checked_offsets(const Int32Array& offsets, int rows, size_t size, const char* name) {
  if (offsets.size() != static_cast<size_t>(rows) + 1 || offsets.data()[0] != 0 || offsets.data()[rows] != static_cast<int64_t>(size)) {
    throw std::invalid_argument(std::string(name) + " must run from 0 to the number of values, one more than there are rows");
  }
  if (!std::is_sorted(offsets.data(), offsets.data() + rows + 1)) throw std::invalid_argument(std::string(name) + " must ascend");
  return offsets.data();
}

const int32_t* checked_tokens(const Int32Array& tokens, int vocab, const char* name) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens.data()[i] < 0 || tokens.data()[i] >= vocab) throw std::invalid_argument(std::string(name) + " holds a token outside the vocabulary");
  }
  return tokens.data();
}

}  // namespace

SampleCall::SampleCall(int rows, int vocab, const RowBytes& parameters, const SampleEdits& edits) {
  if (parameters.shape(0) != static_cast<size_t>(rows) || parameters.shape(1) != sizeof(SamplingRow)) {
    throw std::invalid_argument("sampling must hold one SAMPLING_DTYPE for each logit row");
  }
  sampling.resize(rows);
  if (rows > 0) std::memcpy(sampling.data(), parameters.data(), rows * sizeof(SamplingRow));
  args.rows = rows;
  args.vocab = vocab;
  args.sampling = sampling.data();
  if (edits.bias_offsets) {
    if (!edits.bias_tokens || !edits.bias_values || edits.bias_tokens->size() != edits.bias_values->size()) {
      throw std::invalid_argument("bias_tokens and bias_values must be as long as each other");
    }
    args.bias_offsets = checked_offsets(*edits.bias_offsets, rows, edits.bias_tokens->size(), "bias_offsets");
    args.bias_tokens = checked_tokens(*edits.bias_tokens, vocab, "bias_tokens");
    args.bias_values = edits.bias_values->data();
  }
  if (edits.repeated_offsets) {
    if (!edits.repeated_tokens) throw std::invalid_argument("repeated_tokens is missing");
    args.repeated_offsets = checked_offsets(*edits.repeated_offsets, rows, edits.repeated_tokens->size(), "repeated_offsets");
    args.repeated_tokens = checked_tokens(*edits.repeated_tokens, vocab, "repeated_tokens");
  }
  if (edits.allowed) {
    if (edits.allowed->shape(0) != static_cast<size_t>(rows) || edits.allowed->shape(1) != (static_cast<size_t>(vocab) + 31) / 32) {
      throw std::invalid_argument("allowed must hold one bit a token for each logit row");
    }
    args.allowed = edits.allowed->data();
    args.allowed_stride = edits.allowed->shape(1);
  }
  for (const auto& p : sampling) args.top = std::max(args.top, std::min(p.logprobs, vocab));
  tokens.resize(rows);
  logprobs.resize(rows);
  top_tokens.resize(static_cast<size_t>(rows) * args.top);
  top_logprobs.resize(top_tokens.size());
  args.tokens = tokens.data();
  args.logprobs = logprobs.data();
  args.top_tokens = top_tokens.data();
  args.top_logprobs = top_logprobs.data();
}

nb::tuple SampleCall::take() {
  const auto rows = static_cast<size_t>(args.rows);
  const auto top = static_cast<size_t>(args.top);
  return nb::make_tuple(owned<int32_t>(std::move(tokens), {rows}), owned<float>(std::move(logprobs), {rows}),
                        owned<int32_t>(std::move(top_tokens), {rows, top}), owned<float>(std::move(top_logprobs), {rows, top}));
}

void bind_sample(nb::module_& m) {
  m.def(
      "sample",
      [](const nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>& logits, const RowBytes& sampling,
         std::optional<Int32Array> bias_offsets, std::optional<Int32Array> bias_tokens, std::optional<FloatArray> bias_values,
         std::optional<Int32Array> repeated_offsets, std::optional<Int32Array> repeated_tokens, std::optional<WordRows> allowed) {
        if (logits.shape(1) == 0) throw std::invalid_argument("logits need a vocabulary");
        SampleCall call(static_cast<int>(logits.shape(0)), static_cast<int>(logits.shape(1)), sampling,
                        {bias_offsets, bias_tokens, bias_values, repeated_offsets, repeated_tokens, allowed});
        call.args.logits = logits.data();
        call.args.stride = logits.shape(1);
        SampleScratch scratch;
        for (int r = 0; r < call.args.rows; ++r) sample_row(call.args, r, scratch);
        return call.take();
      },
      "logits"_a, "sampling"_a, "bias_offsets"_a = nb::none(), "bias_tokens"_a = nb::none(), "bias_values"_a = nb::none(),
      "repeated_offsets"_a = nb::none(), "repeated_tokens"_a = nb::none(), "allowed"_a = nb::none());
}

}  // namespace fallow
