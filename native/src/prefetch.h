// Brings memory into a cache before it is needed.
//
// The empty assembly has an effect in the compiler's eyes: GCC takes a function that does nothing but prefetch for one
// without effect, and drops its calls.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fallow {

constexpr size_t cache_line = 64;

// Into the second-level cache: the few fill buffers of the first stay free for what is needed now.
inline void prefetch_far(const void* p) {
  __builtin_prefetch(p, 0, 2);
  asm volatile("");
}

// The same for every line of [p, p + bytes).
inline void prefetch_run(const void* p, size_t bytes) {
  const auto* line = static_cast<const uint8_t*>(p);
  for (size_t i = 0; i < bytes; i += cache_line) prefetch_far(line + i);
}

// Into the first-level cache, one line, to be written.
inline void prefetch_to_write(const void* p) {
  __builtin_prefetch(p, 1, 3);
  asm volatile("");
}

}  // namespace fallow
