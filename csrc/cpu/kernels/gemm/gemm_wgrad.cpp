#include "gemm_wgrad.h"

#include "gemm_outer.h"
#include "wgrad_sum.h"

namespace convext::CONVEXT_ISA {
namespace {

constexpr int32_t kSlab = 96;       // pixels of a slab
constexpr int32_t kItems = 32;      // items of work to aim for
constexpr int64_t kMinShare = 384;  // pixels that are worth an item of their own

// ---- The problem cut into items ----

template <class T>
struct WgradPlan {
  const ConvProblem& p;
  int32_t cg, kg;
  Panels<T> split;  // of one group's t * r * s * cg columns
  int64_t pixels;
  int64_t shares;   // of the pixels
  int64_t partial;  // elements of one share's partial sums

  explicit WgradPlan(const ConvProblem& problem)
      : p(problem),
        cg(problem.c_per_group()),
        kg(problem.k_per_group()),
        split(static_cast<int32_t>(problem.taps()) * cg) {
    pixels = p.z() > 0 && p.p() > 0 && p.q() > 0 ? p.npq() : 0;
    const int64_t items = int64_t{p.groups} * split.count;
    shares = items > 0 ? (kItems + items - 1) / items : 1;
    if (shares > pixels / kMinShare) shares = pixels / kMinShare;
    if (shares < 1) shares = 1;
    partial = int64_t{p.groups} * kg * split.vectors * Vec<T>::width;
  }
  int64_t share_begin(int64_t share) const { return pixels * share / shares; }

  // Partial sums of a panel: (kg, lanes).
  int64_t panel_at(int64_t share, int32_t group, int32_t panel) const {
    return share * partial + (int64_t{group} * split.vectors + split.begin(panel)) * Vec<T>::width * kg;
  }
};

// ---- Gathering B ----

// A stretch of a panel's columns that is contiguous in x for a pixel: channels of filter row r from column s on.
struct Run {
  int32_t t, r, s;
  int32_t channel;        // first channel within tap (t, r, s)
  int32_t first, length;  // columns of the panel
};

// Copies n elements, n small.
template <class T>
CONVEXT_INLINE void copy(T* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + Vec<T>::width <= n; i += Vec<T>::width) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, Lanes<T>(n - i)), Lanes<T>(n - i));
}
template <class T>
CONVEXT_INLINE void clear(T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = 0;
}

constexpr int32_t floor_div(int32_t a, int32_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
constexpr int32_t ceil_div(int32_t a, int32_t b) { return -floor_div(-a, b); }

template <class T>
class Panel {
 public:
  Panel(const WgradPlan<T>& plan, const LaunchArgs& args, int32_t group, int32_t panel)
      : plan_(plan),
        p_(plan.p),
        x_(static_cast<const T*>(args.b) + int64_t{group} * plan.cg),
        dy_(static_cast<const T*>(args.a) + int64_t{group} * plan.kg),
        vectors_(plan.split.width(panel)),
        lanes_(vectors_ * Vec<T>::width) {
    // Taps of a filter row are contiguous in NHWC when nothing lies between them.
    const bool joins_taps = p_.groups == 1 && p_.dil_w == 1;
    const int32_t first = plan.split.first_column(panel), end = first + plan.split.num_columns(panel);
    columns_ = end - first;
    for (int32_t j = first; j < end;) {
      const int32_t tap = j / plan.cg, row = tap / p_.s, s = tap % p_.s;
      const int32_t stop = joins_taps ? (row + 1) * p_.s * plan.cg : (tap + 1) * plan.cg;
      const int32_t length = (stop < end ? stop : end) - j;
      runs_[num_runs_++] = {row / p_.r, row % p_.r, s, j - tap * plan.cg, j - first, length};
      j += length;
    }
  }

  // The partial sums at `out`, (kg, lanes), of pixels [begin, end) of the output, added to what is there if `adds`.
  void accumulate(int64_t begin, int64_t end, T* out, bool adds = false) {
    out_ = out, started_ = adds, filled_ = 0;
    for (int64_t m = begin; m < end;) {  // one row of the output, or the share's part of it
      const int32_t q = static_cast<int32_t>(m % p_.q());
      const int32_t length = static_cast<int32_t>(end - m < p_.q() - q ? end - m : p_.q() - q);
      add_row(m / p_.q(), q, q + length);
      m += length;
    }
    flush();
    if (!started_) clear(out, int64_t{plan_.kg} * lanes_);
  }

 private:
  // The outputs of the row, one of all (n, z, p), that some run sees inside the image are contiguous: gather those.
  void add_row(int64_t row, int32_t q_begin, int32_t q_end) {
    const int64_t plane = row / p_.p(), n = plane / p_.z();
    const int32_t z = static_cast<int32_t>(plane % p_.z()), p = static_cast<int32_t>(row % p_.p());
    int32_t low = q_end, high = q_begin;
    for (int32_t i = 0; i < num_runs_; ++i) {
      const Run& run = runs_[i];
      const int32_t d = p_.d_of(z, run.t), h = p_.h_of(p, run.r);
      lines_[i] = d < 0 || d >= p_.d || h < 0 || h >= p_.h ? nullptr : x_ + ((n * p_.d + d) * p_.h + h) * p_.w * p_.c;
      if (!lines_[i]) continue;
      const int32_t last_s = run.s + (run.channel + run.length - 1) / plan_.cg;
      const int32_t from = ceil_div(-p_.w_of(0, last_s), p_.stride_w);
      const int32_t to = floor_div(p_.w - 1 - p_.w_of(0, run.s), p_.stride_w) + 1;
      low = from < low ? from : low;
      high = to > high ? to : high;
    }
    low = low > q_begin ? low : q_begin;
    high = high < q_end ? high : q_end;
    while (low < high) {
      const int32_t count = high - low < kSlab - filled_ ? high - low : kSlab - filled_;
      gather(row, low, count);
      low += count;
      if (filled_ == kSlab) flush();
    }
  }

  void gather(int64_t row, int32_t q, int32_t count) {
    const T* dy = dy_ + (row * p_.q() + q) * p_.k;
    for (int32_t k = 0; k < count; ++k) rows_[filled_ + k] = dy + int64_t{k} * p_.k;
    T* to = slab_ + filled_ * lanes_;
    for (int32_t i = 0; i < num_runs_; ++i) {
      const Run& run = runs_[i];
      const T* const line = lines_[i];
      if (!line) {
        for (int32_t k = 0; k < count; ++k) clear(to + k * lanes_ + run.first, run.length);
        continue;
      }
      const int64_t line_end = int64_t{p_.w} * p_.c;
      for (int32_t k = 0; k < count; ++k) {
        const int64_t w = p_.w_of(q + k, run.s);
        const int64_t at = w * p_.c + run.channel;  // of the run's first element in the line
        T* dst = to + k * lanes_ + run.first;
        if (w >= 0 && at + run.length <= line_end) {
          copy(dst, line + at, run.length);
        } else {
          gather_clipped(dst, line, at, w, run);
        }
      }
    }
    if (columns_ < lanes_) {
      for (int32_t k = 0; k < count; ++k) clear(to + k * lanes_ + columns_, lanes_ - columns_);
    }
    filled_ += count;
  }

  // A run that sticks out of the line: the elements outside are padding.
  void gather_clipped(T* dst, const T* line, int64_t at, int64_t w, const Run& run) const {
    const bool joined = run.channel + run.length > plan_.cg;
    if (!joined && (w < 0 || w >= p_.w)) return clear(dst, run.length);
    for (int64_t j = 0; j < run.length; ++j) {
      const int64_t column = w + (run.channel + j) / plan_.cg;
      dst[j] = column >= 0 && column < p_.w ? line[at + j] : T(0);
    }
  }

  void flush() {
    if (filled_ == 0) return;
    OuterArgs<T> args{rows_, slab_, lanes_, filled_, 0, out_, started_};
    const int32_t most = max_rows(vectors_), tiles = (plan_.kg + most - 1) / most;
    for (int32_t i = 0; i < tiles; ++i) {
      const int32_t begin = static_cast<int32_t>(int64_t{plan_.kg} * i / tiles);
      const int32_t end = static_cast<int32_t>(int64_t{plan_.kg} * (i + 1) / tiles);
      args.offset = begin;
      args.out = out_ + int64_t{begin} * lanes_;
      outer_table<T>.of(end - begin, vectors_)(args);
    }
    started_ = true;
    filled_ = 0;
  }

  const WgradPlan<T>& plan_;
  const ConvProblem& p_;
  const T* x_;
  const T* dy_;
  int32_t vectors_, lanes_, columns_;
  int32_t num_runs_ = 0;
  T* out_ = nullptr;
  bool started_ = false;
  int32_t filled_ = 0;
  Run runs_[kMaxVectors * Vec<T>::width];
  const T* lines_[kMaxVectors * Vec<T>::width];  // that each run meets from the present row, or nullptr in the padding
  const T* rows_[kSlab];
  alignas(64) T slab_[kSlab * kMaxVectors * Vec<T>::width];
};

// ---- Adding the shares, into KCRS ----

template <class T>
void finish_filter(const WgradPlan<T>& plan, const T* partial, int64_t shares, int64_t filter, T* dw) {
  const int32_t group = static_cast<int32_t>(filter / plan.kg), row = static_cast<int32_t>(filter % plan.kg);
  const int32_t taps = static_cast<int32_t>(plan.p.taps());
  T* to = dw + filter * plan.cg * taps;
  for (int32_t panel = 0; panel < plan.split.count; ++panel) {
    const int32_t lanes = plan.split.width(panel) * Vec<T>::width;
    alignas(64) T sum[kMaxVectors * Vec<T>::width];
    for (int64_t share = 0; share < shares; ++share) {
      const T* from = partial + plan.panel_at(share, group, panel) + int64_t{row} * lanes;
      for (int32_t j = 0; j < lanes; j += Vec<T>::width) {
        store(sum + j, share == 0 ? load(from + j) : load(sum + j) + load(from + j));
      }
    }
    const int32_t first = plan.split.first_column(panel), columns = plan.split.num_columns(panel);
    int32_t tap = first / plan.cg, channel = first % plan.cg;
    for (int32_t j = 0; j < columns;) {
      const int32_t left = columns - j, length = left < plan.cg - channel ? left : plan.cg - channel;
      T* element = to + int64_t{channel} * taps + tap;
      for (int32_t i = 0; i < length; ++i) element[int64_t{i} * taps] = sum[j + i];
      j += length, channel = 0, ++tap;
    }
  }
}

}  // namespace

template <class T>
int64_t wgrad_workspace(const ConvProblem& p, int32_t) {
  if (p.w_size() == 0) return 0;
  const WgradPlan<T> plan(p);
  return plan.shares * plan.partial * static_cast<int64_t>(sizeof(T));
}

template <class T>
const char* wgrad_launch(const ConvProblem& p, const LaunchArgs& args) {
  if (p.w_size() == 0) return nullptr;
  const WgradPlan<T> plan(p);
  T* partial = static_cast<T*>(args.workspace);
  args.parallel->for_each(plan.shares * p.groups * plan.split.count, [&](int64_t item) {
    const int32_t panel = static_cast<int32_t>(item % plan.split.count);
    const int32_t group = static_cast<int32_t>(item / plan.split.count % p.groups);
    const int64_t share = item / plan.split.count / p.groups;
    Panel<T> work(plan, args, group, panel);
    work.accumulate(plan.share_begin(share), plan.share_begin(share + 1), partial + plan.panel_at(share, group, panel));
  });
  args.parallel->for_each(
      p.k, [&](int64_t filter) { finish_filter(plan, partial, plan.shares, filter, static_cast<T*>(args.out)); });
  return nullptr;
}

// ---- Piece by piece (wgrad_sum.h) ----

namespace {

template <class T>
void add_piece(const ConvProblem& p, const Parallel& parallel, const void* dy, const void* x, void* sums, bool adds) {
  const WgradPlan<T> plan(p);
  LaunchArgs args{};
  args.a = dy, args.b = x;
  parallel.for_each(int64_t{p.groups} * plan.split.count, [&](int64_t item) {
    const int32_t group = static_cast<int32_t>(item / plan.split.count);
    const int32_t panel = static_cast<int32_t>(item % plan.split.count);
    Panel<T> work(plan, args, group, panel);
    work.accumulate(0, plan.pixels, static_cast<T*>(sums) + plan.panel_at(0, group, panel), adds);
  });
}

template <class T>
void finish_pieces(const ConvProblem& p, const Parallel& parallel, const void* sums, int64_t shares, void* dw) {
  const WgradPlan<T> plan(p);
  parallel.for_each(p.k, [&](int64_t filter) {
    finish_filter(plan, static_cast<const T*>(sums), shares, filter, static_cast<T*>(dw));
  });
}

int64_t sum_bytes(const ConvProblem& p) {
  return p.dtype == DType::kFloat64 ? WgradPlan<double>(p).partial * static_cast<int64_t>(sizeof(double))
                                    : WgradPlan<float>(p).partial * static_cast<int64_t>(sizeof(float));
}

void add_piece_table(const ConvProblem& p, const Parallel& parallel, const void* dy, const void* x, void* sums,
                     bool adds) {
  p.dtype == DType::kFloat64 ? add_piece<double>(p, parallel, dy, x, sums, adds)
                             : add_piece<float>(p, parallel, dy, x, sums, adds);
}

void finish_pieces_table(const ConvProblem& p, const Parallel& parallel, const void* sums, int64_t shares, void* dw) {
  p.dtype == DType::kFloat64 ? finish_pieces<double>(p, parallel, sums, shares, dw)
                             : finish_pieces<float>(p, parallel, sums, shares, dw);
}

}  // namespace

#define CONVEXT_INSTANTIATE(T)                                      \
  template int64_t wgrad_workspace<T>(const ConvProblem&, int32_t); \
  template const char* wgrad_launch<T>(const ConvProblem&, const LaunchArgs&);
CONVEXT_INSTANTIATE(float)
CONVEXT_INSTANTIATE(double)
#undef CONVEXT_INSTANTIATE

}  // namespace convext::CONVEXT_ISA

namespace convext {

extern const WgradSum CONVEXT_VARIANT(wgrad_sum);
const WgradSum CONVEXT_VARIANT(wgrad_sum) = {CONVEXT_ISA::sum_bytes, CONVEXT_ISA::add_piece_table,
                                             CONVEXT_ISA::finish_pieces_table};

}  // namespace convext
