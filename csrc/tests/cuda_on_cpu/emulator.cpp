#include "emulator.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __asan_poison_memory_region(const volatile void*, size_t);
void __asan_unpoison_memory_region(const volatile void*, size_t);
}
#endif

namespace cuda_on_cpu {

Config config;
Counters counters;
Block block;
Thread* current;
RaceHooks race;
const char* (*launch_elsewhere)(const void*, dim3, dim3, size_t, const Parameters&) = nullptr;

void reset_counters() { counters = Counters{}; }

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kArenaBytes = 256 * 1024;
constexpr int kMaxThreads = 1024;

struct Rendezvous {
  uint32_t mask = 0;
  int arrived = 0;
  const char* name = nullptr;
  void* arguments[32];
};

struct Scheduler {
  unsigned char* arena = nullptr;  // shared memory ends where the guard page begins
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<int> ready;
  std::deque<int> waiting_for_copies;
  std::vector<Rendezvous> warps[kMaxThreads / 32];
  std::vector<int> at_barrier;
  int alive = 0;
  unsigned random_state = 1;
  std::string error;
  const std::function<void()>* body = nullptr;
} scheduler;

void make_ready(int thread) {
  scheduler.threads[thread]->state = Thread::State::kReady;
  scheduler.ready.push_back(thread);
}

void suspend(Thread::State state, const char* at) {
  Thread* self = current;
  self->state = state;
  self->waits_at = at;
  self->fiber.suspend(state == Thread::State::kDone);
}

void thread_main() {
  Fiber::enter();
  (*scheduler.body)();
  suspend(Thread::State::kDone, "end");
  abort();
}

void release_barrier() {
  std::vector<int> waiters = std::move(scheduler.at_barrier);
  scheduler.at_barrier.clear();
  std::sort(waiters.begin(), waiters.end());
  ++counters.barriers;
  if (race.threads_synchronise) race.threads_synchronise(waiters.data(), static_cast<int>(waiters.size()));
  for (int thread : waiters) make_ready(thread);
}

// A wild pointer ends the process: the kernel's own frames cannot be unwound.
void on_fault(int, siginfo_t* info, void*) {
  char text[200];
  const int length = current ? snprintf(text, sizeof text, "bad address %p in block %u,%u,%u thread %u,%u,%u\n",
                                        info->si_addr, block.index.x, block.index.y, block.index.z, current->index.x,
                                        current->index.y, current->index.z)
                             : snprintf(text, sizeof text, "bad address %p outside of any kernel\n", info->si_addr);
  if (write(STDERR_FILENO, text, length) < 0) _exit(4);
  _exit(3);
}

void create_arena() {
  auto* mapping = static_cast<unsigned char*>(
      mmap(nullptr, kArenaBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (mapping == MAP_FAILED) throw Error("no memory for the emulated shared memory");
  mprotect(mapping + kArenaBytes, kPage, PROT_NONE);
  scheduler.arena = mapping;
  static char handler_stack[64 * 1024];
  stack_t stack{};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

void prepare_block() {
  while (static_cast<int>(scheduler.threads.size()) < block.threads) {
    scheduler.threads.push_back(std::make_unique<Thread>());
  }
  scheduler.ready.clear();
  scheduler.waiting_for_copies.clear();
  scheduler.at_barrier.clear();
  for (auto& warp : scheduler.warps) warp.clear();
  scheduler.error.clear();
  scheduler.alive = block.threads;
  scheduler.random_state = config.seed * 7919u + block.serial;
  ++block.serial;
  counters.threads += block.threads;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(scheduler.arena, kArenaBytes);
  __asan_poison_memory_region(scheduler.arena, kArenaBytes - block.shared_bytes);
#endif
  memset(shared_memory(), 0xFF, block.shared_bytes);
  for (int i = 0; i < block.threads; ++i) {
    Thread& thread = *scheduler.threads[i];
    thread.linear = i;
    thread.lane = i % 32;
    thread.warp = i / 32;
    thread.index = make_uint3(i % block.dim.x, i / block.dim.x % block.dim.y, i / (block.dim.x * block.dim.y));
    thread.meetings = 0;
    thread.open_copies.clear();
    thread.copy_groups.clear();
    thread.fiber.prepare(thread_main, i);
    make_ready(i);
  }
  if (race.block_starts) race.block_starts();
}

int next_ready() {
  auto& ready = scheduler.ready;
  size_t pick = 0;
  if (config.order == Order::kLifo) pick = ready.size() - 1;
  if (config.order == Order::kRandom) pick = random_number() % ready.size();
  const int thread = ready[pick];
  if (config.order == Order::kRandom) {
    ready[pick] = ready.back();
    ready.pop_back();
  } else {
    ready.erase(ready.begin() + pick);
  }
  return thread;
}

std::string deadlock_report() {
  std::map<std::string, int> places;
  for (int i = 0; i < block.threads; ++i) {
    const Thread& thread = *scheduler.threads[i];
    ++places[thread.state == Thread::State::kDone ? "the kernel's end" : thread.waits_at];
  }
  std::string text = "deadlock:";
  for (const auto& [place, count] : places) text += " " + std::to_string(count) + " threads at " + place + ";";
  return text;
}

void run_block() {
  prepare_block();
  while (scheduler.alive > 0) {
    if (scheduler.ready.empty() && !scheduler.waiting_for_copies.empty()) {
      make_ready(scheduler.waiting_for_copies.front());
      scheduler.waiting_for_copies.pop_front();
    }
    if (scheduler.ready.empty()) throw Error(deadlock_report());
    Thread& thread = *scheduler.threads[next_ready()];
    current = &thread;
    thread.fiber.resume();
    current = nullptr;
    if (!scheduler.error.empty()) throw Error(scheduler.error);
    if (thread.state == Thread::State::kDone) {
      --scheduler.alive;
      // A barrier waits for the threads that have not left the kernel.
      if (scheduler.alive > 0 && static_cast<int>(scheduler.at_barrier.size()) == scheduler.alive) release_barrier();
    }
  }
}

}  // namespace

void fail(const std::string& message) {
  if (!current) throw Error(message);
  char where[120];
  snprintf(where, sizeof where, " [block %u,%u,%u thread %u,%u,%u]", block.index.x, block.index.y, block.index.z,
           current->index.x, current->index.y, current->index.z);
  scheduler.error = message + where;
  suspend(Thread::State::kDone, "an error");
  abort();
}

unsigned random_number() {
  scheduler.random_state = scheduler.random_state * 1664525u + 1013904223u;
  return scheduler.random_state >> 8;
}

void run_grid(dim3 grid, dim3 dim, size_t shared_bytes, const std::function<void()>& body) {
  if (!scheduler.arena) create_arena();
  if (shared_bytes > max_shared_bytes(config.sm)) {
    throw Error("a block asks for " + std::to_string(shared_bytes) + " bytes of shared memory, on sm_" +
                std::to_string(config.sm) + " it may have " + std::to_string(max_shared_bytes(config.sm)));
  }
  if (grid.y > 65535 || grid.z > 65535) throw Error("the grid is larger than 65535 in y or z");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu) throw Error("the grid is empty or too large in x");
  block.dim = dim;
  block.grid = grid;
  block.threads = static_cast<int>(dim.x * dim.y * dim.z);
  if (block.threads < 1 || block.threads > kMaxThreads) throw Error("a block has 1 to 1024 threads");
  block.shared_bytes = (shared_bytes + 127) / 128 * 128;
  scheduler.body = &body;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block.index = dim3(x, y, z);
        run_block();
      }
}

unsigned char* shared_memory() { return scheduler.arena + kArenaBytes - block.shared_bytes; }

uint32_t shared_offset(const void* pointer, size_t bytes) {
  const intptr_t offset = static_cast<const unsigned char*>(pointer) - shared_memory();
  if (offset < 0 || offset + bytes > block.shared_bytes) fail("an address outside of shared memory");
  return static_cast<uint32_t>(offset);
}

unsigned char* shared_pointer(uint32_t offset, size_t bytes) {
  if (offset + bytes > block.shared_bytes) fail("a shared-memory offset past the end");
  return shared_memory() + offset;
}

void barrier() {
  Thread* self = current;
  ++self->meetings;
  scheduler.at_barrier.push_back(self->linear);
  const bool last = static_cast<int>(scheduler.at_barrier.size()) == scheduler.alive;
  if (last) release_barrier();
  suspend(last ? Thread::State::kReady : Thread::State::kBlocked, "__syncthreads");
}

void warp_collective(const char* name, uint32_t mask, void* argument, CollectiveBody body, bool orders_memory) {
  Thread* self = current;
  ++self->meetings;
  const int first = self->warp * 32;
  const int lanes = std::min(32, block.threads - first);
  const uint32_t present = lanes == 32 ? ~0u : (1u << lanes) - 1;
  if (!(mask >> self->lane & 1)) fail(std::string(name) + ": the calling lane is not in its own mask");
  mask &= present;
  auto& meetings = scheduler.warps[self->warp];
  auto meeting = std::find_if(meetings.begin(), meetings.end(), [&](const Rendezvous& r) { return r.mask == mask; });
  if (meeting == meetings.end()) {
    meetings.emplace_back();
    meeting = meetings.end() - 1;
    meeting->mask = mask;
  }
  if (meeting->arrived == 0) {
    meeting->name = name;
  } else if (strcmp(meeting->name, name) != 0) {
    fail(std::string("divergent warp: ") + name + " meets " + meeting->name);
  }
  meeting->arguments[self->lane] = argument;
  if (++meeting->arrived < __builtin_popcount(mask)) {
    suspend(Thread::State::kBlocked, name);
    return;
  }
  if (body) body(meeting->arguments, mask);
  meeting->arrived = 0;
  int members[32], count = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    members[count++] = first + lane;
    if (lane != self->lane) make_ready(first + lane);
  }
  if (orders_memory && race.threads_synchronise) race.threads_synchronise(members, count);
}

// ---- asynchronous copies

namespace {

void land(const AsyncCopy& copy) {
  if (copy.bytes) memcpy(copy.destination, copy.source, copy.bytes);
  if (copy.zero_bytes) memset(static_cast<char*>(copy.destination) + copy.bytes, 0, copy.zero_bytes);
}

}  // namespace

void issue_copy(const AsyncCopy& copy) {
  ++counters.async_copies;
  if (race.copy_issued) race.copy_issued(copy, __builtin_return_address(0));
  const bool now = config.async == Async::kEager || (config.async == Async::kRandom && random_number() % 2);
  if (now) land(copy);
  current->open_copies.push_back(copy);
  current->open_copies.back().landed = now;
}

void commit_copies() {
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void wait_for_copies(int groups_left) {
  Thread* self = current;
  if (static_cast<int>(self->copy_groups.size()) > groups_left && config.async != Async::kEager) {
    // Others go first, as far as they get.
    scheduler.waiting_for_copies.push_back(self->linear);
    suspend(Thread::State::kWaitsForCopies, "cp.async.wait_group");
  }
  while (static_cast<int>(self->copy_groups.size()) > groups_left) {
    for (const AsyncCopy& copy : self->copy_groups.front()) {
      if (!copy.landed) land(copy);
      if (race.copy_landed) race.copy_landed(copy);
    }
    self->copy_groups.pop_front();
  }
}

// ---- global memory

namespace {
std::vector<DeviceBuffer*> buffers;
}

const std::vector<DeviceBuffer*>& device_buffers() { return buffers; }

DeviceBuffer::DeviceBuffer(size_t bytes, bool at_start) : bytes_(bytes) {
  const size_t inside = std::max(kPage, (bytes + kPage - 1) / kPage * kPage);
  mapping_bytes_ = inside + 2 * kPage;
  mapping_ = static_cast<char*>(mmap(nullptr, mapping_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (mapping_ == MAP_FAILED) throw Error("no memory for a device buffer");
  mprotect(mapping_ + kPage, inside, PROT_READ | PROT_WRITE);
  memset(mapping_ + kPage, 0xFF, inside);
  // cudaMalloc aligns to 256 bytes; kernels need 16, and the fewer bytes left behind the end the better.
  data_ = mapping_ + kPage + (at_start ? 0 : inside - (bytes + 15) / 16 * 16);
  last_reader_.assign(inside / 32 + 1, ~0u);
  last_writer_.assign(inside / 32 + 1, ~0u);
  buffers.push_back(this);
}

DeviceBuffer::~DeviceBuffer() {
  munmap(mapping_, mapping_bytes_);
  buffers.erase(std::find(buffers.begin(), buffers.end(), this));
}

void DeviceBuffer::make_read_only() {
  mprotect(mapping_ + kPage, mapping_bytes_ - 2 * kPage, PROT_READ);
  read_only_ = true;
}

DeviceBuffer* buffer_of(const void* pointer) {
  const auto* at = static_cast<const char*>(pointer);
  for (size_t i = 0; i < buffers.size(); ++i) {
    DeviceBuffer* const buffer = buffers[i];
    if (at < buffer->mapping_ + kPage || at >= buffer->mapping_ + buffer->mapping_bytes_ - kPage) continue;
    if (i) std::swap(buffers[i], buffers[i - 1]);  // the busy ones come to the front
    return buffer;
  }
  return nullptr;
}

void count_global_access(const void* pointer, size_t bytes, bool write) {
  DeviceBuffer* const buffer = current && bytes ? buffer_of(pointer) : nullptr;
  if (!buffer) return;
  counters.requested_bytes += bytes;
  const size_t begin = static_cast<const char*>(pointer) - buffer->mapping_ - kPage;
  auto& last = write ? buffer->last_writer_ : buffer->last_reader_;
  for (size_t sector = begin / 32; sector <= (begin + bytes - 1) / 32; ++sector) {
    if (last[sector] == block.serial) continue;
    last[sector] = block.serial;
    (write ? counters.written_bytes : counters.read_bytes) += 32;
    (write ? buffer->written_bytes_ : buffer->read_bytes_) += 32;
  }
}

}  // namespace cuda_on_cpu
