// Bank conflicts of every access of a warp to shared memory, sectors of every one to global memory (emulator.h).
//
// Fibers do not go in step, so accesses are put together afterwards: lanes that are at one place in the machine code for
// the n-th time since they last met did that in one instruction. g++ is held to copying vectors whole
// (tests/support/cuda_on_cpu.py), so that one of 16 bytes is one access, as nvcc makes it; tests/cuda/test_accesses.py
// compares the two.
//
// This file itself must be compiled without the sanitizer.
#include <algorithm>
#include <unordered_map>

#include "emulator.h"

namespace cuda_on_cpu {
namespace {

struct Place {
  const void* site;
  bool shared, write;
  bool operator==(const Place&) const = default;
};
struct PlaceHash {
  size_t operator()(const Place& p) const { return reinterpret_cast<size_t>(p.site) * 4 + p.shared * 2 + p.write; }
};

// The n-th time since the warp's lanes last met.
struct Instance {
  Place place;
  int warp;
  uint32_t meetings, nth;
  bool operator==(const Instance&) const = default;
};
struct InstanceHash {
  size_t operator()(const Instance& i) const {
    return PlaceHash()(i.place) ^ (size_t(i.meetings) << 40) ^ (size_t(i.nth) << 20) ^ (size_t(i.warp) << 10);
  }
};

struct Lanes {
  int count = 0, bytes = 0;
  uintptr_t address[32];
  int lane[32];
};

struct Visits {
  uint32_t meetings = 0;
  std::unordered_map<Place, uint32_t, PlaceHash> times;
};

std::unordered_map<Place, WarpAccesses, PlaceHash> sites;
std::unordered_map<Instance, Lanes, InstanceHash> unfinished;
std::vector<Visits> visits;  // by thread

constexpr int kBanks = 32;

void add_shared(const Lanes& lanes, WarpAccesses& total) {
  const int words = std::max(1, lanes.bytes / 4), at_once = kBanks / words;
  for (int first = 0; first < 32; first += at_once) {
    std::vector<uintptr_t> touched;
    for (int i = 0; i < lanes.count; ++i) {
      if (lanes.lane[i] < first || lanes.lane[i] >= first + at_once) continue;
      for (int w = 0; w < words; ++w) touched.push_back(lanes.address[i] / 4 + w);
    }
    if (touched.empty()) continue;
    std::sort(touched.begin(), touched.end());
    touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
    int in_bank[kBanks] = {};
    for (const uintptr_t word : touched) ++in_bank[word % kBanks];
    total.turns += *std::max_element(in_bank, in_bank + kBanks);
    ++total.least_turns;
  }
}

void add_global(const Lanes& lanes, WarpAccesses& total) {
  std::vector<uintptr_t> bytes, sectors;
  for (int i = 0; i < lanes.count; ++i) {
    for (int b = 0; b < lanes.bytes; ++b) bytes.push_back(lanes.address[i] + b);
  }
  std::sort(bytes.begin(), bytes.end());
  bytes.erase(std::unique(bytes.begin(), bytes.end()), bytes.end());
  for (const uintptr_t b : bytes) {
    if (sectors.empty() || sectors.back() != b / 32) sectors.push_back(b / 32);
  }
  total.sectors += sectors.size();
  total.least_sectors += (bytes.size() + 31) / 32;
}

void finish(const Place& place, const Lanes& lanes) {
  WarpAccesses& total = sites[place];
  total.site = place.site, total.shared = place.shared, total.write = place.write;
  total.bytes = lanes.bytes;
  ++total.warps;
  if (place.shared) add_shared(lanes, total);
  else add_global(lanes, total);
}

}  // namespace

void count_warp_access(const void* site, const void* pointer, size_t bytes, bool shared, bool write) {
  if (!shared && bytes && !buffer_of(pointer)) return;
  const Place place{site, shared, write};
  if (visits.size() < static_cast<size_t>(block.threads)) visits.resize(block.threads);
  Visits& mine = visits[current->linear];
  if (mine.meetings != current->meetings) mine.times.clear(), mine.meetings = current->meetings;
  const Instance instance{place, current->warp, current->meetings, mine.times[place]++};
  if (!bytes) return;
  Lanes& lanes = unfinished[instance];
  // Banks are counted from the start of shared memory, which a stage of the hardware's begins with.
  lanes.address[lanes.count] =
      shared ? static_cast<const unsigned char*>(pointer) - shared_memory() : reinterpret_cast<uintptr_t>(pointer);
  lanes.lane[lanes.count++] = current->lane;
  lanes.bytes = static_cast<int>(bytes);
  if (lanes.count == std::min(32, block.threads - current->warp * 32)) {
    finish(place, lanes);
    unfinished.erase(instance);
  }
}

void end_warp_accesses() {
  for (const auto& [instance, lanes] : unfinished) finish(instance.place, lanes);
  unfinished.clear();
  visits.clear();
}

std::vector<WarpAccesses> warp_accesses() {
  end_warp_accesses();
  std::vector<WarpAccesses> found;
  for (const auto& [place, total] : sites) found.push_back(total);
  std::sort(found.begin(), found.end(), [](const WarpAccesses& a, const WarpAccesses& b) { return a.site < b.site; });
  return found;
}

void reset_warp_accesses() {
  end_warp_accesses();
  sites.clear();
}

}  // namespace cuda_on_cpu
