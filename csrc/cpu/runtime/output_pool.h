// Memory of results that were dropped, kept for the next results.
//
// malloc gives large blocks back to the system when they are freed, and the system clears every page again at the next
// use: on a virtual machine a MiB took 0.6 ms to write for the first time, and 0.04 ms again. The pool hands the same
// pages out again. A tensor owns its block as any tensor owns its memory, until its storage dies; only then does the
// block come back here.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "core/api.h"

namespace convext {

class CONVEXT_API OutputPool {
 public:
  // Smaller results come from malloc, which keeps blocks of their size itself.
  static constexpr int64_t kSmallest = int64_t{64} << 10;

  // The process's pool. It is never destroyed: tensors may outlive every static object.
  static OutputPool& of_process();

  // A block of at least `bytes`, aligned to a cache line; `bytes` becomes the block's size, with which it must be given
  // back. Throws std::bad_alloc.
  void* take(int64_t& bytes);

  // Keeps the block for a later take(), or frees it if that would keep more than the limit. The blocks that were kept
  // longest are freed first.
  void give(void* data, int64_t bytes) noexcept;

  // Bytes that may be kept. 0 switches the pool off; what is kept beyond the limit is freed at once.
  int64_t limit() const { return limit_.load(std::memory_order_relaxed); }
  void set_limit(int64_t bytes);
  // Bytes that are kept now, in use by no tensor.
  int64_t kept();

  // What gives a tensor over a block (an AtenTensorHandle) a storage that can be resized: csrc/storage's. Without
  // it no result lies in the pool.
  using MakeResizable = void (*)(void* tensor);
  MakeResizable make_resizable() const { return make_resizable_.load(std::memory_order_relaxed); }
  void set_make_resizable(MakeResizable function) { make_resizable_.store(function, std::memory_order_relaxed); }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };
  // By the time of their return, the oldest first. A network has some hundred results, few enough to look at all.
  static constexpr size_t kBlocks = 1024;

  OutputPool();
  void shrink_to(int64_t bytes) noexcept;

  std::mutex mutex_;
  std::vector<Block> blocks_;
  int64_t kept_ = 0;
  std::atomic<int64_t> limit_;
  std::atomic<MakeResizable> make_resizable_{nullptr};
};

}  // namespace convext
