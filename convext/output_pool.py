"""How much memory of results that were dropped is kept for the next ones."""

from __future__ import annotations

from .backends import native


class output_pool:
    """Says how many bytes of dropped results are kept for the next results: a setting, and a context manager that puts
    the former one back.

        >>> before = convext.output_pool.limit()  # the setting
        >>> convext.output_pool(1 << 30)  # 1 GiB from here on
        convext.output_pool(1073741824)
        >>> with convext.output_pool(0):  # inside only: every result comes from malloc and goes back to it
        ...     y = convext.conv2d(torch.randn(8, 16, 64, 64), torch.randn(16, 16, 3, 3))
        ...     convext.output_pool.kept()  # how much is kept now, in use by no tensor
        0
        >>> convext.output_pool(before)  # doctest: +ELLIPSIS
        convext.output_pool(...)

    malloc returns large blocks to the system, which clears every page again when it is next used, and that takes longer
    than to write it. Where the pool is on, the results of convext's CPU kernels, gradients among them, of 64 KiB
    and more, lie in pages that a dropped result left behind. A result owns its memory as any tensor does, until the
    last tensor or array that shares it is gone. Its storage can be resized and shared with other processes as any
    other, by torch's allocator from then on.

    Args:
        bytes: what may be kept, an int of at least 0. Before any setting it is an eighth of the machine's memory, 2 GiB
            at most. What is kept beyond a new limit is given back at once; what was kept longest goes first.

    The setting is the process's, and threads share what is kept. After os.fork() the child has the same setting and its
    own memory. Without the compiled library, under torch 2.10, which cannot wrap memory that way, and under another
    release of torch than convext was built with, whose storages may look otherwise, results come from torch's
    allocator and nothing is kept; `convext doctor` says so.

    Raises TypeError if bytes is not an int, ValueError if it is negative.
    """

    def __init__(self, bytes: int):
        if isinstance(bytes, bool) or not isinstance(bytes, int):
            raise TypeError(f"output_pool: bytes must be an int, got {bytes!r}")
        if not 0 <= bytes < 1 << 63:
            raise ValueError(f"output_pool: bytes must be at least 0 and less than 2**63, got {bytes}")
        self.bytes = bytes
        self._former = self.limit()
        native.set_output_pool_limit(bytes)

    def __enter__(self) -> output_pool:
        return self

    def __exit__(self, *exc: object) -> None:
        native.set_output_pool_limit(self._former)

    def __repr__(self) -> str:
        return f"convext.output_pool({self.bytes})"

    @staticmethod
    def limit() -> int:
        """Bytes that may be kept; 0 where the pool is off."""
        limit: int = native.output_pool_limit()
        return limit

    @staticmethod
    def kept() -> int:
        """Bytes that are kept now."""
        kept: int = native.output_pool_kept()
        return kept
