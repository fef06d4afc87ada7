// How a block is cut into work, and how a strip runs: see block.h.
#include "block.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace convext {
namespace {

constexpr int64_t kAlignment = 64;
constexpr double kRegionFlops = 1e6;  // what a core could compute while threads meet
constexpr double kWeightFlops = 2;    // what a core could compute while it reads a byte of weights
constexpr int64_t kMinRows = 3;       // fewer rows a thread would compute more shared rows twice than it saves

int64_t padded(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

int64_t block_cache_budget() {
  static const int64_t budget = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return size / 2;
#endif
    return int64_t{256} << 10;
  }();
  return budget;
}

namespace {

// Rows [lo, hi) of an image; those outside it are padding.
struct Rows {
  int64_t lo, hi;
  int64_t count() const { return hi - lo; }
  Rows within(int64_t size) const { return {std::clamp<int64_t>(lo, 0, size), std::clamp<int64_t>(hi, 0, size)}; }
};

Rows input_rows(const ConvProblem& p, Rows out) {
  return {out.lo * p.stride_h - p.pad_h, (out.hi - 1) * p.stride_h - p.pad_h + int64_t{p.r - 1} * p.dil_h + 1};
}

int64_t x_row_bytes(const ConvProblem& p) { return int64_t{p.w} * p.c * dtype_size(p.dtype); }
int64_t y_row_bytes(const ConvProblem& p) { return int64_t{p.q()} * p.k * dtype_size(p.dtype); }
double row_flops(const ConvProblem& p) { return 2.0 * p.q() * p.k * p.c_per_group() * p.r * p.s; }
bool row_by_row(const ConvProblem& p) { return p.r == 1 && p.stride_h == 1 && p.pad_h == 0; }

// Steps first .. last, between two squeeze-and-excitations.
struct Segment {
  int first, last;
  int64_t strip = 0;  // rows of the last step's output
};

struct Plan {
  std::vector<Segment> segments;
  int64_t images = 1, groups = 1;  // a group of images is computed together; more than one only as whole images
  int64_t parts = 1;               // runs of rows that an image is cut into for the threads
  int64_t lanes = 1;               // threads that work at once, each with buffers of its own
  bool cooperative = false;        // all threads share every step, over the whole batch at once

  // Offsets into the workspace.
  std::vector<int64_t> image_at;  // by segment: its output for the whole batch; the last one's is the block's
  int64_t sums_at = 0, gates_at = 0, lanes_at = 0;
  // Within a lane's part.
  int64_t edge_at = 0;             // rows of a segment's input beside rows of padding
  std::vector<int64_t> buffer_at;  // by step: its output, unless it is the last of a segment
  int64_t scratch_at = 0, lane_bytes = 0, bytes = 0;

  Plan(const std::vector<BlockStep>& steps, int32_t threads, int64_t budget) {
    for (int i = 0; i < static_cast<int>(steps.size()); ++i) {
      if (i == 0 || steps[i].excites) segments.push_back({i, i});
      segments.back().last = i;
    }
    cut(steps, threads, budget);
    if (cooperative) {
      lay_out_cooperative(steps, threads);
    } else {
      lay_out(steps);
    }
  }

 private:
  void cut(const std::vector<BlockStep>& steps, int32_t threads, int64_t budget) {
    const int64_t batch = steps[0].problem.n;
    int64_t weight_bytes = 0, image_bytes = 0;
    for (const BlockStep& step : steps) weight_bytes += step.problem.w_size() * dtype_size(step.problem.dtype);
    // Weights beyond the second-level cache are read anew for every strip: strips may then take as much as they do.
    const int64_t strip_bytes = weight_bytes > 2 * budget ? weight_bytes : budget;
    for (Segment& segment : segments) {
      int64_t row_bytes = 0, shared = 0, rows_below = 1, whole = 0;
      for (int i = segment.last; i >= segment.first; --i) {  // a row of output stands on `rows_below` rows of a step's
        const ConvProblem& p = steps[i].problem;
        row_bytes += rows_below * y_row_bytes(p);
        rows_below *= p.stride_h;
        shared += (int64_t{p.r - 1} * p.dil_h + 1 - p.stride_h) * x_row_bytes(p);
        whole += p.p() * y_row_bytes(p);
      }
      row_bytes += rows_below * x_row_bytes(steps[segment.first].problem);
      whole += steps[segment.first].problem.h * x_row_bytes(steps[segment.first].problem);
      segment.strip = std::max<int64_t>(1, (strip_bytes - shared) / row_bytes);
      image_bytes = std::max(image_bytes, whole);
    }
    // Small images go together: what they take of the cache may be as much as the weights that they share.
    const int64_t fit = std::max(budget, weight_bytes) / image_bytes;
    images = std::clamp<int64_t>(fit, 1, (batch + threads - 1) / threads);
    groups = (batch + images - 1) / images;
    if (groups < threads) {
      const int64_t most = std::max<int64_t>(1, steps.back().problem.p() / kMinRows);
      if (images == 1) parts = std::min<int64_t>((threads + groups - 1) / groups, most);
    }
    lanes = std::clamp<int64_t>(groups * parts, 1, threads);
    cooperative = images == 1 && groups < threads && better_cooperative(steps, threads, budget);
    for (Segment& segment : segments) {
      const int64_t rows = (steps[segment.last].problem.p() + parts - 1) / parts;
      const int64_t strips = (rows + segment.strip - 1) / segment.strip;
      segment.strip = images > 1 ? rows : (rows + strips - 1) / strips;
    }
  }

  // Whether an image that is cut by rows would keep the threads busy for longer than steps that they share: where rows
  // are few, the parts differ, compute more of each other's rows, and each reads all of the weights.
  bool better_cooperative(const std::vector<BlockStep>& steps, int32_t threads, int64_t budget) const {
    double by_rows = 0, shared = 0;
    int64_t weight_bytes = 0, largest = 0;
    for (const Segment& segment : segments) {
      double longest = 0;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t rows = steps[segment.last].problem.p();
        Rows need{rows * part / parts, rows * (part + 1) / parts};
        double flops = 0;
        for (int i = segment.last; i >= segment.first; --i) {
          const ConvProblem& p = steps[i].problem;
          flops += need.count() * row_flops(p);
          need = input_rows(p, need).within(p.h);
        }
        longest = std::max(longest, flops);
      }
      by_rows += longest * groups * parts / lanes;
    }
    for (const BlockStep& step : steps) {
      const ConvProblem& p = step.problem;
      shared += kRegionFlops + p.n * p.p() * row_flops(p) / threads;
      weight_bytes += p.w_size() * dtype_size(p.dtype);
      largest = std::max(largest, (p.x_size() + p.y_size()) * dtype_size(p.dtype));
    }
    by_rows += segments.size() * kRegionFlops + weight_bytes * kWeightFlops;
    shared += weight_bytes * kWeightFlops / threads;
    return largest <= 2 * budget * threads && shared < by_rows;
  }

  static int64_t take(int64_t& top, int64_t size) {
    const int64_t at = top;
    top += padded(size);
    return at;
  }

  // What squeeze and excitation takes; returns the scratch memory that its gates need.
  int64_t lay_out_gates(const std::vector<BlockStep>& steps, int64_t& top) {
    int64_t sums = 0, gates = 0, scratch = 0;
    for (const BlockStep& step : steps) {
      if (!step.excites) continue;
      sums = std::max<int64_t>(sums, int64_t{step.problem.n} * step.problem.h * step.problem.c);
      gates = std::max<int64_t>(gates, int64_t{step.problem.n} * step.problem.c);
      scratch = std::max<int64_t>(scratch, step.excite.c + step.excite.squeezed);
    }
    sums_at = take(top, sums * 4);
    gates_at = take(top, gates * 4);
    return scratch * 4;
  }

  // Outputs of the steps but the last, in two buffers by turns.
  void lay_out_cooperative(const std::vector<BlockStep>& steps, int32_t threads) {
    int64_t top = 0, largest = 0, scratch = lay_out_gates(steps, top);
    for (const BlockStep& step : steps) {
      const ConvProblem& p = step.problem;
      if (&step != &steps.back()) largest = std::max(largest, p.y_size() * dtype_size(p.dtype));
      if (step.variant->workspace != nullptr) scratch = std::max(scratch, step.variant->workspace(p, threads));
    }
    const int64_t buffers[] = {take(top, largest), take(top, largest)};
    for (size_t i = 0; i < steps.size(); ++i) buffer_at.push_back(buffers[i % 2]);
    lanes_at = take(top, scratch);
    bytes = top;
  }

  void lay_out(const std::vector<BlockStep>& steps) {
    int64_t top = 0;
    for (size_t s = 0; s + 1 < segments.size(); ++s) {
      const ConvProblem& p = steps[segments[s].last].problem;
      image_at.push_back(take(top, p.y_size() * dtype_size(p.dtype)));
    }
    buffer_at.assign(steps.size(), 0);
    int64_t lane = 0, edge = 0, scratch = lay_out_gates(steps, top);
    for (const Segment& segment : segments) {
      int64_t rows = segment.strip;
      const bool whole = rows >= steps[segment.last].problem.p();
      for (int i = segment.last; i >= segment.first; --i) {
        const ConvProblem& p = steps[i].problem;
        if (steps[i].variant->workspace != nullptr) {
          ConvProblem sub = p;
          sub.n = static_cast<int32_t>(images);
          scratch = std::max(scratch, steps[i].variant->workspace(sub, 1));
        }
        rows = std::max<int64_t>(input_rows(p, {0, rows}).count(), whole ? p.h : 0);
        if (i > segment.first) {
          buffer_at[i - 1] = take(lane, images * rows * x_row_bytes(p));
        } else {
          edge = std::max(edge, rows * x_row_bytes(p));
        }
      }
    }
    edge_at = take(lane, edge);
    scratch_at = take(lane, scratch);
    lane_bytes = lane;
    lanes_at = top;
    bytes = top + lanes * lane_bytes;
  }
};

// A strip of one segment, and the segment from strip to strip.
struct Runner {
  const std::vector<BlockStep>& steps;
  const Plan& plan;
  const char* in;
  char *out, *workspace;
  const SqueezeExcite& squeeze_excite;
  Parallel serial{nullptr, 1};
  std::atomic<const char*> failure{nullptr};

  float* sums(const BlockStep& step, int64_t image) const {
    return reinterpret_cast<float*>(workspace + plan.sums_at) + image * step.problem.h * step.problem.c;
  }
  float* gates(const BlockStep& step, int64_t image) const {
    return reinterpret_cast<float*>(workspace + plan.gates_at) + image * step.problem.c;
  }

  // One call of a step: output rows `rows` of `count` images from `image`; x points to the first input row that they
  // read, which is followed by all others, padding included, unless `pad` says that the kernel is to pad itself.
  void call(int index, int64_t image, int64_t count, Rows rows, bool pad, const char* x, char* y, char* lane) {
    const BlockStep& step = steps[index];
    ConvProblem sub = step.problem;
    sub.n = static_cast<int32_t>(count);
    if (!pad) {
      sub.pad_h = 0;
      sub.h = static_cast<int32_t>((rows.count() - 1) * sub.stride_h + int64_t{sub.r - 1} * sub.dil_h + 1);
    }
    LaunchArgs args{};
    args.a = x;
    args.b = step.weights;
    args.out = y;
    args.epilogue = step.epilogue;
    if (args.epilogue.residual != nullptr) {
      args.epilogue.residual = static_cast<const char*>(args.epilogue.residual) +
                               (image * step.problem.p() + rows.lo) * y_row_bytes(step.problem);
    }
    args.workspace = lane + plan.scratch_at;
    args.parallel = &serial;
    if (const char* why = step.variant->launch(sub, args)) failure = why;
  }

  // Output rows `want` of a segment for `count` images; more than one image only in full height.
  void run(int s, int64_t image, int64_t count, Rows want, char* lane) {
    const Segment& segment = plan.segments[s];
    const BlockStep &head = steps[segment.first], &tail = steps[segment.last];
    const char* const source =
        (s == 0 ? in : workspace + plan.image_at[s - 1]) + image * head.problem.h * x_row_bytes(head.problem);
    char* const target = (s + 1 == static_cast<int>(plan.segments.size()) ? out : workspace + plan.image_at[s]) +
                         image * tail.problem.p() * y_row_bytes(tail.problem);
    const bool squeezes = s + 1 < static_cast<int>(plan.segments.size());
    std::vector<Rows> held(steps.size(), Rows{0, 0});  // rows that a step's buffer holds
    for (int64_t lo = want.lo; lo < want.hi; lo += segment.strip) {
      const Rows strip{lo, std::min(lo + segment.strip, want.hi)};
      if (head.excites) {  // row by row: every row is scaled once
        for (int64_t i = 0; i < count; ++i) {
          float* const rows = reinterpret_cast<float*>(const_cast<char*>(source)) +
                              (i * head.problem.h + strip.lo) * head.problem.w * head.problem.c;
          squeeze_excite.scale(rows, strip.count() * head.problem.w, head.problem.c, gates(head, image + i));
        }
      }
      run_strip(segment, image, count, strip, source, target, held, lane);
      if (squeezes) sum_rows(steps[segment.last + 1], image, count, strip, target);
    }
  }

  void sum_rows(const BlockStep& next, int64_t image, int64_t count, Rows strip, const char* target) {
    const ConvProblem& p = next.problem;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t row = strip.lo; row < strip.hi; ++row) {
        squeeze_excite.sums(reinterpret_cast<const float*>(target) + (i * p.h + row) * p.w * p.c, p.w, p.c,
                            sums(next, image + i) + row * p.c);
      }
    }
  }

  void run_strip(const Segment& segment, int64_t image, int64_t count, Rows strip, const char* source, char* target,
                 std::vector<Rows>& held, char* lane) {
    const bool whole = strip.lo == 0 && strip.hi == steps[segment.last].problem.p();
    // Backwards: the rows that each step has to compute, less those that its buffer still holds.
    std::vector<Rows> compute(steps.size());
    compute[segment.last] = strip;
    for (int i = segment.last; i > segment.first; --i) {
      const ConvProblem& p = steps[i].problem;
      const Rows rows = compute[i].within(p.p());
      if (rows.count() <= 0) {
        compute[i - 1] = {0, 0};
        continue;
      }
      const Rows need = whole ? Rows{0, p.h} : input_rows(p, rows);
      Rows& has = held[i - 1];
      if (has.lo <= need.lo && need.lo < has.hi && !whole) {
        char* const buffer = lane + plan.buffer_at[i - 1];
        const int64_t kept = std::min(has.hi, need.hi);
        std::memmove(buffer, buffer + (need.lo - has.lo) * x_row_bytes(p), (kept - need.lo) * x_row_bytes(p));
        compute[i - 1] = {kept, need.hi};
      } else {
        compute[i - 1] = need;
      }
      has = need;
    }
    // Forwards.
    for (int i = segment.first; i <= segment.last; ++i) {
      const ConvProblem& p = steps[i].problem;
      Rows rows = compute[i];
      if (rows.count() <= 0) continue;
      char* y = target + rows.lo * y_row_bytes(p);
      if (i < segment.last) {
        y = lane + plan.buffer_at[i] + (rows.lo - held[i].lo) * y_row_bytes(p);
        rows = without_padding(rows, p, y);
        if (rows.count() <= 0) continue;
      }
      if (whole) {
        call(i, image, count, rows, true, i == segment.first ? source : lane + plan.buffer_at[i - 1], y, lane);
        continue;
      }
      const Rows need = input_rows(p, rows);
      const char* const x = i == segment.first
                                ? first_input(p, need, source, lane)
                                : lane + plan.buffer_at[i - 1] + (need.lo - held[i - 1].lo) * x_row_bytes(p);
      call(i, image, count, rows, false, x, y, lane);
    }
  }

  // Clears the rows of padding among `rows` of the step's output at y; the others, y moved to the first of them.
  static Rows without_padding(Rows rows, const ConvProblem& p, char*& y) {
    const Rows inside = rows.within(p.p());
    const int64_t row = y_row_bytes(p);
    if (inside.count() <= 0) {
      std::memset(y, 0, rows.count() * row);
      return inside;
    }
    std::memset(y, 0, (inside.lo - rows.lo) * row);
    std::memset(y + (inside.hi - rows.lo) * row, 0, (rows.hi - inside.hi) * row);
    y += (inside.lo - rows.lo) * row;
    return inside;
  }

  // Rows `need` of a segment's input: where they lie, or a copy beside rows of zeros.
  const char* first_input(const ConvProblem& p, Rows need, const char* source, char* lane) const {
    const int64_t row = x_row_bytes(p);
    if (need.lo >= 0 && need.hi <= p.h) return source + need.lo * row;
    char* const edge = lane + plan.edge_at;
    const Rows inside = need.within(p.h);
    std::memset(edge, 0, (inside.lo - need.lo) * row);
    std::memcpy(edge + (inside.lo - need.lo) * row, source + inside.lo * row, inside.count() * row);
    std::memset(edge + (inside.hi - need.lo) * row, 0, (need.hi - inside.hi) * row);
    return edge;
  }

  // The gates in front of segment s for one image.
  void excite(int s, int64_t image, char* lane, const Parallel& parallel) {
    const BlockStep& step = steps[plan.segments[s].first];
    squeeze_excite.gates(step.excite, sums(step, image), step.problem.h, int64_t{step.problem.h} * step.problem.w,
                         gates(step, image), reinterpret_cast<float*>(lane + plan.scratch_at), parallel);
  }

  // The whole block, its steps shared by all threads.
  void run_cooperative(const Parallel& parallel) {
    char* const lane = workspace + plan.lanes_at;
    const char* x = in;
    for (int s = 0; s < static_cast<int>(plan.segments.size()); ++s) {
      const Segment& segment = plan.segments[s];
      const ConvProblem& first = steps[segment.first].problem;
      if (s > 0) {
        char* const image = workspace + plan.buffer_at[segment.first - 1];
        parallel.for_each(int64_t{first.n} * first.h, [&](int64_t i) {
          sum_rows(steps[segment.first], i / first.h, 1, {i % first.h, i % first.h + 1},
                   image + i / first.h * first.h * x_row_bytes(first));
        });
        for (int64_t i = 0; i < first.n; ++i) excite(s, i, lane, parallel);
        parallel.for_each(int64_t{first.n} * first.h, [&](int64_t i) {
          squeeze_excite.scale(reinterpret_cast<float*>(image + i * x_row_bytes(first)), first.w, first.c,
                               gates(steps[segment.first], i / first.h));
        });
      }
      for (int i = segment.first; i <= segment.last; ++i) {
        const BlockStep& step = steps[i];
        char* const y = i + 1 == static_cast<int>(steps.size()) ? out : workspace + plan.buffer_at[i];
        LaunchArgs args{};
        args.a = x;
        args.b = step.weights;
        args.out = y;
        args.epilogue = step.epilogue;
        args.workspace = lane;
        args.parallel = &parallel;
        if (const char* why = step.variant->launch(step.problem, args)) failure = why;
        x = y;
      }
    }
  }
};

}  // namespace

const char* reject_block(const std::vector<BlockStep>& steps) {
  if (steps.empty()) return "it has no steps";
  bool excited = false;
  for (size_t i = 0; i < steps.size(); ++i) {
    const ConvProblem& p = steps[i].problem;
    if (!p.is_pointwise() && !p.is_depthwise()) return "a step is neither pointwise nor depthwise";
    if (p.is_pointwise() && (p.pad_h != 0 || p.pad_w != 0)) return "a pointwise step pads";
    if (p.stride_h > int64_t{p.r - 1} * p.dil_h + 1) return "a step skips rows of its input";
    if (p.y_size() == 0 || p.x_size() == 0) return "a step has nothing to compute";
    if (p.dtype != steps[0].problem.dtype) return "the steps differ in dtype";
    if (p.x_layout != Layout::kNHWC || p.y_layout != Layout::kNHWC) return "a step is not channels-last";
    if (i > 0) {
      const ConvProblem& before = steps[i - 1].problem;
      if (before.n != p.n || before.k != p.c || before.p() != p.h || before.q() != p.w) {
        return "a step's input is not the output of the one before";
      }
    }
    excited = excited || steps[i].excites;
    if (excited && !row_by_row(p)) return "what follows squeeze and excitation is no 1x1 convolution";
    if (steps[i].excites) {
      if (i == 0) return "it begins with squeeze and excitation";
      if (p.dtype != DType::kFloat32) return "squeeze and excitation is computed in float32 alone";
      if (steps[i].excite.c != p.c) return "squeeze and excitation has other channels than the convolution after it";
    }
  }
  return nullptr;
}

int64_t block_workspace(const std::vector<BlockStep>& steps, int32_t threads, int64_t budget) {
  return Plan(steps, threads, budget).bytes;
}

const char* run_block(const std::vector<BlockStep>& steps, const void* in, void* out, void* workspace,
                      const SqueezeExcite& squeeze_excite, const Parallel& parallel, int64_t budget) {
  const Plan plan(steps, parallel.threads, budget);
  Runner runner{
      steps,         plan, static_cast<const char*>(in), static_cast<char*>(out), static_cast<char*>(workspace),
      squeeze_excite};
  if (plan.cooperative) {
    runner.run_cooperative(parallel);
    return runner.failure;
  }
  const auto lane_at = [&](int64_t lane) { return runner.workspace + plan.lanes_at + lane * plan.lane_bytes; };
  const int64_t batch = steps[0].problem.n;
  const int segments = static_cast<int>(plan.segments.size());
  const int64_t units = plan.groups * plan.parts;
  // Every lane takes a run of neighbouring units.
  const auto for_units = [&](auto&& body) {
    parallel.for_each(plan.lanes, [&](int64_t lane) {
      for (int64_t unit = units * lane / plan.lanes; unit < units * (lane + 1) / plan.lanes; ++unit) {
        body(unit / plan.parts * plan.images, unit % plan.parts, lane_at(lane));
      }
    });
  };
  if (plan.parts == 1) {  // images are independent: each goes through all segments while it is in the cache
    for_units([&](int64_t image, int64_t, char* lane) {
      const int64_t count = std::min(plan.images, batch - image);
      for (int s = 0; s < segments; ++s) {
        for (int64_t i = 0; s > 0 && i < count; ++i) runner.excite(s, image + i, lane, runner.serial);
        runner.run(s, image, count, {0, steps[plan.segments[s].last].problem.p()}, lane);
      }
    });
    return runner.failure;
  }
  for (int s = 0; s < segments; ++s) {
    if (s > 0) {
      for (int64_t image = 0; image < batch; ++image) runner.excite(s, image, lane_at(0), parallel);
    }
    const int64_t rows = steps[plan.segments[s].last].problem.p();
    for_units([&](int64_t image, int64_t part, char* lane) {
      runner.run(s, image, 1, {rows * part / plan.parts, rows * (part + 1) / plan.parts}, lane);
    });
  }
  return runner.failure;
}

}  // namespace convext
