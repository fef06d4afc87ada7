"""Dilated convolution: skip the taps that meet only padding.

A 3 x 3 filter at dilation 18 over a 33 x 33 image spans 37 pixels: most taps of most output pixels read padding. The
share of multiply-adds that meet the image, 3 x 3, "same" padding:

    dilation      6     12     18
    33 x 33     0.77   0.57   0.41
    65 x 65     0.88   0.77   0.67

Which taps those are differs from pixel to pixel, but not by much inside a small patch. Tap t of a patch whose first
and last rows sit at positions `first` and `last` of the gathered image reads rows [first + t*step, last + t*step]:

    t = 0                 1                    2
    |----|               |----|               |----|            rows read by one patch of rows
            0 |=====================================| extent    the image

Rows grow with t (or shrink, in dgrad, where step is negative), so the taps that reach the image are one interval
[lo, hi), found with two divisions: the loop of direct.py runs over that and nothing else. The same holds for columns.
The narrower the patch, the sharper the interval: 8 x 16 pixels for a tile of 128. wgrad needs no patch: it fixes a tap
and visits exactly the pixels for which it meets the image (wgrad.py).

Chosen for filters larger than 1 x 1 with dilation above 1. Integer division truncates on a GPU: every dividend below
is non-negative where its result is used.
"""

import triton
import triton.language as tl

# Rows and columns of a tile of 128 pixels. 16 columns of NCHW are a 32-byte sector of a 16-bit type.
PATCH_P, PATCH_Q = 8, 16


@triton.jit
def taps_that_reach(first, last, STEP: tl.constexpr, extent, count):
    """[lo, hi) of the taps t in [0, count) for which [first + t*STEP, last + t*STEP] meets [0, extent)."""
    if STEP > 0:
        lo = tl.where(last >= 0, 0, (-last + STEP - 1) // STEP)
        hi = tl.where(first >= extent, 0, (extent - first + STEP - 1) // STEP)
    else:
        lo = tl.where(first < extent, 0, (first - extent) // -STEP + 1)
        hi = tl.where(last < 0, 0, last // -STEP + 1)
    hi = tl.minimum(hi, count)
    return tl.minimum(lo, hi), hi
