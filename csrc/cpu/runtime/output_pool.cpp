#include "output_pool.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <new>

namespace convext {
namespace {

constexpr int64_t kPage = 4096;
// A block serves requests down to this share of its size: layers' outputs differ by factors of two, and a block that is
// mostly empty would keep warm pages from a result that fits them.
constexpr int64_t kLeastShareInEighths = 7;

// An eighth of the machine's memory, 2 GiB at most. A training step of ResNet-50 with eight images leaves 0.75 GiB.
int64_t default_limit() {
  const int64_t pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  if (pages <= 0 || page <= 0) return int64_t{256} << 20;
  return std::min(pages / 8 * page, int64_t{2} << 30);
}

}  // namespace

OutputPool& OutputPool::of_process() {
  static OutputPool* pool = [] {
    auto* made = new OutputPool;
    // A child of fork() has the forking thread alone: it must not find the lock in another's hand.
    pthread_atfork([] { of_process().mutex_.lock(); }, [] { of_process().mutex_.unlock(); },
                   [] { of_process().mutex_.unlock(); });
    return made;
  }();
  return *pool;
}

OutputPool::OutputPool() : limit_(default_limit()) { blocks_.reserve(kBlocks); }

void* OutputPool::take(int64_t& bytes) {
  const int64_t wanted = (bytes + kPage - 1) / kPage * kPage;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The tightest fit, and of equal ones the one that came back last, for what the caches still hold of it.
    auto best = blocks_.end();
    for (auto it = blocks_.begin(); it != blocks_.end(); ++it) {
      const bool fits = it->bytes >= wanted && it->bytes / 8 * kLeastShareInEighths <= wanted;
      if (fits && (best == blocks_.end() || it->bytes <= best->bytes)) best = it;
    }
    if (best != blocks_.end()) {
      void* data = best->data;
      bytes = best->bytes;
      kept_ -= bytes;
      blocks_.erase(best);
      return data;
    }
  }
  void* data = std::aligned_alloc(64, static_cast<size_t>(wanted));
  if (data == nullptr) throw std::bad_alloc();
  bytes = wanted;
  return data;
}

void OutputPool::give(void* data, int64_t bytes) noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (bytes <= limit()) {
      shrink_to(limit() - bytes);
      if (blocks_.size() == kBlocks) {
        kept_ -= blocks_.front().bytes;
        std::free(blocks_.front().data);
        blocks_.erase(blocks_.begin());
      }
      blocks_.push_back({data, bytes});
      kept_ += bytes;
      return;
    }
  }
  std::free(data);
}

void OutputPool::shrink_to(int64_t bytes) noexcept {
  auto first_kept = blocks_.begin();
  for (; first_kept != blocks_.end() && kept_ > bytes; ++first_kept) {
    kept_ -= first_kept->bytes;
    std::free(first_kept->data);
  }
  blocks_.erase(blocks_.begin(), first_kept);
}

void OutputPool::set_limit(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  limit_ = bytes;
  shrink_to(bytes);
}

int64_t OutputPool::kept() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return kept_;
}

}  // namespace convext
