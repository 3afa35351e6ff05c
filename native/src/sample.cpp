#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace fallow {
namespace {

using Candidate = std::pair<float, int32_t>;

constexpr float infinity = std::numeric_limits<float>::infinity();

// Most likely first; the lower id first among equals.
bool before(const Candidate& a, const Candidate& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; }

// Eight chains, so that the compiler may keep them in vector registers; NaN is passed over.
float largest(const float* x, int n) {
  float m[8];
  std::fill(m, m + 8, -infinity);
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) m[j] = x[i + j] > m[j] ? x[i + j] : m[j];
  }
  for (; i < n; ++i) m[0] = x[i] > m[0] ? x[i] : m[0];
  for (int j = 1; j < 8; ++j) m[0] = m[j] > m[0] ? m[j] : m[0];
  return m[0];
}

int first_at(const float* x, int n, float value) {
  for (int i = 0; i < n; ++i) {
    if (x[i] == value) return i;
  }
  return -1;
}

// exp for x <= 0, relative error below 1e-6; written so that loops over it become vector code.
inline float exp_negative(float x) {
  x = x > -87.f ? x : -87.f;
  const float n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // to the nearest whole number
  float r = x - n * 0.693359375f;
  r += n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

// Sum of exp(x - shift) in float, eight chains, blocks of 512 added up in double.
double exp_sum(const float* x, int n, float shift, float factor) {
  double total = 0;
  for (int begin = 0; begin < n; begin += 512) {
    const int end = std::min(n, begin + 512);
    float s[8] = {};
    int i = begin;
    for (; i + 8 <= end; i += 8) {
      for (int j = 0; j < 8; ++j) s[j] += exp_negative((x[i + j] - shift) * factor);
    }
    for (; i < end; ++i) s[0] += exp_negative((x[i] - shift) * factor);
    total += ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  }
  return total;
}

// SplitMix64 (Steele, Lea, Flood 2014) of seed and counter: uniform in [0, 1) with 53 bits.
uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}
uint64_t random_bits(const SamplingRow& p) { return mix(mix(p.seed + 0x9e3779b97f4a7c15ull) + (p.draw + 1) * 0x9e3779b97f4a7c15ull); }
double uniform(const SamplingRow& p) { return static_cast<double>(random_bits(p) >> 11) * 0x1p-53; }

bool edits(const SampleArgs& args, int row) {
  const SamplingRow& p = args.sampling[row];
  return args.allowed != nullptr || (args.bias_offsets != nullptr && args.bias_offsets[row] < args.bias_offsets[row + 1]) ||
         (args.repeated_offsets != nullptr && p.repetition_penalty != 1.f && args.repeated_offsets[row] < args.repeated_offsets[row + 1]);
}

const float* edit(const SampleArgs& args, int row, const float* logits, std::vector<float>& edited) {
  if (!edits(args, row)) return logits;
  const SamplingRow& p = args.sampling[row];
  edited.assign(logits, logits + args.vocab);
  if (args.repeated_offsets != nullptr && p.repetition_penalty != 1.f) {
    for (int i = args.repeated_offsets[row]; i < args.repeated_offsets[row + 1]; ++i) {
      float& x = edited[args.repeated_tokens[i]];
      x = x > 0.f ? x / p.repetition_penalty : x * p.repetition_penalty;
    }
  }
  if (args.bias_offsets != nullptr) {
    for (int i = args.bias_offsets[row]; i < args.bias_offsets[row + 1]; ++i) edited[args.bias_tokens[i]] += args.bias_values[i];
  }
  if (args.allowed != nullptr) {
    const uint32_t* words = args.allowed + static_cast<size_t>(row) * args.allowed_stride;
    for (int w = 0; w * 32 < args.vocab; ++w) {
      if (words[w] == 0xffffffffu) continue;
      for (int i = w * 32; i < std::min(args.vocab, w * 32 + 32); ++i) {
        if ((words[w] >> (i - w * 32) & 1u) == 0u) edited[i] = -infinity;
      }
    }
  }
  return edited.data();
}

// Candidates whose logit is at least `floor`, most likely first, at most `count` of them.
void collect(const float* x, int n, float floor, size_t count, std::vector<Candidate>& out) {
  out.clear();
  for (int i = 0; i < n; ++i) {
    if (x[i] >= floor) out.emplace_back(x[i], i);
  }
  if (out.size() > count) {
    std::nth_element(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(count), out.end(), before);
    out.resize(count);
  }
  std::sort(out.begin(), out.end(), before);
}

// The `count` largest values of at least `least`, largest first, the first among equals first. The largest of 256 strided
// parts bound the count-th largest from below.
void largest_values(const float* x, int n, size_t count, float least, std::vector<Candidate>& out) {
  constexpr int parts = 256;
  float floor = -infinity;
  if (n >= 1024 && count <= parts) {
    float m[parts];
    std::fill(m, m + parts, -infinity);
    int i = 0;
    for (; i + parts <= n; i += parts) {
      for (int j = 0; j < parts; ++j) m[j] = x[i + j] > m[j] ? x[i + j] : m[j];
    }
    std::nth_element(m, m + count - 1, m + parts, [](float a, float b) { return a > b; });
    floor = m[count - 1];
  }
  collect(x, n, std::max(floor, least), count, out);
}

Choice largest_after_noise(const SampleArgs& args, const SamplingRow& p, const float* x) {
  constexpr int width = 512;
  float block[width] = {};
  Choice choice{0, -infinity};
  const NoiseKey key = noise_key(p);
  for (int begin = 0; begin < args.vocab; begin += width) {
    const int count = std::min(width, args.vocab - begin);
    std::copy_n(x + begin, count, block);
    args.perturb(block, begin, width, p.temperature, key, block);
    for (int i = 0; i < count; ++i) {
      if (block[i] > choice.reach) choice = {begin + i, block[i]};
    }
  }
  return choice;
}

Choice draw_token(const SamplingRow& p, const float* x, int n, float peak, std::vector<Candidate>& candidates) {
  const float factor = 1.f / p.temperature;
  const double u = uniform(p);
  // Below `possible` a token's probability is 0 in float32, below `least` it is that or less than min-p asks for.
  const float possible = peak - 80.f * p.temperature;
  const float least = p.min_p > 0.f ? std::max(possible, peak + p.temperature * std::log(p.min_p)) : possible;
  if (p.is_from_all()) {
    const double target = u * exp_sum(x, n, peak, factor);
    double below = 0;
    for (int begin = 0; begin < n; begin += 512) {
      const int end = std::min(n, begin + 512);
      const double block = exp_sum(x + begin, end - begin, peak, factor);
      if (below + block <= target && end < n) {
        below += block;
        continue;
      }
      int last = -1;
      for (int i = begin; i < end; ++i) {
        if (!(x[i] > -infinity)) continue;
        last = i;
        below += exp_negative((x[i] - peak) * factor);
        if (below > target) return {i, -infinity};
      }
      if (last >= 0) return {last, -infinity};
    }
    return {first_at(x, n, peak), -infinity};
  }
  // The total before top-p is over what top-k left, min-p or not; without top-k it is over the whole row.
  double total = 0;
  size_t keep = 0;
  if (p.top_k > 0) {
    largest_values(x, n, std::min<size_t>(p.top_k, n), p.top_p < 1.f ? possible : least, candidates);
    keep = candidates.size();
    for (const auto& c : candidates) total += exp_negative((c.first - peak) * factor);
    if (p.top_p < 1.f) {
      double mass = 0;
      for (keep = 0; keep < candidates.size() && mass < p.top_p * total; ++keep) mass += exp_negative((candidates[keep].first - peak) * factor);
      while (keep > 0 && candidates[keep - 1].first < least) --keep;
    }
  } else if (p.top_p < 1.f) {
    total = exp_sum(x, n, peak, factor);
    // A few hundred tokens hold the mass nearly always; where they do not, all are looked at.
    for (size_t count : {size_t{256}, static_cast<size_t>(n)}) {
      largest_values(x, n, std::min<size_t>(count, n), least, candidates);
      double mass = 0;
      for (keep = 0; keep < candidates.size() && mass < p.top_p * total; ++keep) mass += exp_negative((candidates[keep].first - peak) * factor);
      if (mass >= p.top_p * total || candidates.size() < count) break;
    }
  } else {
    collect(x, n, least, n, candidates);
    keep = candidates.size();
  }
  keep = std::max<size_t>(keep, 1);
  // All from `least` on are kept, unless top-k or top-p end before: then a token that reaches what was kept last would be.
  const bool ended = p.top_p < 1.f || (p.top_k > 0 && keep == static_cast<size_t>(p.top_k));
  const float reach = ended ? candidates[keep - 1].first : least;
  double mass = 0;
  for (size_t i = 0; i < keep; ++i) mass += exp_negative((candidates[i].first - peak) * factor);
  const double target = u * mass;
  double below = 0;
  for (size_t i = 0; i < keep; ++i) {
    below += exp_negative((candidates[i].first - peak) * factor);
    if (below > target) return {candidates[i].second, reach};
  }
  return {candidates[keep - 1].second, reach};
}

}  // namespace

float log_probability(const float* row, int vocab, int token) {
  const float peak = largest(row, vocab);
  return static_cast<float>(static_cast<double>(row[token] - peak) - std::log(exp_sum(row, vocab, peak, 1.f)));
}

NoiseKey noise_key(const SamplingRow& p) {
  const uint64_t key = random_bits(p);
  return {static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(key)};
}

void take_token(const SampleArgs& args, int row, int token) {
  args.tokens[row] = token;
  args.logprobs[row] = 0.f;
  for (int i = 0; i < args.top; ++i) {
    args.top_tokens[static_cast<size_t>(row) * args.top + i] = -1;
    args.top_logprobs[static_cast<size_t>(row) * args.top + i] = -infinity;
  }
}

bool is_plain(const SampleArgs& args, int row) { return args.sampling[row].logprobs < 0 && !edits(args, row); }

Choice sample_row(const SampleArgs& args, int row, SampleScratch& scratch) {
  const SamplingRow& p = args.sampling[row];
  const float* logits = args.logits + static_cast<size_t>(row) * args.stride;
  const float* x = edit(args, row, logits, scratch.edited);
  const float peak = largest(x, args.vocab);
  Choice choice{0, -infinity};
  const bool possible = peak > -infinity;
  if (possible && (!p.is_draw() || peak == infinity)) {
    choice = {first_at(x, args.vocab, peak), peak};
  } else if (possible && p.is_from_all() && args.perturb != nullptr) {
    choice = largest_after_noise(args, p, x);
  } else if (possible) {
    choice = draw_token(p, x, args.vocab, peak, scratch.candidates);
  }
  take_token(args, row, choice.token);
  if (!possible) {
    args.logprobs[row] = std::numeric_limits<float>::quiet_NaN();
    return choice;
  }
  if (p.logprobs < 0) return choice;
  const float raw_peak = largest(logits, args.vocab);
  const double log_total = std::log(exp_sum(logits, args.vocab, raw_peak, 1.f));
  const auto log_probability_of = [&](float logit) { return static_cast<float>(static_cast<double>(logit - raw_peak) - log_total); };
  args.logprobs[row] = log_probability_of(logits[choice.token]);
  const size_t wanted = std::min<size_t>(std::min(p.logprobs, args.top), args.vocab);
  if (wanted == 0) return choice;
  largest_values(logits, args.vocab, wanted, -infinity, scratch.candidates);
  for (size_t i = 0; i < std::min(wanted, scratch.candidates.size()); ++i) {
    args.top_tokens[static_cast<size_t>(row) * args.top + i] = scratch.candidates[i].second;
    args.top_logprobs[static_cast<size_t>(row) * args.top + i] = log_probability_of(scratch.candidates[i].first);
  }
  return choice;
}

}  // namespace fallow
