// fprop of 1x1 layers with few input channels (pointwise.h), such as those that widen or narrow a mobile network's
// blocks. FLOP per byte of x and y: 2 C K / (4 (C + K)), 5.3 at 32 to 16 channels, 6.9 at 16 to 96.
#include "pointwise.h"

#include "cpu/kernels/gemm/cut.h"
#include "cpu/kernels/gemm/strided_tile.h"

namespace convext::CONVEXT_ISA {
namespace {

constexpr int64_t kBlockElements = 6144;  // of the input: 24 KiB
constexpr int64_t kMinPixels = 56, kBlocks = 32;

const char* reject(const ConvProblem& p) { return reject_unless_short_pointwise(p, p.c); }

const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  run_pointwise({static_cast<const float*>(args.a), static_cast<const float*>(args.b), static_cast<float*>(args.out),
                 p.nhw(), p.c, p.k, args.epilogue},
                *args.parallel);
  return nullptr;
}

}  // namespace

void run_pointwise(const PointwiseGemm& g, const Parallel& parallel) {
  if (g.pixels == 0 || g.depth == 0 || g.columns == 0) return;
  constexpr int kWidth = Vec<float>::width;
  int32_t offset[kPointwiseDepth];
  for (int32_t l = 0; l < g.depth; ++l) offset[l] = l;
  const Panels<float> split(g.columns);
  const int64_t in_cache = kBlockElements / g.depth, even = (g.pixels + kBlocks - 1) / kBlocks;
  const int64_t most = even < in_cache ? even : in_cache, size = most > kMinPixels ? most : kMinPixels;
  const int64_t blocks = (g.pixels + size - 1) / size;
  parallel.for_each(blocks, [&](int64_t block) {
    const int64_t begin = g.pixels * block / blocks;
    const int32_t pixels = static_cast<int32_t>(g.pixels * (block + 1) / blocks - begin);
    const Epilogue& e = g.epilogue;
    StridedTile tile{};
    tile.offset = offset;
    tile.taps = g.depth;
    tile.x_pitch = g.depth;
    tile.out_pitch = g.columns;
    tile.activation = e.activation;
    for (int32_t panel = 0; panel < split.count; ++panel) {
      tile.w_pitch = int64_t{split.width(panel)} * kWidth;
      const float* w = g.packed + int64_t{g.depth} * split.begin(panel) * kWidth;
      cut(split.width(panel), kStridedVectors, [&](int32_t from, int32_t vectors) {
        const int32_t column = split.first_column(panel) + from * kWidth, left = g.columns - column;
        tile.w = w + from * kWidth;
        tile.lanes = left < vectors * kWidth ? left : vectors * kWidth;
        tile.scale = e.scale ? static_cast<const float*>(e.scale) + column : nullptr;
        tile.shift = e.shift ? static_cast<const float*>(e.shift) + column : nullptr;
        cut(pixels, max_rows(vectors), [&](int32_t pixel, int32_t rows) {
          const int64_t to = (begin + pixel) * g.columns + column;
          tile.x = g.in + (begin + pixel) * g.depth;
          tile.out = g.out + to;
          tile.residual = e.residual ? static_cast<const float*>(e.residual) + to : nullptr;
          strided_tiles<true>.of(rows, vectors)(tile);
        });
      });
    }
  });
}

}  // namespace convext::CONVEXT_ISA

CONVEXT_DEFINE_VARIANT_OF(float, f32, fprop_pointwise,
                          packed_by<GemmFprop<T, false>>(cpu_variant<T>(name, Algorithm::pointwise, Pass::kFprop,
                                                                        reject, launch, pointwise_work)))
