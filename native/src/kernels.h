// What the executor asks of the kernels of an instruction set, as plain tasks and a table of functions.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "activations.h"
#include "neurons.h"
#include "packed.h"
#include "signs.h"

namespace fallow {

enum class Activation : int { silu = 0, gelu_tanh = 1, relu = 2 };

// What a linear does with its products: stores them, adds them, stores the squares of their positive parts, or, of
// interleaved weights, multiplies the activated products of the first source with those of the second.
enum class Epilogue : int { store = 0, add = 1, relu2 = 2, silu_gate = 3, gelu_gate = 4, relu_gate = 5 };

inline bool is_gate(Epilogue e) { return e == Epilogue::silu_gate || e == Epilogue::gelu_gate || e == Epilogue::relu_gate; }
inline Activation activation_of(Epilogue gate) {
  return gate == Epilogue::silu_gate ? Activation::silu : (gate == Epilogue::gelu_gate ? Activation::gelu_tanh : Activation::relu);
}

// Pages of a layer's KV cache that are fetched from memory while a linear computes: the attention to come reads them.
struct PagesAhead {
  const uint8_t* pool = nullptr;  // that layer's pages
  size_t page_stride = 0;         // bytes between pages
  size_t bytes = 0;               // of a page
  const int32_t* pages = nullptr;
  int count = 0;
};

struct LinearTask {
  const PackedLinear* weights;
  ActivationFormat format;
  const uint8_t* activations;  // [rows], format.row_bytes() each
  int rows;
  float* out;  // [rows][out_stride]
  size_t out_stride;
  const float* bias;  // [tiles rounded up to even * 16] or null
  Epilogue epilogue;
  PagesAhead ahead = {};  // this thread's part
  const int32_t* tiles = nullptr;  // an even number of those that are computed, of which [begin, end) are taken; null: all
  // Of weights that lie by rows: one computes products of those rows whose activated gate is beyond the threshold, and
  // multiplies them with it; all others are zero.
  const float* gates = nullptr;  // [rows][gates_stride]
  size_t gates_stride = 0;
  Activation activation = Activation::silu;
  float threshold = 0.f;
};

// Where the KV cache of one layer keeps its pages. Of a page: for each KV head its keys, bfloat16
// [head_dim/2][page_size][2], then for each KV head its values, bfloat16 [page_size/2][padded_dim][2],
// pair j holding tokens j and j + page_size/2. Where pages are chosen, a page has for each KV head a summary of its keys
// as well, in another place: the mean and the variance of every dimension, bfloat16 [padded_dim][2].
constexpr int page_size = 32;
constexpr int segment_pages = 8;  // softmax is taken a segment at a time, segments are merged in order
constexpr int segment_tokens = page_size * segment_pages;

struct KvLayout {
  int num_heads, num_kv_heads, head_dim;
  int padded_dim() const { return (head_dim + lanes - 1) / lanes * lanes; }
  size_t head_elements() const { return static_cast<size_t>(padded_dim()) * page_size; }
  size_t summary_elements() const { return static_cast<size_t>(padded_dim()) * 2; }
  size_t page_bytes() const { return head_elements() * num_kv_heads * 2 * sizeof(uint16_t); }
  size_t summary_bytes() const { return summary_elements() * num_kv_heads * sizeof(uint16_t); }
  uint16_t* keys(uint8_t* page, int head) const { return reinterpret_cast<uint16_t*>(page) + head * head_elements(); }
  uint16_t* values(uint8_t* page, int head) const {
    return reinterpret_cast<uint16_t*>(page) + (num_kv_heads + head) * head_elements();
  }
};

// Queries of some rows of one sequence that share a KV head.
struct AttentionTask {
  KvLayout layout;
  const uint16_t* queries;  // [rows][num_heads][padded_dim] bfloat16
  size_t query_stride;      // elements between rows
  int kv_head;
  int rows;            // consecutive tokens; rows * heads of the group <= attention_block
  int first_position;  // of row 0
  int window;          // tokens that a query sees, or 0 for all
  float scale;
  uint8_t* pool;       // this layer's pages
  size_t page_stride;  // bytes between pages
  const int32_t* page_table;
  // Of each row the pages that it reads, a bit each and a byte a segment; null: all that it may see.
  const uint8_t* chosen = nullptr;
  size_t chosen_stride = 0;  // bytes between rows
  const uint16_t* next_keys = nullptr;  // of the page that is read after this segment: fetched meanwhile
};

// Which pages of the KV cache a query reads: the first `sinks`, the last `recent` (its own among them), and for each KV
// head the best `top` of those between; of more than `context` pages as many more in proportion, where that is not 0. No
// tops: all.
struct PageChoice {
  int sinks = 0, recent = 0;
  std::vector<int> top;
  int context = 0;

  // How many of those between, of `pages` in all.
  int count(int kv_head, int pages) const {
    if (context == 0 || pages <= context) return top[kv_head];
    const int64_t ends = static_cast<int64_t>(sinks) + recent;
    return static_cast<int>(std::min<int64_t>((ends + top[kv_head]) * pages / context - ends, pages));
  }
};

// One query row's choice among pages [first, end) for a KV head.
struct PageChoiceTask {
  KvLayout layout;
  const uint16_t* queries;  // of the group: [num_heads / num_kv_heads][padded_dim] bfloat16
  int kv_head;
  float scale;
  const uint16_t* summaries;  // of this layer's pages, layout.summary_bytes() each
  const int32_t* page_table;
  int first, end, count;  // how many are chosen
};

// A query's softmax over part of its keys: maximum, sum and weighted values.
struct Partial {
  float maximum, sum;
};

struct NormTask {
  const float* x;
  const float* weight;
  float eps;
  int width;
  const float* shift = nullptr;  // added to the result
};

struct RopeTask {
  KvLayout layout;
  int position;
  const float* table;  // [positions][rotary_dim]: cosines, then sines, of rotary_dim / 2 frequencies
  int rotary_dim;
  const float* q_norm;  // or null
  const float* k_norm;
  float eps;
  const float* qkv;   // one row: queries, keys, values
  uint16_t* queries;  // one row of AttentionTask::queries
  uint8_t* page;
  uint8_t* next_page = nullptr;  // of the next row: where it will write is fetched while this one is computed
  int next_position = 0;
};

// Neurons of a gated feed-forward network: of those whose activated gate is beyond the threshold the product with the up
// projection, of all others zero. Where gates are rounded (the activation is ReLU then), those that may be are computed again.
struct NeuronTask {
  const PackedNeurons* weights;
  int rows;
  const float* x;  // [rows][x_stride], normalised hidden states
  size_t x_stride;
  float* neurons;  // [rows][stride]: gates, which become neurons
  size_t stride;
  Activation activation;
  float threshold;
  float* norms;  // [rows], scratch
};

// What the neurons beyond the threshold add to the hidden states.
struct SpreadTask {
  const PackedNeurons* weights;
  int rows;
  const float* neurons;  // [rows][stride]
  size_t stride;
  float threshold;
  float* out;  // [rows][out_stride]
  size_t out_stride;
};

// Approximate logits, from a first look.
struct ScreenTask {
  const PackedSigns* weights;
  const float* x;  // [rows][x_stride] activations in its basis
  size_t x_stride;
  const int8_t* tables;  // [rows][table_bytes] sign_tables of them,
  const float* steps;    // [rows][looks] and what a 1 in them stands for
  int rows;
  float* const* out;  // [rows]
};

// Better ones of some tiles, from a second look.
struct SecondLookTask {
  const PackedSigns* weights;
  const int8_t* tables;  // of a row of activations
  float step;
  float* out;  // what the first look made, and then the second
};

// Which noise: that of one draw of one request.
struct NoiseKey {
  uint32_t first, second;
};

struct Kernels {
  const char* name;
  // Tiles [begin, end) of the weights, or of the list of them; begin even. scratch: linear_scratch_bytes.
  void (*linear)(const LinearTask&, int begin, int end, uint8_t* scratch);
  // The same of weights that lie by rows, or by columns: then whole blocks of tiles.
  void (*sparse_linear)(const LinearTask&, int begin, int end, uint8_t* scratch);
  // Groups [begin, end) of a row of activations; bf16 has one group of the whole row.
  void (*quantise)(const float* x, const ActivationFormat&, uint8_t* row, int begin, int end);
  void (*rms_norm)(const NormTask&, float* out);
  void (*add)(const float* x, float* out, int width);
  void (*gate)(const float* gate, const float* up, float* out, int width, Activation activation);
  void (*mix)(const float* x, float keep, const float* first, float again, float* out, int width);
  // Whole vectors of sixteen: what follows the last value in a padded row is changed too.
  void (*soft_cap)(float* x, int width, float cap);
  // A row's values less its mean and `quantile` standard deviations, zero where that is negative.
  void (*above_threshold)(float* x, int width, float quantile);
  // scratch: the width, rounded up to lanes.
  void (*keep_largest)(float* x, int width, int count, Activation, float* scratch);
  // Values that are not beyond the threshold become zero.
  void (*zero_within)(float* x, int width, float threshold);
  void (*rope)(const RopeTask&);
  // Attention of all queries of the task to one segment of their keys. Query (row, head of the group) is number
  // row * group + head: its partial and its values [padded_dim]. scratch: attention_scratch_floats floats.
  void (*attention)(const AttentionTask&, int segment, Partial* partials, float* values, float* scratch);
  // Takes a further segment into a running softmax; segments must come in order.
  void (*merge)(Partial& state, float* state_values, const Partial& partial, const float* values, int padded_dim);
  void (*finish)(const Partial& state, const float* state_values, int head_dim, float* out);
  // Makes the summary of the keys of a page that is full, of one KV head.
  void (*summarise)(const KvLayout&, const uint16_t* keys, uint16_t* summary);
  // Sets the bits of the pages that are chosen. scratch: page_choice_scratch_floats(layout, end - first) floats.
  void (*choose_pages)(const PageChoiceTask&, uint8_t* chosen, float* scratch);
  // Neurons [begin, end), begin a multiple of 16.
  void (*neurons)(const NeuronTask&, int begin, int end);
  // To columns [begin, end), multiples of 16.
  void (*spread)(const SpreadTask&, int begin, int end);
  // Logits of tokens [first, first + width), width a multiple of 16: out = x + temperature * noise.
  void (*perturb)(const float* x, int first, int width, float temperature, NoiseKey key, float* out);
  // What signs of each four columns make of activations: tables [columns / 32][8][16], whose entry i has the columns with
  // the signs that its bits say. steps: of each look, what a 1 stands for.
  void (*sign_tables)(const PackedSigns&, const float* x, int8_t* tables, float* steps);
  // Tiles [begin, end).
  void (*screen)(const ScreenTask&, int begin, int end);
  void (*second_look)(const SecondLookTask&, const int32_t* tiles, int count);
  // Of each of some tiles the largest logit after `margin` > 0 of the deviations that a look leaves.
  void (*screened_peaks)(const PackedSigns&, int look, const float* logits, float margin, const int32_t* tiles, int count, float* peaks);
  // Lists which of n values, after `margin` of their deviations, may reach a number, whatever rounding did. out: room for n.
  int (*list_reaching)(const float* values, const float* deviations, int n, float margin, float reach, int32_t* out);
  // The places of the `count` largest of n values, in order; of several that are equal the first ones. Returns how many
  // there are: n at most. out: room for one more.
  int (*list_largest)(const float* values, int n, int count, int32_t* out);
};

// What linears of weights that lie by rows or by columns keep in their scratch memory, one after the other: numbers of what
// works; tiles that they make; the codes of these in 8 bits.
struct SparseScratch {
  explicit SparseScratch(const PackedLinear& w)
      : tiles(w.layout == Layout::rows ? 2 : block_tiles),
        tile_bytes(w.tile_bytes + 256),  // transposing writes whole quads of scales and pairs, of which the last may be over
        wide_bytes(static_cast<size_t>(w.in_features) * lanes),
        list_bytes(ActivationFormat::align(sizeof(int32_t) * (w.layout == Layout::rows ? w.out_features + 2 * lanes : w.in_features + w.groups + 2))) {}
  int tiles;
  size_t tile_bytes, wide_bytes, list_bytes;

  int32_t* list(uint8_t* memory) const { return reinterpret_cast<int32_t*>(memory); }
  uint8_t* tile(uint8_t* memory, int t) const { return memory + list_bytes + t * tile_bytes; }
  uint8_t* wide(uint8_t* memory, int t) const { return memory + list_bytes + tiles * tile_bytes + t * wide_bytes; }
  size_t bytes() const { return list_bytes + tiles * (tile_bytes + wide_bytes); }
};

inline size_t linear_scratch_bytes(const PackedLinear& w) {
  return w.layout == Layout::tiles ? static_cast<size_t>(w.in_features) * lanes * 2 : SparseScratch(w).bytes();
}

constexpr int max_head_dim = 512;
constexpr int attention_block = 24;  // queries that a task holds at most
constexpr size_t attention_scratch_floats = static_cast<size_t>(attention_block) * segment_tokens;

inline size_t page_choice_scratch_floats(const KvLayout& layout, int pages) {
  const size_t group = layout.num_heads / layout.num_kv_heads;
  const size_t padded = (static_cast<size_t>(pages) + lanes - 1) / lanes * lanes;
  return group * (padded + layout.padded_dim()) + padded;
}

const Kernels& scalar_kernels();
#if defined(FALLOW_X86)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// Names of the instruction sets that this CPU runs, best first; "scalar" is always the last.
std::vector<std::string> available_isas();
const Kernels& kernels_of(const std::string& isa);  // throws std::invalid_argument

}  // namespace fallow
