"""How many pictures a network works on together: what memory holds, and half of it each time that was too much.

Results do not depend on it, but for the order of float sums.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import psutil
import torch

from dcgen_convert.core.errors import is_out_of_memory

SHARE = 0.8  # of the free memory: the allocator wastes some, and convolutions want room to work in

T = TypeVar("T")


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still use on ``device``; on a CPU its part of what the machine has."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def pictures(each: float, free: int) -> int:
    """Pictures that need ``each`` bytes that fit into ``free`` bytes; at least 1."""
    return max(1, int(SHARE * free / each))


def release() -> None:
    """Give the memory of what nothing refers to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class AtOnce:
    """Work on many rows in parts, in order.

    Args:
        what: the work, for the message: "latents: encoding".
        tell: takes the message.
    """

    def __init__(self, what: str, tell: Callable[[str], object] = lambda _: None) -> None:
        self.what, self.tell = what, tell
        self.most: int | None = None  # known once memory was short

    def parts(self, rows: Any, work: Callable[[Any], T], limit: int | None = None) -> Iterator[T]:
        """``work`` of slices of ``rows``: of up to ``limit``, and half as many each time that memory is short.

        The last error gets out when a single row is too much.
        """
        start = 0
        while start < len(rows):
            count = min(size for size in (len(rows) - start, limit, self.most) if size is not None)
            try:
                result = work(rows[start : start + count])
            except Exception as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                self.most = count // 2
            else:
                start += count
                yield result
                continue
            release()  # the tensors of the failed call went with its traceback
            self.tell(f"{self.what}: out of memory with {count} pictures at once, going on with {self.most}")
