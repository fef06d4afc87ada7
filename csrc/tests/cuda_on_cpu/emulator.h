// Runs CUDA kernels on the CPU, from their own sources, for tests.
//
// Every CUDA thread is a fiber, every collective operation a rendezvous of fibers. Blocks run one after another. Shared
// memory lies between guard pages and is filled with 0xFF, which reads as NaN, before each block. What real hardware
// leaves open is a policy that a test varies: in which order threads run, and when an asynchronous copy lands.
//
// Memory is ordered by __syncwarp and __syncthreads alone; shuffles, ldmatrix and mma order nothing, as on hardware.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include <vector_functions.h>
#include <vector_types.h>

#include "fiber.h"

namespace cuda_on_cpu {

// A kernel did something that the hardware forbids or leaves undefined; the text names block and thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Async { kEager, kLazy, kRandom };  // copies land at issue, at the last moment allowed, or either
enum class Order { kFifo, kLifo, kRandom };   // which of the runnable threads goes on

struct Config {
  Async async = Async::kEager;
  Order order = Order::kFifo;
  unsigned seed = 1;
  bool traffic_only = false;  // tensor cores compute nothing and races go unnoticed: quick, where bytes alone count
};
extern Config config;

// Work counted since reset_counters(). Global bytes are counted in the build with the race check, for DeviceBuffers:
// a 32-byte sector counts once for each block that touches it, which is the traffic behind a perfect first-level cache.
struct Counters {
  uint64_t read_bytes, written_bytes;  // sectors of 32 bytes, once a block
  uint64_t requested_bytes;            // what threads asked for, repeats included
  uint64_t mma, barriers, async_copies, threads;
};
extern Counters counters;
void reset_counters();

// ---- running a grid

constexpr size_t kMaxSharedBytes = 227 * 1024;  // a block's limit on Hopper
constexpr size_t kMaxSharedBytesSm80 = 163 * 1024;

// Runs body() once for every thread of the grid. Throws Error.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// ---- global memory

// Device memory: guard pages on both sides, the end (or the start, with `at_start`) against one of them, 0xFF inside.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes, bool at_start = false);
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }
  void make_read_only();                               // a kernel that writes its input stops there and then
  uint64_t read_bytes() const { return read_bytes_; }  // of this buffer alone, as in Counters
  uint64_t written_bytes() const { return written_bytes_; }

 private:
  friend void count_global_access(const void*, size_t, bool);
  char* mapping_;
  size_t mapping_bytes_;
  char* data_;
  size_t bytes_;
  uint64_t read_bytes_ = 0, written_bytes_ = 0;
  std::vector<uint32_t> last_reader_, last_writer_;  // by sector: the block that touched it last
};

// ---- what the emulated names and instructions are made of

struct AsyncCopy {
  void* destination;
  const void* source;
  int bytes, zero_bytes;  // copied, then filled with zeros
  bool landed = false;
};

struct Thread {
  enum class State { kReady, kBlocked, kWaitsForCopies, kDone };
  Fiber fiber;
  uint3 index{};
  int linear = 0, lane = 0, warp = 0;
  State state = State::kReady;
  const char* waits_at = "";
  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> copy_groups;
};

struct Block {
  dim3 index, dim, grid;
  int threads = 0;
  uint32_t serial = 0;  // counts blocks over all launches
  size_t shared_bytes = 0;
};

extern Block block;
extern Thread* current;  // the running thread, or nullptr in the scheduler

[[noreturn]] void fail(const std::string& message);
unsigned random_number();

unsigned char* shared_memory();                             // of the running block
uint32_t shared_offset(const void* pointer, size_t bytes);  // fails where the range is not in shared memory
unsigned char* shared_pointer(uint32_t offset, size_t bytes);

void barrier();  // __syncthreads

// The lanes of `mask` meet; the last one to come runs body(arguments by lane, mask); then all go on.
using CollectiveBody = void (*)(void** arguments, uint32_t mask);
void warp_collective(const char* name, uint32_t mask, void* argument, CollectiveBody body, bool orders_memory = false);

void issue_copy(const AsyncCopy& copy);
void commit_copies();
void wait_for_copies(int groups_left);

// ---- race check (race.cpp), nothing in builds without it

struct RaceHooks {
  void (*block_starts)();
  void (*threads_synchronise)(const int* threads, int count);
  void (*access)(const void* pointer, size_t bytes, bool write);
  void (*copy_issued)(const AsyncCopy&);
  void (*copy_landed)(const AsyncCopy&);  // the issuing thread has waited for it
};
extern RaceHooks race;  // all null without the race check

// Counted for DeviceBuffers; called by the instrumented build and by the emulated cp.async.
void count_global_access(const void* pointer, size_t bytes, bool write);

}  // namespace cuda_on_cpu
