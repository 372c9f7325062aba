"""Whether what a stage asks for can ever be placed, known before anything waits for it."""

from __future__ import annotations

import math
import socket
import time
from pathlib import Path

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from montessori_ray.cluster import (
    Bundle,
    Memory,
    connected,
    memory_of,
    require_room,
    rooms,
    say_bundles,
    unplaceable,
    unseen,
)
from montessori_ray.config import Cluster
from montessori_ray.errors import ResourceError

NODE: Bundle = {"CPU": 16, "GPU": 8}
CPU_ONLY: Bundle = {"CPU": 4, "GPU": 0}
GPU_WORKER: Bundle = {"CPU": 2, "GPU": 1}


@pytest.mark.parametrize(
    ("bundles", "nodes", "first"),
    [
        ([], [], None),
        ([], [NODE], None),
        ([{}], [CPU_ONLY], None),
        ([{"CPU": 1}], [], {"CPU": 1}),
        ([GPU_WORKER] * 8, [NODE], None),
        ([GPU_WORKER] * 9, [NODE], GPU_WORKER),
        ([GPU_WORKER] * 9, [NODE, CPU_ONLY], GPU_WORKER),
        ([GPU_WORKER] * 16, [NODE, NODE], None),
        ([{"CPU": 3, "GPU": 1}] * 6, [NODE], {"CPU": 3, "GPU": 1}),
        ([{"CPU": 4, "GPU": 0.5}] * 4, [NODE], None),
        ([{"GPU": 0.5}] * 16, [NODE], None),
        ([{"GPU": 0.5}] * 17, [NODE], {"GPU": 0.5}),
        # Cores enough in all, on no single node.
        ([{"CPU": 6}], [CPU_ONLY, CPU_ONLY], {"CPU": 6}),
        # Tensor parallelism needs its GPUs on one node.
        ([{"CPU": 1, "GPU": 8}], [{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}], {"CPU": 1, "GPU": 8}),
        # The large one is placed first, whatever the order.
        ([{"CPU": 1}, {"CPU": 1}, {"CPU": 4}], [{"CPU": 2, "GPU": 0}, CPU_ONLY], None),
        # Workers without GPUs leave the GPU node's cores to those with.
        ([{"CPU": 4}, *[GPU_WORKER] * 8], [NODE, CPU_ONLY], None),
        ([{"TPU": 1}], [NODE], {"TPU": 1}),
    ],
)
def test_the_first_bundle_that_finds_no_node(bundles: list[Bundle], nodes: list[Bundle], first: Bundle | None) -> None:
    before = [dict(node) for node in nodes]
    assert unplaceable(bundles, nodes) == first
    assert nodes == before


def test_a_share_of_a_gpu_comes_from_one_gpu() -> None:
    """As Ray places them: two workers of 0.6 GPU leave nothing for a third on two GPUs."""
    assert unplaceable([{"GPU": 0.6}] * 2, [{"GPU": 2.0}]) is None
    assert unplaceable([{"GPU": 0.6}] * 3, [{"GPU": 2.0}]) == {"GPU": 0.6}
    assert unplaceable([{"GPU": 0.4}] * 5, [{"GPU": 2.0}]) == {"GPU": 0.4}
    assert unplaceable([{"GPU": 0.4}, {"GPU": 2.0}], [{"GPU": 3.0}]) is None
    assert unplaceable([{"GPU": 0.4}, {"GPU": 2.0}], [{"GPU": 2.4}]) is None, "what others have left of one"


@pytest.mark.parametrize(
    ("bundles", "free", "at_most", "count"),
    [
        ([GPU_WORKER], [], 3, 0),
        ([GPU_WORKER], [NODE], 3, 3),
        ([GPU_WORKER], [NODE], 100, 8),
        # All of a group or nothing of it.
        ([GPU_WORKER] * 3, [NODE], 100, 2),
        ([GPU_WORKER] * 3, [{"CPU": 16, "GPU": 2}, {"CPU": 16, "GPU": 1}], 100, 1),
        ([{"CPU": 4}], [{"CPU": 3.9}, {"CPU": 3.9}], 100, 0),
    ],
)
def test_how_many_whole_groups_fit_into_what_is_free(
    bundles: list[Bundle], free: list[Bundle], at_most: int, count: int
) -> None:
    assert rooms(bundles, free, at_most) == count


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 40))
def test_equal_shares_of_one_gpu_fill_it_exactly(gpus: int, workers_a_gpu: int) -> None:
    share = round(1 / workers_a_gpu, 4)  # as a user would write it
    if share * workers_a_gpu <= 1:
        assert unplaceable([{"GPU": share}] * workers_a_gpu * gpus, [{"GPU": 1.0}] * gpus) is None
    assert unplaceable([{"GPU": share}] * (workers_a_gpu * gpus + gpus), [{"GPU": 1.0}] * gpus) is not None


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # taken, and nobody listens
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        started = time.monotonic()
        said = f"no Ray cluster answers at {address} .*`ray status` on its head"
        with pytest.raises(ResourceError, match=said), connected(Cluster(address=address)):
            pytest.fail("connected")
    assert time.monotonic() - started < 60


def test_require_room_says_what_is_asked_and_what_is_there() -> None:
    require_room("score", [GPU_WORKER] * 8, [NODE])
    with pytest.raises(ResourceError) as caught:
        require_room("iteration_00/score", [GPU_WORKER] * 9, [NODE, CPU_ONLY])
    assert str(caught.value) == (
        "iteration_00/score asks for 9 x (2 CPU, 1 GPU) at once, the cluster has 1 x (16 CPU, 8 GPU) + 1 x (4 CPU): "
        "lower its workers, groups, replicas or their cpus and gpus, or add nodes"
    )


@pytest.mark.parametrize(
    ("bundles", "said"),
    [
        ([], "-"),
        ([{}], "1 x (nothing)"),
        ([{"CPU": 2.0, "GPU": 0.0}], "1 x (2 CPU)"),
        ([{"CPU": 0.5, "GPU": 1}] * 3, "3 x (0.5 CPU, 1 GPU)"),
        ([{"CPU": 1}, {"CPU": 2}, {"CPU": 1}], "2 x (1 CPU) + 1 x (2 CPU)"),
    ],
)
def test_bundles_are_said_with_equal_ones_counted(bundles: list[Bundle], said: str) -> None:
    assert say_bundles(bundles) == said


@pytest.mark.parametrize("address", ["http://head:8265", "ray://head:10001"])
def test_an_address_for_jobs_is_told_from_a_clusters(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray job submit` takes it from RAY_ADDRESS too, where Ray itself would end in a traceback."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ResourceError, match=f"{address} is where jobs .*`ray job submit"), connected(Cluster()):
        pytest.fail("connected")


def test_every_node_is_asked_what_it_sees_and_has(tmp_path: Path) -> None:
    with connected(Cluster(num_cpus=1, dashboard=False, object_store_memory=100_000_000)):
        assert unseen([str(tmp_path)]) == []
        ((address, missing),) = unseen([str(tmp_path), "/no/such/folder"])
        assert address == ray.util.get_node_ip_address()
        assert missing == ["/no/such/folder"]
        asked = memory_of([{"CPU": 1.0, "GPU": 0.0}] * 2)  # as of a cluster of several, by a process on every node
        unknown = Memory(host=math.inf, gpu=math.inf)  # of a node that has not told
        assert asked == [*memory_of([{"CPU": 1.0, "GPU": 0.0}]), unknown]
