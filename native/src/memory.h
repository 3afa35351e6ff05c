// Large, 64-byte aligned, zeroed memory that is only backed by pages once it is touched.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace fallow {

enum class Pages { large, small };

class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes, Pages pages = Pages::large);  // throws std::bad_alloc
  ~Memory();
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// Memory for things that stay as long as the arena, side by side, so that large pages serve small things too.
class Arena {
 public:
  uint8_t* take(size_t bytes);  // 64-byte aligned, zeroed; throws std::bad_alloc
  uint8_t* keep(const uint8_t* data, size_t bytes);  // a copy; throws std::bad_alloc
  void trim();                  // nothing more will be taken: what large pages hold beyond it goes back

 private:
  std::vector<Memory> blocks_;
  size_t used_ = 0;  // of the last block
};

void release_free_memory();  // blocks that malloc keeps for later go back to the system

}  // namespace fallow
