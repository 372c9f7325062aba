"""The client of the teacher pool: what one sends, what one gets, and what happens when a replica dies meanwhile.

    client = pool.client()                                       # picklable: also for Ray tasks and actors
    samples = await client.generate(request)                     # one request
    for index, samples in client.generate_all(requests, concurrency=64):   # many, in order
        ...

A request that was lost with its replica is sent again as it was, seed included; sampled text may then differ all the
same, because batches differ. A request that is itself wrong is never sent again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from montessori_ray.errors import ResourceError, UserError
from montessori_ray.in_order import in_order

_REPLICA_LOST = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError, ReplicaUnavailableError)
"""What a caller sees when the process, the memory or the node of the replica that had its request is gone."""

_FIRST_WAIT_S = 0.5
"""Wait before a request is sent again; doubles every time."""

_STATUS_PERIOD_S = 5.0
"""Seconds between two looks at the pool's health while an answer is awaited."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to sample from it."""

    prompt: str
    """Chat-rendered text, which holds the template's special tokens and gets no others; or a user's message."""
    n: int
    """Samples wanted."""
    seed: int
    """Seed of the first sample; sample i has `seed + i`, so seeds of different requests lie at least `n` apart."""
    temperature: float
    """0 is greedy, for which `n` must be 1."""
    top_p: float
    presence_penalty: float
    max_tokens: int
    """Longest sample, tokens; shorter where the engine's context ends."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample; they are part of it. Where there are any, only they do: no token that ends the model's
    turn is sampled, what else it would write has that token's probability."""
    is_message: bool = False
    """Whether the prompt is a user's message, which the replica puts into the teacher's chat template."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One text the teacher wrote."""

    text: str
    finish_reason: str
    """`stop` (a stop text or, without any, a token that ends the turn) or `length` (`max_tokens` reached)."""
    num_tokens: int


class PoolClient:
    """Sends requests to the replicas of a teacher pool from any process of its Ray cluster.

    Args:
        app: name of the pool's Ray Serve application.
        max_retries: times one request is sent again after its replica died.
        patience_s: seconds without any running replica after which waiting ends with a `ResourceError`.
    """

    def __init__(self, app: str, *, max_retries: int, patience_s: float) -> None:
        self._app = app
        self._max_retries = max_retries
        self._patience_s = patience_s
        self._handle: DeploymentHandle[Any] | None = None
        self._health = _PoolHealth(app, patience_s)

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_client, (self._app, self._max_retries, self._patience_s)

    async def generate(self, request: GenerationRequest) -> list[Sample]:
        """The `n` samples of a request, in sample order.

        Raises:
            ModelError: the prompt leaves no room in the engine's context.
            ResourceError: no model is hosted, no replica came back in time, or every replica that got the request died.
        """
        for attempt in range(self._max_retries + 1):
            if attempt:
                await asyncio.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                return await self._send(request)
            except _REPLICA_LOST as error:
                lost = error
        raise ResourceError(
            f"a request was sent to the teacher pool {self._max_retries + 1} times and its replica died each time "
            f"(last: {_first_line(lost)}): look for memory pressure or a crash in the replicas' logs, or raise "
            "pool.max_retries"
        )

    def generate_all(
        self, requests: Iterable[GenerationRequest], *, concurrency: int
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Yield `(index, samples)` of all requests in their order, each as soon as it is its turn.

        At most `concurrency` requests are under way at once; `in_order` says what is read ahead, and what happens when
        a request fails or the iteration ends early.

        Raises what `generate` raises.
        """
        with closing(in_order(self.generate, requests, concurrency=concurrency)) as results:
            yield from enumerate(results)

    async def _send(self, request: GenerationRequest) -> list[Sample]:
        """One attempt. Serve's router waits for a replica without limit, so this looks after the pool's health."""
        response = (await self._get_handle()).generate.remote(request)
        answer = asyncio.ensure_future(_await(response))
        try:
            while not (await asyncio.wait([answer], timeout=_STATUS_PERIOD_S))[0]:
                await self._health.check()
            samples: list[Sample] | UserError = answer.result()
        except DeploymentUnavailableError:
            raise ResourceError(
                f"no replica of the teacher pool {self._app!r} could be started; the replicas' logs say why"
            ) from None
        finally:
            if not answer.done():
                response.cancel()
                answer.cancel()
        if isinstance(samples, UserError):
            raise samples
        return samples

    async def _get_handle(self) -> DeploymentHandle[Any]:
        if self._handle is None:
            try:
                self._handle = await asyncio.to_thread(serve.get_app_handle, self._app)
            except RayServeException:
                raise _not_hosted(self._app) from None
        return self._handle


class _PoolHealth:
    """Tells a pool that is restarting a replica from one that will never answer again.

    All requests of a client share it, so that Serve is asked once every few seconds however many are waiting.
    """

    def __init__(self, app: str, patience_s: float) -> None:
        self._app = app
        self._patience_s = patience_s
        self._asked = -math.inf
        self._alive = 0.0

    async def check(self) -> None:
        """Raise `ResourceError` when the pool is gone, or has had no running replica for `patience_s`."""
        now = time.monotonic()
        if now - self._asked < _STATUS_PERIOD_S:
            return
        if now - self._asked > 3 * _STATUS_PERIOD_S:  # nobody was waiting: what was seen then says nothing about now
            self._alive = now
        self._asked = now
        num_running = await asyncio.to_thread(_num_running, self._app)
        self._asked = time.monotonic()
        if num_running:
            self._alive = self._asked
        elif self._asked - self._alive > self._patience_s:
            raise ResourceError(
                f"the teacher pool {self._app!r} has had no running replica for {self._patience_s:.0f} s "
                "(pool.start_timeout_s): the cluster lost the resources of pool.worker, or replicas fail to start; "
                "their logs say why"
            )


def _num_running(app: str) -> int:
    """Running replicas of the application."""
    applications = serve.status().applications
    if app not in applications:
        raise _not_hosted(app)
    return sum(
        count
        for deployment in applications[app].deployments.values()
        for state, count in deployment.replica_states.items()
        if state == "RUNNING"
    )


def _not_hosted(app: str) -> ResourceError:
    return ResourceError(f"the teacher pool {app!r} hosts no model: call TeacherPool.host first")


def _make_client(app: str, max_retries: int, patience_s: float) -> PoolClient:
    return PoolClient(app, max_retries=max_retries, patience_s=patience_s)


async def _await(response: Any) -> Any:
    return await response


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
