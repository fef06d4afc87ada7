// Mean and variance by channel of what a kernel stores, as it stores it: no atomics, one order, no second reading of y.
//
//   thread   Welford's update, run by run                                      registers
//   block    the threads' (count, mean, m2) merged, in the order of the rows   shared memory
//   grid     one row of partials for each tile of pixels, merged by launch_merge_stats (batch_norm.h), in order
//
// m2 is the sum of squared deviations from the mean. Sets are joined by
//   n = sum n_i,  mean = sum n_i mean_i / n,  m2 = sum m2_i + sum n_i (mean_i - mean)^2
// (Chan, Golub and LeVeque, 1979): nothing large is subtracted from something large, so a mean far from zero costs no
// digits.
#pragma once
#include "run.h"

namespace convext::cuda {

template <class Acc, int N>
struct Welford {
  Acc count = 0, mean[N] = {}, m2[N] = {};

  CONVEXT_DEVICE void add(const Acc (&v)[N]) {
    count += Acc(1);
    const Acc share = Acc(1) / count;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Acc delta = v[i] - mean[i];
      mean[i] += delta * share;
      m2[i] += delta * (v[i] - mean[i]);
    }
  }

  // Joins another set, of `other` values.
  CONVEXT_DEVICE void join(Acc other, Acc other_mean, Acc other_m2) {
    static_assert(N == 1);
    const Acc total = count + other, delta = other_mean - mean[0], share = other / total;
    mean[0] += delta * share;
    m2[0] += other_m2 + delta * delta * count * share;
    count = total;
  }

  // add() of values on their way to memory in T: what counts is what will be read there.
  template <class T>
  CONVEXT_DEVICE void add_stored(const Acc (&v)[N]) {
    Acc rounded[N];
#pragma unroll
    for (int i = 0; i < N; ++i) rounded[i] = to_accumulate(from_accumulate<T>(v[i]));
    add(rounded);
  }
};

// Shared memory of merge_block, in values: enough for float and double.
CONVEXT_HD constexpr int merge_scratch(int rows, int columns) { return rows * (2 * spread<double>(columns) + 1); }

// A table of statistics in shared memory: counts (rows), means and m2s (rows, columns).
template <class Acc>
struct SharedStats {
  Acc *means, *m2s, *counts;
  int pitch;
  CONVEXT_DEVICE SharedStats(Acc* scratch, int rows, int columns)
      : means(scratch),
        m2s(means + rows * spread<Acc>(columns)),
        counts(m2s + rows * spread<Acc>(columns)),
        pitch(spread<Acc>(columns)) {}

  CONVEXT_DEVICE void store(int row, int column, Acc count, Acc mean, Acc m2) {
    means[row * pitch + spread<Acc>(column)] = mean;
    m2s[row * pitch + spread<Acc>(column)] = m2;
    if (column == 0) counts[row] = count;
  }
  CONVEXT_DEVICE void join_rows(int begin, int end, int column, Acc& count, Acc& mean, Acc& m2) const {
    count = mean = m2 = 0;
    const int at = spread<Acc>(column);
    for (int r = begin; r < end; ++r) {
      count += counts[r];
      mean += counts[r] * means[r * pitch + at];
    }
    if (count == Acc(0)) return;
    mean /= count;
    for (int r = begin; r < end; ++r) {
      const Acc delta = means[r * pitch + at] - mean;
      m2 += m2s[r * pitch + at] + counts[r] * delta * delta;
    }
  }
};

// Merges the statistics of a block whose thread (row, column) has seen channels column to column + N - 1, and calls
// emit(column, count, mean, m2) for each column, by one thread each. All threads of a row must have the same count in
// those columns that emit uses, the first among them; every thread of the block must come here. Rows, columns and
// threads are powers of two.
template <class Acc, int N, class Emit>
CONVEXT_DEVICE void merge_block(const Welford<Acc, N>& mine, Acc* scratch, int row, int rows, int column, int columns,
                                Emit&& emit) {
  SharedStats<Acc> table(scratch, rows, columns);
#pragma unroll
  for (int i = 0; i < N; ++i) table.store(row, column + i, mine.count, mine.mean[i], mine.m2[i]);
  __syncthreads();  // orders the threads' statistics before they are merged
  // First every thread some rows of a column, as long as there are threads, then the results.
  const int threads = static_cast<int>(blockDim.x), i = threadIdx.x % columns;
  const int parts = columns >= threads ? 1 : min_of(min_of(threads / columns, rows), 16);
  const int part = threadIdx.x / columns;
  Acc count, mean, m2;
  if (parts > 1) {
    const int share = rows / parts;
    if (part < parts) table.join_rows(part * share, (part + 1) * share, i, count, mean, m2);
    __syncthreads();  // the rows are read before the parts' results take their place
    if (part < parts) table.store(part, i, count, mean, m2);
    __syncthreads();  // orders the parts' results before they are merged
    rows = parts;
  }
  for (int c = threadIdx.x; c < columns; c += threads) {
    table.join_rows(0, rows, c, count, mean, m2);
    emit(c, count, mean, m2);
  }
}

// Where rows of partial statistics go: partial_stats_bytes (batch_norm.h) of memory.
template <class Acc>  // float or double, const where they are read
struct PartialStats {
  Acc* moments = nullptr;  // (rows, channels, 2): mean, m2; nullptr where no statistics are wanted
  Acc* counts = nullptr;   // (rows)
  int64_t channels = 0;

  PartialStats() = default;
  template <class Void>
  PartialStats(Void* memory, int64_t rows, int64_t channels)
      : moments(static_cast<Acc*>(memory)),
        counts(memory ? moments + rows * channels * 2 : nullptr),
        channels(channels) {}

  CONVEXT_DEVICE void store(int64_t row, int64_t channel, Acc count, Acc mean, Acc m2) const {
    store_run<Acc, 2>(moments + (row * channels + channel) * 2, {mean, m2});
    if (channel == 0) counts[row] = count;
  }
};

}  // namespace convext::cuda
