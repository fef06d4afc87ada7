// Stand-alone test of packed weights (packed_weight.h): that two problems with one key have one packing, over every CPU
// kernel; what a change of the weights is noticed by, and when; threads. No torch. Exits non-zero on failure.
#include "cpu/runtime/packed_weight.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <tuple>

#include "core/select.h"
#include "harness.h"

namespace {

using namespace convext;

using testing::check;
using testing::kSerial;

// ---- one key, one packing ----

std::vector<ConvProblem> problems() {
  std::vector<ConvProblem> all;
  // Few channels whose filter rows merge, or do not where they are dilated; tails of vectors and panels; groups of one
  // weight; depthwise ones, with one filter a channel and with two.
  const int channels[][3] = {{3, 16, 1},    {4, 24, 1},   {8, 64, 1},   {16, 40, 1}, {33, 65, 1}, {64, 96, 1},
                             {64, 64, 2},   {64, 64, 4},  {128, 64, 4}, {32, 64, 2}, {24, 48, 3}, {128, 64, 8},
                             {64, 128, 16}, {40, 40, 40}, {24, 48, 24}, {48, 48, 1}, {96, 48, 2}, {192, 48, 4},
                             {2, 4, 1},     {4, 4, 2},    {1, 5, 1}};
  for (const auto& [c, k, groups] : channels) {
    for (const auto& [r, s] : {std::pair{1, 1}, {3, 3}, {5, 5}, {7, 7}, {1, 3}, {3, 2}}) {
      for (int stride : {1, 2}) {
        for (int dilation : {1, 2}) {
          for (int pad : {0, 3}) {
            all.push_back({1 + pad, c, 14 + pad, 17, k, r, s, stride, stride, pad, pad, dilation, dilation, groups,
                           DType::kFloat32, Layout::kNHWC, Layout::kNHWC});
          }
        }
      }
    }
  }
  return all;
}

std::string text(const ConvProblem& p) {
  char out[160];
  std::snprintf(out, sizeof out, "c=%d k=%d r=%d s=%d groups=%d stride=%d dil=%d pad=%d h=%d", p.c, p.k, p.r, p.s,
                p.groups, p.stride_h, p.dil_h, p.pad_h, p.h);
  return out;
}

uint64_t hash_of(const std::vector<char>& bytes) {
  uint64_t h = 14695981039346656037ull;
  for (char byte : bytes) h = (h ^ static_cast<unsigned char>(byte)) * 1099511628211ull;
  return h;
}

void test_keys() {
  struct Made {
    PackKey key;
    ConvProblem problem;
    const Variant* variant;
    uint64_t hash;
  };
  // By the weight that was packed, which (k, c / groups, r, s) and the dtype make, and the format.
  std::map<std::tuple<int, int, int, int, int, std::string>, std::vector<Made>> made;
  std::map<std::string, int> visited;
  for (ConvProblem p : problems()) {
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
      p.dtype = dtype;
      std::vector<char> weights(p.w_size() * dtype_size(dtype));
      std::mt19937 random(static_cast<unsigned>(weights.size()));
      // Bytes of finite numbers in every type: the exponent's upper bits are never all ones.
      for (char& byte : weights) byte = static_cast<char>(random() % 60);
      for (Pass pass : {Pass::kFprop, Pass::kDgrad}) {
        for (const Variant* v : variants()) {
          if (v->dtype != dtype || v->isa > detect_cpu_isa() || reject(*v, Device::kCPU, pass, p) != nullptr) continue;
          const PackKey key = PackKey::of(*v, p);
          if (key.format == nullptr) continue;
          ++visited[v->name];
          std::vector<char> packed(key.bytes, 0x5A);
          v->pack(p, weights.data(), packed.data(), kSerial);
          auto& group = made[{p.k, p.c_per_group(), p.r, p.s, static_cast<int>(dtype), key.format}];
          const Made now{key, p, v, hash_of(packed)};
          const auto known = std::find_if(group.begin(), group.end(), [&](const Made& m) { return m.key == key; });
          if (known == group.end()) {
            group.push_back(now);
          } else {
            check(known->hash == now.hash, std::string(v->name) + " packs " + text(p) + " unlike " +
                                               known->variant->name + " " + text(known->problem) + ", with one key");
          }
        }
      }
    }
  }
  for (const Variant* v : variants()) {
    if (v->device != Device::kCPU || v->pass == Pass::kWgrad || v->pack == nullptr) continue;
    if (v->isa > detect_cpu_isa()) continue;
    check(visited[v->name] > 0, std::string(v->name) + " was not visited");
  }
  // The test can fail: one weight under one format with other groups is another packing.
  int apart = 0;
  for (const auto& entry : made) {
    for (const Made& a : entry.second) apart += a.hash != entry.second[0].hash;
  }
  check(apart > 0, "weights under one format with other extents were never packed in another way");
}

// ---- what is noticed, and when ----

int packs = 0;

// A variant that packs by copying.
Variant copying() {
  Variant v{};
  v.name = "copy";
  v.pack_format = [](const ConvProblem&) { return "copy"; };
  v.packed_size = [](const ConvProblem& p) { return p.w_size() * dtype_size(p.dtype); };
  v.pack = [](const ConvProblem& p, const void* w, void* packed, const Parallel&) {
    ++packs;
    std::memcpy(packed, w, p.w_size() * dtype_size(p.dtype));
  };
  return v;
}

// A weight in memory of its own, in any order of dimensions, from `offset` on, with `gap` elements after each filter
// or, where `gap_inside`, after each run along the fastest dimension.
struct Weight {
  std::vector<char> memory;
  WeightView view;
  ConvProblem problem;

  Weight(DType dtype, int k, int c, int r, int s, std::vector<int> order, int offset, int gap, bool gap_inside) {
    const int64_t size[4] = {k, c, r, s};
    view.dtype = dtype;
    int64_t stride = 1;
    for (size_t i = 0; i < order.size(); ++i) {  // fastest first
      view.size[order[i]] = size[order[i]];
      view.stride[order[i]] = stride;
      stride *= size[order[i]];
      if (gap_inside ? i == 0 : i + 2 == order.size()) stride += gap;
    }
    memory.resize((stride + offset) * dtype_size(dtype));
    std::mt19937 random(7);
    for (char& byte : memory) byte = static_cast<char>(random());
    view.data = memory.data() + offset * dtype_size(dtype);
    problem = {};
    problem.n = problem.h = problem.w = 1;
    problem.c = c, problem.k = k, problem.r = r, problem.s = s, problem.groups = 1, problem.dtype = dtype;
  }
  char* element(int64_t i) const {  // i counts in KCRS order
    const int64_t s = view.size[3], rs = view.size[2] * s, crs = view.size[1] * rs;
    const int64_t at =
        i / crs * view.stride[0] + i % crs / rs * view.stride[1] + i % rs / s * view.stride[2] + i % s * view.stride[3];
    return static_cast<char*>(const_cast<void*>(view.data)) + at * dtype_size(view.dtype);
  }
  int64_t numel() const { return view.size[0] * view.size[1] * view.size[2] * view.size[3]; }
  std::vector<char> dense() const {
    const int64_t each = dtype_size(view.dtype);
    std::vector<char> out(numel() * each);
    for (int64_t i = 0; i < numel(); ++i) std::memcpy(out.data() + i * each, element(i), each);
    return out;
  }
};

// Whether a call gets the weights as they are.
bool current(PackedWeight& kept, const Weight& w, int64_t version = 0, const Parallel& parallel = kSerial) {
  static const Variant variant = copying();
  const std::vector<char> now = w.dense();
  const auto lease = kept.get(variant, w.problem, w.view, version, parallel, [&] { return now.data(); });
  return std::memcmp(lease.data(), now.data(), now.size()) == 0;
}

void test_what_is_noticed(const std::string& name, Weight w, int64_t positions) {
  PackedWeight kept;
  packs = 0;
  check(FilterLines(w.view).positions() == positions, name + ": as many positions as a filter has lines");
  for (int64_t i = 0; i < 2 * positions + 3; ++i) check(current(kept, w), name + ": what did not change");
  check(packs == 1, name + ": what does not change is packed once");
  // Every element by itself, from every position: within as many calls as there are positions.
  for (int64_t i = 0; i < w.numel(); ++i) {
    for (int64_t skip = i % 3; skip > 0; --skip) current(kept, w);
    *w.element(i) ^= 1;
    int64_t calls = 1;
    while (!current(kept, w) && calls <= positions) ++calls;
    check(calls <= positions, name + ": an element is noticed within the lines of a filter");
    if (positions == 1) check(calls == 1, name + ": where a filter is a line, an element is noticed at once");
  }
  check(packs == 1 + w.numel(), name + ": each change is packed once");
  // The first element and the last, which the first and the last line hold, at every position.
  for (int64_t turn = 0; turn < positions; ++turn) {
    for (int64_t i : {int64_t{0}, w.numel() - 1}) {
      *w.element(i) ^= 1;
      check(current(kept, w), name + ": the first and the last element are noticed at once");
    }
    for (int64_t skip = 0; skip < turn; ++skip) current(kept, w);
  }
  // A whole filter, whichever, at every position.
  const int64_t filter = w.numel() / w.view.size[0];
  for (int64_t turn = 0; turn < positions + 2; ++turn) {
    const int64_t k = turn % w.view.size[0];
    for (int64_t i = 0; i < filter; ++i) *w.element(k * filter + i) ^= 2;
    check(current(kept, w), name + ": a filter is noticed at once");
    current(kept, w);
  }
  if (w.view.size[0] > 1) {  // two filters exchanged: no sum over them would tell
    const int64_t each = dtype_size(w.view.dtype), last = (w.view.size[0] - 1) * filter;
    for (int64_t i = 0; i < filter; ++i) {
      std::swap_ranges(w.element(i), w.element(i) + each, w.element(last + i));
    }
    check(current(kept, w), name + ": filters exchanged are noticed at once");
  }
  // A version alone: an element that no line at hand shows.
  for (int64_t version = 1; version < 4; ++version) {
    *w.element(w.numel() / 2) ^= 1;
    check(current(kept, w, version), name + ": a version is noticed at once");
  }
  *w.element(w.numel() / 2) ^= 1;
  kept.forget();
  check(kept.bytes() == 0, name + ": what is forgotten holds no memory");
  check(current(kept, w, 3), name + ": what was forgotten is packed anew");
}

void test_places() {
  PackedWeight kept;
  Weight w(DType::kFloat32, 4, 32, 3, 3, {3, 2, 1, 0}, 0, 0, false), other = w;
  other.view.data = other.memory.data();
  check(current(kept, w), "a weight");
  *other.element(500) ^= 1;
  check(current(kept, other), "an address is noticed at once");
  check(current(kept, w), "and back");
  std::swap(w.view.stride[2], w.view.stride[3]);
  check(current(kept, w), "strides are noticed at once");
  w.view.size[0] = w.problem.k = 3;
  check(current(kept, w), "extents are noticed at once");
  w.view.size[0] = w.problem.k = 1, w.view.size[2] = w.problem.r = 1;
  check(current(kept, w), "extents of the filter are noticed at once");
  check(kept.bytes() == 32 * 3 * 4, "packings of former extents are gone");
}

void test_geometries_side_by_side() {
  PackedWeight kept;
  Weight w(DType::kFloat32, 8, 4, 3, 3, {3, 2, 1, 0}, 0, 0, false);
  packs = 0;
  for (int turn = 0; turn < 3; ++turn) {
    for (int groups : {1, 2, 4}) {
      w.problem.groups = groups, w.problem.c = 4 * groups;
      check(current(kept, w), "a geometry");
    }
  }
  check(packs == 3, "each geometry is packed once");
}

// ---- leases and threads ----

void test_leases() {
  static const Variant variant = copying();
  PackedWeight kept;
  Weight w(DType::kFloat32, 4, 8, 3, 3, {3, 2, 1, 0}, 0, 0, false);
  const auto get = [&](int64_t version, const std::vector<char>& now) {
    return kept.get(variant, w.problem, w.view, version, kSerial, [&] { return now.data(); });
  };
  const std::vector<char> before = w.dense();
  const auto held = get(0, before);
  *w.element(5) ^= 1;
  const std::vector<char> after = w.dense();
  const auto next = get(1, after);
  check(std::memcmp(held.data(), before.data(), before.size()) == 0, "what a kernel reads is not written to");
  check(std::memcmp(next.data(), after.data(), after.size()) == 0, "and who comes after reads what is new");
  const void* address = nullptr;
  {
    PackedWeight alone;
    for (int64_t version = 0; version < 5; ++version) {
      const auto lease = alone.get(variant, w.problem, w.view, version, kSerial, [&] { return after.data(); });
      check(version == 0 || lease.data() == address, "memory that nobody reads is packed into again");
      address = lease.data();
    }
  }
}

// Threads that use one PackedWeight for weights at two addresses pack over each other's at every call, and each must
// get its own, whole, for as long as it holds the lease.
void test_threads() {
  static const Variant variant = copying();
  PackedWeight kept;
  Weight weights[2] = {{DType::kFloat32, 16, 16, 3, 3, {3, 2, 1, 0}, 0, 0, false},
                       {DType::kFloat32, 16, 16, 3, 3, {3, 2, 1, 0}, 0, 0, false}};
  const std::vector<char> was[2] = {std::vector<char>(weights[0].memory.size(), 1),
                                    std::vector<char>(weights[0].memory.size(), 2)};
  for (int i : {0, 1}) weights[i].memory = was[i], weights[i].view.data = weights[i].memory.data();
  std::atomic<int> torn{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const std::vector<char>& mine = was[t % 2];
      const Weight& w = weights[t % 2];
      for (int i = 0; i < 500; ++i) {
        const auto lease = kept.get(variant, w.problem, w.view, 0, kSerial, [&] { return mine.data(); });
        for (int j = 0; j < 3; ++j) torn += std::memcmp(lease.data(), mine.data(), w.numel() * 4) != 0;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  check(torn == 0, "no thread reads another's packing, or half of it");
}

void test_numbers() {
  int64_t number = 0;
  {
    PackedWeight::Owner owner, another;
    number = owner.number();
    check(number != 0 && number != another.number(), "numbers differ and are not 0");
    check(PackedWeight::numbered(number) != nullptr, "a number is known while its owner lives");
  }
  check(PackedWeight::numbered(number) == nullptr, "and no longer");
}

}  // namespace

int main() {
  test_keys();
  const std::vector<int> kcrs = {3, 2, 1, 0}, krsc = {1, 3, 2, 0}, ckrs = {3, 2, 0, 1};
  const auto f32 = DType::kFloat32;
  test_what_is_noticed("3x3", {f32, 6, 32, 3, 3, kcrs, 0, 0, false}, 18);
  test_what_is_noticed("3x3 channels-last", {f32, 6, 32, 3, 3, krsc, 0, 0, false}, 18);
  test_what_is_noticed("7x7 of three channels, tails", {f32, 8, 3, 7, 7, kcrs, 3, 0, false}, 10);
  test_what_is_noticed("1x1 of twenty channels", {f32, 60, 20, 1, 1, kcrs, 0, 0, false}, 2);
  test_what_is_noticed("1x1 of six channels", {f32, 37, 6, 1, 1, kcrs, 1, 0, false}, 1);
  test_what_is_noticed("1x1 of one channel, less than a line in all", {f32, 3, 1, 1, 1, kcrs, 0, 0, false}, 1);
  test_what_is_noticed("1x1 transposed", {f32, 12, 40, 1, 1, ckrs, 0, 0, false}, 3);
  test_what_is_noticed("depthwise", {f32, 33, 1, 3, 3, kcrs, 0, 0, false}, 1);
  test_what_is_noticed("depthwise with gaps between filters", {f32, 33, 1, 3, 3, kcrs, 0, 5, false}, 1);
  test_what_is_noticed("gaps between filters", {f32, 7, 5, 3, 3, kcrs, 0, 5, false}, 3);
  test_what_is_noticed("gaps within filters", {f32, 7, 5, 3, 3, kcrs, 2, 1, true}, 3);
  test_what_is_noticed("one filter", {f32, 1, 1100, 1, 1, kcrs, 0, 0, false}, 69);
  test_what_is_noticed("float64", {DType::kFloat64, 12, 5, 3, 3, kcrs, 0, 0, false}, 6);
  test_what_is_noticed("bfloat16", {DType::kBFloat16, 50, 5, 3, 3, krsc, 1, 0, false}, 2);
  test_what_is_noticed("of 4 KiB, compared whole", {f32, 8, 128, 1, 1, kcrs, 0, 0, false}, 1);
  test_what_is_noticed("large", {f32, 4, 300, 1, 1, kcrs, 0, 0, false}, 19);
  test_places();
  test_geometries_side_by_side();
  test_leases();
  test_threads();
  test_numbers();
  return testing::summary();
}
