// Python's view of the native core.
#include "bind_kernels.h"
#include "bind_sample.h"
#include "memory.h"
#include "pool.h"

namespace nb = nanobind;

namespace fallow {

namespace {

RowSource source_of(const WeightSource& source) {
  const auto& [type, data] = source;
  return {type, data.data(), data.size(), static_cast<int>(data.shape(0))};
}

Layout layout_of(const std::string& name) {
  if (name == "tiles") return Layout::tiles;
  if (name == "rows") return Layout::rows;
  if (name == "columns") return Layout::columns;
  throw std::invalid_argument("layout " + name + " is not known");
}

}  // namespace

PackedLinear pack_sources(ThreadPool& pool, const std::vector<WeightSource>& sources, int in_features, bool interleave, bool asymmetric,
                          const std::string& precision, const std::string& layout) {
  std::vector<RowSource> rows;
  for (const auto& source : sources) {
    rows.push_back(source_of(source));
  }
  const nb::gil_scoped_release release;
  return pack_linear(rows, in_features, {interleave, asymmetric, precision, layout_of(layout)}, pool);
}

PackedNeurons pack_neuron_sources(const std::optional<WeightSource>& up, const WeightSource& down, int count, const std::string& precision,
                                  const std::optional<WeightSource>& gate) {
  const RowSource gates = gate ? source_of(*gate) : RowSource{};
  const RowSource ups = up ? source_of(*up) : RowSource{};
  const RowSource downs = source_of(down);
  const nb::gil_scoped_release release;
  return pack_neurons(up ? &ups : nullptr, downs, count, precision, gate ? &gates : nullptr);
}

Epilogue epilogue_of(const std::string& name) {
  if (name == "store") return Epilogue::store;
  if (name == "add") return Epilogue::add;
  if (name == "relu2") return Epilogue::relu2;
  if (name == "silu_gate") return Epilogue::silu_gate;
  if (name == "gelu_gate") return Epilogue::gelu_gate;
  if (name == "relu_gate") return Epilogue::relu_gate;
  throw std::invalid_argument("epilogue " + name + " is not known");
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  throw std::invalid_argument("activation " + name + " is not known");
}

}  // namespace fallow

NB_MODULE(_native, m) {
  m.doc() = "Kernels, programs and the executor of the Fallow engine.";
  m.def("available_isas", &fallow::available_isas, "Instruction sets that this CPU runs, best first.");
  m.def("usable_cores", &fallow::usable_cores, "Physical cores that this process may use.");
  m.def("release_free_memory", &fallow::release_free_memory, "Gives memory that malloc keeps for later back to the system.");
  m.attr("page_size") = fallow::page_size;
  fallow::bind_program(m);
  auto kernels = m.def_submodule("kernels", "Single kernels, for tests.");
  fallow::bind_kernels(kernels);
  fallow::bind_sample(kernels);
}
