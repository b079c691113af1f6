"""A queue between one producer and one consumer thread, bounded by the bytes it holds."""

from __future__ import annotations

import queue
import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ByteQueue(Generic[Item]):
    """``put`` waits while the limit would be passed, so a slow consumer slows the producer and
    nothing is dropped.

    The item in the consumer's hands counts as held until its next ``get``.  An item larger than the
    limit passes alone.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._items: deque[tuple[Item, int]] = deque()
        self._held = 0  # bytes in the queue and in the consumer's hands
        self._taken = 0  # bytes in the consumer's hands
        self._ended = False
        self._changed = threading.Condition()

    def put(self, item: Item, num_bytes: int) -> None:
        """Append an item.  Returns at once after ``end``: the item is then never taken."""
        with self._changed:
            # An empty queue takes an item of any size, or one above the limit would wait forever.
            self._changed.wait_for(
                lambda: self._ended or not self._held or self._held + num_bytes <= self._limit,
            )
            self._items.append((item, num_bytes))
            self._held += num_bytes
            self._changed.notify_all()

    def get(self, timeout: float | None) -> Item | None:
        """The next item, None at the end; raises queue.Empty after ``timeout`` seconds."""
        with self._changed:
            self._held -= self._taken
            self._taken = 0
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._items or self._ended, timeout):
                raise queue.Empty
            if not self._items:
                return None
            item, self._taken = self._items.popleft()
            return item

    def end(self, *, drop: bool = False) -> None:
        """No item follows; with ``drop`` those not yet taken are forgotten."""
        with self._changed:
            self._ended = True
            if drop:
                self._items.clear()
            self._changed.notify_all()
