// Cooperative fibers: one stack a CUDA thread, switched by hand.
#pragma once
#include <cstddef>

namespace cuda_on_cpu {

// A stack with an unmapped page below it, and the registers of a function suspended on it. Fibers are reused from block
// to block; a fiber that is abandoned half-way keeps nothing but its stack.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the fiber ready to run entry() from its top. `stagger` shifts the stack so that the same variable of
  // different fibers does not fall into the same cache set.
  void prepare(void (*entry)(), unsigned stagger);

  void resume();                    // from the scheduler into the fiber
  void suspend(bool finish);        // from the fiber back to the scheduler; finish: it never runs again
  bool owns(const void* p) const {  // whether p lies on the stack
    return p >= stack_ && p < stack_ + kStackBytes;
  }
  static void enter();  // first call in entry(): completes the switch for the address sanitizer

 private:
  static constexpr size_t kStackBytes = 128 * 1024;
  char* stack_;
  void* stack_pointer_ = nullptr;
  void* fake_stack_ = nullptr;  // the address sanitizer's own
};

}  // namespace cuda_on_cpu
