// Every CPU kernel of variants.inc, on every instruction set that this CPU has, against a float64 loop nest over a list
// of edge cases; and a bench. No torch. Built by csrc/tests/run.py, under sanitizers too, or by hand from this file,
// core, cpu/kernels and cpu/runtime.
//
//   cpu_variants                                                        test; exit status 1 on any failure
//   cpu_variants --nonfinite                                            what Winograd makes of NaN and infinity alone
//   cpu_variants --peak                                                 FMA peak of one core, GFLOP/s
//   cpu_variants --bench N C H W K R S stride pad dil groups [threads]  GFLOP/s of every variant that takes the problem
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/select.h"
#include "cpu/kernels/roofline/roofline.h"
#include "harness.h"

namespace {

using namespace convext;
using testing::parallel_with;

// ---- One case: a problem and what its epilogue does ----

// What Winograd's kernels alone are given besides: pixel for pixel and tap for tap they promise what a plain sum gives
// whose taps in the padding contribute nothing. The other kernels may multiply such taps by zero.
enum class Plant {
  kNothing,
  kNaNPixels,       // in the first operand: a corner, the middle
  kInfinitePixels,  // of both signs, side by side too: their sum is NaN where one tap has the other's sign
  kNaNTaps,         // in the second operand
  kInfiniteTaps,
  kBoth,         // infinite pixels and taps
  kEverywhere,   // nothing but NaN
  kLargePixels,  // that a transform adds up to infinity, and small taps: every sum is finite
  kLargeTaps,
  kLargeSums,  // too large for the type
};
constexpr std::pair<Plant, const char*> kPlants[] = {{Plant::kNaNPixels, "NaN pixels"},
                                                     {Plant::kInfinitePixels, "infinite pixels"},
                                                     {Plant::kNaNTaps, "NaN taps"},
                                                     {Plant::kInfiniteTaps, "infinite taps"},
                                                     {Plant::kBoth, "infinite pixels and taps"},
                                                     {Plant::kEverywhere, "nothing but NaN"},
                                                     {Plant::kLargePixels, "large pixels"},
                                                     {Plant::kLargeTaps, "large taps"},
                                                     {Plant::kLargeSums, "sums that overflow"}};

struct Case {
  const char* name;
  ConvProblem problem;
  bool scale = false, shift = false, residual = false;
  Activation activation = Activation::identity;
  bool nonfinite = false;  // NaN and infinities among x, w and dy; only without padding
  Plant plant = Plant::kNothing;
};

constexpr Layout kNHWC = Layout::kNHWC;

ConvProblem make(int n, int c, int h, int w, int k, int r, int s, int stride_h, int stride_w, int pad_h, int pad_w,
                 int dil_h, int dil_w, int groups) {
  return {n, c, h, w, k, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups, DType::kFloat32, kNHWC, kNHWC};
}
// With a third axis.
ConvProblem volume(ConvProblem p, int d, int t, int stride_d, int pad_d, int dil_d = 1) {
  p.d = d, p.t = t, p.stride_d = stride_d, p.pad_d = pad_d, p.dil_d = dil_d;
  return p;
}
ConvProblem square(int n, int c, int h, int k, int r, int stride, int pad, int dil = 1, int groups = 1) {
  return make(n, c, h, h, k, r, r, stride, stride, pad, pad, dil, dil, groups);
}

std::vector<Case> cases() {
  using A = Activation;
  return {
      {"pointwise", square(2, 64, 7, 64, 1, 1, 0)},
      {"pointwise_tails_everywhere", square(3, 37, 5, 53, 1, 1, 0), true, true, true, A::relu},
      {"pointwise_few_channels_many_pixels", square(2, 16, 23, 96, 1, 1, 0), true, true, false, A::relu6},
      {"pointwise_few_channels_tails", square(1, 13, 11, 75, 1, 1, 0), true, true, true, A::gelu},
      {"pointwise_stride_2_leaves_holes_in_dgrad", square(1, 24, 9, 40, 1, 2, 0), false, true},
      {"pointwise_padding_larger_than_filter", square(1, 5, 4, 6, 1, 1, 2), true, false, true, A::relu6},
      {"pointwise_one_channel_one_filter", square(1, 1, 3, 1, 1, 1, 0), true, true, true, A::gelu},
      {"pointwise_reduction_in_parts", square(1, 700, 5, 33, 1, 1, 0), true, true, true, A::silu},
      {"filter_3x3", square(1, 32, 14, 48, 3, 1, 1), true, true, false, A::relu},
      {"filter_3x3_batch_tails", square(3, 19, 11, 21, 3, 1, 1), true, true, true, A::hardswish},
      {"filter_3x3_stride_2", square(2, 17, 12, 35, 3, 2, 1), false, true, false, A::silu},
      {"filter_3x3_stride_3_dilation_2", square(2, 10, 17, 12, 3, 3, 2, 2), true},
      {"stride_larger_than_filter", square(1, 6, 13, 7, 2, 3, 0), false, true},
      {"filter_3x3_no_padding_no_tiles_left", square(1, 16, 3, 16, 3, 1, 0), true, true, true, A::gelu},
      {"filter_3x3_deep_reduction", square(1, 150, 7, 70, 3, 1, 1), true, true, true, A::relu6},
      {"winograd_tails_of_channels_and_tiles", square(3, 33, 11, 37, 3, 1, 1), true, true, true, A::hardswish},
      {"winograd_reduction_in_parts_two_panels", square(2, 150, 7, 70, 3, 1, 1), true, true, true, A::relu6},
      {"winograd_no_padding_one_output", square(1, 40, 3, 40, 3, 1, 0), true, true, true, A::gelu},
      {"winograd_padding_larger_than_filter", square(1, 35, 6, 34, 3, 1, 4), false, true, false, A::silu},
      {"winograd_asymmetric", make(2, 34, 13, 18, 33, 3, 3, 1, 1, 2, 0, 1, 1, 1), true},
      {"winograd_several_blocks", square(4, 32, 30, 32, 3, 1, 1), true, true, false, A::relu},
      {"winograd_gradient_in_shares_with_tails", square(5, 33, 30, 37, 3, 1, 1)},
      {"winograd_few_tiles_many_panels", square(1, 64, 7, 300, 3, 1, 1), false, true, true, A::relu},
      {"winograd_phases_of_equal_length", square(1, 40, 16, 40, 3, 1, 2, 2), true, true, false, A::relu},
      {"winograd_phases_of_unequal_length", square(2, 36, 15, 33, 3, 1, 4, 4), true, true, true, A::relu},
      {"winograd_rows_dilated_alone", make(1, 32, 17, 9, 48, 3, 3, 1, 1, 3, 1, 3, 1, 1), false, true},
      {"winograd_channels_in_chunks", square(1, 530, 7, 70, 3, 1, 3, 3), true, true, true, A::relu},
      {"winograd_dilation_larger_than_image", square(1, 48, 5, 32, 3, 1, 9, 9), true, true},
      {"filter_5x5_padding_4", square(1, 8, 6, 9, 5, 1, 4), false, false, true},
      {"filter_larger_than_image", square(1, 4, 3, 5, 7, 1, 3), true, true},
      {"filter_19x19_many_taps", square(1, 3, 24, 4, 19, 1, 9), false, true},
      {"filter_1x7", make(2, 20, 9, 15, 18, 1, 7, 1, 1, 0, 3, 1, 1, 1), true, true, false, A::relu},
      {"filter_7x1_stride_1x2", make(1, 12, 15, 9, 20, 7, 1, 1, 2, 3, 0, 1, 1, 1), false, true},
      {"asymmetric_everything", make(2, 9, 13, 18, 11, 3, 5, 2, 1, 2, 1, 1, 3, 1), true, true, true, A::silu},
      {"one_row_as_in_1d", make(2, 16, 1, 50, 24, 1, 3, 1, 2, 0, 1, 1, 1, 1), true},
      {"first_layer_7x7_stride_2", square(1, 3, 30, 64, 7, 2, 3), true, true, false, A::relu},
      {"first_layer_3x3_stride_2", square(2, 3, 21, 32, 3, 2, 1), true, true, false, A::relu6},
      {"first_layer_one_channel", square(1, 1, 28, 20, 5, 1, 0), false, true},
      {"first_layer_patchify_4x4", square(2, 3, 24, 48, 4, 4, 0), false, true, false, A::gelu},
      {"first_layer_filters_of_three_vectors", square(1, 3, 19, 47, 3, 1, 1), true, true, true, A::hardswish},
      {"first_layer_columns_past_one_patch", make(1, 3, 9, 1100, 20, 7, 7, 1, 1, 3, 3, 1, 1, 1), true, true, true},
      {"first_layer_stride_larger_than_filter", make(1, 2, 23, 41, 18, 2, 3, 5, 7, 1, 2, 1, 1, 1), false, true},
      {"first_layer_dilated_stride_3", make(1, 3, 30, 40, 17, 3, 3, 3, 3, 4, 4, 2, 2, 1), true},
      {"first_layer_stride_9_without_shuffles", make(1, 5, 19, 90, 16, 3, 5, 2, 9, 1, 4, 1, 2, 1), true, true},
      {"first_layer_padding_wider_than_image", square(1, 3, 5, 9, 3, 1, 7), true, true, false, A::relu},
      {"first_layer_eight_channels", square(2, 8, 13, 34, 3, 2, 1), true, true, true, A::relu},
      {"first_layer_four_channels_asymmetric", make(1, 4, 11, 17, 7, 3, 5, 1, 2, 0, 2, 1, 1, 1), true, true, true},
      {"first_layer_dilated_columns_only", make(1, 3, 16, 19, 8, 3, 3, 1, 1, 1, 2, 1, 2, 1)},
      {"dilation_2", square(1, 24, 16, 24, 3, 1, 2, 2), true, true, false, A::relu},
      {"dilation_past_border", square(1, 20, 9, 18, 3, 1, 12, 12), true, true, true, A::relu},
      {"dilation_half_past_border", square(2, 16, 10, 34, 3, 1, 6, 6), false, true},
      {"dilation_stride_2", make(1, 7, 19, 23, 9, 3, 3, 2, 2, 3, 5, 3, 5, 1), true},
      {"dilation_with_groups", square(1, 12, 14, 18, 3, 1, 4, 4, 3), false, true},
      {"groups_2", square(2, 34, 8, 38, 3, 1, 1, 1, 2), true, true, true, A::relu},
      {"groups_of_4_channels", square(1, 32, 9, 32, 3, 1, 1, 1, 8), true, true, false, A::relu},
      {"groups_of_4_channels_stride_2", square(1, 64, 9, 64, 3, 2, 1, 1, 16), false, true},
      {"groups_of_8_channels", square(1, 40, 7, 40, 3, 1, 1, 1, 5), true},
      {"groups_of_4_channels_stride_3x2_dilation", make(2, 24, 17, 33, 24, 3, 3, 3, 2, 2, 1, 1, 2, 6), true, true,
       true},
      {"groups_of_4_channels_several_row_blocks", square(1, 16, 30, 16, 3, 1, 1, 1, 4), true, true, false, A::relu},
      {"groups_of_8_columns_past_one_ring", make(1, 16, 7, 200, 16, 3, 3, 1, 1, 1, 1, 1, 1, 2), true, true, true,
       A::silu},
      {"groups_of_2_channels_filter_5x3", make(1, 20, 9, 11, 20, 5, 3, 1, 1, 2, 0, 1, 1, 10), true, false, true},
      {"groups_pointwise", square(2, 40, 9, 40, 1, 1, 0, 1, 10), true, true, true, A::relu6},
      {"groups_grow_from_2_to_4", square(1, 12, 8, 24, 3, 1, 1, 1, 6), false, true},
      {"groups_stride_larger_than_filter", square(1, 16, 13, 16, 2, 3, 0, 1, 4), false, true},
      {"groups_padding_wider_than_filter", square(1, 16, 5, 16, 3, 1, 4, 1, 4), true},
      {"groups_multiplier", square(1, 6, 8, 15, 3, 1, 1, 1, 3), false, true},
      {"groups_shrink", square(1, 30, 6, 10, 1, 1, 0, 1, 5), true},
      {"depthwise_3x3", square(2, 35, 12, 35, 3, 1, 1, 1, 35), true, true, true, A::relu6},
      {"depthwise_3x3_stride_2", square(1, 48, 15, 48, 3, 2, 1, 1, 48), true, true, false, A::hardswish},
      {"depthwise_5x5", square(1, 17, 9, 17, 5, 1, 2, 1, 17), false, true, false, A::silu},
      {"depthwise_7x7_image_smaller", square(1, 20, 4, 20, 7, 1, 3, 1, 20), true},
      {"depthwise_multiplier_2", square(2, 9, 10, 18, 3, 1, 1, 1, 9), false, true},
      {"depthwise_multiplier_3_stride_2_dilation_2", square(1, 18, 13, 54, 3, 2, 2, 2, 18), true},
      {"depthwise_no_padding", make(1, 33, 9, 14, 33, 3, 5, 1, 2, 0, 0, 1, 1, 33), true},
      {"depthwise_dilation_past_border", square(1, 16, 6, 16, 3, 1, 8, 8, 16)},
      {"depthwise_interior_tiles_side_by_side", make(1, 33, 7, 40, 33, 3, 3, 1, 1, 1, 1, 1, 1, 33), true, true, true},
      {"depthwise_two_narrow_tiles", make(2, 16, 5, 8, 16, 5, 5, 1, 1, 2, 2, 1, 1, 16), true, true, true, A::gelu},
      {"depthwise_columns_left_over", make(1, 24, 6, 19, 24, 7, 7, 1, 1, 3, 3, 1, 1, 24), true, true, false, A::relu},
      {"depthwise_5x5_stride_2_even_image", square(2, 40, 18, 40, 5, 2, 2, 1, 40), true, true, false, A::relu},
      {"depthwise_7x7_stride_2", make(1, 19, 17, 34, 19, 7, 7, 2, 2, 3, 3, 1, 1, 19), false, true},
      {"depthwise_stride_3_two_taps_a_class", square(1, 21, 20, 21, 5, 3, 2, 1, 21), true},
      {"depthwise_stride_larger_than_filter", square(1, 17, 13, 17, 2, 3, 0, 1, 17), false, true},
      {"depthwise_stride_2x1", make(1, 18, 9, 12, 18, 3, 3, 2, 1, 1, 1, 1, 1, 18), true},
      {"depthwise_stride_4_dilation_2_unreachable_rows", square(1, 20, 15, 20, 3, 4, 2, 2, 20), false, true},
      {"depthwise_rows_dilated_alone", make(1, 32, 15, 16, 32, 3, 3, 1, 1, 2, 1, 2, 1, 32), true, true},
      {"depthwise_rows_as_far_apart_as_taps", make(1, 32, 15, 16, 32, 3, 3, 2, 1, 2, 1, 2, 1, 32), true, true},
      {"depthwise_stride_2_last_row_alone", square(2, 35, 17, 35, 3, 2, 1, 1, 35), true, true, true, A::gelu},
      {"depthwise_larger_than_caches", make(2, 40, 200, 300, 40, 3, 3, 2, 2, 1, 1, 1, 1, 40), true, true},
      {"depthwise_wide_filter_11", make(1, 16, 4, 30, 16, 1, 11, 1, 1, 0, 5, 1, 1, 16), true, true, true, A::silu},
      {"depthwise_column_filter_9", make(1, 20, 21, 6, 20, 9, 1, 1, 2, 4, 0, 1, 1, 20), true},
      {"depthwise_filters_2x2_and_4x4_classes", square(1, 23, 15, 23, 4, 1, 2, 1, 23), true},
      {"depthwise_three_channels", square(2, 3, 11, 3, 3, 1, 1, 1, 3), true, true, true, A::relu6},
      {"depthwise_three_channels_multiplier_2", square(1, 3, 9, 6, 3, 2, 1, 1, 3), true, true, true, A::silu},
      {"depthwise_one_channel_multiplier_32", square(1, 1, 12, 32, 5, 1, 2, 1, 1), true, true},
      {"depthwise_multiplier_5_blocks_of_channels", square(1, 70, 6, 350, 3, 1, 1, 1, 70), false, true},
      {"depthwise_padding_larger_than_filter", square(1, 17, 5, 17, 3, 1, 4, 1, 17), true},
      {"depthwise_several_slabs", square(3, 17, 26, 17, 3, 1, 1, 1, 17), true},
      {"depthwise_empty_batch", square(0, 17, 5, 17, 3, 1, 1, 1, 17), true},
      {"empty_batch", square(0, 8, 6, 8, 3, 1, 1), true},
      {"empty_output", square(1, 8, 2, 8, 3, 1, 0), false, true},
      {"empty_filters", square(1, 8, 4, 0, 3, 1, 1)},
      {"output_of_one_pixel", square(1, 40, 3, 40, 3, 1, 0), true, true, true, A::gelu},
      {"volume_3x3x3", volume(square(1, 24, 7, 35, 3, 1, 1), 5, 3, 1, 1), true, true, true, A::relu},
      {"volume_3x3x3_batch_stride_2", volume(square(2, 19, 9, 33, 3, 2, 1), 7, 3, 2, 1), true, true, false, A::silu},
      {"volume_deep_reduction", volume(square(1, 70, 5, 40, 3, 1, 1), 4, 3, 1, 1), true, true, true, A::gelu},
      {"volume_first_layer", volume(square(1, 3, 17, 33, 7, 2, 3), 5, 3, 1, 1), true, true, false, A::relu},
      {"volume_first_layer_without_padding", volume(square(2, 2, 8, 17, 3, 1, 0), 6, 2, 2, 0), false, true},
      {"volume_patches", volume(square(2, 3, 12, 48, 4, 4, 0), 6, 2, 2, 0), false, true},
      {"volume_dilated", volume(square(1, 17, 11, 20, 3, 1, 2, 2), 9, 3, 1, 4, 4), true, true, true, A::hardswish},
      {"volume_dilated_planes_alone", volume(square(1, 17, 5, 20, 3, 1, 1), 11, 3, 1, 3, 3), true},
      {"volume_asymmetric", volume(make(2, 9, 8, 11, 11, 3, 2, 2, 1, 2, 0, 1, 3, 1), 6, 4, 3, 1, 2), true, true, true},
      {"volume_planes_of_padding_alone", volume(square(1, 8, 5, 9, 3, 1, 1), 2, 3, 1, 5), true, true, false, A::relu},
      {"volume_padding_of_one_plane", volume(square(1, 8, 5, 9, 3, 1, 1), 1, 1, 1, 1), true, true, false, A::relu},
      {"volume_stride_larger_than_filter", volume(square(1, 6, 7, 7, 2, 3, 0), 8, 2, 3, 0), true, true, true, A::silu},
      {"volume_groups", volume(square(1, 12, 6, 18, 3, 1, 1, 1, 3), 4, 3, 1, 1), true, true, false, A::relu},
      {"volume_many_taps", volume(square(1, 3, 9, 4, 9, 1, 4), 9, 9, 1, 4), false, true},
      {"volume_pointwise", volume(square(2, 20, 6, 21, 1, 1, 0), 3, 1, 1, 0), true, true, true, A::relu},
      {"volume_pointwise_stride_2", volume(square(1, 20, 6, 21, 1, 2, 0), 5, 1, 2, 0), true},
      {"volume_rows_alone", volume(square(2, 18, 6, 21, 1, 1, 0), 7, 3, 1, 1), true, true, false, A::relu},
      {"volume_planes_alone", volume(square(2, 18, 6, 21, 3, 1, 1), 3, 1, 1, 0), true, true, false, A::relu},
      {"volume_depthwise", volume(square(2, 35, 9, 35, 3, 1, 1, 1, 35), 5, 3, 1, 1), true, true, true, A::gelu},
      {"volume_depthwise_stride_2", volume(square(1, 19, 9, 19, 3, 2, 1, 1, 19), 6, 3, 2, 1), true, true},
      {"volume_depthwise_7x7x7", volume(square(1, 16, 9, 16, 7, 1, 3, 1, 16), 7, 7, 1, 3), false, true, false, A::silu},
      {"volume_depthwise_dilated", volume(square(1, 17, 9, 17, 3, 1, 2, 2, 17), 9, 3, 2, 3, 3), true, true, true},
      {"volume_depthwise_multiplier", volume(square(1, 7, 6, 21, 3, 1, 1, 1, 7), 4, 3, 1, 1), true, true, true,
       A::silu},
      {"volume_depthwise_few_channels", volume(square(1, 5, 6, 5, 2, 3, 0, 1, 5), 7, 2, 3, 0), true, true, true},
      {"volume_depthwise_no_tap_in_some_planes", volume(square(1, 18, 6, 18, 3, 1, 1, 1, 18), 9, 1, 3, 0), true, true},
      {"nonfinite_pointwise", square(1, 20, 5, 20, 1, 1, 0), false, true, false, A::relu, true},
      {"nonfinite_filter_3x3", square(1, 20, 9, 20, 3, 1, 0), true, true, false, A::relu6, true},
      {"nonfinite_winograd", square(1, 40, 12, 36, 3, 1, 0), true, true, true, A::relu6, true},
      {"nonfinite_depthwise", square(1, 20, 9, 20, 3, 1, 0, 1, 20), true, true, false, A::hardswish, true},
      {"batch_8_blocks_of_pixels", square(8, 16, 20, 24, 3, 1, 1), true, true, true, A::relu},
  };
}

// What every Plant is tried on: padding, unequal phases, chunks of channels, several panels and blocks, tails.
std::vector<Case> planted_cases() {
  using A = Activation;
  return {
      {"padded", square(2, 35, 11, 37, 3, 1, 1)},
      {"relu6", square(1, 64, 14, 64, 3, 1, 1), true, true, true, A::relu6},
      {"relu_no_padding", square(3, 33, 9, 20, 3, 1, 0), false, true, false, A::relu},
      {"padding_larger_than_filter", square(1, 36, 5, 34, 3, 1, 4), false, true, false, A::hardswish},
      {"dilated_phases_of_unequal_length", square(1, 36, 15, 33, 3, 1, 4, 4), true, true, true, A::relu},
      {"asymmetric", make(2, 34, 13, 10, 33, 3, 3, 1, 1, 2, 0, 1, 2, 1), true, false, true},
      {"dilation_larger_than_image", square(5, 40, 5, 48, 3, 1, 9, 9), false, true, false, A::silu},
      {"channels_in_chunks", square(1, 530, 7, 70, 3, 1, 1), true, true, true, A::relu},
      {"panels_of_filters", square(2, 32, 12, 300, 3, 1, 1), false, false, true, A::gelu},
      {"gradient_in_shares_with_tails", square(5, 33, 30, 37, 3, 1, 1), true, true, false, A::relu},
      {"gradient_dilated", square(4, 40, 17, 36, 3, 1, 2, 2)},
      {"volume", volume(square(2, 35, 11, 37, 3, 1, 1), 4, 3, 1, 1), true, true, true, A::relu6},
      {"volume_dilated", volume(square(1, 33, 9, 34, 3, 1, 2, 2), 5, 3, 1, 2, 2), true, true, false, A::relu},
      {"gradient_asymmetric", make(8, 34, 13, 18, 33, 3, 3, 1, 1, 2, 0, 1, 1, 1), false, true, true, A::relu6},
  };
}

// ---- The loop nest ----

// Element strides of a (n, channels, rows, columns) tensor in either layout.
struct Strides {
  int64_t n, c, h, w;
  Strides(Layout layout, int64_t channels, int64_t rows, int64_t columns)
      : n(channels * rows * columns),
        c(layout == Layout::kNHWC ? 1 : rows * columns),
        h(layout == Layout::kNHWC ? columns * channels : columns),
        w(layout == Layout::kNHWC ? channels : 1) {}
  int64_t at(int64_t in, int64_t ic, int64_t ih, int64_t iw) const { return in * n + ic * c + ih * h + iw * w; }
};

// Elements and what they are computed in.
struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(double value) {  // values of a test are far from float's limits: rounding twice is harmless
    const float rounded = static_cast<float>(value);
    uint32_t u;
    std::memcpy(&u, &rounded, sizeof u);
    bits = static_cast<uint16_t>(std::isnan(rounded) ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  operator double() const {
    const uint32_t u = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &u, sizeof value);
    return value;
  }
};
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct Operands {
  std::vector<T> x, w, y, residual;  // y stands for dy too
  std::vector<Compute<T>> scale, shift;
};

template <class T>
std::vector<T> random_values(size_t count, std::mt19937& rng, bool nonfinite) {
  std::normal_distribution<double> normal;
  std::vector<T> values(count);
  for (auto& v : values) v = static_cast<T>(normal(rng));
  if (nonfinite && count > 3) {
    values[rng() % count] = T(std::numeric_limits<double>::quiet_NaN());
    values[rng() % count] = T(std::numeric_limits<double>::infinity());
    values[rng() % count] = T(-std::numeric_limits<double>::infinity());
  }
  return values;
}

int64_t size_or_zero(int64_t size, const ConvProblem& p) { return p.z() <= 0 || p.p() <= 0 || p.q() <= 0 ? 0 : size; }

// Into the operand whose pixels reach outputs, x or dy, and the one that they are multiplied by: w, or dy in wgrad.
template <class T>
void plant(const Case& test, Pass pass, Operands<T>& o) {
  if (test.plant == Plant::kNothing) return;
  const ConvProblem& p = test.problem;
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  std::vector<T>& in = pass == Pass::kDgrad ? o.y : o.x;
  std::vector<T>& taps = pass == Pass::kWgrad ? o.y : o.w;
  const bool dgrad = pass == Pass::kDgrad;
  const int channels = dgrad ? p.k : p.c, rows = dgrad ? p.p() : p.h, columns = dgrad ? p.q() : p.w;
  const Strides strides(Layout::kNHWC, channels, rows, columns);
  const int h = rows / 2, w = columns / 2, c = channels / 3;
  T& corner = in[strides.at(0, channels - 1, 0, 0)];
  T& middle = in[strides.at(p.n - 1, c, h, w)];
  const auto scale = [](std::vector<T>& values, double factor) {
    for (auto& v : values) v = T(double(v) * factor);
  };
  switch (test.plant) {
    case Plant::kNothing: break;
    case Plant::kNaNPixels: corner = middle = T(nan); break;
    case Plant::kBoth:
    case Plant::kInfinitePixels:
      corner = T(-inf), middle = T(inf);
      in[strides.at(p.n - 1, c + 1, h, w)] = T(inf);
      in[strides.at(p.n - 1, c, h - 1, w - 1)] = T(-inf);
      if (test.plant == Plant::kInfinitePixels) break;
      [[fallthrough]];
    case Plant::kInfiniteTaps: taps[taps.size() / 2] = T(inf), taps.back() = T(-inf); break;
    case Plant::kNaNTaps: taps[0] = taps[taps.size() / 3] = T(nan); break;
    case Plant::kEverywhere:
      for (auto& v : in) v = T(nan);
      break;
    case Plant::kLargePixels:
      corner = T(3e38);
      for (int i = 0; i < channels; i += 5) in[strides.at(p.n - 1, i, h, w)] = T(i % 2 ? 3e38 : -3e38);
      in[strides.at(p.n - 1, c, h - 1, w - 1)] = T(-3e38);
      scale(taps, 1e-5);
      break;
    case Plant::kLargeTaps:
      for (size_t i = 0; i < taps.size(); ++i) {  // all nine of a filter's channel
        if (i / 9 % 7 == 0) taps[i] = T(i / 9 % 2 ? 3e38 : -3e38);
      }
      scale(in, 1e-5);
      break;
    case Plant::kLargeSums:  // of one sign, each product near the limit
      for (auto& v : taps) v = T(0.7 + 0.2 * std::fabs(std::tanh(double(v))));
      for (int i = 0; i < channels; ++i) in[strides.at(p.n - 1, i, h, w)] = T(3e38);
      break;
  }
}

template <class T>
Operands<T> random_operands(const Case& test, Pass pass) {
  const ConvProblem& p = test.problem;
  std::mt19937 rng(7);
  Operands<T> o;
  o.x = random_values<T>(p.x_size(), rng, test.nonfinite);
  // At the border of dx some taps meet no dy: whether a kernel skips them or multiplies zeros is its own choice, and an
  // infinite weight would tell the two apart.
  o.w = random_values<T>(p.w_size(), rng, test.nonfinite && (pass != Pass::kDgrad || p.is_pointwise()));
  o.y = random_values<T>(size_or_zero(p.y_size(), p), rng, test.nonfinite);
  const bool dgrad = pass == Pass::kDgrad;
  o.scale = random_values<Compute<T>>(dgrad ? p.c : p.k, rng, false);
  o.shift = random_values<Compute<T>>(dgrad ? p.c : p.k, rng, false);
  o.residual = random_values<T>(dgrad ? p.x_size() : size_or_zero(p.y_size(), p), rng, false);
  plant(test, pass, o);
  return o;
}

struct Reference {
  std::vector<double> value;
  std::vector<double> magnitude;  // sum of the absolute values of everything that was added
};

// Calls visit(index in x, index in w, index in y) for every product of the convolution.
template <class F>
void visit_products(const ConvProblem& p, F&& visit) {
  // Planes and rows are one axis.
  const Strides xs(p.x_layout, p.c, p.d * p.h, p.w), ys(p.y_layout, p.k, p.z() * p.p(), p.q());
  const int64_t cg = p.groups ? p.c_per_group() : 0, kg = p.k_per_group();
  for (int n = 0; n < p.n; ++n)
    for (int k = 0; k < p.k; ++k)
      for (int i = 0; i < p.z() * p.p(); ++i)
        for (int j = 0; j < p.q(); ++j)
          for (int c = 0; c < cg; ++c)
            for (int r = 0; r < p.t * p.r; ++r)
              for (int s = 0; s < p.s; ++s) {
                const int d = p.d_of(i / p.p(), r / p.r), h = p.h_of(i % p.p(), r % p.r), w = p.w_of(j, s);
                if (d < 0 || d >= p.d || h < 0 || h >= p.h || w < 0 || w >= p.w) continue;
                visit(xs.at(n, k / kg * cg + c, d * p.h + h, w), ((k * cg + c) * p.t * p.r + r) * p.s + s,
                      ys.at(n, k, i, j));
              }
}

template <class T>
Reference reference(const Case& test, Pass pass, const Operands<T>& o) {
  const ConvProblem& p = test.problem;
  Reference ref;
  const int64_t size = pass == Pass::kFprop   ? size_or_zero(p.y_size(), p)
                       : pass == Pass::kDgrad ? p.x_size()
                                              : p.w_size();
  ref.value.assign(size, 0.0);
  ref.magnitude.assign(size, 0.0);
  visit_products(p, [&](int64_t x, int64_t w, int64_t y) {
    const double product = pass == Pass::kFprop   ? double(o.x[x]) * double(o.w[w])
                           : pass == Pass::kDgrad ? double(o.y[y]) * double(o.w[w])
                                                  : double(o.y[y]) * double(o.x[x]);
    const int64_t to = pass == Pass::kFprop ? y : pass == Pass::kDgrad ? x : w;
    ref.value[to] += product;
    ref.magnitude[to] += std::fabs(product);
  });
  for (double& v : ref.value) {  // as large as a sum of its type gets, before anything else is done with it
    if (std::fabs(v) > std::numeric_limits<Compute<T>>::max()) v *= std::numeric_limits<double>::infinity();
  }
  if (pass == Pass::kWgrad) return ref;
  const bool dgrad = pass == Pass::kDgrad;
  const int channels = dgrad ? p.c : p.k, rows = dgrad ? p.d * p.h : p.z() * p.p(), columns = dgrad ? p.w : p.q();
  const Strides strides(dgrad ? p.x_layout : p.y_layout, channels, rows, columns);
  for (int n = 0; n < p.n; ++n)
    for (int k = 0; k < channels; ++k)
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) {
          const int64_t at = strides.at(n, k, i, j);
          double &v = ref.value[at], &m = ref.magnitude[at];
          if (test.scale) v *= o.scale[k], m *= std::fabs(double(o.scale[k]));
          if (test.shift) v += o.shift[k], m += std::fabs(double(o.shift[k]));
          if (test.residual) v += o.residual[at], m += std::fabs(double(o.residual[at]));
          // Rounding inside the activation is relative to what it returns; its slope is at most 1.2, and hardswish's
          // first product z * gate reaches 6 z.
          m = m * 1.2 + (test.activation == Activation::identity ? 0.0 : std::fabs(v));
          v = visit_activation<double>(test.activation, [&](auto f) { return f.forward(v); });
        }
  return ref;
}

// ---- Running a variant ----

struct Aligned {
  void* data;
  explicit Aligned(int64_t bytes) : data(std::aligned_alloc(64, (std::max<int64_t>(bytes, 1) + 63) / 64 * 64)) {}
  ~Aligned() { std::free(data); }
  Aligned(const Aligned&) = delete;
};

WeightSource source_of(const void* w) {
  return {[](const void* context, const Parallel&, void*) { return context; }, w};
}

template <class T>
std::string run(const Variant& v, const ConvProblem& p, const Operands<T>& o, const Epilogue& epilogue, int threads,
                std::vector<T>& out) {
  const Parallel parallel = parallel_with(threads);
  Aligned packed(v.pack ? v.packed_size(p) : 0);
  if (v.pack) v.pack(p, o.w.data(), packed.data, parallel);
  Aligned workspace(v.workspace ? v.workspace(p, threads) : 0);
  LaunchArgs args{};
  args.a = v.pass == Pass::kFprop ? o.x.data() : o.y.data();
  args.b = v.pass == Pass::kWgrad ? static_cast<const void*>(o.x.data()) : v.pack ? packed.data : o.w.data();
  args.out = out.data();
  args.epilogue = epilogue;
  args.workspace = workspace.data;
  args.parallel = &parallel;
  args.weights = source_of(o.w.data());
  const char* error = v.launch(p, args);
  return error ? error : "";
}

template <class T>
Epilogue epilogue_of(const Case& test, const Operands<T>& o) {
  return {test.scale ? o.scale.data() : nullptr, test.shift ? o.shift.data() : nullptr,
          test.residual ? o.residual.data() : nullptr, test.activation};
}

bool is_winograd(const Variant& v) { return v.algorithm == Algorithm::winograd; }

// The errors of a sum of k terms grow as sqrt(k) eps times the terms' magnitude; 2 is room, 4 the epilogue's steps.
// Winograd's own factor is derived in docs/design.md: 26.3 / 9 for F(4x4), less in wgrad, 11.1 / 9 for F(3x3), less
// than 1 for F(2x2).
// Products of bfloat16 are exact in float; the pair of an AVX512-BF16 instruction is two steps of the sum.
template <class T>
double tolerance(const Variant& v, const ConvProblem& p) {
  const double eps = std::numeric_limits<Compute<T>>::epsilon();
  const double growth = v.tile == 4 ? 26.3 / 9 : v.tile == 3 ? 11.1 / 9 : 1.0;
  return 2 * growth * eps * (std::sqrt(std::max<double>(1, p.gemm_shape(v.pass).k)) + 4);
}

template <class T>
std::string check(const Variant& v, const Case& test, const Operands<T>& o, const Reference& ref) {
  std::vector<T> out(ref.value.size(), T(-77.0));
  std::string error = run(v, test.problem, o, epilogue_of(test, o), 1, out);
  if (!error.empty()) return error;
  const double relative = tolerance<T>(v, test.problem);
  // A Winograd tile mixes the magnitudes of its neighbourhood.
  const bool mixes = is_winograd(v);
  double largest = 0;
  for (double m : ref.magnitude) largest = std::isfinite(m) ? std::max(largest, m) : largest;
  for (size_t i = 0; i < out.size(); ++i) {
    const double want = ref.value[i], got = out[i];
    double bound = relative * (mixes ? largest : ref.magnitude[i]);
    if (sizeof(T) == 2) bound += 0x1p-8 * (std::fabs(want) + bound) + 0x1p-126;  // rounded once; subnormals flushed
    const bool same = std::isnan(want)   ? std::isnan(got)
                      : std::isinf(want) ? got == want
                                         : std::fabs(got - want) <= bound;
    if (!same) {
      char text[160];
      std::snprintf(text, sizeof text, "element %zu of %zu is %.9g, not %.9g (allowed error %.3g)", i, out.size(), got,
                    want, bound);
      return text;
    }
  }
  std::vector<T> again(ref.value.size(), T(55.0));
  run(v, test.problem, o, epilogue_of(test, o), 3, again);
  if (!out.empty() && std::memcmp(out.data(), again.data(), out.size() * sizeof(T)) != 0) {
    return "the result depends on the number of threads";
  }
  return "";
}

constexpr std::pair<Layout, Layout> kLayouts[] = {{Layout::kNHWC, Layout::kNHWC},
                                                  {Layout::kNCHW, Layout::kNHWC},
                                                  {Layout::kNHWC, Layout::kNCHW},
                                                  {Layout::kNCHW, Layout::kNCHW}};
const char* text(Layout layout) { return layout == Layout::kNHWC ? "NHWC" : "NCHW"; }

template <class T>
int test_dtype(DType dtype, std::map<std::string, int>& counts) {
  int failures = 0;
  for (Case test : cases()) {
    test.problem.dtype = dtype;
    for (const auto& [x_layout, y_layout] : kLayouts) {
      test.problem.x_layout = x_layout, test.problem.y_layout = y_layout;
      for (Pass pass : {Pass::kFprop, Pass::kDgrad, Pass::kWgrad}) {
        const Operands<T> operands = random_operands<T>(test, pass);
        Reference ref;
        for (const Variant* v : variants()) {
          if (x_layout == Layout::kNCHW && !v->takes_nchw_x()) continue;
          if (y_layout == Layout::kNCHW && !v->takes_nchw_y()) continue;
          if (v->dtype != dtype || reject(*v, Device::kCPU, pass, test.problem)) continue;
          if (ref.value.empty()) ref = reference<T>(test, pass, operands);
          const std::string error = check<T>(*v, test, operands, ref);
          if (!error.empty()) {
            std::printf("FAIL %s on %s (x %s, y %s): %s\n", v->name, test.name, text(x_layout), text(y_layout),
                        error.c_str());
            ++failures;
          }
          ++counts[v->name];
        }
      }
    }
  }
  return failures;
}

// Winograd's kernels keep NaN, infinity and overflow where plain sums have them.
template <class T>
int test_plants(DType dtype) {
  int failures = 0, checked = 0;
  for (Case test : planted_cases()) {
    test.problem.dtype = dtype;
    for (Pass pass : {Pass::kFprop, Pass::kDgrad, Pass::kWgrad}) {
      for (const auto& [what, name] : kPlants) {
        test.plant = what;
        Operands<T> operands;
        Reference ref;
        for (const Variant* v : variants()) {
          if (!is_winograd(*v) || v->dtype != dtype || reject(*v, Device::kCPU, pass, test.problem)) continue;
          if (ref.value.empty()) operands = random_operands<T>(test, pass), ref = reference<T>(test, pass, operands);
          const std::string error = check<T>(*v, test, operands, ref);
          ++checked;
          if (error.empty()) continue;
          std::printf("FAIL %s on %s with %s: %s\n", v->name, test.name, name, error.c_str());
          ++failures;
        }
      }
    }
  }
  std::printf("%d Winograd cases with what is not finite\n", checked);
  return failures;
}

int test() {
  std::map<std::string, int> counts;
  int failures = test_dtype<float>(DType::kFloat32, counts) + test_dtype<double>(DType::kFloat64, counts) +
                 test_dtype<BFloat16>(DType::kBFloat16, counts) + test_plants<float>(DType::kFloat32) +
                 test_plants<BFloat16>(DType::kBFloat16);
  for (const Variant* v : variants()) {
    if (v->device != Device::kCPU || v->isa > detect_cpu_isa()) continue;
    std::printf("%-34s %4d cases\n", v->name, counts[v->name]);
    if (counts[v->name] == 0) {
      std::printf("FAIL %s took no case\n", v->name);
      ++failures;
    }
  }
  std::printf(failures ? "%d FAILURES\n" : "all passed\n", failures);
  return failures ? 1 : 0;
}

// ---- Bench ----

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class T>
void bench(const Variant& v, const ConvProblem& p, int threads) {
  Case test{"bench", p};
  const Operands<T> o = random_operands<T>(test, v.pass);
  const Parallel parallel = parallel_with(threads);
  Aligned packed(v.pack ? v.packed_size(p) : 0), workspace(v.workspace ? v.workspace(p, threads) : 0);
  if (v.pack) v.pack(p, o.w.data(), packed.data, parallel);
  std::vector<T> out(std::max({p.x_size(), p.y_size(), p.w_size()}));
  LaunchArgs args{};
  args.a = v.pass == Pass::kFprop ? o.x.data() : o.y.data();
  args.b = v.pass == Pass::kWgrad ? static_cast<const void*>(o.x.data()) : v.pack ? packed.data : o.w.data();
  args.out = out.data();
  args.epilogue = {v.pass == Pass::kFprop ? o.scale.data() : nullptr, v.pass == Pass::kFprop ? o.shift.data() : nullptr,
                   nullptr, v.pass == Pass::kFprop ? Activation::relu : Activation::identity};
  args.workspace = workspace.data;
  args.parallel = &parallel;
  args.weights = source_of(o.w.data());
  double best = 1e30, spent = 0;
  for (int i = 0; i < 3 || (spent < 0.25 && i < 2000); ++i) {
    const double start = now();
    v.launch(p, args);
    const double time = now() - start;
    best = std::min(best, time), spent += time;
  }
  std::printf("%-34s x %s y %s %9.1f us %8.1f GFLOP/s\n", v.name, text(p.x_layout), text(p.y_layout), best * 1e6,
              p.flops() / best * 1e-9);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--peak") {
    std::printf("%.1f GFLOP/s\n", roofline_for(detect_cpu_isa()).fma_flops(DType::kFloat32, 1) * 1e-9);
    return 0;
  }
  if (argc > 1 && std::string(argv[1]) == "--nonfinite") {
    return test_plants<float>(DType::kFloat32) + test_plants<BFloat16>(DType::kBFloat16) > 0;
  }
  if (argc > 1 && std::string(argv[1]) == "--bench") {
    if (argc < 13) return std::printf("--bench N C H W K R S stride pad dil groups [threads] [name filter]\n"), 2;
    int a[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};
    for (int i = 0; i < 12 && i + 2 < argc; ++i) a[i] = std::atoi(argv[i + 2]);
    const std::string filter = argc > 14 ? argv[14] : "";
    ConvProblem p = make(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[7], a[8], a[8], a[9], a[9], a[10]);
    for (const Variant* v : variants()) {
      p.dtype = v->dtype;
      if (std::string(v->name).find(filter) == std::string::npos) continue;
      if (reject(*v, Device::kCPU, v->pass, p)) continue;
      for (const auto& [x_layout, y_layout] : kLayouts) {
        if (x_layout == Layout::kNCHW && !v->takes_nchw_x()) continue;
        if (y_layout == Layout::kNCHW && !v->takes_nchw_y()) continue;
        p.x_layout = x_layout, p.y_layout = y_layout;
        v->dtype == DType::kFloat64    ? bench<double>(*v, p, a[11])
        : v->dtype == DType::kBFloat16 ? bench<BFloat16>(*v, p, a[11])
                                       : bench<float>(*v, p, a[11]);
      }
    }
    return 0;
  }
  return test();
}
