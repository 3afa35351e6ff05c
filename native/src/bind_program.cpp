// The program: laid out, executed and sampled from.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "bind_kernels.h"
#include "bind_sample.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fallow {
namespace {

using Signs = nb::ndarray<const bool, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Mode mode_of(const std::string& name) {
  if (name == "plan") return Mode::plan;
  if (name == "draft") return Mode::draft;
  if (name == "dense") return Mode::dense;
  throw std::invalid_argument("mode " + name + " is not known: plan, draft or dense");
}

Step step_of(const Ints& tokens, const Ints& row_offsets, const Ints& start_positions, const Table& page_table, const Ints& logit_rows) {
  if (start_positions.size() == 0 || row_offsets.size() != start_positions.size() + 1 || page_table.shape(0) != start_positions.size()) {
    throw std::invalid_argument("row_offsets, start_positions and page_table describe different numbers of sequences");
  }
  return {tokens.data(),
          static_cast<int>(tokens.size()),
          row_offsets.data(),
          start_positions.data(),
          static_cast<int>(start_positions.size()),
          page_table.data(),
          static_cast<int>(page_table.shape(1)),
          logit_rows.data(),
          static_cast<int>(logit_rows.size())};
}

using PageRecord = nb::ndarray<uint8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using BitRecord = nb::ndarray<uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using TileRecord = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Record record_of(const Program& p, const Step& step, const std::optional<PageRecord>& pages, const std::optional<BitRecord>& neurons,
                 const std::optional<BitRecord>& inputs, const std::optional<TileRecord>& tiles) {
  Record record;
  const auto tokens = static_cast<size_t>(step.num_tokens);
  if (pages) {
    if (pages->shape(0) != tokens || pages->shape(1) != static_cast<size_t>(p.num_choices()) ||
        pages->shape(2) != static_cast<size_t>(p.layout().num_kv_heads)) {
      throw std::invalid_argument("a record of pages holds bits for each token, attention that chooses and KV head");
    }
    record.pages = pages->data();
    record.page_bytes = pages->shape(3);
  }
  if (neurons) {
    if (neurons->shape(0) != tokens || neurons->shape(1) != static_cast<size_t>(p.num_networks())) {
      throw std::invalid_argument("a record of neurons holds bits for each token and network of which neurons rest");
    }
    record.neurons = neurons->data();
    record.neuron_bytes = neurons->shape(2);
  }
  if (inputs) {
    if (inputs->shape(0) != tokens || inputs->shape(1) != static_cast<size_t>(p.num_inputs())) {
      throw std::invalid_argument("a record of inputs holds bits for each token and linear of which inputs rest");
    }
    record.inputs = inputs->data();
    record.input_bytes = inputs->shape(2);
  }
  if (tiles) {
    if (tiles->shape(0) != static_cast<size_t>(step.num_logit_rows)) throw std::invalid_argument("a record of tiles holds one number for each logit row");
    record.tiles = tiles->data();
  }
  return record;
}

nb::dict describe(const PackedLinear& w) {
  nb::dict d;
  d["codes"] = w.codes == Codes::bf16 ? "bf16" : (w.codes == Codes::q4 ? "q4" : "q8");
  d["group"] = w.group;
  d["scales"] = w.scales == Scales::none ? "none" : (w.scales == Scales::f16 ? "f16" : "f32");
  d["pairs"] = static_cast<int>(w.pairs_kind);
  d["bytes"] = w.bytes;
  d["out_features"] = w.out_features;
  d["in_features"] = w.in_features;
  return d;
}

}  // namespace

void bind_program(nb::module_& m) {
  nb::class_<PackedSigns>(m, "Signs")
      .def(
          "__init__",
          [](PackedSigns* self, int out_features, int in_features, const Ints& directions, const Floats& sizes, int first_columns) {
            if (directions.size() != sizes.size()) throw std::invalid_argument("directions and sizes are not those of the same columns");
            std::vector<SignColumn> columns(directions.size());
            for (size_t k = 0; k < columns.size(); ++k) columns[k] = {directions.data()[k], sizes.data()[k]};
            new (self) PackedSigns(out_features, in_features, std::move(columns), first_columns);
          },
          "out_features"_a, "in_features"_a, "directions"_a, "sizes"_a, nb::kw_only(), "first_columns"_a)
      .def(
          "put_rows",
          [](PackedSigns& w, int first, const Matrix& along, const Signs& positive, const Floats& scales, const Matrix& deviations) {
            if (w.memory.data() == nullptr) throw std::invalid_argument("the signs belong to a program already");
            const size_t rows = along.shape(0);
            if (along.shape(1) != static_cast<size_t>(PackedSigns::directions) || positive.shape(0) != w.columns.size() ||
                positive.shape(1) != rows || scales.size() != rows || deviations.shape(0) != PackedSigns::looks ||
                deviations.shape(1) != rows) {
              throw std::invalid_argument("along, positive, scales and deviations are not those of the same rows");
            }
            w.put_rows(first, static_cast<int>(rows), along.data(), positive.data(), scales.data(), deviations.data());
          },
          "first"_a, "along"_a, "positive"_a, "scales"_a, "deviations"_a);
  m.attr("screen_directions") = PackedSigns::directions;
  nb::class_<Program>(m, "Program")
      .def(
          "__init__",
          [](Program* self, int threads, const std::string& isa, int num_heads, int num_kv_heads, int head_dim, int num_layers, int max_tokens,
             int max_sequences, int max_logit_rows, int num_pages, int max_positions) {
            new (self) Program(threads, isa, {num_heads, num_kv_heads, head_dim}, num_layers,
                               {max_tokens, max_sequences, max_logit_rows, num_pages, max_positions});
          },
          nb::kw_only(), "threads"_a, "isa"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "num_layers"_a, "max_tokens"_a,
          "max_sequences"_a, "max_logit_rows"_a, "num_pages"_a, "max_positions"_a)
      .def("buffer", &Program::add_buffer, "width"_a)
      .def(
          "vector", [](Program& p, const Floats& v) { return p.add_vector(std::vector<float>(v.data(), v.data() + v.size())); }, "values"_a)
      .def(
          "weights",
          [](Program& p, const std::vector<WeightSource>& sources, int in_features, bool interleave, bool asymmetric, const std::string& precision,
             const std::string& layout) { return p.add_weights(pack_sources(p.pool(), sources, in_features, interleave, asymmetric, precision, layout)); },
          "sources"_a, "in_features"_a, nb::kw_only(), "interleave"_a = false, "asymmetric"_a = false, "precision"_a = "own", "layout"_a = "tiles")
      .def(
          "neuron_weights",
          [](Program& p, const std::optional<WeightSource>& up, const WeightSource& down, int count, const std::string& precision,
             const std::optional<WeightSource>& gate) { return p.add_neurons(pack_neuron_sources(up, down, count, precision, gate)); },
          "up"_a.none(), "down"_a, "count"_a, nb::kw_only(), "precision"_a, "gate"_a.none() = nb::none())
      .def(
          "signs",
          [](Program& p, PackedSigns& signs) {
            if (signs.memory.data() == nullptr) throw std::invalid_argument("the signs belong to a program already");
            return p.add_signs(std::move(signs));
          },
          "signs"_a)
      .def("describe", [](const Program& p, int w) { return describe(p.weights(w)); }, "weights"_a)
      .def("activations_for", [](Program& p, int w) { return p.add_activations(ActivationFormat::of(p.weights(w))); }, "weights"_a)
      .def(
          "embed",
          [](Program& p, int weights, int out, float scale, int column, bool add) { p.add(op::Embed{weights, out, scale, column, add}); },
          "weights"_a, "out"_a, "scale"_a = 1.f, nb::kw_only(), "column"_a = 0, "add"_a = false)
      .def("norm", [](Program& p, int x, int weight, int out, float eps) { p.add(op::Norm{x, weight, out, eps}); }, "x"_a, "weight"_a,
           "out"_a, "eps"_a)
      .def(
          "norm_quantise",
          [](Program& p, int x, int weight, const std::vector<int>& out, float eps, int kept) {
            p.add(op::NormQuantise{x, weight, out, eps, kept});
          },
          "x"_a, "weight"_a, "out"_a, "eps"_a, nb::kw_only(), "kept"_a = -1)
      .def(
          "quantise", [](Program& p, int x, int out, float threshold, bool recorded) { p.add(op::Quantise{x, out, threshold, recorded}); }, "x"_a,
          "out"_a, nb::kw_only(), "threshold"_a = 0.f, "recorded"_a = false)
      .def(
          "linear",
          [](Program& p, int activations, int weights, int out, int bias, int column, const std::string& epilogue, int gates,
             const std::string& activation, float threshold) {
            p.add(op::Linear{activations, weights, bias, out, column, epilogue_of(epilogue), -1, gates, activation_of(activation), threshold});
          },
          "activations"_a, "weights"_a, "out"_a, nb::kw_only(), "bias"_a = -1, "column"_a = 0, "epilogue"_a = "store", "gates"_a = -1,
          "activation"_a = "silu", "threshold"_a = 0.f)
      .def(
          "rope",
          [](Program& p, int qkv, int table, int rotary_dim, int q_norm, int k_norm, float eps, int layer, std::optional<int> kv_heads) {
            p.add(op::Rope{qkv, table, rotary_dim, q_norm, k_norm, eps, layer, kv_heads.value_or(p.layout().num_kv_heads)});
          },
          "qkv"_a, "table"_a, "rotary_dim"_a, nb::kw_only(), "q_norm"_a = -1, "k_norm"_a = -1, "eps"_a = 0.f, "layer"_a,
          "kv_heads"_a = nb::none(), "kv_heads: as many as the layer has of the program's; None: all.")
      .def(
          "attention",
          [](Program& p, int out, int layer, std::optional<int> kv_heads, int window, float scale, int sink_pages, int recent_pages,
             const std::vector<int>& top_pages, std::optional<int> context_pages) {
            p.add(op::Attention{
                out, layer, kv_heads.value_or(p.layout().num_kv_heads), window, scale, {sink_pages, recent_pages, top_pages, context_pages.value_or(0)}});
          },
          "out"_a, nb::kw_only(), "layer"_a, "kv_heads"_a = nb::none(), "window"_a, "scale"_a, "sink_pages"_a = 0, "recent_pages"_a = 0,
          "top_pages"_a = std::vector<int>{}, "context_pages"_a = nb::none())
      .def("add", [](Program& p, int x, int out) { p.add(op::Add{x, out}); }, "x"_a, "out"_a)
      .def(
          "gate",
          [](Program& p, int gate, int up, int out, const std::string& activation) {
            p.add(op::Gate{gate, up, out, activation_of(activation)});
          },
          "gate"_a, "up"_a, "out"_a, nb::kw_only(), "activation"_a)
      .def(
          "mix", [](Program& p, int x, int first, int out, float keep, float again) { p.add(op::Mix{x, first, out, keep, again}); }, "x"_a,
          "first"_a, "out"_a, nb::kw_only(), "keep"_a, "again"_a)
      .def("soft_cap", [](Program& p, int x, float cap) { p.add(op::SoftCap{x, cap}); }, "x"_a, "cap"_a)
      .def("above_threshold", [](Program& p, int x, float quantile) { p.add(op::AboveThreshold{x, quantile}); }, "x"_a, "quantile"_a)
      .def(
          "keep_largest",
          [](Program& p, int x, int count, const std::string& activation) { p.add(op::KeepLargest{x, count, activation_of(activation)}); }, "x"_a,
          "count"_a, nb::kw_only(), "activation"_a)
      .def(
          "neurons",
          [](Program& p, int x, int gates, int weights, const std::string& activation, float threshold) {
            p.add(op::Neurons{x, gates, weights, activation_of(activation), threshold});
          },
          "x"_a, "gates"_a, "weights"_a, nb::kw_only(), "activation"_a, "threshold"_a)
      .def(
          "spread", [](Program& p, int x, int weights, int out, float threshold) { p.add(op::Spread{x, weights, out, threshold}); }, "x"_a,
          "weights"_a, "out"_a, nb::kw_only(), "threshold"_a = 0.f)
      .def("gather", [](Program& p, int x, int out) { p.add(op::Gather{x, out}); }, "x"_a, "out"_a)
      .def(
          "screen",
          [](Program& p, int x, int signs, int out, float cap) { p.add(op::Screen{x, signs, out, cap}); }, "x"_a, "signs"_a, "out"_a,
          nb::kw_only(), "cap"_a = 0.f)
      .def(
          "look_again", [](Program& p, int logits, int tiles) { p.add(op::SecondLook{logits, tiles}); }, "logits"_a, nb::kw_only(), "tiles"_a)
      .def("shortlist", [](Program& p, int logits, int tiles) { p.add(op::Shortlist{logits, tiles}); }, "logits"_a, nb::kw_only(), "tiles"_a)
      .def(
          "rescore", [](Program& p, int activations, int weights, int out, float cap) { p.add(op::Rescore{activations, weights, out, cap}); },
          "activations"_a, "weights"_a, "out"_a, nb::kw_only(), "cap"_a = 0.f)
      .def("finish", &Program::finish, "logits"_a)
      .def(
          "centre",
          [](Program& p, const Ints& tokens) {
            const std::vector<int32_t> ids(tokens.data(), tokens.data() + tokens.size());
            const nb::gil_scoped_release release;
            p.centre(ids);
          },
          "tokens"_a)
      .def(
          "run",
          [](Program& p, const Ints& tokens, const Ints& row_offsets, const Ints& start_positions, const Table& page_table, const Ints& logit_rows) {
            const Step step = step_of(tokens, row_offsets, start_positions, page_table, logit_rows);
            const nb::gil_scoped_release release;
            p.check(step);
            p.run(step, nullptr);
          },
          "tokens"_a, "row_offsets"_a, "start_positions"_a, "page_table"_a, "logit_rows"_a)
      .def(
          "step",
          [](Program& p, const Ints& tokens, const Ints& row_offsets, const Ints& start_positions, const Table& page_table, const Ints& logit_rows,
             const RowBytes& sampling, std::optional<Int32Array> bias_offsets, std::optional<Int32Array> bias_tokens,
             std::optional<FloatArray> bias_values, std::optional<Int32Array> repeated_offsets, std::optional<Int32Array> repeated_tokens,
             std::optional<WordRows> allowed, const std::string& mode, std::optional<PageRecord> pages_read,
             std::optional<BitRecord> neurons_at_work, std::optional<BitRecord> inputs_at_work, std::optional<TileRecord> tiles_computed) {
            Step step = step_of(tokens, row_offsets, start_positions, page_table, logit_rows);
            step.mode = mode_of(mode);
            SampleCall call(step.num_logit_rows, p.vocab_size(), sampling,
                            {bias_offsets, bias_tokens, bias_values, repeated_offsets, repeated_tokens, allowed});
            {
              const Record record = record_of(p, step, pages_read, neurons_at_work, inputs_at_work, tiles_computed);
              const nb::gil_scoped_release release;
              p.check(step, record);
              p.run(step, &call.args, record);
            }
            return call.take();
          },
          "tokens"_a, "row_offsets"_a, "start_positions"_a, "page_table"_a, "logit_rows"_a, "sampling"_a, "bias_offsets"_a = nb::none(),
          "bias_tokens"_a = nb::none(), "bias_values"_a = nb::none(), "repeated_offsets"_a = nb::none(), "repeated_tokens"_a = nb::none(),
          "allowed"_a = nb::none(), "mode"_a = "plan", nb::kw_only(), "pages_read"_a.noconvert() = nb::none(),
          "neurons_at_work"_a.noconvert() = nb::none(), "inputs_at_work"_a.noconvert() = nb::none(), "tiles_computed"_a.noconvert() = nb::none())
      .def(
          "log_probabilities",
          [](Program& p, const Ints& targets) {
            if (targets.size() > static_cast<size_t>(p.limits().max_logit_rows)) throw std::invalid_argument("there are fewer logit rows");
            for (size_t i = 0; i < targets.size(); ++i) {
              if (targets.data()[i] < 0 || targets.data()[i] >= p.vocab_size()) throw std::invalid_argument("a token is outside the vocabulary");
            }
            std::vector<float> values(targets.size());
            {
              const nb::gil_scoped_release release;
              p.log_probabilities(targets.data(), static_cast<int>(targets.size()), values.data());
            }
            return owned<float>(std::move(values), {targets.size()});
          },
          "targets"_a, "Log-probability of target i under the logits of row i of the last run.")
      .def(
          "logits",
          [](const Program& p, int rows) {
            if (rows < 0 || rows > p.limits().max_logit_rows) throw std::invalid_argument("there are fewer logit rows");
            const auto vocab = static_cast<size_t>(p.vocab_size());
            std::vector<float> values(rows * vocab);
            for (int r = 0; r < rows; ++r) std::memcpy(values.data() + r * vocab, p.logits() + r * p.logits_stride(), vocab * sizeof(float));
            return owned<float>(std::move(values), {static_cast<size_t>(rows), vocab});
          },
          "rows"_a)
      .def_prop_ro("weight_bytes", &Program::weight_bytes)
      .def_prop_ro("page_bytes", &Program::page_bytes)
      .def_prop_ro("head_counts",
                   [](const Program& p) {
                     const auto& counts = p.head_counts();
                     return std::make_tuple(counts.rows, counts.tiles, counts.doubtful_rows);
                   })
      .def("head_tiles", &Program::head_tiles, "row"_a, nb::kw_only(), "shortlist"_a = false,
           "Tiles of the head that the last step computed for a logit row, or those of its shortlist alone.")
      .def_prop_ro("isa", &Program::isa);
}

}  // namespace fallow
