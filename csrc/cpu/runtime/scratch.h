// Scratch memory that CPU ops keep between calls, so that staging and workspaces touch warm pages.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace convext {

constexpr int64_t kScratchAlignment = 64;
// A thread keeps at most this much between calls; larger requests are given back when the call ends, and every page is
// fetched anew by the next one.
constexpr int64_t kScratchKept = int64_t{256} << 20;

// A bump allocator over one block. Use: reserve() the sum of what the call needs, then take() the pieces.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(block_); }

  static constexpr int64_t padded(int64_t bytes) {
    return (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
  }

  void reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= capacity_) return;
    std::free(block_);
    capacity_ = 0;
    block_ = static_cast<char*>(std::aligned_alloc(kScratchAlignment, padded(bytes)));
    if (block_ == nullptr) throw std::bad_alloc();
    capacity_ = padded(bytes);
  }

  void* take(int64_t bytes) {
    if (bytes <= 0) return nullptr;
    void* piece = block_ + used_;
    used_ += padded(bytes);
    return piece;
  }

  void trim() {
    if (capacity_ <= kScratchKept) return;
    std::free(block_);
    block_ = nullptr;
    capacity_ = 0;
  }

 private:
  char* block_ = nullptr;
  int64_t capacity_ = 0;
  int64_t used_ = 0;
};

}  // namespace convext
