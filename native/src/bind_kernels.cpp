// Single kernels for tests: each instruction set against the others, the scalar one against numpy and PyTorch.
#include "bind_kernels.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>

#include "kernels.h"
#include "pool.h"
#include "sample.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fallow {
namespace {

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Cube = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

size_t rounded(size_t n, size_t to) { return (n + to - 1) / to * to; }

Memory padded_rows(const Matrix& x, size_t stride) {
  Memory copy(std::max<size_t>(1, x.shape(0)) * stride * sizeof(float));
  for (size_t r = 0; r < x.shape(0); ++r) {
    std::memcpy(copy.as<float>() + r * stride, x.data() + r * x.shape(1), x.shape(1) * sizeof(float));
  }
  return copy;
}

NumpyFloats linear(const std::string& isa, const std::vector<WeightSource>& sources, const Matrix& x, bool interleave, bool asymmetric,
                   const std::string& precision, const std::string& epilogue, const Matrix& initial, const std::string& layout,
                   const std::optional<Matrix>& gates, const std::string& activation, float threshold) {
  const Kernels& kernels = kernels_of(isa);
  ThreadPool alone(1);
  const PackedLinear w = pack_sources(alone, sources, static_cast<int>(x.shape(1)), interleave, asymmetric, precision, layout);
  const ActivationFormat format = ActivationFormat::of(w);
  const Epilogue e = epilogue_of(epilogue);
  const size_t columns = is_gate(e) ? w.out_features / 2 : w.out_features;
  const int rows = static_cast<int>(x.shape(0));
  if (initial.shape(0) != x.shape(0) || initial.shape(1) != columns) throw std::invalid_argument("initial has another shape than the result");
  const size_t stride = rounded(columns, 2 * lanes);
  const Memory inputs = padded_rows(x, rounded(x.shape(1), lanes));
  Memory activations(std::max(1, rows) * format.row_bytes());
  for (int r = 0; r < rows; ++r) {
    kernels.quantise(inputs.as<float>() + r * rounded(x.shape(1), lanes), format, activations.data() + r * format.row_bytes(), 0, format.groups());
  }
  const Memory out = padded_rows(initial, stride);
  Memory scratch(linear_scratch_bytes(w));
  LinearTask task{&w, format, activations.data(), rows, out.as<float>(), stride, nullptr, e};
  Memory gate_rows;
  if ((w.layout == Layout::rows) != gates.has_value()) throw std::invalid_argument("weights by rows are chosen by gates, others are not");
  if (gates) {
    if (gates->shape(0) != x.shape(0) || gates->shape(1) != columns) throw std::invalid_argument("gates have another shape than the result");
    gate_rows = padded_rows(*gates, stride);
    task.gates = gate_rows.as<float>();
    task.gates_stride = stride;
    task.activation = activation_of(activation);
    task.threshold = threshold;
  }
  (w.layout == Layout::tiles ? kernels.linear : kernels.sparse_linear)(task, 0, (w.tiles + 1) / 2 * 2, scratch.data());
  std::vector<float> values(rows * columns);
  for (int r = 0; r < rows; ++r) std::memcpy(values.data() + r * columns, out.as<float>() + r * stride, columns * sizeof(float));
  return owned<float>(std::move(values), {static_cast<size_t>(rows), columns});
}

NumpyFloats rms_norm(const std::string& isa, const Matrix& x, const Vector& weight, float eps) {
  if (weight.size() != x.shape(1)) throw std::invalid_argument("weight and x differ in width");
  std::vector<float> values(x.size());
  for (size_t r = 0; r < x.shape(0); ++r) {
    kernels_of(isa).rms_norm({x.data() + r * x.shape(1), weight.data(), eps, static_cast<int>(x.shape(1))}, values.data() + r * x.shape(1));
  }
  return owned<float>(std::move(values), {x.shape(0), x.shape(1)});
}

NumpyFloats gate(const std::string& isa, const Matrix& g, const Matrix& up, const std::string& activation) {
  if (g.size() != up.size()) throw std::invalid_argument("gate and up differ in shape");
  std::vector<float> values(g.size());
  kernels_of(isa).gate(g.data(), up.data(), values.data(), static_cast<int>(g.size()), activation_of(activation));
  return owned<float>(std::move(values), {g.shape(0), g.shape(1)});
}

NumpyFloats mix(const std::string& isa, const Matrix& x, const Matrix& first, float keep, float again) {
  if (x.shape(0) != first.shape(0) || x.shape(1) != first.shape(1)) throw std::invalid_argument("x and first differ in shape");
  std::vector<float> values(x.size());
  for (size_t r = 0; r < x.shape(0); ++r) {
    const size_t at = r * x.shape(1);
    kernels_of(isa).mix(x.data() + at, keep, first.data() + at, again, values.data() + at, static_cast<int>(x.shape(1)));
  }
  return owned<float>(std::move(values), {x.shape(0), x.shape(1)});
}

NumpyFloats soft_cap(const std::string& isa, const Matrix& x, float cap) {
  const size_t stride = rounded(x.shape(1), lanes);
  const Memory rows = padded_rows(x, stride);
  std::vector<float> values(x.size());
  for (size_t r = 0; r < x.shape(0); ++r) {
    kernels_of(isa).soft_cap(rows.as<float>() + r * stride, static_cast<int>(x.shape(1)), cap);
    std::memcpy(values.data() + r * x.shape(1), rows.as<float>() + r * stride, x.shape(1) * sizeof(float));
  }
  return owned<float>(std::move(values), {x.shape(0), x.shape(1)});
}

NumpyFloats above_threshold(const std::string& isa, const Matrix& x, float quantile) {
  std::vector<float> values(x.data(), x.data() + x.size());
  for (size_t r = 0; r < x.shape(0); ++r) {
    kernels_of(isa).above_threshold(values.data() + r * x.shape(1), static_cast<int>(x.shape(1)), quantile);
  }
  return owned<float>(std::move(values), {x.shape(0), x.shape(1)});
}

NumpyFloats keep_largest(const std::string& isa, const Matrix& x, int count, const std::string& activation) {
  if (count < 0) throw std::invalid_argument("count must be at least 0");
  std::vector<float> values(x.data(), x.data() + x.size());
  std::vector<float> scratch(rounded(x.shape(1), lanes));
  for (size_t r = 0; r < x.shape(0); ++r) {
    kernels_of(isa).keep_largest(values.data() + r * x.shape(1), static_cast<int>(x.shape(1)), count, activation_of(activation), scratch.data());
  }
  return owned<float>(std::move(values), {x.shape(0), x.shape(1)});
}

// Rotates and caches `qkv` [tokens][(heads + 2 kv_heads) * head_dim] in pages that are in no order, then attends with
// the last `queries` tokens. Garbage (NaN) fills what is not written. With `top_pages`, of each KV head, pages are chosen
// among those that are not the first `sink_pages` or the last `recent_pages`; [queries][kv heads][pages] says which.
nb::tuple attention(const std::string& isa, const Matrix& qkv, const Matrix& table, int num_heads, int num_kv_heads, int head_dim, int rotary_dim,
                    int queries, int window, float scale, int sink_pages, int recent_pages, const std::vector<int>& top_pages,
                    std::optional<int> context_pages) {
  const Kernels& kernels = kernels_of(isa);
  const PageChoice rule{sink_pages, recent_pages, top_pages, context_pages.value_or(0)};
  const bool chooses = !top_pages.empty();
  const KvLayout layout{num_heads, num_kv_heads, head_dim};
  const int tokens = static_cast<int>(qkv.shape(0));
  if (num_kv_heads <= 0 || num_heads % num_kv_heads != 0 || head_dim <= 0 || head_dim > max_head_dim || rotary_dim > head_dim ||
      qkv.shape(1) != static_cast<size_t>((num_heads + 2 * num_kv_heads) * head_dim) || table.shape(0) < qkv.shape(0) ||
      table.shape(1) != static_cast<size_t>(rotary_dim) || queries <= 0 || queries > tokens ||
      (chooses && (top_pages.size() != static_cast<size_t>(num_kv_heads) || recent_pages < 1 || sink_pages < 0 || rule.context < 0 || window > 0))) {
    throw std::invalid_argument("shapes do not fit");
  }
  const int pages = (tokens + page_size - 1) / page_size;
  Memory pool(static_cast<size_t>(pages) * layout.page_bytes());
  std::fill_n(pool.as<uint16_t>(), pool.size() / 2, uint16_t{0x7fc0});
  std::vector<int32_t> page_table(pages);
  for (int p = 0; p < pages; ++p) page_table[p] = pages - 1 - p;
  const size_t query_stride = static_cast<size_t>(num_heads) * layout.padded_dim();
  Memory rotated(tokens * query_stride * sizeof(uint16_t));
  for (int t = 0; t < tokens; ++t) {
    kernels.rope({layout, t, table.data(), rotary_dim, nullptr, nullptr, 0.f, qkv.data() + t * qkv.shape(1), rotated.as<uint16_t>() + t * query_stride,
                  pool.data() + page_table[t / page_size] * layout.page_bytes()});
  }
  const size_t segments = (static_cast<size_t>(pages) + segment_pages - 1) / segment_pages;
  std::vector<uint8_t> chosen(static_cast<size_t>(queries) * num_kv_heads * segments);
  std::vector<bool> read(static_cast<size_t>(queries) * num_kv_heads * pages);
  if (chooses) {
    std::vector<uint16_t> summaries(static_cast<size_t>(pages) * num_kv_heads * layout.summary_elements(), uint16_t{0x7fc0});
    for (int p = 0; p < tokens / page_size; ++p) {
      for (int h = 0; h < num_kv_heads; ++h) {
        uint16_t* summary = summaries.data() + (static_cast<size_t>(page_table[p]) * num_kv_heads + h) * layout.summary_elements();
        kernels.summarise(layout, layout.keys(pool.data() + page_table[p] * layout.page_bytes(), h), summary);
      }
    }
    Memory choice(page_choice_scratch_floats(layout, pages) * sizeof(float));
    for (int i = 0; i < queries * num_kv_heads; ++i) {
      const int h = i % num_kv_heads;
      const int row = tokens - queries + i / num_kv_heads;
      const int own = row / page_size;
      const int first = std::min(sink_pages, own + 1);
      const int end = std::max(first, own + 1 - recent_pages);
      uint8_t* bits = chosen.data() + i * segments;
      for (int p = 0; p <= own; ++p) {
        if (p < first || p >= end) bits[p / segment_pages] |= static_cast<uint8_t>(1u << p % segment_pages);
      }
      const uint16_t* query = rotated.as<uint16_t>() + row * query_stride + static_cast<size_t>(h) * (num_heads / num_kv_heads) * layout.padded_dim();
      kernels.choose_pages({layout, query, h, scale, summaries.data(), page_table.data(), first, end, rule.count(h, own + 1)}, bits, choice.as<float>());
      for (int p = 0; p < pages; ++p) read[static_cast<size_t>(i) * pages + p] = bits[p / segment_pages] >> p % segment_pages & 1;
    }
  }
  const int group = num_heads / num_kv_heads;
  const int block = std::max(1, attention_block / group);
  const size_t padded_dim = layout.padded_dim();
  std::vector<float> values(static_cast<size_t>(queries) * num_heads * head_dim);
  Memory scratch(attention_scratch_floats * sizeof(float));
  Memory segment_values(attention_block * padded_dim * sizeof(float));
  Memory state_values(attention_block * padded_dim * sizeof(float));
  for (int row = tokens - queries; row < tokens; row += block) {
    const int rows = std::min(block, tokens - row);
    for (int h = 0; h < num_kv_heads; ++h) {
      const AttentionTask task{layout, rotated.as<uint16_t>() + row * query_stride, query_stride, h, rows, row, window, scale,
                               pool.data(), layout.page_bytes(), page_table.data(),
                               chooses ? chosen.data() + (static_cast<size_t>(row - (tokens - queries)) * num_kv_heads + h) * segments : nullptr,
                               num_kv_heads * segments};
      std::vector<Partial> partials(attention_block);
      std::vector<Partial> states(attention_block, {-std::numeric_limits<float>::infinity(), 0.f});
      const int begin = (window > 0 ? std::max(0, row + 1 - window) : 0) / segment_tokens;
      for (int s = begin; s * segment_tokens < row + rows; ++s) {
        kernels.attention(task, s, partials.data(), segment_values.as<float>(), scratch.as<float>());
        for (int q = 0; q < rows * group; ++q) {
          kernels.merge(states[q], state_values.as<float>() + q * padded_dim, partials[q], segment_values.as<float>() + q * padded_dim,
                        static_cast<int>(padded_dim));
        }
      }
      for (int q = 0; q < rows * group; ++q) {
        const size_t at = (static_cast<size_t>(row - (tokens - queries) + q / group) * num_heads + h * group + q % group) * head_dim;
        kernels.finish(states[q], state_values.as<float>() + q * padded_dim, head_dim, values.data() + at);
      }
    }
  }
  std::vector<uint8_t> flags(read.begin(), read.end());
  return nb::make_tuple(owned<float>(std::move(values), {static_cast<size_t>(queries), static_cast<size_t>(num_heads * head_dim)}),
                        owned<uint8_t>(std::move(flags), {static_cast<size_t>(queries), static_cast<size_t>(num_kv_heads), static_cast<size_t>(pages)}));
}

// Of hidden states and gates the neurons, and what they add to `initial`: begun in the middle, as threads share them.
nb::tuple feed_forward(const std::string& isa, const std::optional<WeightSource>& up, const WeightSource& down, const Matrix& x, const Matrix& gates,
                       const std::string& precision, const std::string& activation, float threshold, const Matrix& initial,
                       const std::optional<WeightSource>& gate) {
  const Kernels& kernels = kernels_of(isa);
  const int rows = static_cast<int>(x.shape(0));
  const PackedNeurons w = pack_neuron_sources(up, down, static_cast<int>(gates.shape(1)), precision, gate);
  if (gates.shape(0) != x.shape(0) || initial.shape(0) != x.shape(0) || x.shape(1) != static_cast<size_t>(w.in_features) ||
      initial.shape(1) != x.shape(1)) {
    throw std::invalid_argument("shapes do not fit");
  }
  const size_t stride = rounded(w.count, lanes);
  const Memory neurons = padded_rows(gates, stride);
  const Memory out = padded_rows(initial, w.in_features);
  if (w.gated) {
    std::vector<float> norms(rows);
    const NeuronTask task{&w, rows, x.data(), x.shape(1), neurons.as<float>(), stride, activation_of(activation), threshold, norms.data()};
    const int half = w.count / 2 / lanes * lanes;
    kernels.neurons(task, half, w.count);
    kernels.neurons(task, 0, half);
  }
  const SpreadTask task{&w, rows, neurons.as<float>(), stride, w.gated ? 0.f : threshold, out.as<float>(), x.shape(1)};
  const int half = w.in_features / 2 / lanes * lanes;
  kernels.spread(task, half, w.in_features);
  kernels.spread(task, 0, half);
  std::vector<float> values(gates.size());
  for (int r = 0; r < rows; ++r) std::memcpy(values.data() + r * gates.shape(1), neurons.as<float>() + r * stride, gates.shape(1) * sizeof(float));
  std::vector<float> sums(out.as<float>(), out.as<float>() + initial.size());
  return nb::make_tuple(owned<float>(std::move(values), {gates.shape(0), gates.shape(1)}), owned<float>(std::move(sums), {x.shape(0), x.shape(1)}));
}

// Approximate logits of activations after a first look and after a second one at all tiles: [looks][rows][tokens]. Both
// begin in the middle, as threads share them.
NumpyFloats screen(const std::string& isa, const PackedSigns& w, const Matrix& x) {
  const Kernels& kernels = kernels_of(isa);
  if (x.shape(1) != static_cast<size_t>(w.in_features) || w.data == nullptr) throw std::invalid_argument("shapes do not fit");
  const auto rows = static_cast<int>(x.shape(0));
  const Memory tables(std::max(1, rows) * w.table_bytes());
  constexpr size_t looks = PackedSigns::looks;
  std::vector<float> steps(rows * looks);
  const auto tables_of = [&](int r) { return tables.as<int8_t>() + r * w.table_bytes(); };
  for (int r = 0; r < rows; ++r) kernels.sign_tables(w, x.data() + r * x.shape(1), tables_of(r), steps.data() + r * looks);
  const size_t stride = static_cast<size_t>(w.tiles) * lanes;
  std::vector<float> out(looks * rows * stride);
  const auto out_of = [&](int look, int r) { return out.data() + (look * rows + r) * stride; };
  std::vector<float*> outs(rows);
  for (int r = 0; r < rows; ++r) outs[r] = out_of(0, r);
  const ScreenTask task{&w, x.data(), x.shape(1), tables.as<int8_t>(), steps.data(), rows, outs.data()};
  kernels.screen(task, w.tiles / 2, w.tiles);
  kernels.screen(task, 0, w.tiles / 2);
  std::vector<int32_t> all(w.tiles);
  std::iota(all.rbegin(), all.rend(), 0);
  for (int r = 0; r < rows; ++r) {
    std::copy_n(out_of(0, r), stride, out_of(1, r));
    kernels.second_look({&w, tables_of(r), steps[r * looks + 1], out_of(1, r)}, all.data(), w.tiles);
  }
  std::vector<float> values;
  for (size_t k = 0; k < looks * rows; ++k) values.insert(values.end(), out.begin() + k * stride, out.begin() + k * stride + w.out_features);
  return owned<float>(std::move(values), {looks, x.shape(0), static_cast<size_t>(w.out_features)});
}

// The places of the largest of some values.
nb::ndarray<nb::numpy, int32_t> list_largest(const std::string& isa, const Vector& values, int count) {
  std::vector<int32_t> out(values.size() + 1);
  out.resize(kernels_of(isa).list_largest(values.data(), static_cast<int>(values.size()), count, out.data()));
  const size_t listed = out.size();
  return owned<int32_t>(std::move(out), {listed});
}

// Noise of temperature 1 of one draw, for `count` tokens.
NumpyFloats noise(const std::string& isa, int count, uint64_t seed, uint64_t draw) {
  const int width = (count + lanes - 1) / lanes * lanes;
  std::vector<float> values(width);
  SamplingRow p{};
  p.seed = seed;
  p.draw = draw;
  kernels_of(isa).perturb(values.data(), 0, width, 1.f, noise_key(p), values.data());
  values.resize(count);
  return owned<float>(std::move(values), {static_cast<size_t>(count)});
}

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def("linear", &linear, "isa"_a, "sources"_a, "x"_a, nb::kw_only(), "interleave"_a = false, "asymmetric"_a = false,
        "precision"_a = "own", "epilogue"_a = "store", "initial"_a, "layout"_a = "tiles", "gates"_a.none() = nb::none(), "activation"_a = "silu",
        "threshold"_a = 0.f);
  m.def("rms_norm", &rms_norm, "isa"_a, "x"_a, "weight"_a, "eps"_a);
  m.def("gate", &gate, "isa"_a, "gate"_a, "up"_a, nb::kw_only(), "activation"_a);
  m.def("mix", &mix, "isa"_a, "x"_a, "first"_a, nb::kw_only(), "keep"_a, "again"_a);
  m.def("soft_cap", &soft_cap, "isa"_a, "x"_a, "cap"_a);
  m.def("above_threshold", &above_threshold, "isa"_a, "x"_a, "quantile"_a);
  m.def("keep_largest", &keep_largest, "isa"_a, "x"_a, "count"_a, nb::kw_only(), "activation"_a);
  m.def("attention", &attention, "isa"_a, "qkv"_a, "table"_a, nb::kw_only(), "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "rotary_dim"_a,
        "queries"_a, "window"_a, "scale"_a, "sink_pages"_a = 0, "recent_pages"_a = 1, "top_pages"_a = std::vector<int>{}, "context_pages"_a = nb::none());
  m.def("feed_forward", &feed_forward, "isa"_a, "up"_a.none(), "down"_a, "x"_a, "gates"_a, nb::kw_only(), "precision"_a, "activation"_a, "threshold"_a,
        "initial"_a, "gate"_a.none() = nb::none());
  m.def("screen", &screen, "isa"_a, "signs"_a, "x"_a);
  m.def("list_largest", &list_largest, "isa"_a, "values"_a, "count"_a);
  m.def("noise", &noise, "isa"_a, "count"_a, nb::kw_only(), "seed"_a, "draw"_a);
  m.def(
      "unpack",
      [](const std::vector<WeightSource>& sources, int in_features, bool interleave, bool asymmetric, const std::string& precision,
         const std::string& layout, int threads) {
        ThreadPool pool(threads);
        const PackedLinear w = pack_sources(pool, sources, in_features, interleave, asymmetric, precision, layout);
        std::vector<float> values(static_cast<size_t>(w.out_features) * in_features);
        for (int t = 0; t < w.out_features; ++t) unpack_row(w, t, values.data() + static_cast<size_t>(t) * in_features);
        return owned<float>(std::move(values), {static_cast<size_t>(w.out_features), static_cast<size_t>(in_features)});
      },
      "sources"_a, "in_features"_a, nb::kw_only(), "interleave"_a = false, "asymmetric"_a = false, "precision"_a = "own", "layout"_a = "tiles",
      "threads"_a = 1);
}

}  // namespace fallow
