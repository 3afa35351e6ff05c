#include "isa.h"
#include "simd_scalar.h"

namespace fallow {

const Kernels& scalar_kernels() {
  static constexpr Kernels table = make_kernels<Scalar>();
  return table;
}

}  // namespace fallow
