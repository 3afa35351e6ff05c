// The choice of a token from a row of logits. A row's result depends on that row and its parameters alone.
//
// Log-probabilities are of the unmodified logits at temperature 1. Then come, in this order: repetition penalty
// (positive logits divided, negative multiplied), additive edits, the mask of allowed tokens, and either the largest
// logit (temperature below 1e-5; the lowest id among equals) or temperature, top-k, top-p and min-p and one draw by inverse
// distribution function over the remaining tokens: by id where none of the three is on, most likely first otherwise. Where
// noise is given, a draw from all tokens is the largest logit after it instead.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.h"

namespace fallow {

// As SAMPLING_DTYPE in fallow/engine/batch.py.
struct SamplingRow {
  float temperature, top_p, min_p, repetition_penalty;
  int32_t top_k, logprobs;  // logprobs < 0: not even the sampled token's
  uint64_t seed, draw;

  bool is_draw() const { return temperature >= 1e-5f; }
  bool is_from_all() const { return top_k <= 0 && top_p >= 1.f && min_p <= 0.f; }
};
static_assert(sizeof(SamplingRow) == 40, "SamplingRow must match SAMPLING_DTYPE");

struct SampleArgs {
  const float* logits;
  int rows, vocab;
  size_t stride;  // floats between rows
  const SamplingRow* sampling;
  const int32_t *bias_offsets, *bias_tokens;  // or null
  const float* bias_values;
  const int32_t *repeated_offsets, *repeated_tokens;  // or null
  const uint32_t* allowed;                            // or null
  size_t allowed_stride;
  // Where it is given, a draw from all tokens takes the largest logit after its noise (Kernels::perturb).
  void (*perturb)(const float* x, int first, int width, float temperature, NoiseKey key, float* out) = nullptr;
  int32_t* tokens;
  float* logprobs;  // NaN where the logits allow no token
  int top;          // columns of top_tokens: the largest `logprobs` of the rows
  int32_t* top_tokens;
  float* top_logprobs;
};

struct SampleScratch {
  std::vector<float> edited;
  std::vector<std::pair<float, int32_t>> candidates;
};

// A token, and the logit (after the edits) that others had to reach to make it another one; -infinity: any of them could.
struct Choice {
  int token;
  float reach;
};
Choice sample_row(const SampleArgs& args, int row, SampleScratch& scratch);
// The noise of a row's draw.
NoiseKey noise_key(const SamplingRow& p);
// The row's token is known: no log-probabilities are wanted.
void take_token(const SampleArgs& args, int row, int token);
// Whether a row needs nothing but a token, chosen by its logits as they are.
bool is_plain(const SampleArgs& args, int row);

// log softmax of `row` at `token`.
float log_probability(const float* row, int vocab, int token);

}  // namespace fallow
