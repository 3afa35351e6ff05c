// A thread pool for work that lasts microseconds: workers spin between regions and sleep when idle.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace fallow {

// Work of one parallel region: called once on every thread with its index.
using Region = void (*)(void* context, int thread);

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return threads_; }

  // Where the part of `thread` begins when n things are shared out.
  int share(int n, int thread) const { return static_cast<int>(n * int64_t{thread} / threads_); }

  // Runs `region` on all threads, the caller being thread 0, and returns when all have finished.
  void run(Region region, void* context);

  // Inside a region: waits until every thread of it has arrived.
  void barrier();

 private:
  void work(int thread);

  const int threads_;
  std::vector<std::thread> workers_;
  Region region_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> epoch_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
};

// Physical cores that this process may use: affinity and the cgroup's CPU quota respected.
int usable_cores();

}  // namespace fallow
