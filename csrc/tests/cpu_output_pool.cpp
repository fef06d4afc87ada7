// Stand-alone test of the pool of dropped results (output_pool.h): what is handed out again, what is freed, threads,
// fork. No torch. Exits non-zero on failure.
#include "cpu/runtime/output_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "harness.h"

namespace {

using convext::OutputPool;
using namespace convext::testing;

OutputPool& pool() { return OutputPool::of_process(); }

constexpr int64_t kMiB = int64_t{1} << 20;

struct Block {
  int64_t bytes;
  void* data;
  explicit Block(int64_t wanted) : bytes(wanted), data(pool().take(bytes)) {}
  void drop() const { pool().give(data, bytes); }
};

void empty_pool(int64_t limit) {
  pool().set_limit(0);
  pool().set_limit(limit);
}

void test_what_comes_back() {
  empty_pool(64 * kMiB);
  const Block first(3 * kMiB + 1);
  check(first.bytes >= 3 * kMiB + 1, "a block is as large as asked for");
  check(reinterpret_cast<uintptr_t>(first.data) % 64 == 0, "a block starts at a cache line");
  std::memset(first.data, 1, first.bytes);
  first.drop();
  check(pool().kept() == first.bytes, "what was given back is kept");
  const Block larger(4 * kMiB), smaller(2 * kMiB);
  check(larger.data != first.data, "a block that is too small is not handed out");
  check(smaller.data != first.data, "a block is not handed out for far less than it holds");
  const Block same(3 * kMiB);
  check(same.data == first.data && same.bytes == first.bytes, "a block that fits is handed out again, at its own size");
  check(pool().kept() == 0, "what is in use is not kept");
  for (const Block& b : {larger, smaller, same}) b.drop();
}

void test_the_best_block_is_taken() {
  empty_pool(64 * kMiB);
  const Block loose(8 * kMiB), tight(7 * kMiB + kMiB / 2), older(5 * kMiB), younger(5 * kMiB);
  for (const Block& b : {loose, tight, older, younger}) b.drop();
  const Block fitted(7 * kMiB + kMiB / 4);
  check(fitted.data == tight.data, "of two blocks that fit the tighter is taken");
  const Block recent(5 * kMiB);
  check(recent.data == younger.data, "of two equal blocks the one that came back last is taken");
  fitted.drop(), recent.drop();
}

void test_the_limit() {
  empty_pool(10 * kMiB);
  const Block a(4 * kMiB), b(4 * kMiB), c(4 * kMiB), huge(11 * kMiB);
  for (const Block& block : {a, b, c}) block.drop();
  check(pool().kept() == 8 * kMiB, "no more is kept than the limit");
  const Block last(4 * kMiB), before(4 * kMiB);
  check(last.data == c.data && before.data == b.data, "what was kept longest is freed first");
  huge.drop();
  check(pool().kept() == 0, "what is larger than the limit is freed and displaces nothing");
  last.drop(), before.drop();
  check(pool().kept() == 8 * kMiB, "two blocks fit");
  pool().set_limit(5 * kMiB);
  check(pool().kept() == 4 * kMiB, "a lower limit frees what is beyond it");
  pool().set_limit(0);
  check(pool().kept() == 0, "no limit of zero keeps anything");
}

void test_many_small_blocks() {
  empty_pool(1024 * kMiB);
  std::vector<Block> blocks;
  for (int i = 0; i < 3000; ++i) blocks.emplace_back(OutputPool::kSmallest);
  for (const Block& b : blocks) b.drop();
  check(pool().kept() > 0 && pool().kept() < 3000 * OutputPool::kSmallest, "a bounded number of blocks is kept");
  pool().set_limit(0);
  check(pool().kept() == 0, "all of them can be freed");
}

// Each thread fills what it takes with its own bytes and finds them there later; blocks travel between threads through
// the pool, and are given back by others than took them.
void test_threads() {
  empty_pool(16 * kMiB);
  std::vector<std::thread> threads;
  for (int id = 1; id <= 4; ++id) {
    threads.emplace_back([id] {
      std::mt19937 random(id);
      std::vector<Block> held;
      for (int i = 0; i < 3000; ++i) {
        if (held.size() < 6 && random() % 2) {
          held.emplace_back((1 + random() % 5) * OutputPool::kSmallest);
          auto* bytes = static_cast<unsigned char*>(held.back().data);
          for (int64_t at = 0; at < held.back().bytes; at += 512) bytes[at] = static_cast<unsigned char>(id);
        } else if (!held.empty()) {
          const Block block = held[random() % held.size()];
          held.erase(std::find_if(held.begin(), held.end(), [&](const Block& b) { return b.data == block.data; }));
          auto* bytes = static_cast<unsigned char*>(block.data);
          bool intact = true;
          for (int64_t at = 0; at < block.bytes; at += 512) intact &= bytes[at] == id;
          check(intact, "no block belongs to two threads");
          block.drop();
        }
        if (i % 500 == 0) pool().set_limit((8 + random() % 8) * kMiB);
      }
      for (const Block& b : held) b.drop();
    });
  }
  for (std::thread& t : threads) t.join();
  check(pool().kept() <= 16 * kMiB, "threads together keep no more than the limit");
}

// A child of fork() finds the pool unlocked, however busy the parent's other threads are with it.
void test_fork() {
  empty_pool(16 * kMiB);
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) Block(kMiB).drop();
  });
  for (int i = 0; i < 50; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // a child that waits for a lock for ever is killed, which the parent sees
      const Block block(2 * kMiB);
      std::memset(block.data, 7, block.bytes);
      block.drop();
      _exit(pool().kept() >= block.bytes ? 0 : 1);
    }
    int status = 0;
    check(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
          "a child takes and gives back");
  }
  stop = true;
  busy.join();
}

}  // namespace

int main() {
  check(pool().limit() > 0, "the pool is on by default");
  test_what_comes_back();
  test_the_best_block_is_taken();
  test_the_limit();
  test_many_small_blocks();
  test_threads();
  test_fork();
  empty_pool(0);
  return summary();
}
