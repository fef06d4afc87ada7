// wgrad of groups of few channels (grouped.h): lanes are filters of several groups.
//
//   dw[t] = sum_{n,p,q} spread_t[n,p,q] * dy[n,p,q]         t over R * S * (C / groups) taps; a vector each
//
// Register budget: 12 accumulators + 1 vector of dy; the spread inputs are memory operands, 13 loads for 12 FMAs. A
// tile is summed over a row of outputs and added to the partial sums of its block. Blocks are a function of the problem
// alone and are added in a fixed order, so results do not depend on the number of threads.
#include "cpu/kernels/gemm/gemm.h"
#include "grouped.h"

namespace convext::CONVEXT_ISA {
namespace {

using V = Vec<float>;
constexpr int most_taps(int) { return kVectorRegisters == 32 ? 12 : 11; }

struct RowTile {
  const float* x;  // tap i of output q reads the vector at x + offset[i] + q * width
  const int32_t* offset;
  const float* dy;  // filters of output q at dy + q * dy_pitch
  int64_t dy_pitch;
  int32_t outputs, filters;
  float* out;  // a vector for each tap
};

template <int TAPS>
void add_row(const RowTile& args) {
  const float* x[TAPS];
  V acc[TAPS];
  CONVEXT_UNROLL
  for (int i = 0; i < TAPS; ++i) {
    x[i] = args.x + args.offset[i];
    acc[i] = load(args.out + i * V::width);
  }
  const float* dy = args.dy;
  const Lanes<float> lanes(args.filters);
  const int64_t end = int64_t{args.outputs} * V::width;
  for (int64_t q = 0; q < end; q += V::width, dy += args.dy_pitch) {
    const V lane = load(dy, lanes);
    CONVEXT_UNROLL
    for (int i = 0; i < TAPS; ++i) acc[i] = fma(acc[i], lane, load(x[i] + q));
  }
  CONVEXT_UNROLL
  for (int i = 0; i < TAPS; ++i) store(args.out + i * V::width, acc[i]);
}

constexpr TileTable<void (*)(const RowTile&), 1, most_taps> tiles([](auto taps, auto) { return add_row<taps.value>; });

int64_t taps_of(const ConvProblem& p) { return int64_t{p.r} * p.s * p.c_per_group(); }

// Sums of one block: (r, s, c, lane).
void sum_block(const ConvProblem& p, const GroupedBlocks& blocks, const GroupedOutputs& block, const LaunchArgs& args,
               float* sums) {
  SpreadLines lines(p, blocks, static_cast<const float*>(args.b), block);
  for (int64_t i = 0; i < taps_of(p) * V::width; ++i) sums[i] = 0;
  const int32_t filter = block.vector * V::width, row_taps = p.s * p.c_per_group();
  RowTile tile;
  tile.dy_pitch = p.k;
  tile.outputs = block.q1 - block.q0;
  tile.filters = p.k - filter < V::width ? p.k - filter : V::width;
  for (int32_t i = block.p0; i < block.p1; ++i) {
    lines.advance(i);
    tile.dy = static_cast<const float*>(args.a) + ((block.n * p.p() + i) * p.q() + block.q0) * p.k + filter;
    for (int32_t r = 0; r < p.r; ++r) {
      tile.x = lines.row(i, r);
      if (tile.x == nullptr) continue;
      cut(row_taps, most_taps(1), [&](int32_t tap, int32_t taps) {
        tile.offset = lines.offset() + tap;
        tile.out = sums + (int64_t{r} * row_taps + tap) * V::width;
        tiles.of(taps, 1)(tile);
      });
    }
  }
}

int64_t items(const ConvProblem& p, const GroupedBlocks& blocks) {
  return p.n * blocks.down * blocks.across * blocks.vectors;
}

int64_t workspace(const ConvProblem& p, int32_t) {
  return items(p, GroupedBlocks(p)) * taps_of(p) * V::width * static_cast<int64_t>(sizeof(float));
}

const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  const GroupedBlocks blocks(p);
  const int64_t count = items(p, blocks), taps = taps_of(p), tap_pixels = int64_t{p.r} * p.s;
  float* sums = static_cast<float*>(args.workspace);
  args.parallel->for_each(count, [&](int64_t item) {
    sum_block(p, blocks, GroupedOutputs(p, blocks, item), args, sums + item * taps * V::width);
  });
  float* dw = static_cast<float*>(args.out);
  args.parallel->for_each(blocks.vectors, [&](int64_t vector) {
    const int64_t filter = vector * V::width;
    for (int64_t t = 0; t < taps; ++t) {
      V sum = V::zero();
      for (int64_t item = vector; item < count; item += blocks.vectors) {
        sum += load(sums + (item * taps + t) * V::width);
      }
      const int64_t c = t % p.c_per_group(), pixel = t / p.c_per_group();
      for (int lane = 0; lane < V::width && filter + lane < p.k; ++lane) {
        dw[((filter + lane) * p.c_per_group() + c) * tap_pixels + pixel] = sum.v[lane];
      }
    }
  });
  return nullptr;
}

}  // namespace
}  // namespace convext::CONVEXT_ISA

CONVEXT_DEFINE_VARIANT_OF(float, f32, wgrad_grouped,
                          cpu_variant<T>(name, Algorithm::grouped, Pass::kWgrad, reject_unless_grouped, launch,
                                         grouped_work, workspace))
