// The head where most of the vocabulary rests. A screen (signs.h) gives every token an approximate logit, takes a second
// look at the tiles of the head with the largest, and those whose logits are the largest then are computed exactly. After
// them comes every other tile that could change the choice: in which a logit comes within `safe_deviations` of the
// screen's errors of what a token had to reach; one that was looked at once is looked at again before. Of these errors
// the screen knows the standard deviation for each row over some text; how much larger or smaller they are for this
// token is known from the logits of which there are both. A draw from the whole distribution takes the largest logit too,
// after noise (kernels/noise.h); one under top-k or min-p hangs on the last token that was kept; one under top-p needs all
// logits. Drafts (Mode::draft) take what the shortlist says.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "bits.h"
#include "kernels/largest.h"
#include "program.h"

namespace fallow {
namespace {

constexpr float likely_deviations = 1.5f;  // with which tiles compete to be computed first; LIKELY in models/head_screen.py
constexpr float safe_deviations = 5.f;
constexpr int change_every = 8;  // of so many tiles that get a second look one tells how much such looks change
constexpr int most_rounds = 2;  // of further tiles, before a row gets all of them
constexpr float infinity = std::numeric_limits<float>::infinity();

bool is_noisy(const SamplingRow& p) { return p.is_draw() && p.is_from_all(); }
bool needs_all(const SamplingRow& p) { return p.is_draw() && p.top_p < 1.f; }

}  // namespace

void Program::prepare_head() {
  const auto found = std::find_if(operations_.begin(), operations_.end(), [](const Operation& o) { return std::holds_alternative<op::Rescore>(o); });
  if (found == operations_.end()) return;
  rescore_ = static_cast<int>(found - operations_.begin());
  for (int look = 0; look < PackedSigns::looks; ++look) {
    for (int tile = 0; tile < screen().tiles; ++tile) {
      const uint16_t* deviations = screen().deviations(tile, look);
      float most = 0.f;
      for (int i = 0; i < lanes; ++i) most = std::max(most, bf16_to_float(deviations[i]));
      largest_deviations_[look].push_back(most);
    }
  }
  head_rows_.resize(limits_.max_logit_rows);
  for (HeadRow& row : head_rows_) {
    row.peaks.resize(screen().tiles);
    row.bounds.resize(screen().tiles);
    row.looks.resize(screen().tiles);
  }
}

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

void Program::execute(const op::Screen& o, int, int, const Part& part) {
  const PackedSigns& w = *signs_[o.signs];
  const int first = part.first_of(w.tiles);
  const int last = part.end_of(w.tiles);
  for (int begin = part.begin; begin < part.end;) {
    const auto is_whole = [](const HeadRow& row) { return row.whole; };
    begin = static_cast<int>(std::find_if_not(head_rows_.begin() + begin, head_rows_.begin() + part.end, is_whole) - head_rows_.begin());
    const int end = static_cast<int>(std::find_if(head_rows_.begin() + begin, head_rows_.begin() + part.end, is_whole) - head_rows_.begin());
    if (begin == end) return;
    kernels_.screen({&w, activations_[o.along].format, activations_[o.rest].format, activation_row(o.along, begin, part),
                     activation_row(o.rest, begin, part), end - begin, row(o.out, begin, part), buffers_[o.out].stride},
                    first, last);
    for (; begin < end; ++begin) {
      float* logits = row(o.out, begin, part);
      finish_logits(begin, o.cap, first, last, logits);
      kernels_.screened_peaks(w, 0, logits, likely_deviations, first, last, head_rows_[begin].peaks.data());
    }
  }
}

// A row's tiles [first, last) of those that get a second look; and of some of them how much it changes.
void Program::look_again(int r, int first, int last) {
  constexpr int together = 16;
  const op::Screen& o = first_look();
  const PackedSigns& w = screen();
  HeadRow& head = head_rows_[r];
  const Part part{r, r + 1, 0, 1, 0};
  float* logits = row(o.out, r, part);
  const ScreenTask task{&w, activations_[o.along].format, activations_[o.rest].format, activation_row(o.along, r, part), activation_row(o.rest, r, part),
                        1, logits, buffers_[o.out].stride};
  const bool is_known = o.cap == 0.f && !has_noise(r);  // the logits are still what the first look gave
  for (; first < last; first += together) {
    const int count = std::min(together, last - first);
    const int32_t* list = head.closer.data() + first;
    float before[together][lanes];
    for (int i = 0; i < count; ++i) std::copy_n(logits + list[i] * lanes, lanes, before[i]);
    kernels_.screen_again(task, list, count, is_known);
    for (int i = 0; i < count; ++i) {
      const int tile = list[i];
      finish_logits(r, o.cap, tile, tile + 1, logits);
      if ((first + i) % change_every == 0) {
        head.changes[(first + i) / change_every] = squared_errors(tile, w.differences(tile), before[i], logits + tile * lanes);
      }
      kernels_.screened_peaks(w, 1, logits, likely_deviations, tile, tile + 1, head.peaks.data());
      head.looks[tile] = Look::twice;
    }
  }
}

void Program::execute(const op::ScreenAgain&, int, int, const Part& part) {
  for (int r = part.begin; r < part.end; ++r) {
    if (head_rows_[r].whole) continue;
    const auto count = static_cast<int>(head_rows_[r].closer.size());
    look_again(r, part.first_of(count), part.end_of(count));
  }
}

// What logits of tiles [first, last) go through after the product: the cap, and the noise of a draw.
void Program::finish_logits(int r, float cap, int first, int last, float* logits) const {
  float* values = logits + first * lanes;
  const int width = (last - first) * lanes;
  if (cap > 0.f) kernels_.soft_cap(values, width, cap);
  const SamplingRow& p = sample_->sampling[r];
  if (has_noise(r)) kernels_.perturb(values, first * lanes, width, p.temperature, noise_key(p), values);
}

bool Program::has_noise(int r) const { return step_.mode == Mode::plan && is_noisy(sample_->sampling[r]); }

// The tiles that hold the largest, in order; and those whose peak equals the smallest of these.
void Program::execute(const op::Shortlist& o, int index, int, const Part& part) {
  const bool is_second = index == rescore_ - 1;
  for (int r = part.begin; r < part.end; ++r) {
    HeadRow& head = head_rows_[r];
    if (head.whole) continue;
    const auto count = static_cast<int>(is_second ? head.closer.size() : head.peaks.size());
    head.order.resize(count);
    for (int i = 0; i < count; ++i) head.order[i] = ordered_bits(head.peaks[is_second ? head.closer[i] : i]);
    const uint32_t least = kernels::largest(head.order.data(), count, std::min(o.tiles, count));
    auto& list = is_second ? head.wanted : head.closer;
    list.clear();
    for (int i = 0; i < count; ++i) {
      if (head.order[i] >= least) list.push_back(is_second ? head.closer[i] : i);
    }
    if (is_second) {
      head.exact.clear();
      begin_round(head);
    } else {
      std::fill(head.looks.begin(), head.looks.end(), Look::once);
      begin_looks(head);
    }
  }
}

void Program::begin_looks(HeadRow& head) { head.changes.assign((head.closer.size() + change_every - 1) / change_every, 0.0); }

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
      head.errors[i + n] = squared_errors(tile, screen().deviations(tile, 1), before[n], logits + tile * lanes);
    }
  }
}

// Of a tile, in units of its rows' deviations.
double Program::squared_errors(int tile, const uint16_t* deviations, const float* before, const float* after) const {
  double total = 0;
  for (int i = 0; i < std::min(lanes, vocab_size() - tile * lanes); ++i) {
    const double error = (static_cast<double>(after[i]) - before[i]) / std::max(bf16_to_float(deviations[i]), 1e-6f);
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
    const auto root_mean = [](const std::vector<double>& squares) {
      return static_cast<float>(std::sqrt(std::accumulate(squares.begin(), squares.end(), 0.0) / static_cast<double>(squares.size() * lanes)));
    };
    head.scales[0] = root_mean(head.changes);
    head.scales[1] = root_mean(head.errors);
  }
  for (const int32_t tile : head.wanted) {
    if (head.looks[tile] != Look::exact) head.exact.push_back(tile);
    head.looks[tile] = Look::exact;
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
  const bool lost = !std::isfinite(reach) || !std::isfinite(head.scales[0]) || !std::isfinite(head.scales[1]);
  if (!lost) want_doubtful_tiles(r, reach);
  head.doubtful = lost || !head.wanted.empty();
  if (!head.doubtful) return;
  head.whole = lost || ++head.rounds > most_rounds || head.wanted.size() > head.peaks.size() / 4;
  begin_round(head);
}

// Tiles that are not exact and may hold a logit that reaches what a token has to, after a second look. From the peaks and
// the largest deviation of a tile follows more than it can have, mostly too little: few tiles have to be looked at.
void Program::want_doubtful_tiles(int r, float reach) {
  constexpr float rounding = 1e-5f;
  HeadRow& head = head_rows_[r];
  const float* logits = sample_->logits + static_cast<size_t>(r) * sample_->stride;
  const auto may_reach = [&](int tile) {
    const int look = static_cast<int>(head.looks[tile]);
    const float margin = safe_deviations * std::max(head.scales[look], 1e-6f);
    const float more = std::max(margin - likely_deviations, 0.f) * largest_deviations_[look][tile];
    if (head.peaks[tile] + more + rounding * (std::fabs(head.peaks[tile]) + more) < reach) return false;
    kernels_.screened_peaks(screen(), look, logits, margin, tile, tile + 1, head.bounds.data());
    return !(head.bounds[tile] < reach);
  };
  head.wanted.clear();
  head.closer.clear();
  for (int tile = 0; tile < screen().tiles; ++tile) {
    if (head.looks[tile] == Look::once && may_reach(tile)) head.closer.push_back(tile);
  }
  begin_looks(head);
  look_again(r, 0, static_cast<int>(head.closer.size()));
  for (int tile = 0; tile < screen().tiles; ++tile) {
    if (head.looks[tile] == Look::twice && may_reach(tile)) head.wanted.push_back(tile);
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
