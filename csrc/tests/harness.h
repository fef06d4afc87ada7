// What the stand-alone tests of CPU code share: checks that are counted, threads, values, guarded memory.
#pragma once
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/variant.h"

namespace convext::testing {

inline std::atomic<int> failures{0}, checks{0};  // of all threads

inline void check(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED %s\n", what.c_str());
}

// Prints the outcome and returns main()'s exit status.
inline int summary() {
  std::printf("%d checks, %d failed\n", checks.load(), failures.load());
  return failures == 0 ? 0 : 1;
}

constexpr Parallel kSerial{nullptr, 1};

inline int threads_to_use = 1;

// Cuts every range into as many chunks as there are threads, each on a fresh one.
inline Parallel parallel_with(int threads) {
  threads_to_use = threads;
  return {[](int64_t begin, int64_t end, int64_t, RangeBody body, void* context) {
    std::vector<std::thread> pool;
    const int64_t count = end - begin;
    for (int64_t t = 1; t < threads_to_use; ++t) {
      pool.emplace_back(body, context, begin + count * t / threads_to_use, begin + count * (t + 1) / threads_to_use);
    }
    body(context, begin, begin + count / threads_to_use);
    for (std::thread& thread : pool) thread.join();
  }, threads};
}

// 64-byte aligned memory of its own, filled with NaN, so that the sanitizers see what leaves it.
struct Buffer {
  std::unique_ptr<char, void (*)(void*)> data;
  explicit Buffer(int64_t bytes)
      : data(static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64)), std::free) {
    std::memset(data.get(), 0xFF, (bytes + 127) / 64 * 64);
  }
  float* floats() { return reinterpret_cast<float*>(data.get()); }
};

inline std::mt19937 generator(7);

inline std::vector<float> random_values(int64_t count) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(count);
  for (float& v : values) v = uniform(generator);
  return values;
}

struct NamedIsa {
  Isa isa;
  const char* name;
};

// The instruction sets with kernels of float32 up to `best`, the least one first.
inline std::vector<NamedIsa> instruction_sets(Isa best) {
  std::vector<NamedIsa> sets;
  for (const NamedIsa& set : {NamedIsa{Isa::kPortable, "portable"}, {Isa::kAVX2, "avx2"}, {Isa::kAVX512, "avx512"}}) {
    if (set.isa <= best) sets.push_back(set);
  }
  return sets;
}

}  // namespace convext::testing
