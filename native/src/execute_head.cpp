// The head where most of the vocabulary rests. A screen (signs.h) gives every token an approximate logit; the tiles of the
// head with the largest are computed exactly, and then every other tile that could change the choice: in which a logit
// comes within `safe_deviations` of the screen's errors of what a token had to reach. Of these errors the screen knows
// the standard deviation for each row over some text; how much larger or smaller they are for this token is known from
// the logits of which there are both. A draw from the whole distribution takes the largest logit too, after noise
// (kernels/noise.h); one under top-k or min-p hangs on the last token that was kept; one under top-p needs all logits.
// Drafts (Mode::draft) take what the shortlist says.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "bits.h"
#include "program.h"

namespace fallow {
namespace {

constexpr float likely_deviations = 3.f;  // with which tiles compete to be computed first; LIKELY in models/head_screen.py
constexpr float safe_deviations = 5.f;
constexpr int most_rounds = 2;  // of further tiles, before a row gets all of them
constexpr float infinity = std::numeric_limits<float>::infinity();

bool is_noisy(const SamplingRow& p) { return p.is_draw() && p.is_from_all(); }
bool needs_all(const SamplingRow& p) { return p.is_draw() && p.top_p < 1.f; }

}  // namespace

void Program::prepare_head() {
  const auto found = std::find_if(operations_.begin(), operations_.end(), [](const Operation& o) { return std::holds_alternative<op::Rescore>(o); });
  if (found == operations_.end()) return;
  rescore_ = static_cast<int>(found - operations_.begin());
  for (int tile = 0; tile < screen().tiles; ++tile) {
    const uint16_t* deviations = screen().deviations(tile);
    float most = 0.f;
    for (int i = 0; i < lanes; ++i) most = std::max(most, bf16_to_float(deviations[i]));
    largest_deviations_.push_back(most);
  }
  for (ThreadScratch& scratch : scratch_) {
    scratch.tables = Memory(limits_.max_logit_rows * screen().table_bytes());
    scratch.steps.resize(limits_.max_logit_rows);
  }
  head_rows_.resize(limits_.max_logit_rows);
  for (HeadRow& row : head_rows_) {
    row.peaks.resize(screen().tiles);
    row.bounds.resize(screen().tiles);
    row.is_exact.resize(screen().tiles);
  }
}

const PackedSigns& Program::screen() const { return *signs_[std::get<op::Screen>(operations_[rescore_ - 2]).signs]; }

void Program::begin_head() {
  if (rescore_ < 0) return;
  if (sample_ != nullptr && step_.mode == Mode::plan) sample_->perturb = kernels_.perturb;
  for (int r = 0; r < step_.num_logit_rows; ++r) {
    HeadRow& head = head_rows_[r];
    head.screened = sample_ != nullptr && step_.mode != Mode::dense && is_plain(*sample_, r) &&
                    (step_.mode == Mode::draft || !needs_all(sample_->sampling[r]));
    head.whole = !head.screened;
    head.doubtful = false;
    head.rounds = 0;
  }
}

void Program::execute(const op::Screen& o, int, int thread, const Part& part) {
  const PackedSigns& w = *signs_[o.signs];
  const int first = part.first_of(w.tiles);
  const int last = part.end_of(w.tiles);
  for (int begin = part.begin; begin < part.end;) {
    const auto is_whole = [](const HeadRow& row) { return row.whole; };
    begin = static_cast<int>(std::find_if_not(head_rows_.begin() + begin, head_rows_.begin() + part.end, is_whole) - head_rows_.begin());
    const int end = static_cast<int>(std::find_if(head_rows_.begin() + begin, head_rows_.begin() + part.end, is_whole) - head_rows_.begin());
    if (begin == end) return;
    // Each thread makes all tables for itself: that takes less time than one more barrier.
    auto* tables = scratch_[thread].tables.as<int8_t>();
    auto& steps = scratch_[thread].steps;
    for (int r = begin; r < end; ++r) {
      steps[r - begin] =
          kernels_.sign_tables(row(o.x, r, part), w.columns.data(), static_cast<int>(w.columns.size()), tables + (r - begin) * w.table_bytes());
    }
    kernels_.screen({&w, row(o.x, begin, part), buffers_[o.x].stride, tables, steps.data(), end - begin, row(o.out, begin, part), buffers_[o.out].stride},
                    first, last);
    for (; begin < end; ++begin) {
      float* logits = row(o.out, begin, part);
      finish_logits(begin, o.cap, first, last, logits);
      kernels_.screened_peaks(w, logits, likely_deviations, first, last, head_rows_[begin].peaks.data());
    }
  }
}

// What logits of tiles [first, last) go through after the product: the cap, and the noise of a draw.
void Program::finish_logits(int r, float cap, int first, int last, float* logits) const {
  float* values = logits + first * lanes;
  const int width = (last - first) * lanes;
  if (cap > 0.f) kernels_.soft_cap(values, width, cap);
  const SamplingRow& p = sample_->sampling[r];
  if (is_noisy(p) && step_.mode == Mode::plan) kernels_.perturb(values, first * lanes, width, p.temperature, noise_key(p), values);
}

void Program::execute(const op::Shortlist& o, int, int thread, const Part& part) {
  auto& found = scratch_[thread].sample.candidates;
  for (int r = part.begin; r < part.end; ++r) {
    HeadRow& head = head_rows_[r];
    if (head.whole) continue;
    const auto tiles = static_cast<int>(head.peaks.size());
    largest_values(head.peaks.data(), tiles, std::min(o.tiles, tiles), -infinity, found);
    std::fill(head.is_exact.begin(), head.is_exact.end(), 0);
    head.exact.clear();
    head.wanted.clear();
    for (const auto& [peak, tile] : found) head.wanted.push_back(tile);
    std::sort(head.wanted.begin(), head.wanted.end());
    begin_round(head);
  }
}

// Linears take tiles in pairs: where one is left, it is taken twice.
void Program::begin_round(HeadRow& head) {
  if (head.wanted.size() % 2 == 1) head.wanted.push_back(head.wanted.back());
  head.errors.assign(head.wanted.size(), 0.0);
}

void Program::execute(const op::Rescore& o, int, int thread, const Part& part) {
  for (int r = part.begin; r < part.end;) {
    if (head_rows_[r].whole) {
      const auto begin = head_rows_.begin();
      const int end = static_cast<int>(std::find_if_not(begin + r, begin + part.end, [](const HeadRow& row) { return row.whole; }) - begin);
      compute_whole(o, r, end, thread, part);
      r = end;
    } else {
      compute_wanted(o, r, thread, part);
      ++r;
    }
  }
}

// All logits of rows [begin, end), of which the thread computes its share of columns.
void Program::compute_whole(const op::Rescore& o, int begin, int end, int thread, const Part& part) {
  const PackedLinear& w = *weights_[o.weights];
  const int pairs = (w.tiles + 1) / 2;
  const int first = 2 * part.first_of(pairs);
  const int last = 2 * part.end_of(pairs);
  kernels_.linear({&w, activations_[o.activations].format, activation_row(o.activations, begin, part), end - begin, row(o.out, begin, part),
                   buffers_[o.out].stride, nullptr, Epilogue::store},
                  first, last, scratch_[thread].linear.data());
  const int columns = std::min(last * lanes, w.out_features) - first * lanes;
  for (int r = begin; o.cap > 0.f && r < end; ++r) kernels_.soft_cap(row(o.out, r, part) + first * lanes, columns, o.cap);
}

// The tiles of a row that are wanted, of which the thread computes its share; and how wrong the screen was there.
void Program::compute_wanted(const op::Rescore& o, int r, int thread, const Part& part) {
  HeadRow& head = head_rows_[r];
  const int pairs = static_cast<int>(head.wanted.size()) / 2;
  float* logits = row(o.out, r, part);
  for (int i = 2 * part.first_of(pairs); i < 2 * part.end_of(pairs); i += 2) {
    const int count = head.wanted[i] == head.wanted[i + 1] ? 1 : 2;
    for (int n = i + 2; n < std::min(i + 4, 2 * part.end_of(pairs)); ++n) prefetch_run(weights_[o.weights]->tile(head.wanted[n]), weights_[o.weights]->tile_bytes);
    float before[2][lanes];
    for (int n = 0; n < count; ++n) std::copy_n(logits + head.wanted[i + n] * lanes, lanes, before[n]);
    kernels_.linear({weights_[o.weights].get(), activations_[o.activations].format, activation_row(o.activations, r, part), 1, logits,
                     buffers_[o.out].stride, nullptr, Epilogue::store, {}, head.wanted.data()},
                    i, i + 2, scratch_[thread].linear.data());
    for (int n = 0; n < count; ++n) {
      const int tile = head.wanted[i + n];
      finish_logits(r, o.cap, tile, tile + 1, logits);
      head.errors[i + n] = squared_errors(tile, before[n], logits + tile * lanes);
    }
  }
}

// Of a tile, in units of its rows' deviations.
double Program::squared_errors(int tile, const float* screened, const float* exact) const {
  const uint16_t* deviations = screen().deviations(tile);
  double total = 0;
  for (int i = 0; i < std::min(lanes, vocab_size() - tile * lanes); ++i) {
    const double error = (static_cast<double>(exact[i]) - screened[i]) / std::max(bf16_to_float(deviations[i]), 1e-6f);
    total += error * error;
  }
  return total;
}

// Chooses the token of a row from what is known of its logits; tiles that could change it become wanted.
void Program::choose_token(int r, SampleScratch& scratch) {
  HeadRow& head = head_rows_[r];
  head.doubtful = false;
  if (head.whole) {
    sample_row(*sample_, r, scratch);
    return;
  }
  if (head.rounds == 0) {
    const double total = std::accumulate(head.errors.begin(), head.errors.end(), 0.0);
    head.scale = static_cast<float>(std::sqrt(total / static_cast<double>(head.wanted.size() * lanes)));
  }
  for (const int32_t tile : head.wanted) {
    if (head.is_exact[tile] == 0) head.exact.push_back(tile);
    head.is_exact[tile] = 1;
  }
  if (head.rounds == 0) head.listed = head.exact.size();
  const float* logits = sample_->logits + static_cast<size_t>(r) * sample_->stride;
  const SamplingRow& p = sample_->sampling[r];
  if (step_.mode == Mode::draft) {  // it may be wrong: the approximate logits serve beside the exact ones
    if (p.is_draw()) {
      sample_row(*sample_, r, scratch);
    } else {
      take_largest(r, logits);
    }
    return;
  }
  const float reach = p.is_draw() && !is_noisy(p) ? sample_row(*sample_, r, scratch).reach : take_largest(r, logits);
  want_doubtful_tiles(head, logits, reach);
  const bool lost = !std::isfinite(reach) || !std::isfinite(head.scale);
  head.doubtful = lost || !head.wanted.empty();
  if (!head.doubtful) return;
  head.whole = lost || ++head.rounds > most_rounds || head.wanted.size() > head.peaks.size() / 4;
  begin_round(head);
}

// Tiles that are not exact and may hold a logit that reaches what a token has to. From the peaks and the largest deviation
// of a tile follows more than it can have, mostly too little: few tiles have to be looked at.
void Program::want_doubtful_tiles(HeadRow& head, const float* logits, float reach) {
  constexpr float rounding = 1e-5f;
  const float margin = safe_deviations * std::max(head.scale, 1e-6f);
  const float further = std::max(margin - likely_deviations, 0.f);
  head.wanted.clear();
  for (int tile = 0; tile < screen().tiles; ++tile) {
    const float more = further * largest_deviations_[tile];
    if (head.is_exact[tile] != 0 || head.peaks[tile] + more + rounding * (std::fabs(head.peaks[tile]) + more) < reach) continue;
    kernels_.screened_peaks(screen(), logits, margin, tile, tile + 1, head.bounds.data());
    if (!(head.bounds[tile] < reach)) head.wanted.push_back(tile);
  }
}

// The largest of the exact logits; the lowest token among equals.
float Program::take_largest(int r, const float* logits) const {
  float most = -infinity;
  int token = 0;
  for (const int32_t tile : head_rows_[r].exact) {
    for (int i = tile * lanes; i < std::min((tile + 1) * lanes, vocab_size()); ++i) {
      if (logits[i] > most || (logits[i] == most && i < token)) {
        most = logits[i];
        token = i;
      }
    }
  }
  take_token(*sample_, r, token);
  return most;
}

void Program::sample_rows(int thread) {
  if (sample_ == nullptr) return;
  const int rows = step_.num_logit_rows;
  SampleScratch& scratch = scratch_[thread].sample;
  std::atomic<int>& next = next_[operations_.size()];
  if (rescore_ < 0) {
    for (int r = 0; (r = next.fetch_add(1, std::memory_order_relaxed)) < rows;) sample_row(*sample_, r, scratch);
    return;
  }
  const auto& rescore = std::get<op::Rescore>(operations_[rescore_]);
  for (int r = 0; (r = next.fetch_add(1, std::memory_order_relaxed)) < rows;) choose_token(r, scratch);
  pool_.barrier();
  const auto is_doubtful = [](const HeadRow& row) { return row.doubtful; };
  while (std::any_of(head_rows_.begin(), head_rows_.begin() + rows, is_doubtful)) {
    for (int r = 0; r < rows; ++r) {
      const Part part{r, r + 1, thread, pool_.size(), 0};
      if (head_rows_[r].doubtful && head_rows_[r].whole) compute_whole(rescore, r, r + 1, thread, part);
      if (head_rows_[r].doubtful && !head_rows_[r].whole) compute_wanted(rescore, r, thread, part);
    }
    pool_.barrier();
    for (int r = thread; r < rows; r += pool_.size()) {
      if (head_rows_[r].doubtful) choose_token(r, scratch);
    }
    pool_.barrier();
  }
}

void Program::count_head_rows() {
  if (rescore_ < 0 || sample_ == nullptr) return;
  for (int r = 0; r < step_.num_logit_rows; ++r) {
    const HeadRow& head = head_rows_[r];
    const size_t tiles = head.whole ? head.peaks.size() : head.exact.size();
    if (record_.tiles != nullptr) record_.tiles[r] = static_cast<int32_t>(tiles);
    if (!head.screened) continue;
    ++head_counts_.rows;
    head_counts_.tiles += static_cast<int64_t>(tiles);
    head_counts_.doubtful_rows += head.rounds > 0 || head.whole;
  }
}

std::vector<int32_t> Program::head_tiles(int row, bool shortlist) const {
  if (row < 0 || row >= step_.num_logit_rows) throw std::invalid_argument("the last step had fewer logit rows");
  const HeadRow* head = rescore_ < 0 ? nullptr : &head_rows_[row];
  if (head == nullptr || !head->screened || (head->whole && !shortlist)) {
    std::vector<int32_t> all((vocab_size() + lanes - 1) / lanes);
    std::iota(all.begin(), all.end(), 0);
    return all;
  }
  const auto end = shortlist ? head->exact.begin() + static_cast<std::ptrdiff_t>(head->listed) : head->exact.end();
  return {head->exact.begin(), end};
}

}  // namespace fallow
