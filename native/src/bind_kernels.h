// What the bindings share.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#include "neurons.h"
#include "packed.h"

namespace fallow {

// (storage type, bytes [rows, bytes a row])
using WeightSource =
    std::tuple<std::string, nanobind::ndarray<const uint8_t, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>>;
using NumpyFloats = nanobind::ndarray<nanobind::numpy, float>;

template <class T>
nanobind::ndarray<nanobind::numpy, T> owned(std::vector<T> values, std::vector<size_t> shape) {
  auto* heap = new std::vector<T>(std::move(values));
  nanobind::capsule owner(heap, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nanobind::ndarray<nanobind::numpy, T>(heap->data(), shape.size(), shape.data(), owner);
}

// Releases the interpreter lock while it packs.
PackedLinear pack_sources(ThreadPool& pool, const std::vector<WeightSource>& sources, int in_features, bool interleave, bool asymmetric,
                          const std::string& precision, const std::string& layout = "tiles");
PackedNeurons pack_neuron_sources(const std::optional<WeightSource>& up, const WeightSource& down, int count, const std::string& precision,
                                  const std::optional<WeightSource>& gate);
Epilogue epilogue_of(const std::string& name);
Activation activation_of(const std::string& name);

void bind_kernels(nanobind::module_& m);
void bind_program(nanobind::module_& m);

}  // namespace fallow
