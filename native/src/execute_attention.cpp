// Attention of a step: cut into items that threads take one after the other, and merged in order.
#include <algorithm>
#include <cstring>
#include <limits>

#include "program.h"

namespace fallow {
namespace {

constexpr Partial nothing{-std::numeric_limits<float>::infinity(), 0.f};

// Segments of which the rows of an item may see something.
std::pair<int, int> segments_of(int first_position, int rows, int window) {
  const int low = window > 0 ? std::max(0, first_position + 1 - window) : 0;
  return {low / segment_tokens, (first_position + rows - 1) / segment_tokens + 1};
}

}  // namespace

// Few queries with many keys are cut along the keys as well, so that every thread has work. The result is the same:
// segments are merged in order either way.
void Program::plan_attention(const Step& step) {
  items_.clear();
  merges_.clear();
  const int group = layout_.num_heads / layout_.num_kv_heads;
  const int block = std::max(1, attention_block / group);
  int blocks = 0;
  for (int s = 0; s < step.num_sequences; ++s) blocks += (step.row_offsets[s + 1] - step.row_offsets[s] + block - 1) / block;
  const bool split = blocks * layout_.num_kv_heads < 8 * pool_.size();
  int partial = 0;
  for (int s = 0; s < step.num_sequences; ++s) {
    for (int r = step.row_offsets[s]; r < step.row_offsets[s + 1]; r += block) {
      const int rows = std::min(block, step.row_offsets[s + 1] - r);
      const int first = step.start_positions[s] + r - step.row_offsets[s];
      const int segments = (first + rows + segment_tokens - 1) / segment_tokens;
      for (int h = 0; h < layout_.num_kv_heads; ++h) {
        if (!split || segments == 1) {
          items_.push_back({s, r, rows, first, h, -1, 0});
          continue;
        }
        merges_.push_back({s, r, rows, first, h, -1, partial});
        for (int segment = 0; segment < segments; ++segment, partial += rows * group) {
          items_.push_back({s, r, rows, first, h, segment, partial});
        }
      }
    }
  }
  // The last blocks of a prompt see the most keys: they come first.
  std::reverse(items_.begin(), items_.end());
  if (static_cast<int>(split_partials_.size()) < partial) {
    split_partials_.resize(partial);
    split_values_ = Memory(static_cast<size_t>(partial) * layout_.padded_dim() * sizeof(float));
  }
}

// In the order in which items are taken, as many as the last-level cache may hold beside the rest.
void Program::list_pages_ahead() {
  constexpr size_t most_bytes = 8 << 20;
  constexpr int fewest_rows = 4;  // with fewer, linears wait for their weights
  constexpr int most_rows = 128;  // with more, attention computes longer than it waits
  const size_t most = most_bytes / layout_.page_bytes();
  for (Reach& reach : reaches_) {
    const int window = reach.window;
    std::vector<int32_t>& pages = reach.pages;
    pages.clear();
    if (step_.num_tokens < fewest_rows || step_.num_tokens > most_rows) continue;
    for (int s = step_.num_sequences; s-- > 0;) {
      const int first = step_.start_positions[s];
      const int end = first + step_.row_offsets[s + 1] - step_.row_offsets[s];
      const int low = window > 0 ? std::max(0, first + 1 - window) : 0;
      const int recent = first / page_size + 1 - reach.recent;
      for (int page = low / page_size; page * page_size < end && pages.size() < most; ++page) {
        if (reach.chooses && step_.mode != Mode::dense && page >= reach.sinks && page < recent) continue;
        pages.push_back(step_.page_table[static_cast<size_t>(s) * step_.table_width + page]);
      }
    }
  }
}

PagesAhead Program::pages_ahead(int index, int thread) const {
  const Ahead& ahead = ahead_[index];
  if (ahead.layer < 0) return {};
  const std::vector<int32_t>& pages = reaches_[ahead.reach].pages;
  const int first = pool_.share(static_cast<int>(pages.size()), thread);
  const int64_t mine = pool_.share(static_cast<int>(pages.size()), thread + 1) - first;
  const auto begin = mine * ahead.begin / ahead.total;
  const auto end = mine * ahead.end / ahead.total;
  return {page(ahead.layer, 0), page_stride(), layout_.page_bytes(), pages.data() + first + begin, static_cast<int>(end - begin)};
}

AttentionTask Program::attention_task(const op::Attention& o, const AttentionItem& item) const {
  const KvLayout heads = layout(o.kv_heads);
  const size_t stride = static_cast<size_t>(heads.num_heads) * heads.padded_dim();
  return {heads,
          queries_.as<uint16_t>() + item.row * stride,
          stride,
          item.kv_head,
          item.rows,
          item.first_position,
          o.window,
          o.scale,
          page(o.layer, 0),
          page_stride(),
          step_.page_table + static_cast<size_t>(item.sequence) * step_.table_width,
          chooses(o) ? chosen(item.row, item.kv_head) : nullptr,
          static_cast<size_t>(layout_.num_kv_heads) * segments_};
}

void Program::list_full_pages() {
  full_pages_.clear();
  for (int s = 0; s < step_.num_sequences; ++s) {
    const int begin = step_.start_positions[s];
    const int end = begin + step_.row_offsets[s + 1] - step_.row_offsets[s];
    for (int p = begin / page_size; (p + 1) * page_size <= end; ++p) {
      full_pages_.push_back(step_.page_table[static_cast<size_t>(s) * step_.table_width + p]);
    }
  }
}

void Program::summarise_pages(const op::Attention& o, int thread) {
  const KvLayout heads = layout(o.kv_heads);
  const int count = static_cast<int>(full_pages_.size()) * heads.num_kv_heads;
  for (int i = pool_.share(count, thread); i < pool_.share(count, thread + 1); ++i) {
    const int number = full_pages_[i / heads.num_kv_heads];
    const int head = i % heads.num_kv_heads;
    uint16_t* summary = summaries(o.layer) + (static_cast<size_t>(number) * heads.num_kv_heads + head) * heads.summary_elements();
    kernels_.summarise(heads, heads.keys(page(o.layer, number), head), summary);
  }
}

void Program::choose_pages(const op::Attention& o, int index, int row, int kv_head, ThreadScratch& scratch) {
  const int position = row_position_[row];
  const int own = position / page_size;
  const int low = o.window > 0 ? std::max(0, position + 1 - o.window) / page_size : 0;
  const int first = std::min(std::max(low, o.choice.sinks), own + 1);
  const int end = std::max(first, own + 1 - o.choice.recent);
  uint8_t* bits = chosen(row, kv_head);
  std::memset(bits, 0, own / segment_pages + 1);
  const auto choose = [&](int from, int to) {
    for (int p = from; p < to; ++p) bits[p / segment_pages] |= static_cast<uint8_t>(1u << p % segment_pages);
  };
  choose(low, first);
  choose(end, own + 1);
  const KvLayout heads = layout(o.kv_heads);
  const int group = heads.num_heads / heads.num_kv_heads;
  const size_t padded_dim = heads.padded_dim();
  kernels_.choose_pages({heads,
                         queries_.as<uint16_t>() + (static_cast<size_t>(row) * heads.num_heads + static_cast<size_t>(kv_head) * group) * padded_dim,
                         kv_head,
                         o.scale,
                         summaries(o.layer),
                         step_.page_table + static_cast<size_t>(row_sequence_[row]) * step_.table_width,
                         first,
                         end,
                         o.choice.count(kv_head, own + 1)},
                        bits, scratch.choice.as<float>());
  if (record_.pages == nullptr) return;
  const size_t place = (static_cast<size_t>(row) * num_choices_ + record_place_[index]) * layout_.num_kv_heads + kv_head;
  std::memcpy(record_.pages + place * record_.page_bytes, bits, own / segment_pages + 1);
}

unsigned Program::read_pages(const op::Attention& o, const AttentionItem& item, int segment) const {
  if (!chooses(o)) return 0xffu;
  unsigned any = 0;
  for (int r = item.row; r < item.row + item.rows; ++r) any |= chosen(r, item.kv_head)[segment];
  return any;
}

// Of the first page of a segment that the item reads; null where it reads none, or the segment is not among its own.
const uint16_t* Program::first_keys(const op::Attention& o, const AttentionItem& item, int segment) const {
  const auto [begin, end] = segments_of(item.first_position, item.rows, o.window);
  if (segment < begin || segment >= end) return nullptr;
  const unsigned pages = read_pages(o, item, segment);
  const int number = segment * segment_pages + (pages == 0 ? 0 : __builtin_ctz(pages));
  if (pages == 0 || number * page_size >= item.first_position + item.rows) return nullptr;
  uint8_t* p = page(o.layer, step_.page_table[static_cast<size_t>(item.sequence) * step_.table_width + number]);
  return layout(o.kv_heads).keys(p, item.kv_head);
}

void Program::attend(const op::Attention& o, const AttentionItem& item, ThreadScratch& scratch) {
  AttentionTask task = attention_task(o, item);
  const int group = layout_.num_heads / layout_.num_kv_heads;
  const int padded_dim = layout_.padded_dim();
  std::fill(scratch.states.begin(), scratch.states.end(), nothing);
  const auto [begin, end] = segments_of(item.first_position, item.rows, o.window);
  auto* values = scratch.values.as<float>();
  auto* state = scratch.state.as<float>();
  for (int segment = begin; segment < end; ++segment) {
    if (read_pages(o, item, segment) == 0) continue;
    task.next_keys = nullptr;
    for (int next = segment + 1; next < end && task.next_keys == nullptr; ++next) task.next_keys = first_keys(o, item, next);
    kernels_.attention(task, segment, scratch.partials.data(), values, scratch.scores.as<float>());
    for (int q = 0; q < item.rows * group; ++q) {
      const size_t at = static_cast<size_t>(q) * padded_dim;
      kernels_.merge(scratch.states[q], state + at, scratch.partials[q], values + at, padded_dim);
    }
  }
  for (int q = 0; q < item.rows * group; ++q) {
    float* out = row(o.out, item.row + q / group, {}) + (item.kv_head * group + q % group) * layout_.head_dim;
    kernels_.finish(scratch.states[q], state + static_cast<size_t>(q) * padded_dim, layout_.head_dim, out);
  }
}

void Program::attend_segment(const op::Attention& o, int index, ThreadScratch& scratch) {
  const AttentionItem& item = items_[index];
  const auto [begin, end] = segments_of(item.first_position, item.rows, o.window);
  if (item.segment < begin || item.segment >= end) return;
  if (read_pages(o, item, item.segment) == 0) {
    const int group = layout_.num_heads / layout_.num_kv_heads;
    std::fill_n(split_partials_.begin() + item.partial, item.rows * group, nothing);
    return;
  }
  AttentionTask task = attention_task(o, item);
  const size_t next = index + (chooses(o) ? 1 : pool_.size());  // likely this thread's
  if (next < items_.size() && items_[next].segment >= 0 && items_[next].kv_head < o.kv_heads) task.next_keys = first_keys(o, items_[next], items_[next].segment);
  kernels_.attention(task, item.segment, split_partials_.data() + item.partial,
                     split_values_.as<float>() + static_cast<size_t>(item.partial) * layout_.padded_dim(), scratch.scores.as<float>());
}

void Program::merge_segments(const op::Attention& o, const AttentionItem& item, ThreadScratch& scratch) {
  const int group = layout_.num_heads / layout_.num_kv_heads;
  const int padded_dim = layout_.padded_dim();
  const auto [begin, end] = segments_of(item.first_position, item.rows, o.window);
  auto* state = scratch.state.as<float>();
  for (int q = 0; q < item.rows * group; ++q) {
    Partial sum = nothing;
    for (int segment = begin; segment < end; ++segment) {
      const size_t at = static_cast<size_t>(item.partial) + segment * item.rows * group + q;
      kernels_.merge(sum, state, split_partials_[at], split_values_.as<float>() + at * padded_dim, padded_dim);
    }
    float* out = row(o.out, item.row + q / group, {}) + (item.kv_head * group + q % group) * layout_.head_dim;
    kernels_.finish(sum, state, layout_.head_dim, out);
  }
}

void Program::execute(const op::Attention& o, int index, int thread, const Part&) {
  ThreadScratch& scratch = scratch_[thread];
  const bool chooses = this->chooses(o);
  // A dense step keeps them too: later ones may choose.
  if (!o.choice.top.empty() && !full_pages_.empty()) {
    summarise_pages(o, thread);
    pool_.barrier();
  }
  if (chooses && !merges_.empty()) {  // items are parts of what a row reads: it is chosen before
    const int choices = step_.num_tokens * o.kv_heads;
    for (int i = pool_.share(choices, thread); i < pool_.share(choices, thread + 1); ++i) {
      choose_pages(o, index, i / o.kv_heads, i % o.kv_heads, scratch);
    }
    pool_.barrier();
  }
  const int count = static_cast<int>(items_.size());
  // Of a choice many items are next to nothing: a thread takes some at once.
  const int some = chooses && !merges_.empty() ? segment_pages : 1;
  for (int begin = 0; (begin = next_[index].fetch_add(some, std::memory_order_relaxed)) < count;) {
    for (int i = begin; i < std::min(begin + some, count); ++i) {
      if (items_[i].kv_head >= o.kv_heads) continue;
      if (items_[i].segment >= 0) {
        attend_segment(o, i, scratch);
        continue;
      }
      if (chooses && merges_.empty()) {
        for (int r = 0; r < items_[i].rows; ++r) choose_pages(o, index, items_[i].row + r, items_[i].kv_head, scratch);
      }
      attend(o, items_[i], scratch);
    }
  }
  if (merges_.empty()) return;
  pool_.barrier();
  for (size_t i = thread; i < merges_.size(); i += pool_.size()) {
    if (merges_[i].kv_head < o.kv_heads) merge_segments(o, merges_[i], scratch);
  }
}

}  // namespace fallow
