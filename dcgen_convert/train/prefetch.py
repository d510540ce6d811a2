"""Micro-batches of the coming steps, read and drawn in a thread while the device works on the present one."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Prefetch:
    """Calls ``read`` for one key after the other, ahead of the reader.

    Args:
        read: key -> micro-batch, any nesting of dicts, tuples and dataclasses of CPU tensors.
        keys: in the order in which `take` will ask for them.
        ahead: micro-batches kept ready.
        device: where they will go; pinned for a GPU, so that the copy does not wait.
    Attributes:
        waited: seconds that `take` had to wait so far. Near zero: reading does not hold up the device.
    """

    def __init__(self, read: Callable[[Any], Any], keys: Iterable[Any], ahead: int, device: torch.device):
        self._read, self._keys, self._device = read, keys, device
        self._ready: queue.Queue[tuple[Any, Any, BaseException | None]] = queue.Queue(ahead)
        self._closed = threading.Event()
        self.waited = 0.0
        self._thread = threading.Thread(target=self._work, daemon=True, name="prefetch")
        self._thread.start()

    def take(self, key: Any) -> Any:
        """The micro-batch of ``key``; raises what reading it raised."""
        start = time.perf_counter()
        found, batch, error = self._ready.get()
        self.waited += time.perf_counter() - start
        if error is not None:
            raise error
        if found != key:
            raise RuntimeError(f"micro-batch {key} was asked for, {found} is next")
        return batch

    def close(self) -> None:
        """Stop reading; returns when the thread has ended."""
        self._closed.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # the current device is a property of the thread
            for key in self._keys:
                if not self._put((key, self._pinned(self._read(key)), None)):
                    return
        except BaseException as error:  # noqa: BLE001  it belongs to whoever waits for a batch
            self._put((None, None, error))

    def _put(self, item: tuple[Any, Any, BaseException | None]) -> bool:
        """Wait for a free place; False when nobody will take it any more."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _pinned(self, batch: Any) -> Any:
        return pinned(batch) if self._device.type == "cuda" else batch


def pinned(value: Any) -> Any:
    """``value`` with every tensor in page-locked memory."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    if isinstance(value, dict):
        return {key: pinned(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(pinned(part) for part in value)
    return type(value)(**{key: pinned(part) for key, part in vars(value).items()})
