"""What must hold for any order of examples and any change of a state, tried on many (hypothesis)."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from montessori_ray.influence.estimators import Exact, Example
from montessori_ray.influence.zero_state import COUNTERS
from montessori_ray.influence.zero_student import ZeroStudent
from montessori_ray.training.chat import Encoded
from tests.influence.conftest import BACKENDS, EXAMPLES, Backend, exact, reference_set, row, student

pytestmark = pytest.mark.usefixtures("alone")


def tried(times: int) -> settings:
    """That many examples, the same ones in every run."""
    return settings(
        max_examples=times, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


POISON_LENGTH = 33
POISONS = [
    Example("poison", row(POISON_LENGTH, 1)),
    Example("masked", Encoded([5] * 9, [-100] * 9)),
]
ALL = [*EXAMPLES, *POISONS]


@pytest.fixture(scope="module")
def backends(warmed: Path) -> Callable[[Backend], Any]:
    """A student of a backend, made once."""
    made: dict[Backend, Any] = {}

    def of(backend: Backend) -> Any:
        if backend not in made:
            made[backend] = student(warmed, backend)
        return made[backend]

    return of


@pytest.fixture(scope="module")
def groups(warmed: Path) -> Iterator[list[Exact]]:
    """Two scoring groups, whose students choke on examples of one length."""

    def choke(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output * torch.nan if inputs[0].shape[1] == POISON_LENGTH else output

    made = []
    for _ in range(2):
        warm: Any = student(warmed)
        for module in warm._masters.modules.values():
            module.model.get_input_embeddings().register_forward_hook(choke)
        made.append(exact(warm))
    return made  # type: ignore[return-value]


@pytest.fixture(scope="module")
def alone_scores(warmed: Path) -> list[float | None]:
    """Every example scored by a group that never saw another one."""
    return [exact(student(warmed)).score(example).influence for example in EXAMPLES] + [None] * len(POISONS)


@tried(30)
@given(
    order=st.lists(st.integers(0, len(ALL) - 1), min_size=1, max_size=10),
    lease_size=st.integers(1, 4),
    deal=st.randoms(use_true_random=False),
)
def test_a_score_is_the_same_whatever_is_scored_around_it(
    groups: list[Exact], alone_scores: list[float | None], order: list[int], lease_size: int, deal: random.Random
) -> None:
    """Any order with repetitions, in leases of any size, dealt to either group, poison among them: bit for bit."""
    for start in range(0, len(order), lease_size):
        group = deal.choice(groups)
        for index in order[start : start + lease_size]:
            score = group.score(ALL[index])
            assert score.influence == alone_scores[index]
            assert (score.quarantine is None) == (index < len(EXAMPLES))


def state(warm: Any) -> list[torch.Tensor]:
    """Every tensor that a step reads, as it is in memory."""
    if isinstance(warm, ZeroStudent):
        return [*warm._state._tensors(), *warm._engine.module.buffers()]
    return [warm._weights, *warm._moments, *warm._masters.modules["warmed"].buffers()]


def counters(warm: Any) -> list[int]:
    return [getattr(warm._engine, name) for name in COUNTERS] if isinstance(warm, ZeroStudent) else []


@pytest.mark.parametrize("backend", BACKENDS)
@tried(8)
@given(acts=st.lists(st.sampled_from(["step", "null step", "measure", "gradient", "random"]), min_size=1, max_size=4))
def test_restoring_brings_every_bit_back(backends: Callable[[Backend], Any], backend: Backend, acts: list[str]) -> None:
    warm, reference = backends(backend), reference_set()
    before = [tensor.clone() for tensor in state(warm)]
    steps, generator = counters(warm), torch.get_rng_state()
    for number, act in enumerate(acts):
        if act == "step":
            warm.step(EXAMPLES[number].encoded)
        elif act == "null step":
            warm.null_step()
        elif act == "measure":
            warm.reference_losses(reference)
        elif act == "gradient":
            warm.reference_gradient(reference)
        else:
            torch.rand(3)
    warm.restore()
    assert all(torch.equal(now, then) for now, then in zip(state(warm), before, strict=True))
    assert counters(warm) == steps
    assert torch.equal(torch.get_rng_state(), generator)


def flip(tensor: torch.Tensor, place: int, bit: int) -> None:
    """Turn over one bit."""
    octets = tensor.detach().view(-1).view(torch.uint8)
    octets[place % len(octets)] ^= 1 << bit


@pytest.mark.parametrize("backend", BACKENDS)
@tried(20)
@given(which=st.integers(0, 10**6), place=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_the_digest_sees_any_bit(
    backends: Callable[[Backend], Any], backend: Backend, which: int, place: int, bit: int
) -> None:
    warm = backends(backend)
    before = warm.digest()
    tensors = [tensor for tensor in state(warm) if tensor.numel()]
    tensor = tensors[which % len(tensors)]
    flip(tensor, place, bit)
    assert warm.digest() != before
    flip(tensor, place, bit)
    assert warm.digest() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flipped_bit_stops_the_group_at_the_next_check(warmed: Path, backend: Backend) -> None:
    warm: Any = student(warmed, backend)
    group = Exact(warm, reference_set(), baseline="null_step", verify_every=3, worker="here")
    group.score(EXAMPLES[0])
    kept = warm._state._saved if isinstance(warm, ZeroStudent) else state(warm)
    flip(kept[1], 17, 0)  # the lowest bit of a moment
    group.score(EXAMPLES[1])
    with pytest.raises(RuntimeError, match="not restored exactly"):
        group.score(EXAMPLES[2])
