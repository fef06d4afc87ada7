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
void run_part(const float* x, float* z, int64_t count, const ChainStep* steps, int size, Operand&& operand,
              Value&& value) {
  alignas(kVectorBytes) float kept[kPart];
  if (x != z) __builtin_memcpy(z, x, count * sizeof *z);
  for (int s = 0; s < size; ++s) {
    if (steps[s].operation == ChainOperation::keep) {
      __builtin_memcpy(kept, z, count * sizeof *z);
    } else {
      visit(steps[s].operation, z, count, steps[s].takes_kept ? kept : operand(s), value(s));
    }
  }
}

// Planes of one channel each: every operand is one value.
void run_planes(const Parallel& parallel, const float* x, float* z, int64_t planes, int64_t channels, int64_t inner,
                const ChainStep* steps, int count) {
  const int64_t total = planes * inner;
  parallel.for_each((total + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t end = least((chunk + 1) * kChunk, total);
    for (int64_t at = chunk * kChunk; at < end;) {
      const int64_t plane = at / inner, channel = plane % channels;
      const int64_t size = least(least(kPart, end - at), (plane + 1) * inner - at);
      run_part(x + at, z + at, size, steps, count, [](int) -> const float* { return nullptr; },
               [&](int s) { return steps[s].operand == nullptr ? steps[s].value : steps[s].operand[channel]; });
      at += size;
    }
  });
}

// Every operand's values for `rows` pixels, where a part holds more than one.
struct Repeated {
  float values[kChainSteps][kPart];

  Repeated(const ChainStep* steps, int count, int64_t channels, int64_t rows) {
    for (int s = 0; s < count && rows > 1; ++s) {
      if (steps[s].operand == nullptr) continue;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < channels; ++c) values[s][row * channels + c] = steps[s].operand[c];
      }
    }
  }
};

// Pixels of all channels as parts of `rows` of them, or of one pixel's first, second, ... kPart channels; `parts` visits
// those of one chunk.
struct Pixels {
  int64_t pixels, channels, rows, each, groups;

  Pixels(int64_t all, int64_t of, int64_t chunk)
      : pixels(all),
        channels(of),
        rows(of < kPart ? kPart / of : 1),
        each(chunk / (rows * of) + 1),
        groups((all + rows - 1) / rows) {}

  int64_t chunks() const { return (groups + each - 1) / each; }

  // visit(where it begins, how many elements, of which channel the first)
  template <class Visit>
  void parts(int64_t chunk, Visit&& visit) const {
    const int64_t end = least((chunk + 1) * each, groups);
    for (int64_t group = chunk * each; group < end; ++group) {
      const int64_t first = group * rows, size = least(rows, pixels - first) * channels;
      for (int64_t at = 0; at < size; at += kPart) visit(first * channels + at, least(kPart, size - at), at);
    }
  }
};

void run_pixels(const Parallel& parallel, const float* x, float* z, int64_t pixels, int64_t channels,
                const ChainStep* steps, int count) {
  const Pixels all(pixels, channels, kChunk);
  parallel.for_each(all.chunks(), [&](int64_t chunk) {
    const Repeated repeated(steps, count, channels, all.rows);
    all.parts(chunk, [&](int64_t begin, int64_t size, int64_t at) {
      const auto operand = [&](int s) -> const float* {
        if (steps[s].operand == nullptr) return nullptr;
        return all.rows > 1 ? repeated.values[s] : steps[s].operand + at;
      };
      run_part(x + begin, z + begin, size, steps, count, operand, [&](int s) { return steps[s].value; });
    });
  });
}

void run(const Parallel& parallel, const float* x, float* z, int64_t outer, int64_t channels, int64_t inner,
         const ChainStep* steps, int count) {
  if (inner == 1) {
    run_pixels(parallel, x, z, outer, channels, steps, count);
  } else {
    run_planes(parallel, x, z, outer * channels, channels, inner, steps, count);
  }
}

// ---- Gradients ----

constexpr int64_t kBackwardChunk = 4 * kChunk;

// One step over `count` neighbours, backwards: what arrives at z, and, unless db is nullptr, at the operand. z, out: what
// the step saw and what it made of it.
template <ChainOperation which>
void visit_back(const float* z, const float* out, int64_t count, const float* b, float value, const float* g, float* dz,
                float* db) {
  const V all(value);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const V zs = load(z + i), bs = b == nullptr ? all : load(b + i), gs = load(g + i);
    if (db != nullptr) store(db + i, convext::chain::operand_gradient<which>(zs, bs, gs));
    store(dz + i, convext::chain::gradient<which>(zs, load(out + i), bs, gs));
  }
  if (i < count) {
    const Lanes<float> lanes(count - i);
    const V zs = load(z + i, lanes), bs = b == nullptr ? all : load(b + i, lanes), gs = load(g + i, lanes);
    if (db != nullptr) store(db + i, convext::chain::operand_gradient<which>(zs, bs, gs), lanes);
    store(dz + i, convext::chain::gradient<which>(zs, load(out + i, lanes), bs, gs), lanes);
  }
}

void visit_back(ChainOperation which, const float* z, const float* out, int64_t count, const float* b, float value,
                const float* g, float* dz, float* db) {
  switch (which) {
#define CONVEXT_X(name) \
  case ChainOperation::name: return visit_back<ChainOperation::name>(z, out, count, b, value, g, dz, db);
    CONVEXT_CHAIN_OPERATIONS(CONVEXT_X)
#undef CONVEXT_X
  }
}

// What every step saw: `seen[s]` is its input, seen[size] the result. `kept[s]` is what was kept last before it.
struct Seen {
  alignas(kVectorBytes) float values[kChainSteps][kPart];
  const float* seen[kChainSteps + 1];
  const float* kept[kChainSteps];

  template <class Operand, class Value>
  void compute(const float* x, int64_t count, const ChainStep* steps, int size, Operand&& operand, Value&& value) {
    const float* last = nullptr;
    seen[0] = x;
    for (int s = 0; s < size; ++s) {
      kept[s] = last;
      if (steps[s].operation == ChainOperation::keep) {
        seen[s + 1] = last = seen[s];
        continue;
      }
      __builtin_memcpy(values[s], seen[s], count * sizeof *x);
      visit(steps[s].operation, values[s], count, steps[s].takes_kept ? last : operand(s), value(s));
      seen[s + 1] = values[s];
    }
  }

  void all_are(const float* result, int size) {
    for (int s = 0; s <= size; ++s) seen[s] = result;
  }
};

// All steps over `count` neighbours backwards, kPart at most. add(step, db) gets the gradients of an operand that are
// wanted, one for each of them.
template <class Operand, class Value, class Add>
void run_part_back(const ChainGradients& gradients, int64_t begin, int64_t count, const ChainStep* steps, int size,
                   Operand&& operand, Value&& value, Add&& add) {
  Seen of;
  alignas(kVectorBytes) float at_operand[kPart], at_kept[kPart];
  if (gradients.by_output) {
    of.all_are(gradients.saved + begin, size);
  } else {
    of.compute(gradients.saved + begin, count, steps, size, operand, value);
  }
  const float* g = gradients.dout + begin;
  float* const dx = gradients.dx + begin;
  bool is_kept = false;  // whether anything has arrived at what is kept
  for (int s = size - 1; s >= 0; --s) {
    const ChainStep& step = steps[s];
    if (step.operation == ChainOperation::keep) {
      if (!is_kept) continue;
      visit_back<ChainOperation::keep>(g, g, count, nullptr, 0.0f, g, dx, nullptr);
      visit<ChainOperation::add>(dx, count, at_kept, 0.0f);
      is_kept = false;
    } else {
      const bool wanted = gradients.sums[s] != nullptr || step.takes_kept;
      visit_back(step.operation, of.seen[s], of.seen[s + 1], count, step.takes_kept ? of.kept[s] : operand(s), value(s),
                 g, dx, wanted ? at_operand : nullptr);
      if (step.takes_kept) {
        if (is_kept) {
          visit<ChainOperation::add>(at_kept, count, at_operand, 0.0f);
        } else {
          __builtin_memcpy(at_kept, at_operand, count * sizeof *at_kept);
        }
        is_kept = true;
      } else if (wanted) {
        add(s, at_operand);
      }
    }
    g = dx;
  }
}

double sum_of(const float* values, int64_t count) {
  double lanes[kWidth] = {}, sum = 0.0;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    for (int lane = 0; lane < kWidth; ++lane) lanes[lane] += values[i + lane];
  }
  for (; i < count; ++i) sum += values[i];
  for (const double lane : lanes) sum += lane;
  return sum;
}

int sums_wanted(const ChainGradients& gradients, int count) {
  int wanted = 0;
  for (int s = 0; s < count; ++s) wanted += gradients.sums[s] != nullptr;
  return wanted;
}

// Planes in parts: where sums are wanted one channel after the other, each by one thread, so that the order in which
// they are added does not depend on how many there are.
void planes_back(const Parallel& parallel, const ChainGradients& gradients, int64_t outer, int64_t channels,
                 int64_t inner, const ChainStep* steps, int count) {
  const auto plane = [&](int64_t begin, int64_t end, int64_t channel, double* sums) {
    for (int64_t at = begin; at < end; at += kPart) {
      const int64_t size = least(kPart, end - at);
      run_part_back(gradients, at, size, steps, count, [](int) -> const float* { return nullptr; }, [&](int s) {
        return steps[s].operand == nullptr ? steps[s].value : steps[s].operand[channel];
      }, [&](int s, const float* db) { sums[s] += sum_of(db, size); });
    }
  };
  if (sums_wanted(gradients, count) == 0) {
    const int64_t total = outer * channels * inner;
    parallel.for_each((total + kChunk - 1) / kChunk, [&](int64_t chunk) {
      const int64_t end = least((chunk + 1) * kChunk, total);
      for (int64_t at = chunk * kChunk; at < end;) {
        const int64_t number = at / inner, until = least(end, (number + 1) * inner);
        plane(at, until, number % channels, nullptr);
        at = until;
      }
    });
    return;
  }
  parallel.for_each(channels, [&](int64_t channel) {
    double sums[kChainSteps] = {};
    for (int64_t o = 0; o < outer; ++o) {
      const int64_t begin = (o * channels + channel) * inner;
      plane(begin, begin + inner, channel, sums);
    }
    for (int s = 0; s < count; ++s) {
      if (gradients.sums[s] != nullptr) gradients.sums[s][channel] = sums[s];
    }
  });
}

// Pixels: each chunk has sums of its own, which are added in the chunks' order.
void pixels_back(const Parallel& parallel, const ChainGradients& gradients, int64_t pixels, int64_t channels,
                 const ChainStep* steps, int count, double* partial) {
  const Pixels all(pixels, channels, kBackwardChunk);
  int place[kChainSteps], wanted = 0;
  for (int s = 0; s < count; ++s) place[s] = gradients.sums[s] == nullptr ? -1 : wanted++;
  parallel.for_each(all.chunks(), [&](int64_t chunk) {
    const Repeated repeated(steps, count, channels, all.rows);
    double* const own = partial + chunk * wanted * channels;
    for (int64_t i = 0; i < wanted * channels; ++i) own[i] = 0.0;
    all.parts(chunk, [&](int64_t begin, int64_t size, int64_t at) {
      const auto operand = [&](int s) -> const float* {
        if (steps[s].operand == nullptr) return nullptr;
        return all.rows > 1 ? repeated.values[s] : steps[s].operand + at;
      };
      run_part_back(gradients, begin, size, steps, count, operand, [&](int s) { return steps[s].value; },
                    [&](int s, const float* db) {
        double* const sums = own + place[s] * channels + at;
        const int64_t across = least(size, channels);
        for (int64_t row = 0; row < size; row += across) {
          for (int64_t c = 0; c < across; ++c) sums[c] += db[row + c];
        }
      });
    });
  });
  for (int s = 0; s < count; ++s) {
    if (place[s] < 0) continue;
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < all.chunks(); ++chunk) sum += partial[(chunk * wanted + place[s]) * channels + c];
      gradients.sums[s][c] = sum;
    }
  }
}

int64_t workspace(const ChainGradients& gradients, int64_t outer, int64_t channels, int64_t inner, int count) {
  if (inner != 1) return 0;
  return Pixels(outer, channels, kBackwardChunk).chunks() * sums_wanted(gradients, count) * channels * sizeof(double);
}

void backward(const Parallel& parallel, const ChainGradients& gradients, int64_t outer, int64_t channels, int64_t inner,
              const ChainStep* steps, int count, void* work) {
  if (inner == 1) {
    pixels_back(parallel, gradients, outer, channels, steps, count, static_cast<double*>(work));
  } else {
    planes_back(parallel, gradients, outer, channels, inner, steps, count);
  }
}

}  // namespace
}  // namespace CONVEXT_ISA

extern const Chain CONVEXT_VARIANT(chain);
const Chain CONVEXT_VARIANT(chain) = {CONVEXT_ISA::run, CONVEXT_ISA::workspace, CONVEXT_ISA::backward};

}  // namespace convext
