// A program is laid out, checked as a whole and given its memory; and every step is checked before it runs.
#include "program.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

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

template <class Op>
bool follows(const std::vector<Operation>& operations, size_t index) {
  return index > 0 && std::holds_alternative<Op>(operations[index - 1]);
}

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

int Program::add_neurons(PackedNeurons neurons) {
  neurons.move_to(arena_);
  neurons_.push_back(std::make_unique<PackedNeurons>(std::move(neurons)));
  return static_cast<int>(neurons_.size()) - 1;
}

int Program::add_signs(PackedSigns signs) {
  signs.move_to(arena_);
  signs_.push_back(std::make_unique<PackedSigns>(std::move(signs)));
  return static_cast<int>(signs_.size()) - 1;
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
  for (const auto& n : neurons_) total += n->bytes;
  for (const auto& n : signs_) total += n->bytes;
  return total;
}

void Program::finish(int logits_buffer) {
  const auto width = [&](int b) { return buffers_.at(b).width; };
  const auto vector_of = [&](int v, int least) {
    require(static_cast<int>(vectors_.at(v).size()) >= least, "a vector is shorter than its operation needs");
  };
  std::vector<int> buffer_kind(buffers_.size(), -1);
  std::vector<int> activation_kind(activations_.size(), -1);
  int kind = 0;
  const auto use = [&](std::vector<int>& kinds, int i) {
    require(kinds.at(i) < 0 || kinds[i] == kind, "a buffer holds all rows before the gather, or logit rows after it: not both");
    kinds[i] = kind;
  };
  int widest = 1;
  size_t linear_scratch = 1;
  // Weights that are read with these activations.
  const auto reading = [&](int activations, int weights) -> const PackedLinear& {
    use(activation_kind, activations);
    const PackedLinear& w = *weights_.at(weights);
    const ActivationFormat& f = activations_.at(activations).format;
    require(f.in_features == w.in_features, "linear: activations and weights differ in width");
    require((w.codes == Codes::bf16) == (f.codes == Codes::bf16), "linear: activations are of another kind than the weights");
    require(w.codes == Codes::bf16 || (f.group == w.group && f.pairs_kind == w.pairs_kind &&
                                       f.asymmetric == (w.pairs_kind == Pairs::sums || w.pairs_kind == Pairs::both)),
            "linear: activations are grouped otherwise than the weights");
    linear_scratch = std::max(linear_scratch, linear_scratch_bytes(w));
    return w;
  };
  row_kind_.clear();
  for (const auto& operation : operations_) {
    std::visit(
        Overloaded{
            [&](const op::Embed& o) {
              use(buffer_kind, o.out);
              require(kind == 0, "embed: before the gather");
              require(o.column >= 0 && o.column + int64_t{weights_.at(o.weights)->in_features} <= width(o.out), "embed: the buffer is too narrow");
              widest = std::max(widest, width(o.out));
            },
            [&](const op::Norm& o) {
              use(buffer_kind, o.x);
              use(buffer_kind, o.out);
              vector_of(o.weight, width(o.x));
              require(width(o.out) >= width(o.x), "norm: the buffer is too narrow");
            },
            [&](const op::NormQuantise& o) {
              use(buffer_kind, o.x);
              vector_of(o.weight, width(o.x));
              widest = std::max(widest, width(o.x));
              for (const int a : o.out) {
                require(activations_.at(a).format.in_features <= width(o.x), "norm: activations are too wide");
                use(activation_kind, a);
              }
              if (o.kept < 0) return;
              use(buffer_kind, o.kept);
              require(width(o.kept) >= width(o.x), "norm: the buffer is too narrow");
            },
            [&](const op::Quantise& o) {
              use(buffer_kind, o.x);
              use(activation_kind, o.out);
              require(activations_.at(o.out).format.in_features <= width(o.x), "quantise: activations are too wide");
              require(o.threshold >= 0.f && std::isfinite(o.threshold), "quantise: the threshold must be a number of at least 0");
            },
            [&](const op::Linear& o) {
              use(buffer_kind, o.out);
              const PackedLinear& w = reading(o.activations, o.weights);
              const bool gated = is_gate(o.epilogue);
              require(!gated || w.out_features % (2 * lanes) == 0, "linear: gated weights need rows in multiples of 32");
              require(o.column >= 0 && o.column + (gated ? w.out_features / 2 : w.out_features) <= width(o.out),
                      "linear: the buffer is too narrow");
              require((w.layout == Layout::rows) == (o.gates >= 0), "linear: gates choose among weights that lie by rows, and those need them");
              require(!gated || w.layout == Layout::tiles, "linear: gated weights lie in tiles");
              if (o.gates >= 0) {
                use(buffer_kind, o.gates);
                require(o.epilogue == Epilogue::store && o.column == 0 && o.gates != o.out, "linear: what gates choose is stored, elsewhere than they are");
                require(width(o.gates) == w.out_features && w.out_features % lanes == 0, "linear: gates are as many as rows, a multiple of 16");
                require(o.threshold >= 0.f && std::isfinite(o.threshold), "linear: the threshold must be a number of at least 0");
              }
              if (o.bias >= 0) vector_of(o.bias, w.out_features);
            },
            [&](const op::Rope& o) {
              use(buffer_kind, o.qkv);
              require(kind == 0, "rope: before the gather");
              require(o.kv_heads > 0 && o.kv_heads <= layout_.num_kv_heads, "rope: a layer has from one to all of the KV heads");
              const KvLayout heads = layout(o.kv_heads);
              require(width(o.qkv) >= (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, "rope: the buffer is too narrow");
              require(o.rotary_dim > 0 && o.rotary_dim % 2 == 0 && o.rotary_dim <= layout_.head_dim, "rope: rotary_dim must be even and at most head_dim");
              require(vectors_.at(o.table).size() >= static_cast<size_t>(limits_.max_positions) * o.rotary_dim, "rope: the table is too short");
              if (o.q_norm >= 0) vector_of(o.q_norm, layout_.head_dim);
              if (o.k_norm >= 0) vector_of(o.k_norm, layout_.head_dim);
              require(o.layer >= 0 && o.layer < num_layers_, "rope: no such layer");
            },
            [&](const op::Attention& o) {
              use(buffer_kind, o.out);
              require(kind == 0, "attention: before the gather");
              require(o.kv_heads > 0 && o.kv_heads <= layout_.num_kv_heads, "attention: a layer has from one to all of the KV heads");
              require(width(o.out) >= layout(o.kv_heads).num_heads * layout_.head_dim, "attention: the buffer is too narrow");
              require(o.layer >= 0 && o.layer < num_layers_ && o.window >= 0, "attention: no such layer or window");
              const PageChoice& c = o.choice;
              if (c.top.empty()) return;
              require(static_cast<int>(c.top.size()) == o.kv_heads, "attention: pages are chosen for each KV head");
              require(c.recent > 0 && c.sinks >= 0, "attention: a query's own page is always read");
              require(c.context >= 0, "attention: a context has one page at least");
              for (const int top : c.top) require(top >= 0, "attention: fewer than no pages");
              chooses_pages_ = true;
            },
            [&](const op::Add& o) {
              use(buffer_kind, o.x);
              use(buffer_kind, o.out);
              require(width(o.out) >= width(o.x), "add: the buffer is too narrow");
            },
            [&](const op::Gate& o) {
              for (const int b : {o.gate, o.up, o.out}) use(buffer_kind, b);
              require(width(o.gate) == width(o.up) && width(o.out) >= width(o.gate), "gate: buffers differ in width");
            },
            [&](const op::Mix& o) {
              for (const int b : {o.x, o.first, o.out}) use(buffer_kind, b);
              require(width(o.x) == width(o.first) && width(o.out) >= width(o.x), "mix: buffers differ in width");
            },
            [&](const op::SoftCap& o) {
              use(buffer_kind, o.x);
              require(o.cap > 0.f && std::isfinite(o.cap), "soft cap: the cap must be positive");
            },
            [&](const op::AboveThreshold& o) {
              use(buffer_kind, o.x);
              require(std::isfinite(o.quantile), "above threshold: the quantile must be finite");
            },
            [&](const op::KeepLargest& o) {
              use(buffer_kind, o.x);
              require(o.count >= 0, "keep largest: the number of values must be at least 0");
              widest = std::max(widest, width(o.x));
            },
            [&](const op::Neurons& o) {
              use(buffer_kind, o.x);
              use(buffer_kind, o.gates);
              const PackedNeurons& w = *neurons_.at(o.neurons);
              require(w.gated, "neurons: they have no up projection");
              require(!w.rounded_gates || o.activation == Activation::relu, "neurons: gates that are rounded need ReLU");
              require(width(o.x) >= w.in_features && width(o.gates) >= w.count, "neurons: a buffer is too narrow");
              require(o.threshold >= 0.f && std::isfinite(o.threshold), "neurons: the threshold must be a number of at least 0");
            },
            [&](const op::Spread& o) {
              use(buffer_kind, o.x);
              use(buffer_kind, o.out);
              const PackedNeurons& w = *neurons_.at(o.neurons);
              require(width(o.x) >= w.count && width(o.out) >= w.in_features, "spread: a buffer is too narrow");
              require(o.threshold >= 0.f && std::isfinite(o.threshold), "spread: the threshold must be a number of at least 0");
            },
            [&](const op::Gather& o) {
              require(width(o.out) >= width(o.x) && buffer_kind.at(o.x) == 0, "gather: from a buffer of all rows, into one as wide");
              kind = 1;
              use(buffer_kind, o.out);
            },
            [&](const op::Screen& o) {
              use(buffer_kind, o.out);
              use(buffer_kind, o.x);
              require(kind == 1 && o.out == logits_buffer, "screen: it makes logits");
              const PackedSigns& w = *signs_.at(o.signs);
              require(width(o.x) == w.in_features, "screen: it has other directions than the buffer");
              require(w.out_features == width(o.out), "screen: it has another vocabulary than the logits");
              require(o.cap >= 0.f && std::isfinite(o.cap), "screen: the cap must be a number of at least 0");
            },
            [&](const op::SecondLook& o) {
              require(follows<op::Screen>(operations_, row_kind_.size()) && o.logits == logits_buffer, "second look: it follows a screen");
              require(o.tiles > 0, "second look: it is at nothing");
            },
            [&](const op::Shortlist& o) {
              require(follows<op::SecondLook>(operations_, row_kind_.size()) && o.logits == logits_buffer, "shortlist: it follows a second look");
              require(o.tiles > 0, "shortlist: it is empty");
            },
            [&](const op::Rescore& o) {
              require(follows<op::Shortlist>(operations_, row_kind_.size()) && o.out == logits_buffer, "rescore: it follows a shortlist");
              const PackedLinear& w = reading(o.activations, o.weights);
              require(w.layout == Layout::tiles && w.out_features == width(o.out), "rescore: the weights lie otherwise, or have another vocabulary than the logits");
              require(o.cap >= 0.f && std::isfinite(o.cap), "rescore: the cap must be a number of at least 0");
            },
        },
        operation);
    row_kind_.push_back(kind);
  }
  require(kind == 1, "a program gathers the rows whose logits are wanted");
  const auto count = [&](auto is) { return std::count_if(operations_.begin(), operations_.end(), is); };
  const auto screens = count([](const Operation& o) { return std::holds_alternative<op::Screen>(o); });
  require(screens <= 1 && screens == count([](const Operation& o) { return std::holds_alternative<op::Rescore>(o); }),
          "screen: a program has one at most, and computes its shortlist");
  logits_ = logits_buffer;
  (void)buffers_.at(logits_buffer);
  find_runs();
  const int passing_rows = std::min(limits_.max_tokens, block_rows * pool_.size());
  const auto rows_of = [&](int k, bool passing) {
    return static_cast<size_t>(k == 1 ? limits_.max_logit_rows : passing ? passing_rows : limits_.max_tokens);
  };
  for (size_t b = 0; b < buffers_.size(); ++b) {
    // Of the logits mostly a few rows are written: large pages would take memory for many.
    const Pages pages = static_cast<int>(b) == logits_ ? Pages::small : Pages::large;
    buffers_[b].passing = buffers_[b].passing && buffer_kind[b] == 0;
    buffers_[b].memory = Memory(rows_of(buffer_kind[b], buffers_[b].passing) * buffers_[b].stride * sizeof(float), pages);
  }
  for (size_t a = 0; a < activations_.size(); ++a) {
    activations_[a].passing = activation_kind[a] == 0;
    activations_[a].memory = Memory(rows_of(activation_kind[a], activations_[a].passing) * activations_[a].format.row_bytes());
  }
  arena_.trim();
  const int most_pages = (limits_.max_positions + page_size - 1) / page_size;
  segments_ = (most_pages + segment_pages - 1) / segment_pages;
  if (chooses_pages_) {
    chosen_ = Memory(static_cast<size_t>(limits_.max_tokens) * layout_.num_kv_heads * segments_);
    summary_memory_ = Memory(layout_.summary_bytes() * limits_.num_pages * num_layers_);
  }
  pool_memory_ = Memory(page_stride() * limits_.num_pages);
  const size_t padded_dim = layout_.padded_dim();
  queries_ = Memory(limits_.max_tokens * layout_.num_heads * padded_dim * sizeof(uint16_t));
  for (int t = 0; t < pool_.size(); ++t) {
    ThreadScratch s;
    s.linear = Memory(linear_scratch);
    s.row = Memory((widest + lanes) * sizeof(float));
    s.scores = Memory(attention_scratch_floats * sizeof(float));
    s.values = Memory(attention_block * padded_dim * sizeof(float));
    s.state = Memory(attention_block * padded_dim * sizeof(float));
    if (chooses_pages_) s.choice = Memory(page_choice_scratch_floats(layout_, most_pages) * sizeof(float));
    if (!neurons_.empty()) s.norms.resize(limits_.max_tokens);
    s.partials.resize(attention_block);
    s.states.resize(attention_block);
    scratch_.push_back(std::move(s));
  }
  prepare_head();
  row_sequence_.resize(limits_.max_tokens);
  row_position_.resize(limits_.max_tokens);
  next_linear_.assign(operations_.size(), -1);
  int next = -1;
  for (int i = static_cast<int>(operations_.size()) - 1; i >= 0; --i) {
    next_linear_[i] = next;
    if (const auto* o = std::get_if<op::Linear>(&operations_[i])) next = o->weights;
  }
  find_aheads();
  record_place_.assign(operations_.size(), 0);
  for (size_t i = 0; i < operations_.size(); ++i) {
    if (const auto* attention = std::get_if<op::Attention>(&operations_[i]); attention != nullptr && !attention->choice.top.empty()) {
      record_place_[i] = num_choices_++;
    }
    const auto* spread = std::get_if<op::Spread>(&operations_[i]);
    const auto* linear = std::get_if<op::Linear>(&operations_[i]);
    if (spread != nullptr || (linear != nullptr && linear->gates >= 0)) {
      record_place_[i] = num_networks_++;
      most_neurons_ = std::max(most_neurons_, spread != nullptr ? neurons_[spread->neurons]->count : weights_[linear->weights]->out_features);
    }
    if (const auto* quantise = std::get_if<op::Quantise>(&operations_[i]); quantise != nullptr && quantise->recorded) {
      record_place_[i] = num_inputs_++;
      most_inputs_ = std::max(most_inputs_, activations_[quantise->out].format.in_features);
    }
  }
  next_ = std::make_unique<std::atomic<int>[]>(operations_.size() + 1);
}

// Runs of operations that take each row by itself, and the buffers that only pass something on within a run: where one
// uses such a buffer, it has written it before. Activations always are: they are made for what comes next.
void Program::find_runs() {
  run_end_.assign(operations_.size(), 0);
  std::vector<char> kept(buffers_.size(), 0);
  std::vector<char> written(buffers_.size(), 0);
  const auto reads = [&](int b) { kept[b] |= !written[b]; };
  const auto writes = [&](int b) { written[b] = 1; };
  const auto leaves_run = [&](int b) { kept[b] = 1; };
  size_t begin = 0;
  for (size_t i = 0; i < operations_.size(); ++i) {
    bool alone = false;
    std::visit(Overloaded{
                   [&](const op::Embed& o) {
                     if (o.add) reads(o.out);
                     writes(o.out);
                   },
                   [&](const op::Norm& o) { reads(o.x), writes(o.out); },
                   [&](const op::NormQuantise& o) {
                     reads(o.x);
                     if (o.kept >= 0) writes(o.kept);
                   },
                   [&](const op::Quantise& o) { reads(o.x); },
                   [&](const op::Linear& o) {
                     if (o.epilogue == Epilogue::add) reads(o.out);
                     if (o.gates >= 0) reads(o.gates);
                     writes(o.out);
                   },
                   [&](const op::Rope& o) { reads(o.qkv); },
                   // Attention reads other rows, and a gather changes which rows there are.
                   [&](const op::Attention& o) { leaves_run(o.out), alone = true; },
                   [&](const op::Add& o) { reads(o.x), reads(o.out); },
                   [&](const op::Gate& o) { reads(o.gate), reads(o.up), writes(o.out); },
                   [&](const op::Mix& o) { reads(o.x), reads(o.first), writes(o.out); },
                   [&](const op::SoftCap& o) { reads(o.x); },
                   [&](const op::AboveThreshold& o) { reads(o.x); },
                   [&](const op::KeepLargest& o) { reads(o.x); },
                   [&](const op::Neurons& o) { reads(o.x), reads(o.gates); },
                   [&](const op::Spread& o) { reads(o.x), reads(o.out); },
                   [&](const op::Gather& o) { leaves_run(o.x), leaves_run(o.out), alone = true; },
                   [&](const op::Screen& o) { reads(o.x), writes(o.out); },
                   [&](const op::SecondLook& o) { reads(o.logits); },
                   [&](const op::Shortlist& o) { reads(o.logits); },
                   [&](const op::Rescore& o) { reads(o.out); },
               },
               operations_[i]);
    if (alone || i + 1 == operations_.size()) {
      std::fill(run_end_.begin() + begin, run_end_.begin() + i + (alone ? 0 : 1), static_cast<int>(alone ? i : i + 1));
      std::fill(written.begin(), written.end(), 0);
      begin = i + 1;
    }
  }
  kept[logits_] = 1;
  for (size_t b = 0; b < buffers_.size(); ++b) buffers_[b].passing = !kept[b];
}

// Linears between two attentions fetch the pages that the second one reads, each its share by the size of its weights.
void Program::find_aheads() {
  ahead_.assign(operations_.size(), {});
  reaches_.clear();
  size_t begin = 0;
  for (size_t i = 0; i < operations_.size(); ++i) {
    const auto* attention = std::get_if<op::Attention>(&operations_[i]);
    if (attention == nullptr) continue;
    int64_t total = 0;
    const auto for_linears = [&](const auto& f) {
      for (size_t k = begin; k < i; ++k) {
        const auto* linear = std::get_if<op::Linear>(&operations_[k]);
        if (linear != nullptr && weights_[linear->weights]->layout == Layout::tiles) f(ahead_[k], *weights_[linear->weights]);
      }
    };
    const PageChoice& choice = attention->choice;
    const Reach reach{attention->window, choice.sinks, choice.recent, !choice.top.empty(), {}};
    const auto found = std::find_if(reaches_.begin(), reaches_.end(), [&](const Reach& r) { return r.same(reach); });
    const auto number = static_cast<int>(found - reaches_.begin());
    if (found == reaches_.end()) reaches_.push_back(reach);
    for_linears([&](Ahead& a, const PackedLinear& w) {
      a = {attention->layer, number, total, total + w.tiles, 1};
      total += w.tiles;
    });
    for_linears([&](Ahead& a, const PackedLinear&) { a.total = total; });
    begin = i + 1;
  }
}

void Program::check(const Step& step, const Record& record) const {
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
    require(record.pages == nullptr || pages <= static_cast<int64_t>(8 * record.page_bytes), "a record of pages has too few of them");
    for (int64_t p = 0; p < pages; ++p) {
      const int32_t page = step.page_table[static_cast<int64_t>(s) * step.table_width + p];
      require(page >= 0 && page < limits_.num_pages, "a page is outside the pool");
    }
  }
  for (int i = 0; i < step.num_logit_rows; ++i) {
    require(step.logit_rows[i] >= 0 && step.logit_rows[i] < step.num_tokens, "a logit row is outside the step");
  }
  require(record.neurons == nullptr || most_neurons_ <= static_cast<int64_t>(8 * record.neuron_bytes), "a record of neurons has too few of them");
  require(record.inputs == nullptr || most_inputs_ <= static_cast<int64_t>(8 * record.input_bytes), "a record of inputs has too few of them");
}

}  // namespace fallow
