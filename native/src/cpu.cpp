// Which instruction sets this CPU runs.
#include <stdexcept>

#include "kernels.h"

namespace fallow {

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
#if defined(FALLOW_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) {
    names.emplace_back("avx512");
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    names.emplace_back("avx2");
  }
#endif
  names.emplace_back("scalar");
  return names;
}

const Kernels& kernels_of(const std::string& isa) {
  for (const auto& name : available_isas()) {
    if (name != isa) continue;
#if defined(FALLOW_X86)
    if (name == "avx512") return avx512_kernels();
    if (name == "avx2") return avx2_kernels();
#endif
    return scalar_kernels();
  }
  throw std::invalid_argument("this CPU does not run the instruction set " + isa);
}

}  // namespace fallow
