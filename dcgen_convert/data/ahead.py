"""Work that threads do ahead of its use: Pillow decodes and resizes without holding Python's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

MOST = 8  # threads: decoding of 8 keeps ahead of one device

Item = TypeVar("Item")
Result = TypeVar("Result")


def threads() -> int:
    """This process's part of the cores that it may use, 1 to MOST."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST, cores))


def ahead(items: Iterable[Item], work: Callable[[Item], Result], depth: int) -> Iterator[Result]:
    """``work`` of every item, in order; an error gets out in its turn.

    Args:
        depth: results that may wait to be used.
    """
    source = iter(items)
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads())
    try:
        waiting.extend(pool.submit(work, item) for item in islice(source, depth))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in islice(source, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
