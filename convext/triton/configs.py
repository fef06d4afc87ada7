"""The few tile configurations of the GEMM kernels, and the model that picks one without measuring.

A tile is argued from three sides. BLOCK_M * BLOCK_N / (BLOCK_M + BLOCK_N) products an element moved says whether the
matrix units or the second-level cache is the limit: 64 for 128 x 128, 43 for 128 x 64, 32 for 64 x 64. The accumulator
of BLOCK_M * BLOCK_N floats must stay in the registers: 128 x 128 over 8 warps is 64 a thread. And num_stages tiles of
A and B must fit into shared memory: 164 KiB an sm_80, 228 KiB an sm_90, 64 KiB a gfx942.

    16-bit   128x128x64 s3   large layers                                                          96 KiB
             128x 64x64 s4   64 filters, and layers too small to fill the GPU with the above       96 KiB
              64x 64x64 s4   late layers at small batch: few pixels, many filters                  64 KiB
             128x 32x32 s4   MobileNet's projections to 16..32 channels                            40 KiB
    flat     16-bit where every element of a tile of A has an address of its own (direct.py, wgrad.py): 32 deep, or
             the addresses overflow the registers
    tf32     the same bytes: half of BLOCK_K; 128x64x32 in 3 stages
    float32  by FMA, without matrix units: 64x64x16 s2, 32 accumulators a thread at 128 threads
    float64  by products and sums: 32x16x8, 4096 products in flight over 128 threads

The bytes are those of sm_90; sm_80 holds one stage less. AMD has 64 KiB: num_stages=2 keeps one stage in registers
there and one in shared memory. No main loop spills a register on any of the three (test_triton_compile.py); an
epilogue of batch norm, residual and gelu over the largest tile may, once a tile.

The interpreter pays by the operation, hardly by the element: float32 takes large tiles there, whatever they would need.
"""

import functools
import math

import triton


def _config(block_m, block_n, block_k, warps, stages):
    return triton.Config(
        {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}, num_warps=warps, num_stages=stages
    )


_GEMM = {
    "half": (
        _config(128, 128, 64, 8, 3),
        _config(128, 64, 64, 8, 4),
        _config(64, 64, 64, 4, 4),
        _config(128, 32, 32, 4, 4),
    ),
    "flat": (_config(128, 64, 32, 8, 3), _config(64, 64, 32, 4, 3), _config(128, 32, 32, 4, 3)),
    "tf32": (_config(128, 128, 32, 8, 3), _config(128, 64, 32, 4, 3), _config(64, 64, 32, 4, 4)),
    "ieee": (_config(64, 64, 16, 4, 2),),
    "sum": (_config(32, 16, 8, 4, 1),),
    "interpreter": (_config(512, 64, 64, 4, 1), _config(128, 64, 64, 4, 1), _config(64, 32, 32, 4, 1)),
}

# Products that a multiprocessor's matrix units do while it moves one element in from the second-level cache: about 32
# on an A100 (1024 products and 32 elements of 16 bits a clock), about 128 on an H100.
_PRODUCTS_PER_ELEMENT = 64
# What a tile costs before its first product and after its last (index arithmetic, filling the pipeline, the store),
# in products of one step of the loop: about two steps of a 128 x 128 x 64 tile.
_FIXED_PRODUCTS = 2 * 128 * 128 * 64


@functools.cache
def gemm_configs(family: str, target: str) -> tuple[triton.Config, ...]:
    """The configurations of a family (a key of _GEMM) on a Triton target ("cuda", "hip", "xpu")."""
    configs = _GEMM[family]
    if target != "hip":
        return configs
    return tuple(triton.Config(c.kwargs, num_warps=c.num_warps, num_stages=min(c.num_stages, 2)) for c in configs)


def cost(config: triton.Config, m: int, n: int, k: int, batch: int, processors: int) -> float:
    """What a GEMM of `batch` independent (m, n, k) products costs with a tile, in products of one processor: waves of
    tiles, times the longer of multiplying and moving, for all of BLOCK_K whether used or not."""
    block_m, block_n, block_k = (config.kwargs[f"BLOCK_{axis}"] for axis in "MNK")
    waves = math.ceil(math.ceil(m / block_m) * math.ceil(n / block_n) * batch / processors)
    depth = math.ceil(k / block_k) * block_k
    return waves * (_FIXED_PRODUCTS + depth * max(block_m * block_n, (block_m + block_n) * _PRODUCTS_PER_ELEMENT))


def cheapest(configs, m: int, n: int, k: int, batch: int, processors: int) -> triton.Config:
    """The configuration of least cost; the earlier, larger one where two cost the same."""
    return min(configs, key=lambda config: cost(config, m, n, k, batch, processors))


def tuning_key(problem, *extents: int) -> int:
    """What tunes alike: the extents' bucket and the layouts. Dtypes are Triton's part of the key."""
    return bucket(*extents, 1 << (2 * problem.x_layout + problem.y_layout))


def bucket(*extents: int) -> int:
    """Extents rounded up to powers of two, packed into one integer: shapes that tune alike share it."""
    key = 0
    for extent in extents:
        key = key << 6 | (max(extent, 1) - 1).bit_length()
    return key
