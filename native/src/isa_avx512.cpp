#include "isa.h"
#include "simd_avx512.h"

namespace fallow {

const Kernels& avx512_kernels() {
  static constexpr Kernels table = make_kernels<Avx512>();
  return table;
}

}  // namespace fallow
