// Centring: what is rounded symmetrically to 8 bits loses the mean that it has over some text, and the linears that read
// it gain the mean's product with their weights.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <stdexcept>

#include "program.h"

namespace fallow {
namespace {

constexpr int sink_rows = 4;             // the first tokens of a text are unlike all others
constexpr double fixed_point = 1 << 24;  // of sums that must not depend on the order in which threads add to them

}  // namespace

void Program::add_to_sums(int r, const float* normed, std::vector<int64_t>& sums) const {
  if (row_position_[r] < sink_rows) return;
  for (size_t i = 0; i < sums.size(); ++i) sums[i] += std::llround(normed[i] * fixed_point);
}

void Program::add_to_totals(int index, const std::vector<int64_t>& sums) {
  const std::lock_guard<std::mutex> lock(totals_mutex_);
  totals_[index].resize(sums.size());
  for (size_t i = 0; i < sums.size(); ++i) totals_[index][i] += sums[i];
}

void Program::centre(const std::vector<int32_t>& tokens) {
  const int n = static_cast<int>(tokens.size());
  const int length = std::min(page_size, limits_.max_positions);
  const int sequences = n / length;
  if (n == 0 || n % length != 0) throw std::invalid_argument("centring needs whole sequences");
  if (length <= sink_rows) return;
  const auto is_rounded = [&](const Operation& operation) {
    const auto* norm = std::get_if<op::NormQuantise>(&operation);
    return norm != nullptr && std::all_of(norm->out.begin(), norm->out.end(), [&](int a) {
      return activations_[a].format.codes == Codes::q8 && !activations_[a].format.asymmetric;
    });
  };
  const auto last = std::find_if(operations_.rbegin(), operations_.rend(), is_rounded);
  if (last == operations_.rend()) return;
  last_centred_ = static_cast<int>(operations_.rend() - last) - 1;
  totals_.assign(operations_.size(), {});
  std::vector<int32_t> all_rows(length);
  std::iota(all_rows.begin(), all_rows.end(), 0);
  // One page at a time and as many rows as a step may have: what is found must not depend on the limits.
  for (int s = 0; s < sequences; ++s) {
    for (int begin = 0, count = 0; begin < length; begin += count) {
      count = std::min({length - begin, limits_.max_tokens, limits_.max_logit_rows});
      const int32_t page = 0;
      const int32_t offsets[2] = {0, count};
      const Step step{tokens.data() + s * length + begin, count, offsets, &begin, 1, &page, 1, all_rows.data(), count};
      check(step);
      run(step, nullptr);
    }
  }
  const auto totals = std::move(totals_);
  totals_.clear();
  for (size_t i = 0; i < operations_.size(); ++i) {
    if (totals[i].empty() || !is_rounded(operations_[i])) continue;
    auto* norm = std::get_if<op::NormQuantise>(&operations_[i]);
    std::vector<float> negative(totals[i].size());
    std::transform(totals[i].begin(), totals[i].end(), negative.begin(), [&](int64_t total) {
      return static_cast<float>(-static_cast<double>(total) / fixed_point / (sequences * (length - sink_rows)));
    });
    norm->centre = add_vector(std::move(negative));
    // The linears that read these activations before anything else is written there.
    std::set<int> live(norm->out.begin(), norm->out.end());
    for (size_t j = i + 1; j < operations_.size() && !live.empty(); ++j) {
      if (const auto* other = std::get_if<op::NormQuantise>(&operations_[j])) {
        for (const int a : other->out) live.erase(a);
      }
      if (const auto* other = std::get_if<op::Quantise>(&operations_[j])) live.erase(other->out);
      auto* linear = std::get_if<op::Linear>(&operations_[j]);
      if (linear == nullptr || live.count(linear->activations) == 0) continue;
      const int bias = add_vector(std::vector<float>(weights_[linear->weights]->tiles * lanes));
      if (linear->bias >= 0) vectors_[bias] = vectors_[linear->bias];
      vectors_[bias].resize(static_cast<size_t>(weights_[linear->weights]->tiles + 1) / 2 * 2 * lanes);
      linear->bias = bias;
      centred_.push_back({norm->centre, linear->weights, bias});
    }
  }
  pool_.run(
      [](void* self, int thread) {
        auto& p = *static_cast<Program*>(self);
        std::vector<float> row;
        for (const auto& [centre, weights, bias] : p.centred_) {
          const PackedLinear& w = *p.weights_[weights];
          row.resize(w.in_features);
          for (int r = thread; r < w.tiles * lanes; r += p.pool_.size()) {
            unpack_row(w, r, row.data());
            double product = 0;
            for (int k = 0; k < w.in_features; ++k) product -= static_cast<double>(p.vectors_[centre][k]) * row[k];
            p.vectors_[bias][r] += static_cast<float>(product);
          }
        }
      },
      this);
}

}  // namespace fallow
