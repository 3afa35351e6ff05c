#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fallow {
namespace {

// AddressSanitizer knows the borders of what malloc gives, not of this: it is told of bytes around it that are nobody's.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t guard = 4096;
void forbid(const uint8_t* p, size_t bytes) { ASAN_POISON_MEMORY_REGION(p, bytes); }
void permit(const uint8_t* p, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(p, bytes); }
#else
constexpr size_t guard = 0;
void forbid(const uint8_t*, size_t) {}
void permit(const uint8_t*, size_t) {}
#endif

}  // namespace

Memory::Memory(size_t bytes, Pages pages) : bytes_(bytes) {
  if (bytes == 0) return;
  void* p = mmap(nullptr, bytes + 2 * guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  // Weights are streamed once a step: large pages spare the walks of the page table.
  if (pages == Pages::large && bytes >= (size_t{4} << 20)) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  data_ = static_cast<uint8_t*>(p) + guard;
  forbid(data_ - guard, guard);
  forbid(data_ + bytes, guard);
}

Memory::~Memory() {
  if (data_ == nullptr) return;
  permit(data_ - guard, bytes_ + 2 * guard);
  munmap(data_ - guard, bytes_ + 2 * guard);
}

uint8_t* Arena::take(size_t bytes) {
  constexpr size_t block_bytes = size_t{256} << 20;  // of addresses: only what is written takes memory
  const size_t wanted = bytes;
  bytes = (bytes + guard + 63) / 64 * 64;
  if (blocks_.empty() || blocks_.back().size() - used_ < bytes) {
    blocks_.emplace_back(std::max(bytes, block_bytes));
    used_ = 0;
  }
  uint8_t* p = blocks_.back().data() + used_;
  used_ += bytes;
  forbid(p + wanted, bytes - wanted);
  return p;
}

uint8_t* Arena::keep(const uint8_t* data, size_t bytes) {
  uint8_t* place = take(bytes);
  std::memcpy(place, data, bytes);
  return place;
}

void Arena::trim() {
  constexpr size_t page = 4096;
  if (blocks_.empty()) return;
  const size_t used = (used_ + page - 1) / page * page;
  if (used < blocks_.back().size()) madvise(blocks_.back().data() + used, blocks_.back().size() - used, MADV_DONTNEED);
}

void release_free_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

}  // namespace fallow
