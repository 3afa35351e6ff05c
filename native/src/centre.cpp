// Centring: what is rounded symmetrically to 8 bits loses the mean that it has over some text, and the linears that read
// it gain the mean's product with their weights.
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <set>
#include <stdexcept>

#include "program.h"

namespace fallow {
namespace {

constexpr int sink_rows = 4;             // the first tokens of a text are unlike all others, the very first most of all
constexpr double fixed_point = 1 << 24;  // of sums that must not depend on the order in which threads add to them

}  // namespace

void Program::add_to_sums(int position, const float* normed, Sums& sums) const {
  if (position > 0 && position < sink_rows) return;
  std::vector<int64_t>& of = position == 0 ? sums.first : sums.others;
  for (size_t i = 0; i < of.size(); ++i) of[i] += std::llround(normed[i] * fixed_point);
}

void Program::add_to_totals(int index, const Sums& sums) {
  const std::lock_guard<std::mutex> lock(totals_mutex_);
  const auto add = [](const std::vector<int64_t>& from, std::vector<int64_t>& to) {
    to.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) to[i] += from[i];
  };
  add(sums.first, totals_[index].first);
  add(sums.others, totals_[index].others);
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
  std::vector<Product> products;
  for (size_t i = 0; i < operations_.size(); ++i) {
    if (!totals[i].others.empty() && is_rounded(operations_[i])) centre_norm(i, totals[i], sequences, length, products);
  }
  struct Task {
    Program* program;
    const std::vector<Product>* products;
  } task{this, &products};
  pool_.run(
      [](void* context, int thread) {
        const Task& t = *static_cast<Task*>(context);
        Program& p = *t.program;
        std::vector<float> row;
        for (const auto& [weights, gains] : *t.products) {
          const PackedLinear& w = *p.weights_[weights];
          row.resize(w.in_features);
          for (int r = thread; r < w.tiles * lanes; r += p.pool_.size()) {
            unpack_row(w, r, row.data());
            for (const auto& [centre, bias] : gains) {
              double product = 0;
              for (int k = 0; k < w.in_features; ++k) product -= static_cast<double>(p.vectors_[centre][k]) * row[k];
              p.vectors_[bias][r] += static_cast<float>(product);
            }
          }
        }
      },
      &task);
}

void Program::centre_norm(size_t index, const Sums& totals, int sequences, int length, std::vector<Product>& products) {
  auto& norm = std::get<op::NormQuantise>(operations_[index]);
  const auto minus_mean = [&](const std::vector<int64_t>& total, int rows) {
    std::vector<float> mean(total.size());
    std::transform(total.begin(), total.end(), mean.begin(),
                   [&](int64_t sum) { return static_cast<float>(-static_cast<double>(sum) / fixed_point / rows); });
    return mean;
  };
  const std::vector<float> others = minus_mean(totals.others, sequences * (length - sink_rows));
  const std::vector<float> first = minus_mean(totals.first, sequences);
  // The linears that read these activations before anything else is written there.
  std::vector<op::Linear*> linears;
  std::set<int> live(norm.out.begin(), norm.out.end());
  for (size_t j = index + 1; j < operations_.size() && !live.empty(); ++j) {
    if (const auto* other = std::get_if<op::NormQuantise>(&operations_[j])) {
      for (const int a : other->out) live.erase(a);
    }
    if (const auto* other = std::get_if<op::Quantise>(&operations_[j])) live.erase(other->out);
    auto* linear = std::get_if<op::Linear>(&operations_[j]);
    if (linear != nullptr && live.count(linear->activations) > 0) linears.push_back(linear);
  }
  norm.centre = add_vector(others);
  const size_t before = products.size();
  for (op::Linear* linear : linears) {
    const int bias = add_vector(std::vector<float>(weights_[linear->weights]->tiles * lanes));
    if (linear->bias >= 0) std::copy(vectors_[linear->bias].begin(), vectors_[linear->bias].end(), vectors_[bias].begin());
    linear->bias = bias;
    products.push_back({linear->weights, {{norm.centre, bias}}});
  }
  // What a linear has put through an activation can take no more: there the first token is centred as all others are.
  const auto is_sum = [](const op::Linear* linear) {
    return (linear->epilogue == Epilogue::store || linear->epilogue == Epilogue::add) && linear->gates < 0;
  };
  if (!std::all_of(linears.begin(), linears.end(), is_sum)) return;
  norm.first_centre = add_vector(first);
  std::vector<float> beyond(first.size());
  std::transform(first.begin(), first.end(), others.begin(), beyond.begin(), std::minus<>());
  const int difference = add_vector(std::move(beyond));
  for (size_t i = 0; i < linears.size(); ++i) {
    linears[i]->first_bias = add_vector(std::vector<float>(weights_[linears[i]->weights]->tiles * lanes));
    products[before + i].gains.emplace_back(difference, linears[i]->first_bias);
  }
}

}  // namespace fallow
