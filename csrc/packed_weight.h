// Packed weights that outlive a call, and how they notice that the weights behind them have changed.
//
// A packed buffer is kHeader bytes followed by what Variant::pack writes. The header holds a fingerprint of the
// weights it was packed from: torch's version counter, which every in-place operation bumps, mixed with the weights
// themselves, because a change through `weight.data` leaves the counter as it was. Up to kHashedWhole bytes every word
// counts; beyond, kSamples words spread evenly do, which notices a change of the whole tensor (an optimizer, a loaded
// checkpoint, a scaling) but may miss a single element written through `.data` of a large tensor.
#pragma once
#include <cstdint>
#include <cstring>
#include <mutex>

#include "variant.h"

namespace convext {

constexpr int64_t kPackedHeader = 64;
constexpr int64_t kHashedWhole = int64_t{64} << 10;
constexpr int64_t kSamples = 1024;

// FNV-like multiply and xor over four lanes, so that the multiplications overlap.
inline uint64_t fingerprint(const void* data, int64_t bytes, uint64_t seed) {
  constexpr uint64_t kPrime = 0x9E3779B97F4A7C15ull;
  const char* const base = static_cast<const char*>(data);
  const int64_t words = bytes / 8;
  const int64_t step = bytes <= kHashedWhole ? 1 : words / kSamples;
  uint64_t lane[4] = {seed, seed ^ kPrime, ~seed, seed * kPrime};
  int64_t index = 0;
  for (int64_t i = 0; i < words; i += step, ++index) {
    uint64_t word;
    std::memcpy(&word, base + 8 * i, 8);
    uint64_t& h = lane[index & 3];
    h = (h ^ word) * kPrime;
    h ^= h >> 29;
  }
  uint64_t tail = 0;  // the last, perhaps partial, word
  const int64_t last = bytes >= 8 ? bytes - 8 : 0;
  std::memcpy(&tail, base + last, bytes - last);
  uint64_t h = tail ^ static_cast<uint64_t>(bytes);
  for (uint64_t part : lane) h = (h ^ part) * kPrime, h ^= h >> 32;
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
