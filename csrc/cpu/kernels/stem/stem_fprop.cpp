// fprop of a layer with few input channels: the first one of a network. It reads x as the user has it, NCHW or NHWC,
// through patches (stem_patch.h), and writes y as the user wants it:
//
//   NHWC   lanes are filters, a tile's rows are neighbouring output columns: weights are loaded, x is broadcast
//   NCHW   lanes are output columns, a tile's rows are filters: x is loaded, weights are broadcast
//
//   out[i][j] = sum_t a_t[i] * b_t[j]          t over the R * S * C taps; i rows, j lanes
//
// The rows of a tile are a constant distance apart, so that a few pointers reach them all: the tile is as tall as the
// vector registers allow.
//
// Register budget, 32 registers: 14x2 = 28 accumulators + 2 vectors + 1 broadcast, 9x3 = 27+3+1; 16: 6x2 = 12+2+1. Per
// tap of a 14x2 tile: 16 loads for 28 FMAs, 2 loads and 2 FMAs a cycle.
//
// FLOP per byte of y: 2 * R * S * C / 4, 13.5 at 3x3x3: beyond the caches memory bounds what is smaller than that.
#include "cpu/kernels/gemm/gemm_passes.h"
#include "cpu/kernels/gemm/strided_tile.h"
#include "stem_patch.h"

namespace convext::CONVEXT_ISA {
namespace {

// One block of outputs.
class StemBlock {
 public:
  StemBlock(const ConvProblem& p, const LaunchArgs& args, const StemPatches& patches, const int32_t* offset)
      : p_(p), args_(args), patches_(patches), offset_(offset) {}

  void run(const StemOutputs& block) {
    patches_.fill(block, patch_);
    const Panels<float> split(p_.k);
    const int32_t taps = p_.r * p_.s * p_.c;
    for (int32_t panel = 0; panel < split.count; ++panel) {
      const float* w = static_cast<const float*>(args_.b) + int64_t{taps} * split.begin(panel) * Vec<float>::width;
      const int32_t filter = split.first_column(panel), filters = split.num_columns(panel);
      tile_.w_pitch = int64_t{split.width(panel)} * Vec<float>::width;
      if (p_.y_layout == Layout::kNHWC) {
        cut(split.width(panel), kStridedVectors, [&](int32_t from, int32_t vectors) {
          const int32_t skipped = from * Vec<float>::width, left = filters - skipped;
          const int32_t most = vectors * Vec<float>::width;
          for (int32_t i = 0; i < block.rows; ++i) {
            run_row(block, i, w + skipped, filter + skipped, left < most ? left : most, vectors);
          }
        });
      } else {
        for (int32_t i = 0; i < block.rows; ++i) run_row(block, i, w, filter, filters, 0);
      }
    }
  }

 private:
  // Row i of the block: `filters` of its outputs from `filter` on, whose weights begin at w.
  void run_row(const StemOutputs& block, int32_t i, const float* w, int32_t filter, int32_t filters, int32_t vectors) {
    const int64_t n = block.n;
    const int32_t p = block.p0 + i, q0 = block.q0, columns = block.columns;
    const FilterRows inside(p_, p);
    const int32_t first_tap = inside.begin * p_.s * p_.c;
    tile_.offset = offset_ + first_tap;
    tile_.taps = inside.end * p_.s * p_.c - first_tap;
    tile_.activation = args_.epilogue.activation;
    w += first_tap * tile_.w_pitch;
    const float* x = patch_ + int64_t{i} * patches_.row_pitch();
    if (p_.y_layout == Layout::kNHWC) {
      const int64_t row = ((n * p_.p() + p) * p_.q() + q0) * p_.k + filter;
      tile_.x_pitch = patches_.column_pitch();
      tile_.out_pitch = p_.k;
      tile_.lanes = filters;
      tile_.w = w;
      point_at_filter(filter);
      cut(columns, max_rows(vectors), [&](int32_t q, int32_t count) {
        tile_.x = x + q * tile_.x_pitch;
        point_at_output(row + int64_t{q} * p_.k);
        strided_tiles<true>.of(count, vectors)(tile_);
      });
    } else {
      const int64_t plane = int64_t{p_.p()} * p_.q();
      const int64_t row = (n * p_.k + filter) * plane + int64_t{p} * p_.q() + q0;
      tile_.out_pitch = plane;
      cut((columns + Vec<float>::width - 1) / Vec<float>::width, 2, [&](int32_t from, int32_t width) {
        const int32_t q = from * Vec<float>::width, left = columns - q, most = width * Vec<float>::width;
        tile_.lanes = left < most ? left : most;
        tile_.x = x + q;
        cut(filters, max_rows(width), [&](int32_t k, int32_t count) {
          tile_.w = w + k;
          point_at_filter(filter + k);
          point_at_output(row + k * plane + q);
          strided_tiles<false>.of(count, width)(tile_);
        });
      });
    }
  }

  void point_at_filter(int32_t filter) {
    const Epilogue& e = args_.epilogue;
    tile_.scale = e.scale ? static_cast<const float*>(e.scale) + filter : nullptr;
    tile_.shift = e.shift ? static_cast<const float*>(e.shift) + filter : nullptr;
  }
  void point_at_output(int64_t element) {
    const Epilogue& e = args_.epilogue;
    tile_.out = static_cast<float*>(args_.out) + element;
    tile_.residual = e.residual ? static_cast<const float*>(e.residual) + element : nullptr;
  }

  const ConvProblem& p_;
  const LaunchArgs& args_;
  const StemPatches& patches_;
  const int32_t* offset_;  // of every tap, in the order of the packed weights: r, s, c
  StridedTile tile_;
  alignas(64) float patch_[kPatchElements + kPatchSlack];
};

const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  if (p.n == 0 || p.k == 0 || p.p() <= 0 || p.q() <= 0) return nullptr;
  const StemPatches patches(p, args.a);
  int32_t offset[kStemTaps];
  patches.offsets(offset);
  args.parallel->for_each(patches.blocks().count(p),
                          [&](int64_t item) { StemBlock(p, args, patches, offset).run(patches.blocks().at(p, item)); });
  return nullptr;
}

}  // namespace
}  // namespace convext::CONVEXT_ISA

CONVEXT_DEFINE_VARIANT_OF(float, f32, fprop_stem,
                          packed_by<GemmFprop<T, false>>(cpu_variant<T>(name, Algorithm::stem, Pass::kFprop,
                                                                        reject_unless_stem, launch, stem_work, nullptr,
                                                                        Layouts::kAny)))
