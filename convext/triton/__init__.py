"""Convolution kernels in Triton: what serves a GPU where the compiled library does not.

    launch      device guard, grid, tuned or default configuration, the interpreter
    configs     the few tile configurations, and the model that picks one without measuring
    tile        which pixels a tile holds; the multiply-accumulate step
    epilogue    bias, batch norm, residual and activation, on a tile still in registers
    direct      fprop and dgrad as implicit GEMM
    wgrad       the weight gradient as implicit GEMM, split over the pixels
    dilated     the taps of a tile that meet anything but padding
    depthwise   fprop, and dgrad and wgrad in one pass
    batch_norm  statistics, forward and backward
    reduction   partial results, added in a fixed order
    ops         the same entry points as operators that torch.compile sees through

Importing this package does not import Triton; `convext.backends.triton` does so once it has found it usable.
"""
