// Packed weights that outlive a call, and how they notice that the weights behind them have changed.
//
// A packed buffer is kHeader bytes followed by what Variant::pack writes. The header holds a fingerprint of the
// weights it was packed from: torch's version counter, which every in-place operation bumps, mixed with a sample of
// the weights themselves, because a change through `weight.data` leaves the counter as it was. The sample is every
// word up to kHashedWhole bytes and kSamples words spread evenly beyond: few, because the original weights are not in
// any cache while a network runs on the packed ones. It notices a change of the whole tensor (an optimizer, a loaded
// checkpoint, a scaling); a single element written through `.data` of a large tensor it may miss.
#pragma once
#include <cstdint>
#include <cstring>
#include <mutex>

#include "core/variant.h"

namespace convext {

constexpr int64_t kPackedHeader = 64;
constexpr int64_t kHashedWhole = 2048;
constexpr int64_t kSamples = 16;

// visit(offset, size): the bytes that a fingerprint looks at.
template <class F>
void visit_fingerprint(int64_t bytes, F&& visit) {
  const int64_t words = bytes / 8, step = bytes <= kHashedWhole ? 1 : words / kSamples;
  for (int64_t i = 0; i < words; i += step) visit(8 * i, 8);
  visit(bytes >= 8 ? bytes - 8 : 0, bytes >= 8 ? 8 : bytes);
}

// Multiply and xor, as in FNV, over every word or over a sample of them, and the last one.
inline uint64_t fingerprint(const void* data, int64_t bytes, uint64_t seed) {
  constexpr uint64_t kPrime = 0x9E3779B97F4A7C15ull;
  const char* const base = static_cast<const char*>(data);
  uint64_t h = seed ^ static_cast<uint64_t>(bytes);
  visit_fingerprint(bytes, [&](int64_t at, int64_t size) {
    uint64_t word = 0;
    std::memcpy(&word, base + at, size);
    h = (h ^ word) * kPrime;
    h ^= h >> 29;
  });
  return h | 1;  // never 0, which marks an empty buffer
}

// The packed weights in `buffer`, packed anew first where they are stale. `load()` returns the weights as dense KCRS in
// the kernel's dtype, and is called only then.
template <class Load>
const void* refresh_packed(const Variant& variant, const ConvProblem& problem, uint64_t print, void* buffer,
                           const Parallel& parallel, Load&& load) {
  static std::mutex packing;  // two threads that find the same weights stale pack them once
  auto* const header = static_cast<uint64_t*>(buffer);
  char* const packed = static_cast<char*>(buffer) + kPackedHeader;
  if (__atomic_load_n(header, __ATOMIC_ACQUIRE) == print) return packed;
  std::lock_guard<std::mutex> lock(packing);
  if (__atomic_load_n(header, __ATOMIC_ACQUIRE) == print) return packed;
  __atomic_store_n(header, uint64_t{0}, __ATOMIC_RELEASE);
  variant.pack(problem, load(), packed, parallel);
  __atomic_store_n(header, print, __ATOMIC_RELEASE);
  return packed;
}

}  // namespace convext
