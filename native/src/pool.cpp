#include "pool.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <set>
#include <string>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fallow {
namespace {

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Spins until `done()`; yields the core now and then, so that a contended machine makes progress.
template <class Done>
void spin(const Done& done) {
  for (int i = 1; !done(); ++i) {
    relax();
    if (i > 200 && i % 16 == 0) std::this_thread::yield();
  }
}

constexpr auto idle_spin = std::chrono::microseconds(2000);

}  // namespace

ThreadPool::ThreadPool(int threads) : threads_(std::max(1, threads)) {
  for (int t = 1; t < threads_; ++t) workers_.emplace_back([this, t] { work(t); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
    epoch_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& w : workers_) w.join();
}

void ThreadPool::run(Region region, void* context) {
  if (threads_ == 1) return region(context, 0);
  region_ = region;
  context_ = context;
  running_.store(threads_ - 1, std::memory_order_relaxed);
  epoch_.fetch_add(1);  // sequentially consistent, as is sleeping_: a worker sees the epoch or we see it asleep
  if (sleeping_.load() > 0) {
    { const std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }
  region(context, 0);
  spin([this] { return running_.load(std::memory_order_acquire) == 0; });
}

void ThreadPool::barrier() {
  if (threads_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
  } else {
    spin([this, phase] { return phase_.load(std::memory_order_acquire) != phase; });
  }
}

void ThreadPool::work(int thread) {
  uint64_t seen = 0;
  while (true) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 1; epoch_.load(std::memory_order_acquire) == seen; ++i) {
      relax();
      if (i % 256 != 0) continue;
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() - start < idle_spin) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_.fetch_add(1);
      wake_.wait(lock, [&] { return epoch_.load() != seen; });
      sleeping_.fetch_sub(1);
    }
    seen = epoch_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    region_(context_, thread);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return std::max(1u, std::thread::hardware_concurrency());
  std::set<std::pair<int, int>> cores;  // (package, core): hyper-threads of a core count once
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &set)) continue;
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    int package = 0;
    int core = cpu;
    std::ifstream(topology + "physical_package_id") >> package;
    if (!(std::ifstream(topology + "core_id") >> core)) core = cpu;
    cores.insert({package, core});
  }
  int n = static_cast<int>(cores.size());
  std::ifstream quota_file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (quota_file >> quota >> period && quota != "max" && period > 0) {
    n = std::min(n, static_cast<int>(std::ceil(std::stod(quota) / period)));
  }
  return std::max(1, n);
#else
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#endif
}

}  // namespace fallow
