// How a batch is cut into pieces, and what is done with each: see training.h.
#include "training.h"

#include <algorithm>
#include <atomic>
#include <vector>

namespace convext {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kPieceBytes = 256 << 10;     // of x and y together that a piece is to have
constexpr int64_t kMinPixels = 96;             // of a piece: with fewer, reading the weights is what takes the time
constexpr int64_t kSharedWeights = 256 << 10;  // bytes of weights from which a piece has more pixels
constexpr int64_t kMinPixelsOfMany = 384;
constexpr int64_t kMaxShares = 16;
// How many times the weights of a filter with taps a piece has at least: Winograd's kernels transform them, and dw, for
// every piece.
constexpr int64_t kTransformed = 8;

int64_t padded(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int64_t take(int64_t& top, int64_t size) {
  const int64_t at = top;
  top += padded(size);
  return at;
}

char* offset(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }
const char* offset(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }

// A filter that reads the pixel it writes, so that any pixels are a problem of their own.
bool is_by_pixel(const ConvProblem& p) {
  return p.is_pointwise() && p.is_unit_stride() && p.pad_h == 0 && p.pad_w == 0 && p.x_layout == Layout::kNHWC &&
         p.y_layout == Layout::kNHWC;
}

// A run of chunks, and the same in images, of those that have whole ones, and in pixels of x and of y.
struct Piece {
  int64_t chunk, chunks;
  int64_t x_pixel, x_pixels, y_pixel, y_pixels;
  ConvProblem problem;
};

// The batch cut into pieces by chunks of `grid`, which is of y, or with `of_x` of x.
std::vector<Piece> cut(const ConvProblem& p, const BatchNorm& kernels, const BatchNormArgs& grid, bool of_x) {
  const int64_t element = dtype_size(p.dtype), weights = p.w_size() * element;
  const bool by_pixel = is_by_pixel(p);
  const int64_t grid_image = of_x ? int64_t{p.h} * p.w : int64_t{p.p()} * p.q();  // pixels
  const int64_t x_image = int64_t{p.h} * p.w, y_image = int64_t{p.p()} * p.q();
  const int64_t image_bytes = (x_image * p.c + y_image * p.k) * element;
  // Weights are read anew for every piece, which may take of the cache what they do.
  const int64_t least = weights > kSharedWeights ? kMinPixelsOfMany : kMinPixels;
  const int64_t wanted_pixels = std::max(kPieceBytes * grid_image / std::max<int64_t>(image_bytes, 1), least);
  const int64_t shared = p.taps() > 1 && p.groups == 1 ? kTransformed * weights : weights;
  const int64_t wanted_images = std::max<int64_t>(1, std::max(2 * kPieceBytes, shared) / image_bytes);
  const int64_t most = by_pixel ? wanted_pixels : wanted_images * grid_image, all = p.n * grid_image;
  const int64_t count = (all + most - 1) / most, wanted = (all + count - 1) / count;  // as even as they go
  const int64_t chunks = kernels.chunks(grid);
  std::vector<Piece> pieces;
  for (int64_t chunk = 0; chunk < chunks;) {
    const int64_t begin = kernels.chunk_begin(grid, chunk);
    int64_t next = chunk, end = begin;
    do {
      end = kernels.chunk_begin(grid, ++next);
    } while (next < chunks && (end - begin < wanted || (!by_pixel && end % grid_image != 0)));
    Piece piece{chunk, next - chunk, begin, end - begin, begin, end - begin, p};
    if (by_pixel) {
      piece.problem.n = piece.problem.h = 1;
      piece.problem.w = static_cast<int32_t>(end - begin);
    } else {
      const int64_t image = begin / grid_image, images = (end - begin) / grid_image;
      piece.problem.n = static_cast<int32_t>(images);
      piece.x_pixel = image * x_image, piece.x_pixels = images * x_image;
      piece.y_pixel = image * y_image, piece.y_pixels = images * y_image;
    }
    pieces.push_back(piece);
    chunk = next;
  }
  return pieces;
}

int64_t workspace_of(const Variant& variant, const std::vector<Piece>& pieces, int32_t threads) {
  int64_t most = 0;
  if (variant.workspace != nullptr) {
    for (const Piece& piece : pieces) most = std::max(most, variant.workspace(piece.problem, threads));
  }
  return most;
}

// body(begin, pixels) for parts of so many pixels.
template <class F>
void in_parts(const Parallel& parallel, int64_t pixels, F&& body) {
  const int64_t parts = std::clamp<int64_t>(pixels / 64, 1, parallel.threads);
  parallel.for_each(parts, [&](int64_t part) {
    const int64_t begin = pixels * part / parts;
    body(begin, pixels * (part + 1) / parts - begin);
  });
}

// `count` tasks in order on so many lanes, each of which works by itself, or on one, each by all threads:
// task(index, lane, parallel).
template <class F>
void in_lanes(const Parallel& parallel, int64_t count, int64_t lanes, F&& task) {
  if (lanes == 1) {
    for (int64_t i = 0; i < count; ++i) task(i, int64_t{0}, parallel);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel.for_each(lanes, [&](int64_t lane) {
    const Parallel serial{nullptr, 1};
    for (int64_t i = next++; i < count; i = next++) task(i, lane, serial);
  });
}

// A lane for each thread, where the last tasks leave few of them idle.
int64_t lanes_of(int64_t tasks, int32_t threads) {
  return tasks >= 4 * threads || (tasks >= threads && tasks % threads == 0) ? threads : 1;
}

// The largest power of two up to a number, which cores are as a rule.
int64_t power_of_two(int64_t most) {
  int64_t power = 1;
  while (2 * power <= most) power *= 2;
  return power;
}

}  // namespace

// ---- forward ----

namespace {

struct FpropPlan {
  std::vector<Piece> pieces;
  int64_t lanes;
  int64_t output_at, input_at, lanes_at, x_at = 0, scratch_at, lane_bytes = 0, bytes = 0;

  FpropPlan(const FpropStats& call, const BatchNorm& kernels, int32_t threads)
      : pieces(cut(call.problem, kernels, call.output, false)),
        lanes(lanes_of(static_cast<int64_t>(pieces.size()), threads)) {
    if (lanes == 1 && threads > 1) pieces = {whole(call, kernels)};
    const int64_t pixel = call.problem.c * dtype_size(call.problem.dtype);
    int64_t x_bytes = 0;
    for (const Piece& piece : pieces) x_bytes = std::max(x_bytes, piece.x_pixels * pixel);
    output_at = take(bytes, kernels.workspace(call.output));
    input_at = take(bytes, call.input ? kernels.workspace(*call.input) : 0);
    if (call.input) x_at = take(lane_bytes, x_bytes);
    scratch_at = take(lane_bytes, workspace_of(*call.variant, pieces, lanes == 1 ? threads : 1));
    lanes_at = bytes;
    bytes += lanes * lane_bytes;
  }

  // y does not depend on how it is cut, nor do the chunks.
  static Piece whole(const FpropStats& call, const BatchNorm& kernels) {
    const ConvProblem& p = call.problem;
    return {0, kernels.chunks(call.output), 0, p.nhw(), 0, p.npq(), p};
  }
};

}  // namespace

int64_t fprop_stats_workspace(const FpropStats& call, const BatchNorm& kernels, int32_t threads) {
  return FpropPlan(call, kernels, threads).bytes;
}

const char* fprop_stats(FpropStats call, const BatchNorm& kernels, void* workspace, const Parallel& parallel) {
  const FpropPlan plan(call, kernels, parallel.threads);
  const ConvProblem& p = call.problem;
  const int64_t element = dtype_size(p.dtype), x_pixel = p.c * element, y_pixel = p.k * element;
  void* const of_output = offset(workspace, plan.output_at);
  void* const of_input = offset(workspace, plan.input_at);
  if (call.input) kernels.load(*call.input, of_input);
  std::atomic<const char*> failure{nullptr};
  in_lanes(parallel, static_cast<int64_t>(plan.pieces.size()), plan.lanes,
           [&](int64_t index, int64_t lane, const Parallel& threads) {
    const Piece& piece = plan.pieces[index];
    char* const own = offset(workspace, plan.lanes_at + lane * plan.lane_bytes);
    LaunchArgs args = call.args;
    if (call.input) {
      char* const x = own + plan.x_at;
      const char* const from = offset(call.input->y, piece.x_pixel * x_pixel);
      in_parts(threads, piece.x_pixels, [&](int64_t begin, int64_t pixels) {
        kernels.act(*call.input, from + begin * x_pixel, pixels, x + begin * x_pixel, of_input);
      });
      args.a = x;
    } else {
      args.a = offset(call.args.a, piece.x_pixel * x_pixel);
    }
    args.out = offset(call.args.out, piece.y_pixel * y_pixel);
    args.workspace = own + plan.scratch_at;
    args.parallel = &threads;
    if (const char* why = call.variant->launch(piece.problem, args)) failure = why;
    threads.for_each(piece.chunks, [&](int64_t i) { kernels.stats_of_chunk(call.output, piece.chunk + i, of_output); });
  });
  if (failure == nullptr) kernels.finish_stats(parallel, call.output, call.mean, call.var, of_output);
  return failure;
}

// ---- backward ----

namespace {

// What all pieces of x are cut by: the chunks of its batch norm, or of one that would be there.
BatchNormArgs grid_of(const BatchNormConvGradients& call) {
  if (call.input) return *call.input;
  const ConvProblem& p = call.problem;
  BatchNormArgs grid{};
  grid.n = p.n, grid.c = p.c, grid.hw = int64_t{p.h} * p.w, grid.layout = Layout::kNHWC, grid.dtype = p.dtype;
  return grid;
}

struct GradientPlan {
  std::vector<Piece> pieces;
  int64_t shares, lanes;
  bool keeps_sums;  // dw's between pieces; else a launch of wgrad for each piece, and its result is added
  int64_t output_at, input_at, sums_at, dw_at, share_bytes, lanes_at;
  int64_t dy_at, x_at, scratch_at, piece_dw_at, lane_bytes = 0, bytes = 0;

  GradientPlan(const BatchNormConvGradients& call, const BatchNorm& kernels, const WgradSum& sum, int32_t threads)
      : pieces(cut(call.problem, kernels, grid_of(call), true)) {
    const ConvProblem& p = call.problem;
    const int64_t element = dtype_size(p.dtype), weights = p.w_size() * element;
    const int64_t count = static_cast<int64_t>(pieces.size());
    // Sums of dw that are no more than what they are of.
    shares = power_of_two(std::clamp<int64_t>((p.x_size() + p.y_size()) / std::max<int64_t>(1, p.w_size()), 1,
                                              std::min(kMaxShares, count)));
    lanes = lanes_of(shares, threads);
    const Algorithm algorithm = call.wgrad->algorithm;
    keeps_sums = count > 1 && (algorithm == Algorithm::direct || algorithm == Algorithm::dilated);
    share_bytes = padded(keeps_sums ? sum.bytes(p) : weights);
    int64_t dy_bytes = 0, x_bytes = 0;
    for (const Piece& piece : pieces) {
      dy_bytes = std::max(dy_bytes, piece.y_pixels * p.k * element);
      x_bytes = std::max(x_bytes, piece.x_pixels * p.c * element);
    }
    const int32_t at_once = lanes == 1 ? threads : 1;
    output_at = take(bytes, kernels.workspace(call.output));
    input_at = take(bytes, call.input ? kernels.workspace(*call.input) : 0);
    sums_at = take(bytes, call.sums ? 0 : 2 * p.k * static_cast<int64_t>(sizeof(double)));
    dw_at = take(bytes, count > 1 ? shares * share_bytes : 0);
    dy_at = take(lane_bytes, dy_bytes);
    x_at = take(lane_bytes, call.input ? x_bytes : 0);
    scratch_at = take(lane_bytes,
                      std::max(workspace_of(*call.dgrad, pieces, at_once), workspace_of(*call.wgrad, pieces, at_once)));
    piece_dw_at = take(lane_bytes, keeps_sums || count == 1 ? 0 : weights);
    lanes_at = bytes;
    bytes += lanes * lane_bytes;
  }
  int64_t share_begin(int64_t share) const { return static_cast<int64_t>(pieces.size()) * share / shares; }
};

template <class T>
void add(void* to, const void* from, int64_t count) {
  T* const sums = static_cast<T*>(to);
  const T* const more = static_cast<const T*>(from);
  for (int64_t i = 0; i < count; ++i) sums[i] += more[i];
}

void add(DType dtype, void* to, const void* from, int64_t count) {
  dtype == DType::kFloat64 ? add<double>(to, from, count) : add<float>(to, from, count);
}

// One call of batch_norm_conv_gradients.
struct GradientRun {
  const BatchNormConvGradients& call;
  const BatchNorm& kernels;
  const WgradSum& sum;
  const GradientPlan& plan;
  void* workspace;
  int64_t element = dtype_size(call.problem.dtype);
  int64_t x_pixel = call.problem.c * element, y_pixel = call.problem.k * element;  // bytes
  std::atomic<const char*> failure{nullptr};

  void* of_output() const { return offset(workspace, plan.output_at); }
  void* of_input() const { return offset(workspace, plan.input_at); }

  void launch(const Variant& variant, const Piece& piece, const void* a, const void* b, void* out, char* own,
              const Parallel& threads) {
    LaunchArgs args{};
    args.a = a, args.b = b, args.out = out;
    args.weights = call.source;
    args.workspace = own + plan.scratch_at;
    args.parallel = &threads;
    if (const char* why = variant.launch(piece.problem, args)) failure = why;
  }

  // x of a piece: where it lies, or computed again, with the sums over dx on the way.
  const char* x_of(const Piece& piece, char* own, const Parallel& threads) {
    if (!call.input) return offset(call.x, piece.x_pixel * x_pixel);
    char* const x = own + plan.x_at;
    if (call.input_sums) {
      threads.for_each(piece.chunks, [&](int64_t i) {
        const int64_t chunk = piece.chunk + i, begin = kernels.chunk_begin(*call.input, chunk) - piece.x_pixel;
        kernels.sums_of_chunk(*call.input, call.dx, chunk, x + begin * x_pixel, of_input());
      });
    } else {
      const char* const y = offset(call.input->y, piece.x_pixel * x_pixel);
      in_parts(threads, piece.x_pixels, [&](int64_t begin, int64_t pixels) {
        kernels.act(*call.input, y + begin * x_pixel, pixels, x + begin * x_pixel, of_input());
      });
    }
    return x;
  }

  void run(const Piece& piece, void* dw, bool adds, char* own, const Parallel& threads) {
    char* const dy = own + plan.dy_at;
    const int64_t y_at = piece.y_pixel * y_pixel;
    in_parts(threads, piece.y_pixels, [&](int64_t begin, int64_t pixels) {
      const int64_t at = begin * y_pixel;
      kernels.gradient(call.output, offset(call.output.y, y_at + at), offset(call.dout, y_at + at), pixels, dy + at,
                       of_output());
    });
    launch(*call.dgrad, piece, dy, call.weights, offset(call.dx, piece.x_pixel * x_pixel), own, threads);
    const char* const x = x_of(piece, own, threads);
    if (plan.keeps_sums) {
      sum.add(piece.problem, threads, dy, x, dw, adds);
      return;
    }
    void* const out = adds ? own + plan.piece_dw_at : dw;
    launch(*call.wgrad, piece, dy, x, out, own, threads);
    if (adds) add(call.problem.dtype, dw, out, call.problem.w_size());
  }

  void run_all(const Parallel& parallel) {
    if (plan.pieces.size() == 1) {
      run(plan.pieces[0], call.dw, false, offset(workspace, plan.lanes_at), parallel);
      return;
    }
    in_lanes(parallel, plan.shares, plan.lanes, [&](int64_t share, int64_t lane, const Parallel& threads) {
      void* const sums = offset(workspace, plan.dw_at + share * plan.share_bytes);
      void* const dw = share == 0 && !plan.keeps_sums ? call.dw : sums;
      char* const own = offset(workspace, plan.lanes_at + lane * plan.lane_bytes);
      const int64_t first = plan.share_begin(share);
      for (int64_t i = first; i < plan.share_begin(share + 1); ++i) run(plan.pieces[i], dw, i > first, own, threads);
    });
    void* const sums = offset(workspace, plan.dw_at);
    if (plan.keeps_sums) {
      sum.finish(call.problem, parallel, sums, plan.shares, call.dw);
      return;
    }
    const int64_t count = call.problem.w_size();
    for (int64_t share = 1; share < plan.shares; ++share) {
      add(call.problem.dtype, call.dw, offset(sums, share * plan.share_bytes), count);
    }
  }
};

}  // namespace

int64_t batch_norm_conv_gradients_workspace(const BatchNormConvGradients& call, const BatchNorm& kernels,
                                            const WgradSum& sum, int32_t threads) {
  return GradientPlan(call, kernels, sum, threads).bytes;
}

const char* batch_norm_conv_gradients(BatchNormConvGradients call, const BatchNorm& kernels, const WgradSum& sum,
                                      void* workspace, const Parallel& parallel) {
  const GradientPlan plan(call, kernels, sum, parallel.threads);
  GradientRun run{call, kernels, sum, plan, workspace};
  const double* sums = call.sums;
  if (sums == nullptr) {
    double* const own = reinterpret_cast<double*>(offset(workspace, plan.sums_at));
    kernels.load(call.output, run.of_output());
    parallel.for_each(kernels.chunks(call.output), [&](int64_t chunk) {
      kernels.sums_of_chunk(call.output, call.dout, chunk, nullptr, run.of_output());
    });
    kernels.finish_sums(parallel, call.output, own, run.of_output());
    sums = own;
  }
  BatchNormGradients vectors{};
  vectors.dgamma = call.dgamma, vectors.dbeta = call.dbeta;
  kernels.load_gradient(call.output, vectors, sums, run.of_output());
  if (call.input) kernels.load(*call.input, run.of_input());
  run.run_all(parallel);
  if (run.failure == nullptr && call.input_sums) {
    kernels.finish_sums(parallel, *call.input, call.input_sums, run.of_input());
  }
  return run.failure;
}

}  // namespace convext
