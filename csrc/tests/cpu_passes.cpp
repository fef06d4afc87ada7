// Stand-alone test of the CPU passes that are no convolution: staging (cpu/staging.h), for every instruction set that this
// CPU has, against plain loops in long double. No torch. Exits non-zero on failure.
//
// Link with the objects of cpu/staging.cpp, one for each instruction set, and -pthread.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/staging.h"

namespace convext {
namespace {

using Real = long double;

int failures = 0;

void check(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED %s\n", what.c_str());
}

struct IsaName {
  Isa isa;
  const char* name;
};

std::vector<IsaName> isas() {
  std::vector<IsaName> all = {{Isa::kPortable, "portable"}};
#if defined(CONVEXT_HAVE_X86_ISAS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back({Isa::kAVX2, "avx2"});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    all.push_back({Isa::kAVX512, "avx512"});
  }
#endif
  return all;
}

Parallel parallel_with(int threads) {
  if (threads == 1) {
    return {[](int64_t begin, int64_t end, int64_t, RangeBody body, void* context) { body(context, begin, end); }, 1};
  }
  return {[](int64_t begin, int64_t end, int64_t, RangeBody body, void* context) {
            const int64_t middle = begin + (end - begin) / 3;
            std::thread other(body, context, begin, middle);
            body(context, middle, end);
            other.join();
          },
          threads};
}

// ---- dtypes, written without the tricks of the code under test -------------------------------------------------------

const char* name_of(DType dtype) {
  static const char* const names[] = {"f32", "f64", "bf16", "f16"};
  return names[static_cast<int>(dtype)];
}

Real decode(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const Real sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa ? std::numeric_limits<Real>::quiet_NaN() : sign * std::numeric_limits<Real>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(Real(mantissa), 1 - bias - mantissa_bits);
  return sign * std::ldexp(Real(mantissa + (1 << mantissa_bits)), exponent - bias - mantissa_bits);
}

Real read(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kFloat64: return static_cast<const double*>(data)[i];
    case DType::kBFloat16: return decode(static_cast<const uint16_t*>(data)[i], 8, 7);
    default: return decode(static_cast<const uint16_t*>(data)[i], 5, 10);
  }
}

// The nearest value of the dtype, ties to even.
Real rounded(Real v, DType dtype) {
  if (dtype == DType::kFloat64) return static_cast<double>(v);
  if (dtype == DType::kFloat32) return static_cast<float>(v);
  if (std::isnan(v) || std::isinf(v) || v == 0) return v;
  const int mantissa_bits = dtype == DType::kBFloat16 ? 7 : 10;
  const int min_exponent = dtype == DType::kBFloat16 ? -126 : -14, max_exponent = 1 - min_exponent;
  int exponent;
  std::frexp(v, &exponent);
  const int place = std::max(exponent - 1, min_exponent) - mantissa_bits;
  const Real result = std::ldexp(std::nearbyint(std::ldexp(v, -place)), place);
  if (std::fabs(result) >= std::ldexp(Real(1), max_exponent + 1)) return v > 0 ? INFINITY : -INFINITY;
  return result;
}

bool same(Real a, Real b) { return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b)); }

// A buffer of exactly the bytes asked for, so that the address sanitizer sees every step outside.
struct Buffer {
  DType dtype;
  std::vector<char> bytes;
  Buffer(int64_t count, DType d) : dtype(d), bytes(count * dtype_size(d)) {}
  void* data() { return bytes.data(); }
  const void* data() const { return bytes.data(); }
  Real at(int64_t i) const { return read(data(), dtype, i); }
  void set(int64_t i, double v) {
    switch (dtype) {
      case DType::kFloat32: reinterpret_cast<float*>(bytes.data())[i] = static_cast<float>(v); break;
      case DType::kFloat64: reinterpret_cast<double*>(bytes.data())[i] = v; break;
      default: set_half(i, v);
    }
  }
  void set_half(int64_t i, double v) {
    // The nearest by search over the sorted magnitudes.
    uint16_t low = 0, high = dtype == DType::kBFloat16 ? 0x7f80 : 0x7c00;
    while (high - low > 1) {
      const uint16_t middle = (low + high) / 2;
      if (read(&middle, dtype, 0) <= std::fabs(v)) low = middle;
      else high = middle;
    }
    reinterpret_cast<uint16_t*>(bytes.data())[i] = low | (std::signbit(v) ? 0x8000 : 0);
  }
};

// ---- staging ---------------------------------------------------------------------------------------------------------

struct Strides {
  const char* name;
  int64_t stride[4];
  int64_t extent;  // elements of the buffer behind it
};

std::vector<Strides> strides_of(const int64_t (&s)[4], bool as_destination) {
  const int64_t n = s[0], c = s[1], h = s[2], w = s[3];
  std::vector<Strides> all = {
      {"nchw", {c * h * w, h * w, w, 1}, n * c * h * w},
      {"nhwc", {h * w * c, 1, w * c, c}, n * c * h * w},
      {"nhwc_with_gaps", {h * w * (c + 3), 1, w * (c + 3), c + 3}, n * h * w * (c + 3)},
      {"nchw_every_other_column", {c * h * w * 2, h * w * 2, w * 2, 2}, n * c * h * w * 2},
      {"nchw_rows_padded", {c * h * (w + 5), h * (w + 5), w + 5, 1}, n * c * h * (w + 5)},
      {"transposed_image", {c * h * w, h * w, 1, h}, n * c * h * w},
  };
  if (!as_destination) {
    all.push_back({"expanded_scalar", {0, 0, 0, 0}, 1});
    all.push_back({"expanded_channels", {h * w, 0, w, 1}, n * h * w});
  }
  return all;
}

int64_t at(const int64_t* stride, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
}

void copy_every_layout_and_dtype(const Staging& staging, const std::string& isa) {
  const int64_t sizes[][4] = {{1, 1, 1, 1}, {2, 3, 5, 7},   {1, 16, 4, 4}, {2, 33, 3, 11},
                              {1, 70, 9, 15}, {3, 17, 1, 66}, {2, 130, 7, 7}, {64, 9, 3, 3}};
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  for (const auto& size : sizes) {
    for (int pair = 0; pair < 16; ++pair) {
      const DType src_dtype = static_cast<DType>(pair / 4), dst_dtype = static_cast<DType>(pair % 4);
      for (const Strides& from : strides_of(size, false)) {
        Buffer src(from.extent, src_dtype);
        for (int64_t i = 0; i < from.extent; ++i) src.set(i, normal(random));
        std::vector<Real> expected(from.extent);
        for (int64_t i = 0; i < from.extent; ++i) expected[i] = rounded(src.at(i), dst_dtype);
        for (const Strides& to : strides_of(size, true)) {
          Buffer dst(to.extent, dst_dtype);
          staging.copy(parallel_with(1 + pair % 2), src.data(), src_dtype, from.stride, dst.data(), dst_dtype,
                       to.stride, size);
          std::vector<Real> wanted(to.extent, 0);  // gaps are left alone
          for (int64_t n = 0; n < size[0]; ++n)
            for (int64_t c = 0; c < size[1]; ++c)
              for (int64_t h = 0; h < size[2]; ++h)
                for (int64_t w = 0; w < size[3]; ++w)
                  wanted[at(to.stride, n, c, h, w)] = expected[at(from.stride, n, c, h, w)];
          bool ok = true;
          for (int64_t i = 0; i < to.extent; ++i) ok &= same(dst.at(i), wanted[i]);
          check(ok, isa + " copy " + from.name + " " + name_of(src_dtype) + " to " + to.name + " " +
                        name_of(dst_dtype) + " c=" + std::to_string(size[1]));
        }
      }
    }
  }
}

void copy_large_with_threads(const Staging& staging, const std::string& isa) {
  const int64_t size[4] = {3, 65, 23, 29};
  for (const Strides& from : strides_of(size, true)) {
    for (const Strides& to : strides_of(size, true)) {
      Buffer src(from.extent, DType::kFloat32), dst(to.extent, DType::kFloat32);
      for (int64_t i = 0; i < from.extent; ++i) src.set(i, static_cast<double>(i));
      staging.copy(parallel_with(3), src.data(), src.dtype, from.stride, dst.data(), dst.dtype, to.stride, size);
      bool ok = true;
      for (int64_t i = 0; i < size[0] * size[1] * size[2] * size[3]; ++i) {
        const int64_t w = i % size[3], h = i / size[3] % size[2], c = i / size[3] / size[2] % size[1];
        const int64_t n = i / size[3] / size[2] / size[1];
        ok &= dst.at(at(to.stride, n, c, h, w)) == src.at(at(from.stride, n, c, h, w));
      }
      check(ok, isa + " threaded copy " + from.name + " to " + to.name);
    }
  }
}

// Every half there is, there and back; every rounding boundary between two neighbours, and just beside it.
void halves_round_to_nearest_even(const Staging& staging, const std::string& isa) {
  for (DType half : {DType::kBFloat16, DType::kFloat16}) {
    const int64_t size[4] = {1, 1, 1, 65536}, stride[4] = {0, 0, 0, 1};
    std::vector<uint16_t> all(65536), back(65536);
    for (int i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
    std::vector<float> wide(65536);
    staging.copy(parallel_with(1), all.data(), half, stride, wide.data(), DType::kFloat32, stride, size);
    staging.copy(parallel_with(1), wide.data(), DType::kFloat32, stride, back.data(), half, stride, size);
    bool widened = true, narrowed = true;
    for (int i = 0; i < 65536; ++i) {
      const Real exact = read(all.data(), half, i);
      widened &= same(wide[i], exact);
      narrowed &= same(read(back.data(), half, i), exact);
    }
    check(widened, isa + " every " + name_of(half) + " widens exactly");
    check(narrowed, isa + " every " + name_of(half) + " survives the way back");

    std::vector<float> values = {65519.996f, 65520.0f, 65504.0f, 1e30f, 3.4e38f, 1e-8f, 2.9802322e-8f, 2.9802326e-8f,
                                 1e-45f,     -0.0f,    0.0f,     INFINITY, -INFINITY, NAN};
    const int top = half == DType::kBFloat16 ? 0x7f80 : 0x7c00;
    for (int i = 0; i + 1 < top; ++i) {
      const uint16_t pair[2] = {static_cast<uint16_t>(i), static_cast<uint16_t>(i + 1)};
      const float tie = static_cast<float>((read(pair, half, 0) + read(pair, half, 1)) / 2);
      for (float v : {tie, std::nextafterf(tie, 0.0f), std::nextafterf(tie, INFINITY)}) values.push_back(i % 2 ? v : -v);
    }
    const int64_t count[4] = {1, 1, 1, static_cast<int64_t>(values.size())};
    std::vector<uint16_t> narrow(values.size());
    staging.copy(parallel_with(1), values.data(), DType::kFloat32, stride, narrow.data(), half, stride, count);
    int wrong = 0;
    for (size_t i = 0; i < values.size(); ++i) wrong += !same(read(narrow.data(), half, i), rounded(values[i], half));
    check(wrong == 0, isa + " " + std::to_string(wrong) + " ties of " + name_of(half) + " do not round to even");

    // A double must not be rounded twice on its way: 1 + 2^-m-1 + 2^-40 is above the tie, its float is not.
    const int mantissa = half == DType::kBFloat16 ? 7 : 10;
    const std::vector<double> doubles = {1 + std::ldexp(1.0, -mantissa - 1) + std::ldexp(1.0, -40),
                                         1 + 3 * std::ldexp(1.0, -mantissa - 1) - std::ldexp(1.0, -40)};
    const int64_t two[4] = {1, 1, 1, 2};
    staging.copy(parallel_with(1), doubles.data(), DType::kFloat64, stride, narrow.data(), half, stride, two);
    for (int i = 0; i < 2; ++i) {
      check(same(read(narrow.data(), half, i), rounded(doubles[i], half)),
            isa + " double rounding through float to " + name_of(half));
    }
  }
}

void test_staging(const IsaName& isa) {
  const Staging& staging = staging_for(isa.isa);
  copy_every_layout_and_dtype(staging, isa.name);
  copy_large_with_threads(staging, isa.name);
  halves_round_to_nearest_even(staging, isa.name);
}

}  // namespace
}  // namespace convext

int main() {
  for (const convext::IsaName& isa : convext::isas()) {
    convext::test_staging(isa);
    std::printf("%s: done, %d failures so far\n", isa.name, convext::failures);
  }
  return convext::failures ? 1 : 0;
}
