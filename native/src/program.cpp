#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <set>
#include <stdexcept>

#include "prefetch.h"

namespace fallow {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void require(bool holds, const char* message) {
  if (!holds) refuse(message);
}

template <class... F>
struct Overloaded : F... {
  using F::operator()...;
};
template <class... F>
Overloaded(F...) -> Overloaded<F...>;

constexpr size_t next_bytes = 32768;

constexpr int column_rows = 64;  // beyond, rows lie too far apart to be walked down a column
constexpr int sink_rows = 4;  // the first tokens of a text are unlike all others
constexpr double fixed_point = 1 << 24;  // of sums that must not depend on the order in which threads add to them

constexpr Partial nothing{-std::numeric_limits<float>::infinity(), 0.f};

}  // namespace

Program::Program(int threads, const std::string& isa, KvLayout layout, int num_layers, Limits limits)
    : kernels_(kernels_of(isa)), layout_(layout), num_layers_(num_layers), limits_(limits), pool_(threads) {
  require(layout.num_heads > 0 && layout.num_kv_heads > 0 && layout.num_heads % layout.num_kv_heads == 0,
          "the number of heads must be a multiple of the number of KV heads");
  require(layout.head_dim > 0 && layout.head_dim <= max_head_dim, "head_dim must be from 1 to 512");
  require(layout.num_heads / layout.num_kv_heads <= attention_block, "at most 24 heads may share a KV head");
  require(limits.max_tokens > 0 && limits.max_sequences > 0 && limits.max_logit_rows > 0 && limits.num_pages > 0 &&
              limits.max_positions > 0 && num_layers > 0,
          "limits must be positive");
}

int Program::add_buffer(int width) {
  require(width > 0, "a buffer needs a positive width");
  buffers_.push_back({width, static_cast<size_t>((width + lanes - 1) / lanes * lanes), {}});
  return static_cast<int>(buffers_.size()) - 1;
}

int Program::add_activations(const ActivationFormat& format) {
  require(format.in_features > 0, "activations need a positive width");
  require(format.codes == Codes::bf16 || (format.codes == Codes::q8 && (format.group == 16 || format.group == 32) &&
                                          format.in_features % format.group == 0),
          "quantised activations need a width in multiples of their group of 16 or 32");
  activations_.push_back({format, {}});
  return static_cast<int>(activations_.size()) - 1;
}

int Program::add_weights(PackedLinear weights) {
  weights.move_to(arena_);
  weights_.push_back(std::make_unique<PackedLinear>(std::move(weights)));
  return static_cast<int>(weights_.size()) - 1;
}

int Program::add_vector(std::vector<float> values) {
  // Kernels read whole pairs of tiles of a bias.
  values.resize((values.size() + 2 * lanes - 1) / (2 * lanes) * (2 * lanes), 0.f);
  vectors_.push_back(std::move(values));
  return static_cast<int>(vectors_.size()) - 1;
}

void Program::add(Operation operation) { operations_.push_back(std::move(operation)); }

size_t Program::weight_bytes() const {
  size_t total = 0;
  for (const auto& w : weights_) total += w->bytes;
  return total;
}

void Program::finish(int logits_buffer) {
  const auto width = [&](int b) { return buffers_.at(b).width; };
  const auto vector_of = [&](int v, int least) {
    require(static_cast<int>(vectors_.at(v).size()) >= least, "a vector is shorter than its operation needs");
  };
  const int heads_width = layout_.num_heads * layout_.head_dim;
  const int qkv_width = heads_width + 2 * layout_.num_kv_heads * layout_.head_dim;
  std::vector<int> buffer_kind(buffers_.size(), 0);
  std::vector<int> activation_kind(activations_.size(), 0);
  int kind = 0;
  int widest = 1;
  int widest_linear = 1;
  row_kind_.clear();
  for (const auto& operation : operations_) {
    std::visit(
        Overloaded{
            [&](const op::Embed& o) {
              require(width(o.out) >= weights_.at(o.weights)->in_features, "embed: the buffer is too narrow");
              widest = std::max(widest, width(o.out));
            },
            [&](const op::Norm& o) {
              vector_of(o.weight, width(o.x));
              require(width(o.out) >= width(o.x), "norm: the buffer is too narrow");
            },
            [&](const op::NormQuantise& o) {
              vector_of(o.weight, width(o.x));
              widest = std::max(widest, width(o.x));
              for (const int a : o.out) {
                require(activations_.at(a).format.in_features <= width(o.x), "norm: activations are too wide");
                activation_kind[a] = kind;
              }
            },
            [&](const op::Quantise& o) {
              require(activations_.at(o.out).format.in_features <= width(o.x), "quantise: activations are too wide");
              activation_kind[o.out] = kind;
            },
            [&](const op::Linear& o) {
              const PackedLinear& w = *weights_.at(o.weights);
              const ActivationFormat& f = activations_.at(o.activations).format;
              require(f.in_features == w.in_features, "linear: activations and weights differ in width");
              require((w.codes == Codes::bf16) == (f.codes == Codes::bf16), "linear: activations are of another kind than the weights");
              require(w.codes == Codes::bf16 || (f.group == w.group && f.pairs_kind == w.pairs_kind &&
                                                 f.asymmetric == (w.pairs_kind == Pairs::sums || w.pairs_kind == Pairs::both)),
                      "linear: activations are grouped otherwise than the weights");
              const bool gated = o.epilogue == Epilogue::silu_gate || o.epilogue == Epilogue::gelu_gate;
              require(!gated || w.out_features % (2 * lanes) == 0, "linear: gated weights need rows in multiples of 32");
              require(o.column >= 0 && o.column + (gated ? w.out_features / 2 : w.out_features) <= width(o.out),
                      "linear: the buffer is too narrow");
              if (o.bias >= 0) vector_of(o.bias, w.out_features);
              widest_linear = std::max(widest_linear, w.in_features);
              buffer_kind[o.out] = kind;
            },
            [&](const op::Rope& o) {
              require(width(o.qkv) >= qkv_width, "rope: the buffer is too narrow");
              require(o.rotary_dim > 0 && o.rotary_dim % 2 == 0 && o.rotary_dim <= layout_.head_dim, "rope: rotary_dim must be even and at most head_dim");
              require(vectors_.at(o.table).size() >= static_cast<size_t>(limits_.max_positions) * o.rotary_dim, "rope: the table is too short");
              if (o.q_norm >= 0) vector_of(o.q_norm, layout_.head_dim);
              if (o.k_norm >= 0) vector_of(o.k_norm, layout_.head_dim);
              require(o.layer >= 0 && o.layer < num_layers_, "rope: no such layer");
            },
            [&](const op::Attention& o) {
              require(width(o.out) >= heads_width, "attention: the buffer is too narrow");
              require(o.layer >= 0 && o.layer < num_layers_ && o.window >= 0, "attention: no such layer or window");
            },
            [&](const op::Add& o) { require(width(o.out) >= width(o.x), "add: the buffer is too narrow"); },
            [&](const op::Gate& o) {
              require(width(o.gate) == width(o.up) && width(o.out) >= width(o.gate), "gate: buffers differ in width");
            },
            [&](const op::Gather& o) {
              require(width(o.out) >= width(o.x) && o.x != o.out && kind == 0, "gather: once, into a buffer of its own");
              kind = 1;
              buffer_kind[o.out] = 1;
            },
        },
        operation);
    row_kind_.push_back(kind);
  }
  require(kind == 1, "a program gathers the rows whose logits are wanted");
  logits_ = logits_buffer;
  (void)buffers_.at(logits_buffer);
  const auto rows_of = [&](int k) { return static_cast<size_t>(k == 1 ? limits_.max_logit_rows : limits_.max_tokens); };
  for (size_t b = 0; b < buffers_.size(); ++b) buffers_[b].memory = Memory(rows_of(buffer_kind[b]) * buffers_[b].stride * sizeof(float));
  for (size_t a = 0; a < activations_.size(); ++a) {
    activations_[a].memory = Memory(rows_of(activation_kind[a]) * activations_[a].format.row_bytes());
  }
  pool_memory_ = Memory(page_bytes() * limits_.num_pages);
  const size_t padded_dim = layout_.padded_dim();
  queries_ = Memory(limits_.max_tokens * layout_.num_heads * padded_dim * sizeof(uint16_t));
  for (int t = 0; t < pool_.size(); ++t) {
    ThreadScratch s;
    s.linear = Memory(linear_scratch_bytes(widest_linear));
    s.row = Memory((widest + lanes) * sizeof(float));
    s.scores = Memory(attention_scratch_floats * sizeof(float));
    s.values = Memory(attention_block * padded_dim * sizeof(float));
    s.state = Memory(attention_block * padded_dim * sizeof(float));
    s.partials.resize(attention_block);
    s.states.resize(attention_block);
    scratch_.push_back(std::move(s));
  }
  row_sequence_.resize(limits_.max_tokens);
  row_position_.resize(limits_.max_tokens);
  next_linear_.assign(operations_.size(), -1);
  int next = -1;
  for (int i = static_cast<int>(operations_.size()) - 1; i >= 0; --i) {
    next_linear_[i] = next;
    if (const auto* o = std::get_if<op::Linear>(&operations_[i])) next = o->weights;
  }
  next_ = std::make_unique<std::atomic<int>[]>(operations_.size() + 1);
}

void Program::check(const Step& step) const {
  require(logits_ >= 0, "the program is not finished");
  require(step.num_tokens > 0 && step.num_tokens <= limits_.max_tokens, "a step has no tokens or more than max_tokens");
  require(step.num_sequences > 0 && step.num_sequences <= limits_.max_sequences, "a step has no sequences or more than max_sequences");
  require(step.num_logit_rows >= 0 && step.num_logit_rows <= limits_.max_logit_rows, "a step has more logit rows than max_logit_rows");
  require(step.row_offsets[0] == 0 && step.row_offsets[step.num_sequences] == step.num_tokens, "row_offsets must run from 0 to the number of tokens");
  int vocabulary = std::numeric_limits<int>::max();
  for (const auto& o : operations_) {
    if (const auto* e = std::get_if<op::Embed>(&o)) vocabulary = std::min(vocabulary, weights_[e->weights]->out_features);
  }
  for (int i = 0; i < step.num_tokens; ++i) require(step.tokens[i] >= 0 && step.tokens[i] < vocabulary, "a token is outside the vocabulary");
  for (int s = 0; s < step.num_sequences; ++s) {
    const int64_t count = int64_t{step.row_offsets[s + 1]} - step.row_offsets[s];
    require(count > 0 && step.row_offsets[s + 1] <= step.num_tokens, "row_offsets must ascend");
    const int64_t end = step.start_positions[s] + count;
    require(step.start_positions[s] >= 0 && end <= limits_.max_positions, "a position is outside the context");
    const int64_t pages = (end + page_size - 1) / page_size;
    require(pages <= step.table_width, "the page table is too narrow for a sequence");
    for (int64_t p = 0; p < pages; ++p) {
      const int32_t page = step.page_table[static_cast<int64_t>(s) * step.table_width + p];
      require(page >= 0 && page < limits_.num_pages, "a page is outside the pool");
    }
  }
  for (int i = 0; i < step.num_logit_rows; ++i) {
    require(step.logit_rows[i] >= 0 && step.logit_rows[i] < step.num_tokens, "a logit row is outside the step");
  }
}

void Program::run(const Step& step, SampleArgs* sample) {
  step_ = step;
  sample_ = sample;
  if (sample != nullptr) {
    sample->logits = logits();
    sample->stride = logits_stride();
  }
  for (int s = 0; s < step.num_sequences; ++s) {
    for (int r = step.row_offsets[s]; r < step.row_offsets[s + 1]; ++r) {
      row_sequence_[r] = s;
      row_position_[r] = step.start_positions[s] + r - step.row_offsets[s];
    }
  }
  plan_attention(step);
  for (size_t i = 0; i <= operations_.size(); ++i) next_[i].store(0, std::memory_order_relaxed);
  pool_.run([](void* self, int thread) { static_cast<Program*>(self)->execute(thread); }, this);
}

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

void Program::execute(int thread) {
  for (size_t i = 0; i < operations_.size(); ++i) {
    if (row_kind_[i] == 1 && step_.num_logit_rows == 0) break;
    std::visit([&](const auto& o) { execute(o, static_cast<int>(i), thread); }, operations_[i]);
    pool_.barrier();
  }
  if (sample_ == nullptr) return;
  std::atomic<int>& next = next_[operations_.size()];
  for (int r = 0; (r = next.fetch_add(1, std::memory_order_relaxed)) < step_.num_logit_rows;) sample_row(*sample_, r, scratch_[thread].sample);
}

void Program::log_probabilities(const int32_t* targets, int count, float* out) {
  struct Task {
    Program* program;
    const int32_t* targets;
    int count;
    float* out;
  } task{this, targets, count, out};
  pool_.run(
      [](void* context, int thread) {
        const Task& t = *static_cast<Task*>(context);
        for (int r = thread; r < t.count; r += t.program->pool_.size()) {
          t.out[r] = log_probability(t.program->logits() + r * t.program->logits_stride(), t.program->vocab_size(), t.targets[r]);
        }
      },
      &task);
}

void Program::execute(const op::Embed& o, int index, int thread) {
  const PackedLinear& w = *weights_[o.weights];
  for_rows(index, thread, [&](int r) {
    float* out = row(o.out, r);
    unpack_row(w, step_.tokens[r], out);
    if (o.scale != 1.f) {
      for (int i = 0; i < w.in_features; ++i) out[i] *= o.scale;
    }
  });
}

void Program::execute(const op::Norm& o, int index, int thread) {
  for_rows(index, thread, [&](int r) {
    kernels_.rms_norm({row(o.x, r), vectors_[o.weight].data(), o.eps, buffers_[o.x].width}, row(o.out, r));
  });
}

void Program::execute(const op::NormQuantise& o, int index, int thread) {
  auto* normed = scratch_[thread].row.as<float>();
  const int width = buffers_[o.x].width;
  std::vector<int64_t> sums(totals_.empty() ? 0 : width);
  for_rows(index, thread, [&](int r) {
    // Half of a row was written by another core.
    prefetch_near(row(o.x, r + 1), width * sizeof(float));
    const float* shift = o.centre < 0 ? nullptr : vectors_[o.centre].data();
    kernels_.rms_norm({row(o.x, r), vectors_[o.weight].data(), o.eps, width, shift}, normed);
    if (!sums.empty() && row_position_[r] >= sink_rows) {
      for (int i = 0; i < width; ++i) sums[i] += std::llround(normed[i] * fixed_point);
    }
    for (const int a : o.out) kernels_.quantise(normed, activations_[a].format, activation_row(a, r), 0, activations_[a].format.groups());
  });
  if (sums.empty()) return;
  const std::lock_guard<std::mutex> lock(totals_mutex_);
  totals_[index].resize(width);
  for (int i = 0; i < width; ++i) totals_[index][i] += sums[i];
}

void Program::centre(const std::vector<int32_t>& tokens) {
  const int n = static_cast<int>(tokens.size());
  const int length = std::min(page_size, limits_.max_positions);
  const int sequences = n / length;
  require(n > 0 && n % length == 0, "centring needs whole sequences");
  if (length <= sink_rows) return;
  totals_.assign(operations_.size(), {});
  // One page at a time and as many rows as a step may have: what is found must not depend on the limits.
  for (int s = 0; s < sequences; ++s) {
    for (int begin = 0, count = 0; begin < length; begin += count) {
      count = std::min(length - begin, limits_.max_tokens);
      const int32_t page = 0;
      const int32_t offsets[2] = {0, count};
      const Step step{tokens.data() + s * length + begin, count, offsets, &begin, 1, &page, 1, nullptr, 0};
      check(step);
      run(step, nullptr);
    }
  }
  const auto totals = std::move(totals_);
  totals_.clear();
  for (size_t i = 0; i < operations_.size(); ++i) {
    auto* norm = std::get_if<op::NormQuantise>(&operations_[i]);
    if (norm == nullptr || totals[i].empty()) continue;
    const bool rounded = std::all_of(norm->out.begin(), norm->out.end(), [&](int a) {
      return activations_[a].format.codes == Codes::q8 && !activations_[a].format.asymmetric;
    });
    if (!rounded) continue;
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

void Program::execute(const op::Quantise& o, int index, int thread) {
  const ActivationFormat& f = activations_[o.out].format;
  if (rows(index) > column_rows) {
    for_rows(index, thread, [&](int r) {
      prefetch_near(row(o.x, r + 1), f.in_features * sizeof(float));
      kernels_.quantise(row(o.x, r), f, activation_row(o.out, r), 0, f.groups());
    });
    return;
  }
  // By columns, as the linear before wrote them: what a thread reads is in its own cache.
  const int64_t threads = pool_.size();
  const int begin = static_cast<int>(f.groups() * int64_t{thread} / threads);
  const int end = static_cast<int>(f.groups() * (int64_t{thread} + 1) / threads);
  for (int r = 0; r < rows(index); ++r) kernels_.quantise(row(o.x, r), f, activation_row(o.out, r), begin, end);
}

void Program::execute(const op::Linear& o, int index, int thread) {
  const PackedLinear& w = *weights_[o.weights];
  const Activations& a = activations_[o.activations];
  const LinearTask task{&w,
                        a.format,
                        a.memory.data(),
                        rows(index),
                        row(o.out, 0) + o.column,
                        buffers_[o.out].stride,
                        o.bias < 0 ? nullptr : vectors_[o.bias].data(),
                        o.epilogue};
  uint8_t* scratch = scratch_[thread].linear.data();
  const auto share = [&](const PackedLinear& m, int t) { return 2 * static_cast<int>((m.tiles + 1) / 2 * int64_t{t} / pool_.size()); };
  const int begin = share(w, thread);
  const int end = share(w, thread + 1);
  kernels_.linear(task, begin, end, scratch);
  // While the others finish, the start of this thread's next weights comes.
  const int next = next_linear_[index];
  if (next < 0) return;
  const PackedLinear& after = *weights_[next];
  const uint8_t* p = after.tile(share(after, thread));
  const uint8_t* last = after.data + after.bytes;
  for (size_t line = 0; line < next_bytes && p + line < last; line += cache_line) prefetch_far(p + line);
}

void Program::execute(const op::Rope& o, int index, int thread) {
  const size_t stride = static_cast<size_t>(layout_.num_heads) * layout_.padded_dim();
  const auto norm = [&](int v) { return v < 0 ? nullptr : vectors_[v].data(); };
  for_rows(index, thread, [&](int r) {
    const auto page_of = [&](int i) {
      return page(o.layer, step_.page_table[static_cast<size_t>(row_sequence_[i]) * step_.table_width + row_position_[i] / page_size]);
    };
    const int next = std::min(r + 1, rows(index) - 1);
    kernels_.rope({layout_, row_position_[r], vectors_[o.table].data(), o.rotary_dim, norm(o.q_norm), norm(o.k_norm), o.eps, row(o.qkv, r),
                   queries_.as<uint16_t>() + r * stride, page_of(r), page_of(next), row_position_[next]});
  });
}

AttentionTask Program::attention_task(const op::Attention& o, const AttentionItem& item) const {
  const size_t stride = static_cast<size_t>(layout_.num_heads) * layout_.padded_dim();
  return {layout_,
          queries_.as<uint16_t>() + item.row * stride,
          stride,
          item.kv_head,
          item.rows,
          item.first_position,
          o.window,
          o.scale,
          page(o.layer, 0),
          page_bytes(),
          step_.page_table + static_cast<size_t>(item.sequence) * step_.table_width};
}

namespace {

// Segments of which the rows of an item may see something.
std::pair<int, int> segments_of(int first_position, int rows, int window) {
  const int low = window > 0 ? std::max(0, first_position + 1 - window) : 0;
  return {low / segment_tokens, (first_position + rows - 1) / segment_tokens + 1};
}

}  // namespace

void Program::attend(const op::Attention& o, const AttentionItem& item, ThreadScratch& scratch) {
  const AttentionTask task = attention_task(o, item);
  const int group = layout_.num_heads / layout_.num_kv_heads;
  const int padded_dim = layout_.padded_dim();
  std::fill(scratch.states.begin(), scratch.states.end(), nothing);
  const auto [begin, end] = segments_of(item.first_position, item.rows, o.window);
  auto* values = scratch.values.as<float>();
  auto* state = scratch.state.as<float>();
  for (int segment = begin; segment < end; ++segment) {
    kernels_.attention(task, segment, scratch.partials.data(), values, scratch.scores.as<float>());
    for (int q = 0; q < item.rows * group; ++q) {
      const size_t at = static_cast<size_t>(q) * padded_dim;
      kernels_.merge(scratch.states[q], state + at, scratch.partials[q], values + at, padded_dim);
    }
  }
  for (int q = 0; q < item.rows * group; ++q) {
    float* out = row(o.out, item.row + q / group) + (item.kv_head * group + q % group) * layout_.head_dim;
    kernels_.finish(scratch.states[q], state + static_cast<size_t>(q) * padded_dim, layout_.head_dim, out);
  }
}

void Program::attend_segment(const op::Attention& o, const AttentionItem& item, ThreadScratch& scratch) {
  const auto [begin, end] = segments_of(item.first_position, item.rows, o.window);
  if (item.segment < begin || item.segment >= end) return;
  kernels_.attention(attention_task(o, item), item.segment, split_partials_.data() + item.partial,
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
    float* out = row(o.out, item.row + q / group) + (item.kv_head * group + q % group) * layout_.head_dim;
    kernels_.finish(sum, state, layout_.head_dim, out);
  }
}

void Program::execute(const op::Attention& o, int index, int thread) {
  ThreadScratch& scratch = scratch_[thread];
  const int count = static_cast<int>(items_.size());
  for (int i = 0; (i = next_[index].fetch_add(1, std::memory_order_relaxed)) < count;) {
    if (items_[i].segment < 0) {
      attend(o, items_[i], scratch);
    } else {
      attend_segment(o, items_[i], scratch);
    }
  }
  if (merges_.empty()) return;
  pool_.barrier();
  for (size_t i = thread; i < merges_.size(); i += pool_.size()) merge_segments(o, merges_[i], scratch);
}

void Program::execute(const op::Add& o, int index, int thread) {
  for_rows(index, thread, [&](int r) { kernels_.add(row(o.x, r), row(o.out, r), buffers_[o.x].width); });
}

void Program::execute(const op::Gate& o, int index, int thread) {
  for_rows(index, thread, [&](int r) { kernels_.gate(row(o.gate, r), row(o.up, r), row(o.out, r), buffers_[o.gate].width, o.gelu); });
}

void Program::execute(const op::Gather& o, int index, int thread) {
  for_rows(index, thread, [&](int r) { std::memcpy(row(o.out, r), row(o.x, step_.logit_rows[r]), sizeof(float) * buffers_[o.x].width); });
}

}  // namespace fallow
