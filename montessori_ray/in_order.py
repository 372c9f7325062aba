"""Many requests at once, their answers in order: what a client of any served model does with a stream of prompts."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOOKAHEAD = 4
"""Items up to this many times `concurrency` are begun while the next one in order is slow."""


def in_order(
    call: Callable[[Item], Awaitable[Result]], items: Iterable[Item], *, concurrency: int
) -> Generator[Result]:
    """Yield the results of `call(item)` for all items in their order, each as soon as it is its turn.

    At most `concurrency` calls are under way at once, and items are read from the iterable at most `4 * concurrency`
    ahead of the last result yielded, so memory stays bounded. When a call fails, the results before it are yielded
    first. Ending the iteration early cancels what is under way. All calls run in one event loop of their own.

    Raises what `call` raises.
    """
    slots = asyncio.Semaphore(concurrency)

    async def in_a_slot(item: Item) -> Result:
        async with slots:
            return await call(item)

    with _event_loop() as loop:
        left = iter(items)
        window: deque[Future[Result]] = deque()
        while True:
            for item in islice(left, _LOOKAHEAD * concurrency - len(window)):
                window.append(asyncio.run_coroutine_threadsafe(in_a_slot(item), loop))
            if not window:
                return
            yield window.popleft().result()


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own; what still runs in it at the end is cancelled."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="in-order", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
