// wgrad of a layer with few input channels: the first one of a network. It reads x as the user has it, NCHW or NHWC,
// through patches (stem_patch.h), and dy in NHWC.
//
//   dw[t, k] = sum_{n,p,q} x[n, p, q at tap t] * dy[n, p, q, k]         t over the R * S * C taps
//
//   A  (taps, NPQ)  in a patch: one pointer a tap, the same distance from an output to the next; broadcast
//   B  (NPQ, K)     dy as it lies: lanes are filters
//   C  (taps, K)    a share's partial sums in the workspace, turned into KCRS at the end
//
// A tile is summed over one row of outputs and added to its partial sums, 1 step in about 100.
//
// Register budget, 32 registers: 11x2 = 22 accumulators + 2 vectors + 1 broadcast, 9x3 = 27+3+1; 16: 6x2 = 12+2+1. The
// pointers of more than 11 taps would not fit into the general registers.
//
// One item of work is a fixed share of the blocks of outputs. Shares depend on the problem alone and are added in a
// fixed order, so results do not depend on the number of threads.
#include "cpu/kernels/gemm/gemm.h"
#include "cpu/simd/registers.h"
#include "stem_patch.h"

namespace convext::CONVEXT_ISA {
namespace {

constexpr int64_t kShares = 16;
constexpr int kFilterVectors = kVectorRegisters == 32 ? 3 : 2;
constexpr int max_taps(int vectors) { return max_rows(vectors) < 11 ? max_rows(vectors) : 11; }

struct RowTile {
  const float* x;  // tap i of output q reads x[offset[i] + q * x_pitch]
  const int32_t* offset;
  int64_t x_pitch;
  const float* dy;  // filters of output q begin at dy + q * dy_pitch
  int64_t dy_pitch;
  int32_t outputs;
  int32_t filters;  // lanes that exist
  float* out;       // tap i adds to out + i * out_pitch
  int64_t out_pitch;
};

template <bool WHOLE, int TAPS, int VECTORS>
void add_row(const RowTile& args) {
  using V = Vec<float>;
  const Lanes<float> tail(args.filters - (VECTORS - 1) * V::width);
  const float* x[TAPS];
  CONVEXT_UNROLL
  for (int i = 0; i < TAPS; ++i) x[i] = args.x + args.offset[i];
  V acc[TAPS][VECTORS];
  unrolled<TAPS, VECTORS>(
      [&](int i, int j) CONVEXT_LAMBDA_INLINE { acc[i][j] = load(args.out + i * args.out_pitch + j * V::width); });
  const float* dy = args.dy;
  const int64_t end = args.outputs * args.x_pitch;
  for (int64_t q = 0; q < end; q += args.x_pitch, dy += args.dy_pitch) {
    add_outer(acc, [&](int i) CONVEXT_LAMBDA_INLINE { return V(x[i][q]); }, [&](int j) CONVEXT_LAMBDA_INLINE {
      return WHOLE || j < VECTORS - 1 ? load(dy + j * V::width) : load(dy + j * V::width, tail);
    });
  }
  unrolled<TAPS, VECTORS>(
      [&](int i, int j) CONVEXT_LAMBDA_INLINE { store(args.out + i * args.out_pitch + j * V::width, acc[i][j]); });
}

template <bool WHOLE>
constexpr TileTable<void (*)(const RowTile&), kFilterVectors, max_taps> row_tiles([](auto taps, auto vectors) {
  return add_row<WHOLE, taps.value, vectors.value>;
});

struct WgradShares {
  int32_t taps, lanes;  // lanes: filters rounded up to whole vectors
  int64_t blocks, count;

  explicit WgradShares(const ConvProblem& p, const StemBlocks& b)
      : taps(p.r * p.s * p.c), lanes((p.k + Vec<float>::width - 1) / Vec<float>::width * Vec<float>::width) {
    blocks = p.p() > 0 && p.q() > 0 ? b.count(p) : 0;
    count = blocks < kShares ? blocks : kShares;
  }
  int64_t partial() const { return int64_t{taps} * lanes; }  // elements
};

// One share of the blocks, summed into `partial`, (taps, lanes).
class ShareSum {
 public:
  ShareSum(const ConvProblem& p, const LaunchArgs& args, const StemPatches& patches, const int32_t* offset,
           const WgradShares& shares, float* partial)
      : p_(p),
        dy_(static_cast<const float*>(args.a)),
        patches_(patches),
        offset_(offset),
        shares_(shares),
        partial_(partial) {
    for (int64_t i = 0; i < shares.partial(); ++i) partial[i] = 0;
    tile_.x_pitch = patches.column_pitch();
    tile_.dy_pitch = p.k;
    tile_.out_pitch = shares.lanes;
  }

  void add(const StemOutputs& block) {
    patches_.fill(block, patch_);
    patches_.clear_outside(block, patch_);
    tile_.outputs = block.columns;
    for (int32_t i = 0; i < block.rows; ++i) {
      tile_.x = patch_ + int64_t{i} * patches_.row_pitch();
      const float* dy = dy_ + ((block.n * p_.p() + block.p0 + i) * p_.q() + block.q0) * p_.k;
      cut(shares_.lanes / Vec<float>::width, kFilterVectors, [&](int32_t first, int32_t vectors) {
        const int32_t filter = first * Vec<float>::width, left = p_.k - filter;
        tile_.filters = left < vectors * Vec<float>::width ? left : vectors * Vec<float>::width;
        tile_.dy = dy + filter;
        const auto& tiles = tile_.filters == vectors * Vec<float>::width ? row_tiles<true> : row_tiles<false>;
        cut(shares_.taps, max_taps(vectors), [&](int32_t tap, int32_t taps) {
          tile_.offset = offset_ + tap;
          tile_.out = partial_ + int64_t{tap} * shares_.lanes + filter;
          tiles.of(taps, vectors)(tile_);
        });
      });
    }
  }

 private:
  const ConvProblem& p_;
  const float* dy_;
  const StemPatches& patches_;
  const int32_t* offset_;
  const WgradShares& shares_;
  float* partial_;
  RowTile tile_;
  alignas(64) float patch_[kPatchElements + kPatchSlack];
};

// dw of tap t for all filters: the shares' sums added in order.
void finish_tap(const ConvProblem& p, const WgradShares& shares, const float* partial, int32_t t, float* dw) {
  const int32_t c = t % p.c, tap = t / p.c, filter = p.c * p.r * p.s;
  float* to = dw + c * p.r * p.s + tap;
  for (int32_t k = 0; k < p.k; k += Vec<float>::width) {
    Vec<float> sum = Vec<float>::zero();
    const float* from = partial + int64_t{t} * shares.lanes + k;
    for (int64_t i = 0; i < shares.count; ++i) sum += load(from + i * shares.partial());
    for (int32_t j = 0; j < Vec<float>::width && k + j < p.k; ++j) to[int64_t{k + j} * filter] = sum.v[j];
  }
}

int64_t workspace(const ConvProblem& p, int32_t) {
  const WgradShares shares(p, StemBlocks(p));
  return shares.count * shares.partial() * static_cast<int64_t>(sizeof(float));
}

const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  if (p.w_size() == 0) return nullptr;
  const StemPatches patches(p, args.b);
  const WgradShares shares(p, patches.blocks());
  int32_t offset[kStemTaps];
  patches.offsets(offset);
  float* partial = static_cast<float*>(args.workspace);
  args.parallel->for_each(shares.count, [&](int64_t share) {
    ShareSum sum(p, args, patches, offset, shares, partial + share * shares.partial());
    for (int64_t i = shares.blocks * share / shares.count; i < shares.blocks * (share + 1) / shares.count; ++i) {
      sum.add(patches.blocks().at(p, i));
    }
  });
  args.parallel->for_each(shares.taps, [&](int64_t t) {
    finish_tap(p, shares, partial, static_cast<int32_t>(t), static_cast<float*>(args.out));
  });
  return nullptr;
}

}  // namespace
}  // namespace convext::CONVEXT_ISA

CONVEXT_DEFINE_VARIANT_OF(float, f32, wgrad_stem,
                          cpu_variant<T>(name, Algorithm::stem, Pass::kWgrad, reject_unless_stem, launch, stem_work,
                                         workspace, Layouts::kAnyX))
