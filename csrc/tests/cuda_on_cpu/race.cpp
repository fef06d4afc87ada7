// The shared-memory race check, and the counting of accesses.
//
// Kernels are compiled with -fsanitize=thread and linked without its library: every load and store then calls one of
// the __tsan_ functions below. Shared memory is checked with vector clocks: an access races with an earlier one of
// another thread unless a barrier (__syncthreads, __syncwarp) lies between. A copy under way (cp.async issued, not yet
// waited for) may not be read at all. Everything else that falls into a DeviceBuffer is counted, and how warps access
// both where config.count_accesses asks for it.
//
// This file itself must be compiled without the sanitizer.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "emulator.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kCellBytes = 2;  // the smallest element that two threads may write side by side
constexpr int kReaders = 4;       // the latest readers of a cell are remembered

struct Cell {
  uint32_t write_clock = 0;
  uint32_t read_clock[kReaders] = {};
  int16_t writer = -1;
  int16_t reader[kReaders] = {-1, -1, -1, -1};
  bool copy_under_way = false;
};

std::vector<Cell> cells;
std::vector<uint32_t> clocks;  // (threads, threads): what each thread knows of the others
bool active = true;            // off inside the check itself

uint32_t* clock_of(int thread) { return &clocks[static_cast<size_t>(thread) * block.threads]; }

bool checks() { return !config.traffic_only && !config.count_accesses; }

void block_starts() {
  if (config.count_accesses) end_warp_accesses();
  if (!checks()) return;
  cells.assign(block.shared_bytes / kCellBytes, Cell{});
  clocks.assign(static_cast<size_t>(block.threads) * block.threads, 0);
  for (int i = 0; i < block.threads; ++i) clock_of(i)[i] = 1;
}

void threads_synchronise(const int* threads, int count) {
  if (!checks()) return;
  static std::vector<uint32_t> joined;
  joined.assign(block.threads, 0);
  for (int i = 0; i < count; ++i) {
    const uint32_t* clock = clock_of(threads[i]);
    for (int k = 0; k < block.threads; ++k) joined[k] = std::max(joined[k], clock[k]);
  }
  for (int i = 0; i < count; ++i) {
    memcpy(clock_of(threads[i]), joined.data(), block.threads * sizeof(uint32_t));
    ++clock_of(threads[i])[threads[i]];
  }
}

void report(const char* what, size_t cell, int other) {
  char text[160];
  snprintf(text, sizeof text, "race: %s at shared byte %zu, threads %d and %d", what, cell * kCellBytes,
           current->linear, other);
  active = true;
  fail(text);
}

void check_shared(size_t offset, size_t bytes, bool write) {
  const int self = current->linear;
  const uint32_t* known = clock_of(self);
  for (size_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    Cell& cell = cells[i];
    if (cell.copy_under_way) report("an access while a cp.async is under way", i, cell.writer);
    if (!write && cell.writer < 0) report("a read of what nobody wrote", i, self);
    if (cell.writer >= 0 && cell.writer != self && cell.write_clock > known[cell.writer]) {
      report(write ? "two writes" : "a read after a write", i, cell.writer);
    }
    if (write) {
      for (int k = 0; k < kReaders; ++k) {
        if (cell.reader[k] >= 0 && cell.reader[k] != self && cell.read_clock[k] > known[cell.reader[k]]) {
          report("a write after a read", i, cell.reader[k]);
        }
        cell.reader[k] = -1;
      }
      cell.writer = static_cast<int16_t>(self);
      cell.write_clock = known[self];
    } else {
      int slot = self % kReaders;
      for (int k = 0; k < kReaders; ++k) {
        if (cell.reader[k] == self || cell.reader[k] < 0) {
          slot = k;
          break;
        }
      }
      cell.reader[slot] = static_cast<int16_t>(self);
      cell.read_clock[slot] = known[self];
    }
  }
}

void access(const void* site, const void* pointer, size_t bytes, bool write) {
  if (!active || !current || !bytes || current->fiber.owns(pointer)) return;
  active = false;
  const intptr_t offset = static_cast<const unsigned char*>(pointer) - shared_memory();
  const bool shared = offset >= 0 && offset < static_cast<intptr_t>(block.shared_bytes);
  if (shared && checks()) check_shared(offset, bytes, write);
  if (!shared) count_global_access(pointer, bytes, write);
  if (config.count_accesses) count_warp_access(site, pointer, bytes, shared, write);
  active = true;
}

void access_here(const void* pointer, size_t bytes, bool write) {
  access(__builtin_return_address(0), pointer, bytes, write);
}

// For every cell that a copy writes.
template <class F>
void for_cells(const AsyncCopy& copy, F&& f) {
  const size_t offset = shared_offset(copy.destination, copy.bytes + copy.zero_bytes);
  for (size_t i = offset / kCellBytes; i < (offset + copy.bytes + copy.zero_bytes) / kCellBytes; ++i) f(cells[i]);
}

void copy_issued(const AsyncCopy& copy, const void* site) {
  access(site, copy.destination, copy.bytes + copy.zero_bytes, true);
  access(site, copy.source, copy.bytes, false);
  if (config.count_accesses && !copy.bytes) count_warp_access(site, copy.source, 0, false, false);
  if (!checks()) return;
  for_cells(copy, [](Cell& cell) { cell.copy_under_way = true; });
}

void copy_landed(const AsyncCopy& copy) {
  if (!checks()) return;
  const int self = current->linear;
  for_cells(copy, [&](Cell& cell) {
    if (cell.writer != self) return;
    cell.copy_under_way = false;
    cell.write_clock = clock_of(self)[self];
  });
}

[[maybe_unused]] const bool installed = [] {
  race = RaceHooks{block_starts, threads_synchronise, access_here, copy_issued, copy_landed};
  return true;
}();

}  // namespace
}  // namespace cuda_on_cpu

// The compiler's entry points for -fsanitize=thread.
#define CONVEXT_TSAN(name, bytes, write) \
  extern "C" void name(void* p) { cuda_on_cpu::access(__builtin_return_address(0), p, bytes, write); }
#define CONVEXT_TSAN_ACCESS(bytes)                         \
  CONVEXT_TSAN(__tsan_read##bytes, bytes, false)           \
  CONVEXT_TSAN(__tsan_write##bytes, bytes, true)           \
  CONVEXT_TSAN(__tsan_unaligned_read##bytes, bytes, false) \
  CONVEXT_TSAN(__tsan_unaligned_write##bytes, bytes, true) \
  CONVEXT_TSAN(__tsan_volatile_read##bytes, bytes, false)  \
  CONVEXT_TSAN(__tsan_volatile_write##bytes, bytes, true)
CONVEXT_TSAN_ACCESS(1)
CONVEXT_TSAN_ACCESS(2)
CONVEXT_TSAN_ACCESS(4)
CONVEXT_TSAN_ACCESS(8)
CONVEXT_TSAN_ACCESS(16)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, unsigned long bytes) {
  cuda_on_cpu::access(__builtin_return_address(0), p, bytes, false);
}
void __tsan_write_range(void* p, unsigned long bytes) {
  cuda_on_cpu::access(__builtin_return_address(0), p, bytes, true);
}
// Function-local statics on the host side.
char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
}
