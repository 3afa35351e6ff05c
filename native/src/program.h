// A program: a flat list of operations on preallocated buffers, laid out once by Python, executed here for each step.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <variant>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "neurons.h"
#include "packed.h"
#include "pool.h"
#include "prefetch.h"
#include "sample.h"
#include "signs.h"

namespace fallow {

// Operations name their operands by number: buffers are float32 [rows][width], activations are rows for the linear
// kernels, weights and vectors are constants. Rows are all tokens of a step, or, from the
// first gather on, its logit rows.
namespace op {
struct Embed {  // the rows of the step's tokens, times scale, stored at a column of out or added to what is there
  int weights, out;
  float scale;
  int column;
  bool add;
};
struct Norm {  // out = rms_norm(x) * weight
  int x, weight, out;
  float eps;
};
struct NormQuantise {  // the same, straight into activations
  int x, weight;
  std::vector<int> out;
  float eps;
  int kept = -1;  // a buffer for what is normalised as it is, or -1
  // Vectors that are added before rounding: minus the mean, which the linears' biases give back. The first token of a text
  // is unlike all others and has a mean of its own.
  int centre = -1, first_centre = -1;
};
struct Quantise {  // what is not beyond the threshold becomes zero before
  int x, out;
  float threshold = 0.f;
  bool recorded = false;
};
struct Linear {
  int activations, weights, bias, out, column;  // bias: vector or -1
  Epilogue epilogue;
  int first_bias = -1;  // vector that is added to the first token of a text afterwards, or -1
  // Of weights that lie by rows: the gates that decide which are computed, and what their activations must be beyond.
  int gates = -1;
  Activation activation = Activation::silu;
  float threshold = 0.f;
};
struct Rope {  // kv_heads: those that the layer has, each with its queries
  int qkv, table, rotary_dim, q_norm, k_norm;  // norms: vector or -1
  float eps;
  int layer, kv_heads;
};
struct Attention {
  int out, layer, kv_heads, window;
  float scale;
  PageChoice choice = {};
};
struct Add {
  int x, out;
};
struct Gate {  // out = activation(gate) * up
  int gate, up, out;
  Activation activation;
};
struct Mix {  // out = keep * x + again * first
  int x, first, out;
  float keep, again;
};
struct SoftCap {  // x = cap * tanh(x / cap)
  int x;
  float cap;
};
struct AboveThreshold {  // x = max(x - mean - quantile * standard deviation, 0), both of the row
  int x;
  float quantile;
};
struct KeepLargest {  // x = 0 for all but the values whose activations are the largest of the row
  int x, count;
  Activation activation;
};
struct Neurons {  // gates become neurons: activation(gate) * (up row . x) where the first is beyond the threshold, else 0
  int x, gates, neurons;
  Activation activation;
  float threshold;
};
struct Spread {  // out += what the neurons in x beyond the threshold add to the hidden states
  int x, neurons, out;
  float threshold;
};
struct Gather {  // rows of logit_rows
  int x, out;
};
// The head where most of the vocabulary rests (execute_head.cpp), one after the other. Rows of which more is wanted than
// a token get all logits.
struct Screen {  // approximate logits out of activations in a screen's basis
  int x, signs, out;
  float cap;  // soft, or 0
};
struct SecondLook {  // better ones of so many tiles that hold the largest
  int logits, tiles;
};
struct Shortlist {  // of these the tiles that do then
  int logits, tiles;
};
struct Rescore {  // the logits of these, exactly
  int activations, weights, out;
  float cap;
};
}  // namespace op

using Operation = std::variant<op::Embed, op::Norm, op::NormQuantise, op::Quantise, op::Linear, op::Rope, op::Attention,
                               op::Add, op::Gate, op::Mix, op::SoftCap, op::AboveThreshold, op::KeepLargest, op::Neurons, op::Spread, op::Gather, op::Screen,
                               op::SecondLook, op::Shortlist, op::Rescore>;

struct Limits {
  int max_tokens, max_sequences, max_logit_rows, num_pages, max_positions;
};

// What rests in a step. Under `dense` all pages are read, all inputs and rows count and the head is whole, to the bits of a
// program without a plan's axes attention, input and head, and where neurons are rows of 4-bit weights, ffn. Under `draft` the plan holds, and a token is drawn the way a dense step draws it, but likely
// rather than surely the one that it would draw of the same logits.
enum class Mode { plan, draft, dense };

// One step, all checked by Program::check.
struct Step {
  const int32_t* tokens;
  int num_tokens;
  const int32_t* row_offsets;
  const int32_t* start_positions;
  int num_sequences;
  const int32_t* page_table;
  int table_width;
  const int32_t* logit_rows;
  int num_logit_rows;
  Mode mode = Mode::plan;
};

// Where the operations of a step write what they decided: arrays of the caller, zero before, null where nobody asks. Of the
// bits in a byte the least significant is the first.
struct Record {
  uint8_t* pages = nullptr;    // [tokens][attentions that choose][kv heads][page_bytes], a bit a page that the query reads
  uint8_t* neurons = nullptr;  // [tokens][networks][neuron_bytes], a bit a neuron at work; after the gather of logit rows alone
  uint8_t* inputs = nullptr;   // [tokens][activations that are recorded][input_bytes], a bit a value that is not zero; as neurons
  int32_t* tiles = nullptr;    // [logit rows], how many tiles of the head were computed exactly
  size_t page_bytes = 0, neuron_bytes = 0, input_bytes = 0;
};

class Program {
 public:
  Program(int threads, const std::string& isa, KvLayout layout, int num_layers, Limits limits);

  int add_buffer(int width);
  int add_activations(const ActivationFormat& format);
  int add_weights(PackedLinear weights);
  int add_neurons(PackedNeurons neurons);
  int add_signs(PackedSigns signs);
  int add_vector(std::vector<float> values);
  void add(Operation operation);
  // Checks every operand of every operation and allocates. Throws std::invalid_argument.
  void finish(int logits_buffer);
  // Runs the tokens, as sequences of one page (or of the context, where that is shorter), and centres what is rounded
  // symmetrically to 8 bits: activations lose the mean that they have there, linears gain its product with their
  // weights. Exact but for rounding, whatever the tokens.
  void centre(const std::vector<int32_t>& tokens);

  // Throws std::invalid_argument where the step does not fit the program or its limits, or the record the step.
  void check(const Step& step, const Record& record = {}) const;
  // Then samples where `sample` is given (its logits are set here).
  void run(const Step& step, SampleArgs* sample, const Record& record = {});
  // Operations that write to a record, of each kind.
  int num_choices() const { return num_choices_; }
  int num_networks() const { return num_networks_; }
  int num_inputs() const { return num_inputs_; }
  // Of targets[i] under the logits of row i of the last run.
  void log_probabilities(const int32_t* targets, int count, float* out);

  const float* logits() const { return buffers_[logits_].memory.as<float>(); }
  int vocab_size() const { return buffers_[logits_].width; }
  size_t logits_stride() const { return buffers_[logits_].stride; }
  const PackedLinear& weights(int i) const { return *weights_.at(i); }
  const Limits& limits() const { return limits_; }
  const KvLayout& layout() const { return layout_; }
  // Of a layer that has so many KV heads: its pages and queries begin where others do, and are as much smaller.
  KvLayout layout(int kv_heads) const { return {layout_.num_heads / layout_.num_kv_heads * kv_heads, kv_heads, layout_.head_dim}; }
  // Since the program began: rows that were screened, tiles of the head that were computed for them, and how many of the
  // rows needed more than their shortlist.
  struct HeadCounts {
    int64_t rows = 0, tiles = 0, doubtful_rows = 0;
  };
  const HeadCounts& head_counts() const { return head_counts_; }
  // That the last step computed for a logit row, or those of its shortlist alone. Throws std::invalid_argument.
  std::vector<int32_t> head_tiles(int row, bool shortlist) const;
  ThreadPool& pool() { return pool_; }
  size_t weight_bytes() const;
  size_t page_bytes() const { return (layout_.page_bytes() + (chooses_pages_ ? layout_.summary_bytes() : 0)) * num_layers_; }
  const char* isa() const { return kernels_.name; }

 private:
  struct Buffer {
    int width;
    size_t stride;  // floats between rows: kernels write whole vectors of sixteen
    Memory memory;
    bool passing = false;  // holds only what one operation leaves to the next ones of its run
  };
  struct Activations {
    ActivationFormat format;
    Memory memory;
    bool passing = false;
  };
  // A block of queries that share a KV head; segment < 0: all segments one after the other.
  struct AttentionItem {
    int sequence, row, rows, first_position, kv_head, segment, partial;
  };
  struct HeadScratch {  // of each logit row:
    Memory tables;             // sign_tables of both looks,
    std::vector<float> steps;  // [looks] what a 1 in them stands for,
    std::vector<float*> out;   // and where looks write logits
    // Likely tiles, peaks of some, and what is listed of them.
    std::vector<int32_t> tiles, listed;
    std::vector<float> peaks;
    int8_t* tables_of(int row, const PackedSigns& w) const { return tables.as<int8_t>() + row * w.table_bytes(); }
  };

  struct ThreadScratch {
    Memory linear, row, scores, values, state, choice;
    std::vector<Partial> partials, states;
    std::vector<float> norms;
    HeadScratch head;
    SampleScratch sample;
  };

  // What a thread does of an operation: rows [begin, end), and of their columns share `share` of `shares`. Row r is row
  // r - shift of the buffers that only hold what is passed on within a run of operations.
  struct Part {
    int begin, end, share, shares, shift;
    int first_of(int n) const { return static_cast<int>(n * int64_t{share} / shares); }
    int end_of(int n) const { return static_cast<int>(n * (int64_t{share} + 1) / shares); }
  };

  // While centring: sums of the normalised rows, in fixed point.
  struct Sums {
    std::vector<int64_t> first, others;
  };
  void add_to_sums(int position, const float* normed, Sums& sums) const;
  void add_to_totals(int index, const Sums& sums);
  // Biases of a linear, each of which gains minus the product of a centre with the weights.
  struct Product {
    int weights;
    std::vector<std::pair<int, int>> gains;  // centre, bias
  };
  void centre_norm(size_t index, const Sums& totals, int sequences, int length, std::vector<Product>& products);
  void find_runs();
  void find_aheads();
  void list_pages_ahead();
  PagesAhead pages_ahead(int index, int thread) const;
  void plan_attention(const Step& step);
  void execute(int thread);
  Part part_of(int index, int thread) const;
  void execute(const op::Embed&, int index, int thread, const Part&);
  void execute(const op::Norm&, int index, int thread, const Part&);
  void execute(const op::NormQuantise&, int index, int thread, const Part&);
  void execute(const op::Quantise&, int index, int thread, const Part&);
  void execute(const op::Linear&, int index, int thread, const Part&);
  void execute(const op::Rope&, int index, int thread, const Part&);
  void execute(const op::Attention&, int index, int thread, const Part&);
  void execute(const op::Add&, int index, int thread, const Part&);
  void execute(const op::Gate&, int index, int thread, const Part&);
  void execute(const op::Mix&, int index, int thread, const Part&);
  void execute(const op::SoftCap&, int index, int thread, const Part&);
  void execute(const op::AboveThreshold&, int index, int thread, const Part&);
  void execute(const op::KeepLargest&, int index, int thread, const Part&);
  void execute(const op::Neurons&, int index, int thread, const Part&);
  void execute(const op::Spread&, int index, int thread, const Part&);
  // Where the bits of a record go: of each token `places` times `bytes`.
  struct Bits {
    uint8_t* first;
    int places;
    size_t bytes;
  };
  Bits neuron_bits() const { return {record_.neurons, num_networks_, record_.neuron_bytes}; }
  Bits input_bits() const { return {record_.inputs, num_inputs_, record_.input_bytes}; }
  void record_bits(const Bits&, int buffer, int count, float threshold, int index, const Part&, int begin, int end) const;
  void execute(const op::Gather&, int index, int thread, const Part&);
  void execute(const op::Screen&, int index, int thread, const Part&);
  void execute(const op::SecondLook&, int index, int thread, const Part&);
  void execute(const op::Shortlist&, int index, int thread, const Part&);
  void execute(const op::Rescore&, int index, int thread, const Part&);

  struct Peaks {  // of some tiles
    std::vector<int32_t> tiles;
    std::vector<float> peaks;
  };

  struct HeadRow {  // of a logit row where most of the vocabulary rests
    bool screened = false;  // it began with approximate logits
    bool whole = true;      // all of its logits are exact, or are about to be
    bool doubtful = false;  // `wanted` could change its token
    int rounds = 0;
    int tables_by = 0;            // the thread that made tables for it
    size_t listed = 0;            // how many of `exact` the shortlist was
    float scale = 0.f;            // of the screen's errors in this row, in units of the deviations that it knows
    std::vector<char> looks;          // of each tile: the last look at it, 0 or 1, or `exact_look`
    std::vector<float> peaks;         // of each tile the largest logit, and the deviations with which tiles compete
    std::vector<float> deviations;    // of each tile the largest
    std::vector<Peaks> likely;        // of each thread's share of tiles those that may be looked at again
    std::vector<int32_t> again;       // tiles that are
    std::vector<int32_t> wanted;      // tiles to be computed, an even number
    std::vector<int32_t> exact;       // tiles that are
    std::vector<double> errors;       // of each tile wanted: squared, in units of deviations
  };
  Memory first_logits_;  // [max_logit_rows][logits_stride] of the first look, where logits go through more after it
  std::vector<int32_t> all_tiles_;  // of the head, in order
  std::vector<float> largest_deviations_[PackedSigns::looks];  // of each tile, together: the screen's own lie far apart
  void prepare_head();
  void want_doubtful_tiles(int row, float reach, HeadScratch&);
  void begin_head();
  const op::Screen& screening() const;
  const op::SecondLook& second_look() const;
  const PackedSigns& screen() const;
  template <class F>
  void for_screened_rows(const Part&, const F& f) const;
  void look_again(int row, const int32_t* tiles, int count, const HeadScratch& made, HeadScratch&);
  void keep_peaks(int row, int look, const int32_t* tiles, int count, const float* values, HeadScratch&);
  bool is_finished(int row) const;
  bool has_noise(int row) const;
  float* logits_of(int row) const { return buffers_[logits_].memory.as<float>() + row * logits_stride(); }
  void finish_logits(int row, const int32_t* tiles, int count, const float* values, float* logits) const;
  static void begin_round(HeadRow&);
  void compute_whole(const op::Rescore&, int begin, int end, int thread, const Part&);
  void compute_wanted(const op::Rescore&, int row, int thread, const Part&);
  double squared_errors(const HeadRow&, int tile, const float* screened, const float* exact) const;
  void choose_token(int row, ThreadScratch&);
  float take_largest(int row, const float* logits) const;
  void sample_rows(int thread);
  void count_head_rows();

  float resting(float threshold) const { return step_.mode == Mode::dense ? 0.f : threshold; }
  bool chooses(const op::Attention& o) const { return !o.choice.top.empty() && step_.mode != Mode::dense; }
  void attend(const op::Attention&, const AttentionItem&, ThreadScratch&);
  void attend_segment(const op::Attention&, int item, ThreadScratch&);
  void merge_segments(const op::Attention&, const AttentionItem&, ThreadScratch&);
  AttentionTask attention_task(const op::Attention&, const AttentionItem&) const;
  void list_full_pages();
  void summarise_pages(const op::Attention&, int thread);
  void choose_pages(const op::Attention&, int index, int row, int kv_head, ThreadScratch&);
  uint8_t* chosen(int row, int kv_head) const {
    return chosen_.data() + (static_cast<size_t>(row) * layout_.num_kv_heads + kv_head) * segments_;
  }
  // The pages of a segment that a row of the item reads, a bit each.
  unsigned read_pages(const op::Attention&, const AttentionItem&, int segment) const;
  const uint16_t* first_keys(const op::Attention&, const AttentionItem&, int segment) const;

  int rows(int index) const { return row_kind_[index] == 1 ? step_.num_logit_rows : step_.num_tokens; }
  // Of row r of an operation within its text.
  int position(int index, int r) const { return row_position_[row_kind_[index] == 1 ? step_.logit_rows[r] : r]; }
  float* row(int buffer, int r, const Part& part) const {
    const Buffer& b = buffers_[buffer];
    return b.memory.as<float>() + static_cast<size_t>(b.passing ? r - part.shift : r) * b.stride;
  }
  uint8_t* activation_row(int activations, int r, const Part& part) const {
    const Activations& a = activations_[activations];
    return a.memory.data() + static_cast<size_t>(a.passing ? r - part.shift : r) * a.format.row_bytes();
  }
  uint8_t* page(int layer, int page) const {
    return pool_memory_.data() + static_cast<size_t>(page) * page_stride() + static_cast<size_t>(layer) * layout_.page_bytes();
  }
  size_t page_stride() const { return layout_.page_bytes() * num_layers_; }
  // Of the pages of a layer.
  uint16_t* summaries(int layer) const {
    return reinterpret_cast<uint16_t*>(summary_memory_.data() + static_cast<size_t>(layer) * limits_.num_pages * layout_.summary_bytes());
  }
  // Calls f(row) for the rows of `part`, of which f reads `width` floats from column `first` on. They are fetched well
  // before: another core may have written them.
  template <class F>
  void fetching_ahead(int buffer, int first, int width, const Part& part, const F& f) const {
    constexpr int fetch_bytes = 16384;
    const int bytes = width * static_cast<int>(sizeof(float));
    const int ahead = std::max(1, fetch_bytes / std::max(bytes, 1));
    for (int r = part.begin; r < std::min(part.end, part.begin + ahead); ++r) prefetch_run(row(buffer, r, part) + first, bytes);
    for (int r = part.begin; r < part.end; ++r) {
      if (r + ahead < part.end) prefetch_run(row(buffer, r + ahead, part) + first, bytes);
      f(r);
    }
  }
  // Rows that a thread takes through a run of operations at once.
  static constexpr int block_rows = 64;

  const Kernels& kernels_;
  KvLayout layout_;
  int num_layers_;
  Limits limits_;
  ThreadPool pool_;
  std::vector<Buffer> buffers_;
  std::vector<Activations> activations_;
  Arena arena_;
  std::vector<std::unique_ptr<PackedLinear>> weights_;
  std::vector<std::unique_ptr<PackedNeurons>> neurons_;
  std::vector<std::unique_ptr<PackedSigns>> signs_;
  std::vector<std::vector<float>> vectors_;
  std::vector<Operation> operations_;
  std::vector<int> row_kind_;  // of each operation: 0 tokens, 1 logit rows
  std::vector<int> run_end_;  // of each operation: the end of those around it that take each row by itself; 0: it does not
  // Which pages attentions are sure to read, and in a step their numbers.
  struct Reach {
    int window, sinks, recent;
    bool chooses;
    std::vector<int32_t> pages;
    bool same(const Reach& o) const { return window == o.window && sinks == o.sinks && recent == o.recent && chooses == o.chooses; }
  };
  std::vector<Reach> reaches_;
  // Of each linear: which part of the pages of which layer it fetches for the attention to come.
  struct Ahead {
    int layer = -1;
    int reach = 0;
    int64_t begin = 0, end = 0, total = 1;
  };
  std::vector<Ahead> ahead_;
  std::vector<int> next_linear_;  // of each operation: the weights of the linear after it, or -1
  std::vector<int> record_place_;  // of each operation: its place in a record, among those of its kind
  int num_choices_ = 0, num_networks_ = 0, most_neurons_ = 0, num_inputs_ = 0, most_inputs_ = 0;
  int logits_ = -1;
  Memory pool_memory_;
  bool chooses_pages_ = false;
  Memory summary_memory_;  // [layers][pages][kv heads] summaries, where pages are chosen
  Memory queries_;
  std::vector<ThreadScratch> scratch_;

  int rescore_ = -1;  // the operation, or -1
  std::vector<HeadRow> head_rows_;
  HeadCounts head_counts_;

  Step step_{};
  SampleArgs* sample_ = nullptr;
  Record record_;
  std::vector<Sums> totals_;  // per operation, while centring
  int last_centred_ = 0;  // the last operation that centring needs
  std::mutex totals_mutex_;
  std::vector<int> row_sequence_, row_position_;
  std::vector<AttentionItem> items_, merges_;
  std::vector<int32_t> full_pages_;  // that this step fills
  Memory chosen_;  // [tokens][kv heads][segments_], a bit a page, where pages are chosen
  int segments_ = 0;
  std::vector<Partial> split_partials_;
  Memory split_values_;
  std::unique_ptr<std::atomic<int>[]> next_;
};

}  // namespace fallow
