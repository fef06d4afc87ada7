"""Which pixels a tile holds, and the step that multiplies and accumulates.

A tile of BLOCK_M pixels is laid over an image grid (N, P, Q) in one of two ways:

    flat     PATCH_Q == 0: BLOCK_M successive pixels of the flattened grid. Nothing is wasted at the edges. Good for
             channels-last memory, where it is the channels that lie side by side.
    patches  PATCH_P x PATCH_Q pixels of one image, or of several images where one is smaller than the tile.
             Neighbouring lanes are neighbours in memory for NCHW, and a tile spans few rows and columns, so that
             whole filter taps fall into the padding and can be skipped (dilated.py).
"""

import triton
import triton.language as tl


@triton.constexpr_function
def patch_shape(block_m, patch_p, patch_q):
    """(images, rows, columns) of a tile of block_m pixels, given the largest patch wanted. Powers of two, all."""
    columns = min(patch_q, block_m)
    rows = min(patch_p, block_m // columns)
    return block_m // (rows * columns), rows, columns


def tile_count(block_m: int, patch_p: int, patch_q: int, n: int, p: int, q: int) -> int:
    """Tiles that cover an (n, p, q) grid: the host's side of `tile_pixels`."""
    if patch_q == 0:
        return -(-n * p * q // block_m)
    images, rows, columns = patch_shape(block_m, patch_p, patch_q)
    return -(-n // images) * -(-p // rows) * -(-q // columns)


@triton.jit
def tile_pixels(
    tile, N, P, Q, BLOCK_M: tl.constexpr, PATCH_P: tl.constexpr, PATCH_Q: tl.constexpr, INDEX: tl.constexpr
):
    """n, p, q of each pixel of the tile, (BLOCK_M,) each in the INDEX type, and whether it exists."""
    lane = tl.arange(0, BLOCK_M)
    if PATCH_Q == 0:
        pixel = tile.to(INDEX) * BLOCK_M + lane
        row = pixel // Q
        n = row // P
        p = row % P
        q = pixel % Q
    else:
        SHAPE: tl.constexpr = patch_shape(BLOCK_M, PATCH_P, PATCH_Q)
        p0, q0 = patch_origin(tile, P, Q, BLOCK_M, PATCH_P, PATCH_Q)
        n = tile // (tl.cdiv(P, SHAPE[1]) * tl.cdiv(Q, SHAPE[2])) * SHAPE[0] + lane // (SHAPE[1] * SHAPE[2])
        p = p0 + lane // SHAPE[2] % SHAPE[1]
        q = q0 + lane % SHAPE[2]
    return n.to(INDEX), p.to(INDEX), q.to(INDEX), (n < N) & (p < P) & (q < Q)


@triton.jit
def patch_origin(tile, P, Q, BLOCK_M: tl.constexpr, PATCH_P: tl.constexpr, PATCH_Q: tl.constexpr):
    """The first row and column of a patch."""
    SHAPE: tl.constexpr = patch_shape(BLOCK_M, PATCH_P, PATCH_Q)
    tiles_q = tl.cdiv(Q, SHAPE[2])
    return tile // tiles_q % tl.cdiv(P, SHAPE[1]) * SHAPE[1], tile % tiles_q * SHAPE[2]


@triton.jit
def multiply_accumulate(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b for a (M, K) and b (K, N), as PRECISION says:

    "ieee", "tf32"   tl.dot: matrix instructions for the 16-bit types and tf32, plain FMA for float32
    "sum"            products and a sum: float64, for which tl.dot is not there on every GPU
    "widen"          tl.dot on float32 copies: bfloat16 in the interpreter, whose tl.dot multiplies the raw bits
    """
    if PRECISION == "sum":
        acc += tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    elif PRECISION == "widen":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc
