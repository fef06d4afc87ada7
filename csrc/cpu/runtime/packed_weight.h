// Packed weights that outlive a call, and how they notice that the weights behind them have changed. No torch here.
//
// A PackedWeight keeps every packing that kernels have needed of one weight tensor, each under all that its bytes
// follow from (PackKey), and a fingerprint of the weights that they were made of. A call notices at once another
// version, address, extent, stride or dtype; and because a change through `weight.data`, through NumPy, or by another
// process that shares the memory leaves all of these as they were, it compares one line of every filter besides, at a
// position that moves from call to call, and the first and the last line of all. So a change of whole filters is seen
// by the very next call, and one of a single element within as many calls as a filter has lines
// (`FilterLines::positions`), whichever passes or geometries they are of. To compare everything at each call would read
// all the weights, which a network that runs on packed ones has in no cache, a second time.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/api.h"
#include "core/variant.h"

namespace convext {

// The weights as they lie: KCRS extents, strides in elements. Of a volume's filters, planes and rows are one axis, T * R.
struct WeightView {
  const void* data;
  int64_t size[4], stride[4];
  DType dtype;

  bool operator==(const WeightView& o) const {
    return data == o.data && dtype == o.dtype && std::memcmp(size, o.size, sizeof size) == 0 &&
           std::memcmp(stride, o.stride, sizeof stride) == 0;
  }
};

// All that the bytes of a packing follow from, besides the weights: the name of the order, which says type, instruction
// set and kernel's parameters, and the extents that every `pack` turns into an order. The pass is not among them: where
// two passes name one order they share it.
struct PackKey {
  const char* format;  // nullptr: the kernel reads KCRS as it is
  int32_t c, k, t, r, s, groups;
  DType dtype;
  int64_t bytes;

  static PackKey of(const Variant& variant, const ConvProblem& p) {
    const char* const format = variant.pack_format == nullptr ? nullptr : variant.pack_format(p);
    return {format, p.c, p.k, p.t, p.r, p.s, p.groups, p.dtype, format == nullptr ? 0 : variant.packed_size(p)};
  }
  bool operator==(const PackKey& o) const {
    return c == o.c && k == o.k && t == o.t && r == o.r && s == o.s && groups == o.groups && dtype == o.dtype &&
           bytes == o.bytes &&
           (format == o.format || (format != nullptr && o.format != nullptr && std::strcmp(format, o.format) == 0));
  }
};

// The filters of a weight cut into lines of kLine bytes. Where the elements of a filter lie without gaps, in whatever
// order (KCRS, channels-last), a line is a run of its bytes, from its first on; the last one overlaps the one before
// it. Where there are gaps, a line is so many elements in the order CRS. Filters of a line at most that lie one behind
// the other, and those of a weight of kWhole bytes at most, are taken together: then all is at the one position that
// there is.
class FilterLines {
 public:
  static constexpr int64_t kLine = kCacheLine;
  static constexpr int64_t kWhole = 4096;
  static constexpr int64_t kAhead = 24;  // filters

  FilterLines() = default;
  explicit FilterLines(const WeightView& w)
      : view_(w),
        element_(dtype_size(w.dtype)),
        filters_(w.size[0]),
        bytes_(w.size[1] * w.size[2] * w.size[3] * element_),
        pitch_(w.stride[0] * element_),
        dense_(is_dense(w)) {
    if (filters_ == 0 || bytes_ == 0) {
      filters_ = bytes_ = 0;
    } else if (dense_ && (pitch_ == bytes_ || filters_ == 1) && (bytes_ <= kLine || filters_ * bytes_ <= kWhole)) {
      whole_ = filters_ * bytes_;
    }
  }

  // Calls until every byte has been compared; what is looked at in one of them is at one position.
  int64_t positions() const { return whole_ > 0 || bytes_ == 0 ? 1 : (bytes_ + kLine - 1) / kLine; }
  int64_t bytes() const { return filters_ * bytes_; }

  // visit(line, i) for each line at positions [begin, end), filter by filter: `line` points to kLine bytes, and i is
  // the position less `begin`.
  template <class F>
  void visit(int64_t begin, int64_t end, F&& f) const {
    if (whole_ > 0) {
      for (int64_t at = 0; at < whole_; at += kLine) take(view_.data, at, whole_, 0, f);
      return;
    }
    for (int64_t k = 0; k < filters_; ++k) {
      const char* const filter = static_cast<const char*>(view_.data) + k * pitch_;
      // Lines a filter apart, which no hardware prefetches. All at once, before the layer that runs in between,
      // took longer: what came was gone again. Past the end nothing is read.
      if (end - begin == 1) __builtin_prefetch(filter + kAhead * pitch_ + begin * kLine);
      for (int64_t j = begin; j < end; ++j) one(filter, j, j - begin, f);
    }
  }

  // visit(line, 0) for the first line of the first filter and the last one of the last, where filters are apart.
  template <class F>
  void visit_ends(F&& f) const {
    if (whole_ > 0 || filters_ == 0) return;
    const char* const first = static_cast<const char*>(view_.data);
    one(first, 0, 0, f);
    one(first + (filters_ - 1) * pitch_, positions() - 1, 0, f);
  }

 private:
  static int64_t start(int64_t at, int64_t bytes) { return at + kLine <= bytes || bytes < kLine ? at : bytes - kLine; }

  // The elements of a filter lie without gaps, whatever their order; the stride of an extent of one says nothing.
  static bool is_dense(const WeightView& w) {
    int64_t expected = 1, left = w.size[1] * w.size[2] * w.size[3];
    bool used[4] = {};
    while (left > 1) {
      int found = 0;
      for (int i = 1; i < 4; ++i) {
        if (!used[i] && w.size[i] > 1 && w.stride[i] == expected) found = i;
      }
      if (found == 0) return false;
      used[found] = true;
      expected *= w.size[found];
      left /= w.size[found];
    }
    return true;
  }

  template <class F>
  void one(const char* filter, int64_t line, int64_t position, F& f) const {
    if (dense_) {
      take(filter, line * kLine, bytes_, position, f);
    } else {
      gather(filter, line, position, f);
    }
  }

  template <class F>
  static void take(const void* base, int64_t at, int64_t bytes, int64_t position, F& f) {
    const char* const line = static_cast<const char*>(base) + start(at, bytes);
    if (bytes >= kLine) return f(line, position);
    alignas(64) char padded[kLine] = {};
    std::memcpy(padded, line, bytes);
    f(padded, position);
  }

  template <class F>
  void gather(const char* filter, int64_t line, int64_t position, F& f) const {
    alignas(64) char gathered[kLine] = {};
    const int64_t each = kLine / element_, s = view_.size[3], rs = view_.size[2] * s, count = bytes_ / element_;
    for (int64_t i = line * each, to = 0; i < count && i < (line + 1) * each; ++i, to += element_) {
      const int64_t offset = i / rs * view_.stride[1] + i % rs / s * view_.stride[2] + i % s * view_.stride[3];
      std::memcpy(gathered + to, filter + offset * element_, element_);
    }
    f(gathered, position);
  }

  WeightView view_{};
  int64_t element_ = 0, filters_ = 0, bytes_ = 0, pitch_ = 0, whole_ = 0;
  bool dense_ = false;
};

// A hash of lines in their order. Each step is a bijection of the word that it takes in, and of what came before, so
// that lines that differ in one word never have one hash; others share one with a probability of 2^-64. Eight chains
// run side by side, because a multiplication takes longer than to start the next.
class LineHash {
 public:
  void operator()(const void* line) {
    uint64_t words[kWords];
    std::memcpy(words, line, sizeof words);
    for (int i = 0; i < kWords; ++i) chain_[i] = mixed(chain_[i], words[i]);
  }
  uint64_t value() const {
    uint64_t h = 0;
    for (uint64_t chain : chain_) h = mixed(h, chain);
    return h;
  }

 private:
  static constexpr int kWords = FilterLines::kLine / 8;
  static uint64_t mixed(uint64_t h, uint64_t word) {
    h = (h ^ word) * 0x9E3779B97F4A7C15ull;
    return h ^ h >> 29;
  }
  uint64_t chain_[kWords] = {};
};

// All packings of one weight tensor, for as long as its memory lives. Threads may share it: who packs anew while
// another thread's kernel still reads the former packing writes elsewhere.
class PackedWeight {
  struct Packing {
    PackKey key;
    int64_t generation = 0;  // of the weights that it was made of
    char* data;
    explicit Packing(const PackKey& k)
        : key(k), data(static_cast<char*>(std::aligned_alloc(64, (k.bytes + 63) / 64 * 64))) {
      if (data == nullptr && k.bytes > 0) throw std::bad_alloc();
    }
    ~Packing() { std::free(data); }
    Packing(const Packing&) = delete;
    Packing& operator=(const Packing&) = delete;
  };

 public:
  // A packing stays what it is while somebody holds this.
  class Lease {
   public:
    const void* data() const { return packing_->data; }

   private:
    friend class PackedWeight;
    std::shared_ptr<const Packing> packing_;
  };

  // The weights packed for that variant and problem, from what is kept where they have not changed. `version` moves
  // with every change that its owner knows of. `load()` returns the weights as dense KCRS in the kernel's dtype, and is
  // called only where they are packed.
  template <class Load>
  Lease get(const Variant& variant, const ConvProblem& problem, const WeightView& weights, int64_t version,
            const Parallel& parallel, Load&& load) {
    const PackKey key = PackKey::of(variant, problem);
    const std::lock_guard<std::mutex> lock(mutex_);  // threads that find the same weights stale pack them once
    // First the fingerprint, then the packing: what changes in between is noticed later.
    if (!unchanged(weights, version)) remember(weights, version, parallel);
    std::shared_ptr<Packing>& kept = packing(key);
    if (kept->generation != generation_) {
      if (kept.use_count() > 1) kept = std::make_shared<Packing>(key);
      std::atomic_thread_fence(std::memory_order_acquire);  // after the last read of whoever held it
      kept->generation = 0;
      variant.pack(problem, load(), kept->data, parallel);
      kept->generation = generation_;
    }
    Lease lease;
    lease.packing_ = kept;
    return lease;
  }

  // The next `get` packs anew.
  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    known_ = false;
    packings_.clear();
  }

  // Bytes of all packings.
  int64_t bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t sum = 0;
    for (const auto& packing : packings_) sum += packing->key.bytes;
    return sum;
  }

  // PackedWeights travel through torch's operators, which take no pointers, as numbers, never 0, which are valid while
  // their owner lives.
  static std::shared_ptr<PackedWeight> numbered(int64_t number) {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    const auto found = registry().all.find(number);
    return found == registry().all.end() ? nullptr : found->second;
  }

  class Owner {
   public:
    Owner() : weight_(std::make_shared<PackedWeight>()) {
      const std::lock_guard<std::mutex> lock(registry().mutex);
      number_ = ++registry().last;
      registry().all.emplace(number_, weight_);
    }
    ~Owner() {
      const std::lock_guard<std::mutex> lock(registry().mutex);
      registry().all.erase(number_);
    }
    Owner(const Owner&) = delete;
    Owner& operator=(const Owner&) = delete;
    int64_t number() const { return number_; }
    PackedWeight* operator->() const { return weight_.get(); }

   private:
    std::shared_ptr<PackedWeight> weight_;
    int64_t number_;
  };

 private:
  bool unchanged(const WeightView& weights, int64_t version) {
    if (!known_ || version != version_ || !(weights == weights_)) return false;
    const int64_t position = position_;
    LineHash hash;
    lines_.visit(position, position + 1, [&](const void* line, int64_t) { hash(line); });
    position_ = position + 1 < lines_.positions() ? position + 1 : 0;
    return hash.value() == hashes_[position] && hash_of_ends() == ends_;
  }

  uint64_t hash_of_ends() const {
    LineHash hash;
    lines_.visit_ends([&](const void* line, int64_t) { hash(line); });
    return hash.value();
  }

  // Takes the fingerprint of these weights: all their lines.
  void remember(const WeightView& weights, int64_t version, const Parallel& parallel) {
    known_ = false;
    const FilterLines lines(weights);
    const int64_t positions = lines.positions();
    hashes_.resize(positions);
    constexpr int64_t kRun = 16, kAlone = 1 << 16;  // positions that are read in one go; bytes worth several threads
    const Parallel& sharing = lines.bytes() > kAlone ? parallel : Parallel{nullptr, 1};
    sharing.for_each((positions + kRun - 1) / kRun, [&](int64_t run) {
      const int64_t begin = run * kRun, end = begin + kRun < positions ? begin + kRun : positions;
      LineHash hash[kRun];
      lines.visit(begin, end, [&](const void* line, int64_t i) { hash[i](line); });
      for (int64_t i = begin; i < end; ++i) hashes_[i] = hash[i - begin].value();
    });
    if (std::memcmp(weights.size, weights_.size, sizeof weights.size) != 0) packings_.clear();
    weights_ = weights, version_ = version, lines_ = lines;
    ends_ = hash_of_ends();
    position_ = 0;
    ++generation_;
    known_ = true;
  }

  std::shared_ptr<Packing>& packing(const PackKey& key) {
    for (auto& packing : packings_) {
      if (packing->key == key) return packing;
    }
    return packings_.emplace_back(std::make_shared<Packing>(key));
  }

  struct Registry {
    std::mutex mutex;
    int64_t last = 0;
    std::unordered_map<int64_t, std::shared_ptr<PackedWeight>> all;
  };
  CONVEXT_API static Registry& registry();  // one for the library and its bindings

  mutable std::mutex mutex_;
  bool known_ = false;
  WeightView weights_{};
  int64_t version_ = 0, generation_ = 0, position_ = 0;
  FilterLines lines_;
  std::vector<uint64_t> hashes_;  // by position, of that line of every filter
  uint64_t ends_ = 0;             // of the first line and the last
  std::vector<std::shared_ptr<Packing>> packings_;
};

}  // namespace convext
