// The head where most of the vocabulary rests. A screen (signs.h) gives every token an approximate logit and, in a second
// look at the tiles of the head with the largest, some of them a better one; the tiles that have the largest then are
// computed exactly, and after them every other tile that could change the choice: in which a logit comes, after two looks,
// within `safe_deviations` of the screen's errors of what a token had to reach. Of these errors the screen knows the
// standard deviation for each row over some text; how much larger or smaller they are for this token is known from the
// logits of which there are both. A draw from the whole distribution takes the largest logit too, after noise
// (kernels/noise.h); one under top-k or min-p hangs on the last token that was kept; one under top-p needs all logits.
// Drafts (Mode::draft) take what the shortlist says.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "bits.h"
#include "prefetch.h"
#include "program.h"

namespace fallow {
namespace {

constexpr float likely_deviations = 3.f;  // with which tiles compete to be computed first; LIKELY in models/head_screen.py
constexpr float safe_deviations = 5.f;
constexpr int most_rounds = 2;  // of further tiles, before a row gets all of them
constexpr int chunk = 32;  // tiles of the first look, whose peaks are found while their logits are in the cache
constexpr char exact_look = PackedSigns::looks;
constexpr float infinity = std::numeric_limits<float>::infinity();

bool is_noisy(const SamplingRow& p) { return p.is_draw() && p.is_from_all(); }
bool needs_all(const SamplingRow& p) { return p.is_draw() && p.top_p < 1.f; }

}  // namespace

void Program::prepare_head() {
  const auto found = std::find_if(operations_.begin(), operations_.end(), [](const Operation& o) { return std::holds_alternative<op::Rescore>(o); });
  if (found == operations_.end()) return;
  rescore_ = static_cast<int>(found - operations_.begin());
  const PackedSigns& w = screen();
  for (int look = 0; look < PackedSigns::looks; ++look) {
    for (int tile = 0; tile < w.tiles; ++tile) {
      const uint16_t* deviations = w.deviations(look, tile);
      float most = 0.f;
      for (int i = 0; i < lanes; ++i) most = std::max(most, bf16_to_float(deviations[i]));
      largest_deviations_[look].push_back(most);
    }
  }
  all_tiles_.resize(w.tiles);
  std::iota(all_tiles_.begin(), all_tiles_.end(), 0);
  const int rows = limits_.max_logit_rows;
  first_logits_ = Memory(rows * logits_stride() * sizeof(float), Pages::small);
  for (ThreadScratch& scratch : scratch_) {
    HeadScratch& head = scratch.head;
    head.tables = Memory(rows * w.table_bytes());
    head.steps.resize(rows * PackedSigns::looks);
    head.out.resize(rows);
    head.tiles.resize(w.tiles);
    head.listed.resize(w.tiles + 1);
    head.peaks.resize(w.tiles);
  }
  head_rows_.resize(rows);
  for (HeadRow& row : head_rows_) {
    row.looks.resize(w.tiles);
    row.peaks.resize(w.tiles);
    row.deviations.resize(w.tiles);
    row.likely.resize(pool_.size());
  }
}

const op::Screen& Program::screening() const { return std::get<op::Screen>(operations_[rescore_ - 3]); }
const op::SecondLook& Program::second_look() const { return std::get<op::SecondLook>(operations_[rescore_ - 2]); }
const PackedSigns& Program::screen() const { return *signs_[screening().signs]; }

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

// Calls f(begin, end) for the rows of `part` that are screened, where several follow each other together.
template <class F>
void Program::for_screened_rows(const Part& part, const F& f) const {
  const auto is_whole = [](const HeadRow& row) { return row.whole; };
  const auto rows = head_rows_.begin();
  for (auto begin = rows + part.begin;;) {
    begin = std::find_if_not(begin, rows + part.end, is_whole);
    const auto end = std::find_if(begin, rows + part.end, is_whole);
    if (begin == end) return;
    f(static_cast<int>(begin - rows), static_cast<int>(end - rows));
    begin = end;
  }
}

void Program::execute(const op::Screen& o, int, int thread, const Part& part) {
  const PackedSigns& w = *signs_[o.signs];
  HeadScratch& scratch = scratch_[thread].head;
  const int first = part.first_of(w.tiles);
  const int last = part.end_of(w.tiles);
  for_screened_rows(part, [&](int begin, int end) {
    // Each thread makes all tables for itself, of both looks: that takes less time than one more barrier.
    for (int r = begin; r < end; ++r) {
      if (part.share == 0) head_rows_[r].tables_by = thread;
      scratch.out[r] = is_finished(r) ? row(o.out, r, part) : first_logits_.as<float>() + r * logits_stride();
      kernels_.sign_tables(w, row(o.x, r, part), scratch.tables_of(r, w), scratch.steps.data() + r * PackedSigns::looks);
    }
    for (int from = first; from < last; from += chunk) {
      const int to = std::min(from + chunk, last);
      kernels_.screen({&w, row(o.x, begin, part), buffers_[o.x].stride, scratch.tables_of(begin, w),
                       scratch.steps.data() + begin * PackedSigns::looks, end - begin, scratch.out.data() + begin},
                      from, to);
      for (int r = begin; r < end; ++r) keep_peaks(r, 0, all_tiles_.data() + from, to - from, scratch.out[r], scratch);
    }
    for (int r = begin; r < end; ++r) {
      const float* peaks = head_rows_[r].peaks.data() + first;
      const int count = kernels_.list_largest(peaks, last - first, second_look().tiles, scratch.listed.data());
      Peaks& likely = head_rows_[r].likely[part.share];
      likely.tiles.resize(count);
      likely.peaks.resize(count);
      for (int i = 0; i < count; ++i) {
        likely.tiles[i] = first + scratch.listed[i];
        likely.peaks[i] = peaks[scratch.listed[i]];
      }
    }
  });
}

void Program::execute(const op::SecondLook& o, int, int thread, const Part& part) {
  HeadScratch& scratch = scratch_[thread].head;
  for_screened_rows(part, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      HeadRow& head = head_rows_[r];
      // Each thread lists for itself what all shares have, and takes its part of that: every second tile, or third, so that
      // none has all of those that lie side by side, which come faster.
      int count = 0;
      for (int share = 0; share < part.shares; ++share) {
        const Peaks& likely = head.likely[share];
        std::copy(likely.tiles.begin(), likely.tiles.end(), scratch.tiles.begin() + count);
        std::copy(likely.peaks.begin(), likely.peaks.end(), scratch.peaks.begin() + count);
        count += static_cast<int>(likely.tiles.size());
      }
      count = kernels_.list_largest(scratch.peaks.data(), count, o.tiles, scratch.listed.data());
      for (int i = 0; i < count; ++i) scratch.listed[i] = scratch.tiles[scratch.listed[i]];
      if (part.share == 0) head.again.assign(scratch.listed.begin(), scratch.listed.begin() + count);
      int mine = 0;
      for (int i = part.share; i < count; i += part.shares) scratch.listed[mine++] = scratch.listed[i];
      look_again(r, scratch.listed.data(), mine, scratch, scratch);
    }
  });
}

// `made` has the tables of the row.
void Program::look_again(int r, const int32_t* tiles, int count, const HeadScratch& made, HeadScratch& scratch) {
  const PackedSigns& w = screen();
  kernels_.second_look({&w, made.tables_of(r, w), made.steps[r * PackedSigns::looks + 1], made.out[r]}, tiles, count);
  keep_peaks(r, 1, tiles, count, made.out[r], scratch);
}

// Of tiles after a look, which made `values` of them.
void Program::keep_peaks(int r, int look, const int32_t* tiles, int count, const float* values, HeadScratch& scratch) {
  HeadRow& head = head_rows_[r];
  float* logits = logits_of(r);
  finish_logits(r, tiles, count, values, logits);
  kernels_.screened_peaks(screen(), look, logits, likely_deviations, tiles, count, scratch.peaks.data());
  for (int i = 0; i < count; ++i) {
    head.looks[tiles[i]] = static_cast<char>(look);
    head.peaks[tiles[i]] = scratch.peaks[i];
    head.deviations[tiles[i]] = largest_deviations_[look][tiles[i]];
  }
}

// Whether logits of a row stay what the product made of them.
bool Program::is_finished(int r) const { return !(screening().cap > 0.f) && !has_noise(r); }
bool Program::has_noise(int r) const { return step_.mode == Mode::plan && is_noisy(sample_->sampling[r]); }

// What logits go through after the product: the cap, and the noise of a draw.
void Program::finish_logits(int r, const int32_t* tiles, int count, const float* values, float* logits) const {
  if (is_finished(r)) return;
  const float cap = screening().cap;
  const SamplingRow& p = sample_->sampling[r];
  const bool noisy = has_noise(r);
  const NoiseKey key = noise_key(p);
  for (int i = 0; i < count; ++i) {
    const int first = tiles[i] * lanes;
    if (values != logits) std::copy_n(values + first, lanes, logits + first);
    if (cap > 0.f) kernels_.soft_cap(logits + first, lanes, cap);
    if (noisy) kernels_.perturb(logits + first, first, lanes, p.temperature, key, logits + first);
  }
}

void Program::execute(const op::Shortlist& o, int, int thread, const Part& part) {
  HeadScratch& scratch = scratch_[thread].head;
  for (int r = part.begin; r < part.end; ++r) {
    HeadRow& head = head_rows_[r];
    if (head.whole) continue;
    const auto count = static_cast<int>(head.again.size());
    for (int i = 0; i < count; ++i) scratch.peaks[i] = head.peaks[head.again[i]];
    head.wanted.resize(count + 1);
    head.wanted.resize(kernels_.list_largest(scratch.peaks.data(), count, o.tiles, head.wanted.data()));
    for (int32_t& wanted : head.wanted) wanted = head.again[wanted];
    head.exact.clear();
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
  const PackedLinear& w = *weights_[o.weights];
  // Every second pair, or third, as in the second look.
  const auto last = static_cast<int>(head.wanted.size());
  const int first = 2 * part.share;
  const int stride = 2 * part.shares;
  float* logits = row(o.out, r, part);
  const auto fetch = [&](int pair) {
    for (int i = pair; i < std::min(pair + 2, last); ++i) prefetch_run(w.tile(head.wanted[i]), w.tile_bytes);
  };
  fetch(first);
  fetch(first + stride);
  for (int i = first; i < last; i += stride) {
    const int count = head.wanted[i] == head.wanted[i + 1] ? 1 : 2;
    fetch(i + 2 * stride);
    float before[2][lanes];
    for (int n = 0; n < count; ++n) std::copy_n(logits + head.wanted[i + n] * lanes, lanes, before[n]);
    kernels_.linear({&w, activations_[o.activations].format, activation_row(o.activations, r, part), 1, logits,
                     buffers_[o.out].stride, nullptr, Epilogue::store, {}, head.wanted.data()},
                    i, i + 2, scratch_[thread].linear.data());
    for (int n = 0; n < count; ++n) {
      const int tile = head.wanted[i + n];
      finish_logits(r, &head.wanted[i + n], 1, logits, logits);
      head.errors[i + n] = squared_errors(head, tile, before[n], logits + tile * lanes);
    }
  }
}

// Of a tile, in units of its rows' deviations.
double Program::squared_errors(const HeadRow& head, int tile, const float* screened, const float* exact) const {
  const uint16_t* deviations = screen().deviations(head.looks[tile], tile);
  double total = 0;
  for (int i = 0; i < std::min(lanes, vocab_size() - tile * lanes); ++i) {
    const double error = (static_cast<double>(exact[i]) - screened[i]) / std::max(bf16_to_float(deviations[i]), 1e-6f);
    total += error * error;
  }
  return total;
}

// Chooses the token of a row from what is known of its logits; tiles that could change it become wanted.
void Program::choose_token(int r, ThreadScratch& scratch) {
  HeadRow& head = head_rows_[r];
  head.doubtful = false;
  if (head.whole) {
    sample_row(*sample_, r, scratch.sample);
    return;
  }
  if (head.rounds == 0) {
    const double total = std::accumulate(head.errors.begin(), head.errors.end(), 0.0);
    head.scale = static_cast<float>(std::sqrt(total / static_cast<double>(head.wanted.size() * lanes)));
  }
  for (const int32_t tile : head.wanted) {
    if (head.looks[tile] == exact_look) continue;
    head.exact.push_back(tile);
    head.looks[tile] = exact_look;
    head.peaks[tile] = std::numeric_limits<float>::lowest();
  }
  if (head.rounds == 0) head.listed = head.exact.size();
  const float* logits = logits_of(r);
  const SamplingRow& p = sample_->sampling[r];
  if (step_.mode == Mode::draft) {  // it may be wrong: the approximate logits serve beside the exact ones
    if (p.is_draw()) {
      sample_row(*sample_, r, scratch.sample);
    } else {
      take_largest(r, logits);
    }
    return;
  }
  const float reach = p.is_draw() && !is_noisy(p) ? sample_row(*sample_, r, scratch.sample).reach : take_largest(r, logits);
  const bool lost = !std::isfinite(reach) || !std::isfinite(head.scale);
  if (!lost) want_doubtful_tiles(r, reach, scratch.head);
  head.doubtful = lost || !head.wanted.empty();
  if (!head.doubtful) return;
  head.whole = lost || ++head.rounds > most_rounds || head.wanted.size() > head.peaks.size() / 4;
  begin_round(head);
}

// Tiles that are not exact and may hold a logit that reaches what a token has to, after two looks: those that had one get
// the second now. From the peak and the largest deviation of a tile follows more than it can have, mostly too little: the
// deviations of few have to be read.
void Program::want_doubtful_tiles(int r, float reach, HeadScratch& scratch) {
  HeadRow& head = head_rows_[r];
  const float margin = safe_deviations * std::max(head.scale, 1e-6f);
  const float further = std::max(margin - likely_deviations, 0.f);
  const float* logits = logits_of(r);
  const auto list = [&](int look, std::vector<int32_t>& out) {
    const int found = kernels_.list_reaching(head.peaks.data(), head.deviations.data(), screen().tiles, further, reach, scratch.listed.data());
    out.clear();
    for (int i = 0; i < found; ++i) {
      const int32_t tile = scratch.listed[i];
      if (head.looks[tile] != look) continue;
      float most = 0.f;
      kernels_.screened_peaks(screen(), look, logits, margin, &tile, 1, &most);
      if (!(most < reach)) out.push_back(tile);
    }
  };
  list(0, head.again);
  look_again(r, head.again.data(), static_cast<int>(head.again.size()), scratch_[head.tables_by].head, scratch);
  list(1, head.wanted);
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
  ThreadScratch& scratch = scratch_[thread];
  std::atomic<int>& next = next_[operations_.size()];
  if (rescore_ < 0) {
    for (int r = 0; (r = next.fetch_add(1, std::memory_order_relaxed)) < rows;) sample_row(*sample_, r, scratch.sample);
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
