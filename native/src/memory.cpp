#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace fallow {

Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  // Weights are streamed once a step: huge pages spare the walks of the page table.
  if (bytes >= (size_t{4} << 20)) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  data_ = static_cast<uint8_t*>(p);
}

Memory::~Memory() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

uint8_t* Arena::take(size_t bytes) {
  constexpr size_t block_bytes = size_t{256} << 20;  // of addresses: only what is written takes memory
  bytes = (bytes + 63) / 64 * 64;
  if (blocks_.empty() || blocks_.back().size() - used_ < bytes) {
    blocks_.emplace_back(std::max(bytes, block_bytes));
    used_ = 0;
  }
  uint8_t* p = blocks_.back().data() + used_;
  used_ += bytes;
  return p;
}

}  // namespace fallow
