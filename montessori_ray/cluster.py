"""The Ray cluster of a run: connect or start one, and know beforehand whether what is asked for can ever be placed."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import ray
import ray._common.utils
import ray._private.thirdparty.pynvml
import ray._private.utils
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from montessori_ray.config import Cluster
from montessori_ray.errors import ResourceError

Bundle = dict[str, float]
Answer = TypeVar("Answer")

WHOLE = 10_000
"""Parts of one CPU or GPU that Ray tells apart."""

CONNECT_TIMEOUT_S = 10.0
"""Seconds in which a cluster's head node must take a connection."""

LOOK_TIMEOUT_S = 60.0
"""Seconds in which a node must have started a process that looks for files or memory."""


def address_of(cluster: Cluster) -> str | None:
    """Address of the cluster to connect to, the configured or the job's own; None where one is to be started."""
    return cluster.address or os.environ.get("RAY_ADDRESS")


@contextmanager
def connected(cluster: Cluster) -> Iterator[str]:
    """Connect to the configured cluster, the job's own, or one started here and stopped afterwards.

    Yields what to call it: its address and dashboard.

    Raises:
        ResourceError: the address is no cluster's, or none answers there.
    """
    for name in ("ray", "ray.serve", "ray.train"):  # the run's own console says what matters
        logging.getLogger(name).setLevel(logging.ERROR)
    address = address_of(cluster)
    if address and "://" in address:
        raise ResourceError(
            f"{address} is where jobs or Ray's client are taken in: a run connects to `auto`, on a node of the "
            "cluster, or HEAD:6379, and from elsewhere it is a job (`ray job submit --address http://HEAD:8265 ...`)"
        )
    if address:
        require_listener(address)
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            context = ray.init(
                address=address, log_to_driver=False, namespace="montessori", logging_level=logging.ERROR
            )
        else:
            # Few cores run many waiting processes here; Ray would warn of "8 workers on 2 cores" again and again.
            startups = max(16, psutil.cpu_count() or 1)
            os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(startups))
            context = ray.init(
                address="local",
                num_cpus=cluster.num_cpus,
                object_store_memory=cluster.object_store_memory,
                include_dashboard=cluster.dashboard,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace="montessori",
            )
    except (ConnectionError, TimeoutError, RuntimeError, RayError) as error:  # the last: its token is missing or wrong
        raise ResourceError(f"no Ray cluster answers at {address or 'this machine'}: {error}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_termination)  # ray.init put its own in place, which aborts
    try:
        dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else "off"
        yield f"{address or 'a cluster of its own'}, dashboard {dashboard}"
    finally:
        ray.shutdown()


def require_listener(address: str) -> None:
    """Refuse HOST:PORT where nothing listens; Ray would try it for a quarter of an hour, with a page of warnings.

    Raises:
        ResourceError: see above.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # `auto`, which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster answers at {address} ({error}): `ray status` on its head node says whether it is up, and "
            "the port is 6379 unless it was started with another"
        ) from None


def cluster_nodes() -> list[Bundle]:
    """CPUs and GPUs of every living node of the connected cluster."""
    return [
        {"CPU": node["Resources"].get("CPU", 0.0), "GPU": node["Resources"].get("GPU", 0.0)}
        for node in ray.nodes()
        if node["Alive"]
    ]


def unseen(paths: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Addresses of the nodes that lack some of the paths, each with what it lacks."""
    found = _asked_of_nodes(_missing, list(paths))
    return [(address, missing) for address, missing in found if missing]


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]


@dataclass(frozen=True, slots=True)
class Memory:
    """What a node has, in GB."""

    host: float
    """Of the machine, or of the container a node is."""
    gpu: float | None
    """Of its largest GPU; None without NVIDIA's."""


def memory_of(nodes: Sequence[Bundle]) -> list[Memory]:
    """Memory of the connected cluster's nodes; where there is one, this is it. One that does not tell has any amount:
    nothing is refused for its sake."""
    if len(nodes) < 2:
        return [_memory()]
    told = [memory for _, memory in _asked_of_nodes(_memory)]
    return told + [Memory(host=math.inf, gpu=math.inf)] * (len(nodes) - len(told))


def _memory() -> Memory:
    return Memory(host=ray._common.utils.get_system_memory() / 1e9, gpu=_largest_gpu())


def _largest_gpu() -> float | None:
    nvml = ray._private.thirdparty.pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return max((nvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9 for handle in handles), default=None)
    finally:
        nvml.nvmlShutdown()


def _asked_of_nodes(function: Callable[..., Answer], *arguments: Any) -> list[tuple[str, Answer]]:
    """What a function returns on every node, beside the node's address.

    A node that is lost meanwhile, or has not answered in `LOOK_TIMEOUT_S`, is left out.
    """
    look = ray.remote(num_cpus=0)(function)
    looks = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            *arguments
        ): node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"]
    }
    answered, _ = ray.wait(list(looks), num_returns=len(looks), timeout=LOOK_TIMEOUT_S)
    found = []
    for ref in answered:
        with suppress(RayError):
            found.append((looks[ref], ray.get(ref)))
    return found


def free_nodes() -> list[Bundle]:
    """CPUs and GPUs that nothing holds, of every living node of the connected cluster."""
    return [
        {"CPU": free.get("CPU", 0.0), "GPU": free.get("GPU", 0.0)}
        for free in ray._private.state.available_resources_per_node().values()
    ]


def this_machine(cluster: Cluster) -> list[Bundle]:
    """The one node that a cluster started here would have."""
    gpus = ray._private.accelerators.NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    return [{"CPU": float(cluster.num_cpus or ray._private.utils.get_num_cpus()), "GPU": float(gpus)}]


def unplaceable(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> Bundle | None:
    """The first bundle that finds no node when all are placed at once, largest first; None if all fit.

    First fit of the largest is what a packing scheduler does; it may miss a packing that exists only for odd mixes of
    sizes, and a run asks for bundles of one or two sizes.
    """
    free = [_Free(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda b: (b.get("GPU", 0), b.get("CPU", 0)), reverse=True):
        if not any(node.take(bundle) for node in free):
            return bundle
    return None


class _Free:
    """What is left of a node; of its GPUs one by one, since Ray gives a share of a GPU from a single one."""

    def __init__(self, node: Bundle) -> None:
        exact = _exact(node)
        whole, rest = divmod(exact.pop("GPU", 0), WHOLE)
        self._amounts = exact
        self._gpus = [WHOLE] * whole + [rest]

    def take(self, bundle: Bundle) -> bool:
        """Take what a bundle asks for, if all of it is there."""
        asked = _exact(bundle)
        whole, share = divmod(asked.pop("GPU", 0), WHOLE)
        gpus = [WHOLE] * whole + ([share] if share else [])
        left = sorted(self._gpus)
        for amount in gpus:
            if (fitting := next((free for free in left if free >= amount), None)) is None:
                return False
            left.remove(fitting)
            left.append(fitting - amount)
            left.sort()
        if any(self._amounts.get(name, 0) < amount for name, amount in asked.items()):
            return False
        self._gpus = left
        for name, amount in asked.items():
            self._amounts[name] -= amount
        return True


def rooms(bundles: Sequence[Bundle], free: Sequence[Bundle], at_most: int) -> int:
    """How many times all of `bundles` fit into what is free, up to `at_most`."""
    count = 0
    while count < at_most and unplaceable([*bundles] * (count + 1), free) is None:
        count += 1
    return count


def _exact(bundle: Bundle) -> dict[str, int]:
    """Amounts in ten-thousandths, as Ray itself counts: 20 x 0.05 GPU is one GPU, which sums of floats miss."""
    return {name: round(amount * WHOLE) for name, amount in bundle.items()}


def require_room(stage: str, bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> None:
    """Refuse a placement that can never be met, instead of waiting for it for ever.

    Raises:
        ResourceError: names the stage, what it asks for and what the cluster has.
    """
    if unplaceable(bundles, nodes) is not None:
        raise ResourceError(
            f"{stage} asks for {say_bundles(bundles)} at once, the cluster has {say_bundles(nodes)}: lower its "
            "workers, groups, replicas or their cpus and gpus, or add nodes"
        )


def say_bundles(bundles: Sequence[Bundle]) -> str:
    """`2 x (1 CPU, 1 GPU)`; equal bundles counted."""
    said = [", ".join(f"{amount:g} {name}" for name, amount in bundle.items() if amount) for bundle in bundles]
    counted = {text: said.count(text) for text in said}
    return " + ".join(f"{count} x ({text or 'nothing'})" for text, count in counted.items()) or "-"
