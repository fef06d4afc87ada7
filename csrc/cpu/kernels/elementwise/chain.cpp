// A chain of elementwise operations in the instruction set of this file: see chain.h.
#include "cpu/kernels/elementwise/chain.h"

#include "cpu/simd/vec.h"

namespace convext {
namespace CONVEXT_ISA {
namespace {

using V = Vec<float>;
constexpr int kWidth = V::width;
constexpr int64_t kPart = 1024;    // elements that go through all steps together
constexpr int64_t kChunk = 16384;  // elements that a thread takes at a time

// One step over `count` neighbours. b: a value for each of them, or nullptr for `value`.
template <ChainOperation which>
void visit(float* z, int64_t count, const float* b, float value) {
  const V all(value);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    store(z + i, convext::chain::apply<which>(load(z + i), b == nullptr ? all : load(b + i)));
  }
  if (i < count) {
    const Lanes<float> lanes(count - i);
    store(z + i, convext::chain::apply<which>(load(z + i, lanes), b == nullptr ? all : load(b + i, lanes)), lanes);
  }
}

void visit(ChainOperation which, float* z, int64_t count, const float* b, float value) {
  switch (which) {
#define CONVEXT_X(name) \
  case ChainOperation::name: return visit<ChainOperation::name>(z, count, b, value);
    CONVEXT_CHAIN_OPERATIONS(CONVEXT_X)
#undef CONVEXT_X
  }
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// All steps over `count` neighbours, kPart at most; operand(step) is a pointer to as many values, or nullptr, and
// value(step) the one for all.
template <class Operand, class Value>
void run_part(float* z, int64_t count, const ChainStep* steps, int size, Operand&& operand, Value&& value) {
  alignas(kVectorBytes) float kept[kPart];
  for (int s = 0; s < size; ++s) {
    if (steps[s].operation == ChainOperation::keep) {
      __builtin_memcpy(kept, z, count * sizeof *z);
    } else {
      visit(steps[s].operation, z, count, steps[s].takes_kept ? kept : operand(s), value(s));
    }
  }
}

// Planes of one channel each: every operand is one value.
void run_planes(const Parallel& parallel, float* z, int64_t planes, int64_t channels, int64_t inner,
                const ChainStep* steps, int count) {
  const int64_t total = planes * inner;
  parallel.for_each((total + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t end = least((chunk + 1) * kChunk, total);
    for (int64_t at = chunk * kChunk; at < end;) {
      const int64_t plane = at / inner, channel = plane % channels;
      const int64_t size = least(least(kPart, end - at), (plane + 1) * inner - at);
      run_part(z + at, size, steps, count, [](int) -> const float* { return nullptr; },
               [&](int s) { return steps[s].operand == nullptr ? steps[s].value : steps[s].operand[channel]; });
      at += size;
    }
  });
}

// Pixels of all channels, `rows` of them together where there are few: operands are repeated as often.
void run_pixels(const Parallel& parallel, float* z, int64_t pixels, int64_t channels, const ChainStep* steps,
                int count) {
  const int64_t rows = channels < kPart ? kPart / channels : 1, each = kChunk / (rows * channels) + 1;
  const int64_t groups = (pixels + rows - 1) / rows;
  parallel.for_each((groups + each - 1) / each, [&](int64_t chunk) {
    float repeated[kChainSteps][kPart];
    for (int s = 0; s < count && channels < kPart; ++s) {
      if (steps[s].operand == nullptr) continue;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < channels; ++c) repeated[s][row * channels + c] = steps[s].operand[c];
      }
    }
    const int64_t end = least((chunk + 1) * each, groups);
    for (int64_t group = chunk * each; group < end; ++group) {
      const int64_t first = group * rows, size = least(rows, pixels - first) * channels;
      for (int64_t at = 0; at < size; at += kPart) {
        const auto operand = [&](int s) -> const float* {
          if (steps[s].operand == nullptr) return nullptr;
          return channels < kPart ? repeated[s] + at : steps[s].operand + at;
        };
        run_part(z + first * channels + at, least(kPart, size - at), steps, count, operand,
                 [&](int s) { return steps[s].value; });
      }
    }
  });
}

void run(const Parallel& parallel, float* z, int64_t outer, int64_t channels, int64_t inner, const ChainStep* steps,
         int count) {
  if (inner == 1) {
    run_pixels(parallel, z, outer, channels, steps, count);
  } else {
    run_planes(parallel, z, outer * channels, channels, inner, steps, count);
  }
}

}  // namespace
}  // namespace CONVEXT_ISA

extern const Chain CONVEXT_VARIANT(chain);
const Chain CONVEXT_VARIANT(chain) = {CONVEXT_ISA::run};

}  // namespace convext
