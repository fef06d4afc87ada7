// fprop of groups of few channels (grouped.h): lanes are filters of several groups, a tile's rows are neighbouring
// output columns.
//
//   out[i] = sum_t spread_t[i] * w_t       t over R * S * (C / groups) taps; a vector each
//
// Register budget: 14 accumulators + 1 vector of weights; the spread inputs are memory operands, 15 loads for 14 FMAs.
// The direct kernel computes a group at a time and leaves all lanes but K / groups of a vector empty.
#include "grouped_fprop.h"

#include "cpu/kernels/gemm/gemm.h"
#include "cpu/kernels/gemm/tile_epilogue.h"

namespace convext::CONVEXT_ISA {
namespace {

using V = Vec<float>;

struct GroupedTile {
  const float* const* rows;  // one for each filter row inside the image
  const float* const* w;     // their weights
  int32_t num_rows;
  const int32_t* offset;  // of the taps of a row
  int32_t taps;           // of a row
  float* out;
  int64_t out_pitch;
  int32_t filters;  // lanes that exist
  const float* scale;
  const float* shift;
  const float* residual;  // for out
  Activation activation;
};

template <int COLUMNS>
void tile(const GroupedTile& args) {
  V acc[COLUMNS];
  CONVEXT_UNROLL
  for (int i = 0; i < COLUMNS; ++i) acc[i] = V::zero();
  for (int32_t r = 0; r < args.num_rows; ++r) {
    const float* row = args.rows[r];
    const float* w = args.w[r];
    for (int32_t t = 0; t < args.taps; ++t, w += V::width) {
      const float* x = row + args.offset[t];
      const V weight = load(w);
      CONVEXT_UNROLL
      for (int i = 0; i < COLUMNS; ++i) acc[i] = fma(acc[i], weight, load(x + i * V::width));
    }
  }
  const Lanes<float> lanes(args.filters);
  if (args.scale) {
    const V scale = load(args.scale, lanes);
    CONVEXT_UNROLL
    for (int i = 0; i < COLUMNS; ++i) acc[i] = acc[i] * scale;
  }
  if (args.shift) {
    const V shift = load(args.shift, lanes);
    CONVEXT_UNROLL
    for (int i = 0; i < COLUMNS; ++i) acc[i] += shift;
  }
  if (args.residual) {
    CONVEXT_UNROLL
    for (int i = 0; i < COLUMNS; ++i) acc[i] += load(args.residual + i * args.out_pitch, lanes);
  }
  const Clamp<float> clamp(args.activation);
  const auto clamped = clamp.of_vectors();
  CONVEXT_UNROLL
  for (int i = 0; i < COLUMNS; ++i) store(args.out + i * args.out_pitch, clamped(acc[i]), lanes);
  if (!clamp.exact) activate(args.activation, args.out, args.out_pitch, COLUMNS, args.filters);
}

constexpr TileTable<void (*)(const GroupedTile&), 1> tiles([](auto columns, auto) { return tile<columns.value>; });

void run_block(const ConvProblem& p, const GroupedBlocks& blocks, const GroupedOutputs& block, const float* x,
               const float* packed, float* y, const Epilogue& e) {
  SpreadLines lines(p, blocks, x, block);
  const int32_t filter = block.vector * V::width;
  const float* rows[kGroupedTaps];
  const float* weights[kGroupedTaps];
  GroupedTile args{};
  args.w = weights;
  args.offset = lines.offset();
  args.taps = p.s * p.c_per_group();
  args.out_pitch = p.k;
  args.filters = p.k - filter;
  args.scale = e.scale ? static_cast<const float*>(e.scale) + filter : nullptr;
  args.shift = e.shift ? static_cast<const float*>(e.shift) + filter : nullptr;
  args.activation = e.activation;
  if (args.filters > V::width) args.filters = V::width;
  for (int32_t i = block.p0; i < block.p1; ++i) {
    lines.advance(i);
    args.num_rows = 0;
    for (int32_t r = 0; r < p.r; ++r) {
      const float* row = lines.row(i, r);
      if (row == nullptr) continue;
      weights[args.num_rows] = packed + (int64_t{block.vector} * p.r + r) * args.taps * V::width;
      rows[args.num_rows++] = row;
    }
    const int64_t out = ((block.n * p.p() + i) * p.q() + block.q0) * p.k + filter;
    cut(block.q1 - block.q0, max_rows(1), [&](int32_t q, int32_t count) {
      const float* shifted[kGroupedTaps];
      for (int32_t r = 0; r < args.num_rows; ++r) shifted[r] = rows[r] + int64_t{q} * V::width;
      args.rows = shifted;
      args.out = y + out + int64_t{q} * p.k;
      args.residual = e.residual ? static_cast<const float*>(e.residual) + out + int64_t{q} * p.k : nullptr;
      tiles.of(count, 1)(args);
    });
  }
}

struct Packing {
  static const char* pack_format(const ConvProblem&) { return "grouped_" CONVEXT_STRING(CONVEXT_ISA); }
  static int64_t packed_size(const ConvProblem& p) { return grouped_packed_size(p); }

  static void pack(const ConvProblem& p, const void* w, void* packed, const Parallel&) {
    const float* from = static_cast<const float*>(w);
    float* to = static_cast<float*>(packed);
    const int32_t cg = p.c_per_group(), taps = p.r * p.s;
    for (int32_t k = 0; k < p.k; k += V::width) {
      for (int32_t tap = 0; tap < taps; ++tap) {
        for (int32_t c = 0; c < cg; ++c) {
          for (int lane = 0; lane < V::width; ++lane) {
            *to++ = k + lane < p.k ? from[(int64_t{k + lane} * cg + c) * taps + tap] : 0;
          }
        }
      }
    }
  }
};

const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  run_grouped(p, static_cast<const float*>(args.a), static_cast<const float*>(args.b), static_cast<float*>(args.out),
              args.epilogue, *args.parallel);
  return nullptr;
}

}  // namespace

void run_grouped(const ConvProblem& p, const float* x, const float* packed, float* y, const Epilogue& epilogue,
                 const Parallel& parallel) {
  const GroupedBlocks blocks(p);
  parallel.for_each(p.n * blocks.down * blocks.across * blocks.vectors, [&](int64_t item) {
    run_block(p, blocks, GroupedOutputs(p, blocks, item), x, packed, y, epilogue);
  });
}

}  // namespace convext::CONVEXT_ISA

CONVEXT_DEFINE_VARIANT_OF(float, f32, fprop_grouped,
                          packed_by<Packing>(cpu_variant<T>(name, Algorithm::grouped, Pass::kFprop,
                                                            reject_unless_grouped, launch, grouped_work)))
