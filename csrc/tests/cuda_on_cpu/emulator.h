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
#include <cstring>
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
  bool traffic_only = false;    // tensor cores compute nothing and races go unnoticed: quick, where bytes alone count
  bool count_accesses = false;  // warp by warp, in place of the race check
  int sm = 86;                  // the GPU whose limits hold: of those that kernels are for, the one with the least
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

// Shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, "Compute Capabilities").
constexpr size_t max_shared_bytes(int sm) {
  const size_t kib = sm == 80 || sm == 87 ? 163 : sm == 90 || sm / 10 == 10 ? 227 : 99;  // 8.6, 8.9, 12.x
  return kib * 1024;
}

// Runs body() once for every thread of the grid. Throws Error.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// ---- running it elsewhere

// A kernel's parameters as hardware has them: side by side, each at a multiple of its alignment.
struct Parameters {
  std::vector<unsigned char> bytes;
  template <class T>
  void add(const T& value) {
    const size_t at = (bytes.size() + alignof(T) - 1) / alignof(T) * alignof(T);
    bytes.resize(at + sizeof(T));
    memcpy(&bytes[at], &value, sizeof(T));
  }
};

// Who runs launches in place of this emulator (elsewhere.cpp), or nullptr. Returns nullptr or what went wrong.
extern const char* (*launch_elsewhere)(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                                       const Parameters&);

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
  void make_read_only();  // a kernel that writes its input stops there and then
  bool is_read_only() const { return read_only_; }
  uint64_t read_bytes() const { return read_bytes_; }  // of this buffer alone, as in Counters
  uint64_t written_bytes() const { return written_bytes_; }

 private:
  friend void count_global_access(const void*, size_t, bool);
  friend DeviceBuffer* buffer_of(const void*);
  char* mapping_;
  size_t mapping_bytes_;
  char* data_;
  size_t bytes_;
  bool read_only_ = false;
  uint64_t read_bytes_ = 0, written_bytes_ = 0;
  std::vector<uint32_t> last_reader_, last_writer_;  // by sector: the block that touched it last
};

// Those that there are.
const std::vector<DeviceBuffer*>& device_buffers();
DeviceBuffer* buffer_of(const void* pointer);  // or nullptr

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
  uint32_t meetings = 0;  // barriers and collectives so far
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
  void (*copy_issued)(const AsyncCopy&, const void* site);
  void (*copy_landed)(const AsyncCopy&);  // the issuing thread has waited for it
};
extern RaceHooks race;  // all null without the race check

// Counted for DeviceBuffers; called by the instrumented build and by the emulated cp.async.
void count_global_access(const void* pointer, size_t bytes, bool write);

// ---- how warps access memory (warp_accesses.cpp), counted with the race check's callbacks where config.count_accesses

// What one place in a kernel's code did, over all warps. An access of a warp is what its lanes did there for the n-th
// time since they last met, each: as long as their loops go in step, that is one instruction.
struct WarpAccesses {
  const void* site;  // in the machine code
  bool shared, write;
  int bytes;       // of a thread
  uint64_t warps;  // accesses of a warp
  // Shared memory: turns that the 32 banks of 4 bytes take, and what they would take without a conflict. A turn serves
  // 128 bytes: 32 lanes at 4 bytes or fewer, 16 at 8 bytes, 8 at 16. Lanes that read the same word share it.
  uint64_t turns, least_turns;
  // Global memory: sectors of 32 bytes that are touched, and how many would hold the bytes that are asked for.
  uint64_t sectors, least_sectors;
};
std::vector<WarpAccesses> warp_accesses();  // since reset_warp_accesses(), by site
void reset_warp_accesses();
// 0 bytes: the lane was there, and accessed nothing.
void count_warp_access(const void* site, const void* pointer, size_t bytes, bool shared, bool write);
void end_warp_accesses();  // of a block: what lanes have not all done

}  // namespace cuda_on_cpu
