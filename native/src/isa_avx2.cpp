#include "isa.h"
#include "simd_avx2.h"

namespace fallow {

const Kernels& avx2_kernels() {
  static constexpr Kernels table = make_kernels<Avx2>();
  return table;
}

}  // namespace fallow
