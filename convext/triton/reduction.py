"""Partial results, added in a fixed order: the second half of every split reduction.

    out[i] = sum_s slabs[s, i]

Slabs are read BLOCK_S at a time, each such block is summed by a tree of fixed shape, and the blocks are added one after
the other. No atomics: the order, hence the rounding, depends on the shapes alone.
"""

import triton
import triton.language as tl

from .launch import Launch, accumulate


@triton.jit(do_not_specialize=["slabs"])
def reduce_kernel(slab_ptr, out_ptr, slabs, size, ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr):
    """slab_ptr: (slabs, size), dense, in the ACC type. out_ptr: (size,)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    acc = tl.zeros((BLOCK_I,), ACC)
    for block in range(tl.cdiv(slabs, BLOCK_S)):
        s = block * BLOCK_S + tl.arange(0, BLOCK_S)
        at = slab_ptr + s.to(tl.int64)[:, None] * size + i[None, :]  # (BLOCK_S, BLOCK_I)
        acc += tl.sum(tl.load(at, (s < slabs)[:, None] & (i < size)[None, :], 0), axis=0)
    tl.store(out_ptr + i, acc.to(out_ptr.dtype.element_ty), i < size)


def add_slabs(slabs, out) -> Launch:
    """out, dense, becomes the sum of slabs (S, *out.shape), dense, along the first axis."""
    size = out.numel()
    config = triton.Config({"BLOCK_S": 32, "BLOCK_I": 64}, num_warps=4, num_stages=1)
    return Launch(
        reduce_kernel,
        lambda meta: (triton.cdiv(size, meta["BLOCK_I"]),),
        (config,),
        {"slab_ptr": slabs, "out_ptr": out, "slabs": slabs.shape[0], "size": size, "ACC": accumulate(slabs.dtype)},
    )
