"""On a GPU: recorded passes, the compiled step and fused attention against the same student on a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from montessori_ray.config import Score, WorkerResources
from montessori_ray.influence import capture
from montessori_ray.influence.capture import Graphs
from montessori_ray.influence.scorer import Scorer
from tests.tiny import rows

pytestmark = [
    pytest.mark.usefixtures("alone"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
REFERENCE, EXAMPLES = rows(12, 10_000), rows(10, 0)


@pytest.fixture
def scorer(tiny: Path) -> Callable[..., Scorer]:
    def make(gpus: float = 1.0, **settings: Any) -> Scorer:
        given = Score(reference_tokens=64, worker=WorkerResources(cpus=1, gpus=gpus), verify_every=1, **settings)
        return Scorer(tiny, REFERENCE, given, chat_template=None, max_length=64, worker="me")

    return make


def influences(made: Scorer) -> list[Any]:
    return [made.score(example).influence for example in EXAMPLES]


@pytest.mark.parametrize("estimator", ["exact", "first_order", "corrected"])
@pytest.mark.parametrize("compiled", [False, True])
def test_scores_are_those_of_a_cpu(scorer: Callable[..., Scorer], estimator: str, compiled: bool) -> None:
    made = scorer(estimator=estimator, precision="float32", compile=compiled)
    on_gpu = influences(made)
    assert on_gpu == pytest.approx(influences(scorer(0.0, estimator=estimator)), abs=2e-6)
    assert len(made._student._graphs["float32"]._recorded) > 1  # type: ignore[attr-defined]
    assert influences(made) == on_gpu  # replayed, in the same order
    assert [made.score(example).influence for example in reversed(EXAMPLES)] == on_gpu[::-1]


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_other_precisions_come_near_and_are_rechecked_in_float32(scorer: Callable[..., Scorer], precision: str) -> None:
    made, exact = scorer(precision=precision), influences(scorer(precision="float32"))
    for example, expected in zip(EXAMPLES, exact, strict=True):
        score = made.score({**example, "recheck": True})
        assert score.recheck_influence == pytest.approx(expected, abs=1e-6)
        assert score.influence == pytest.approx(expected, abs=0.2)


def test_backend_zero_gives_the_same(scorer: Callable[..., Scorer]) -> None:
    local = influences(scorer(precision="float32"))
    assert influences(scorer(precision="float32", backend="zero")) == pytest.approx(local, abs=2e-6)


def test_what_cannot_be_recorded_runs_as_it_is(
    scorer: Callable[..., Scorer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = influences(scorer(precision="float32"))

    def refuse(self: Graphs, work: Callable[[], torch.Tensor]) -> Any:
        work()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(capture.Graphs, "_record", refuse)
    made = scorer(precision="float32")
    assert influences(made) == pytest.approx(expected, abs=1e-6)
    assert len([record for record in caplog.records if "no CUDA graph of them" in record.message]) == 1


def test_a_real_refusal_leaves_the_device_usable() -> None:
    graphs, ones = Graphs(), torch.ones(4, device="cuda")
    assert graphs.run("waits", lambda: ones * ones.sum().item(), undo=lambda: None).tolist() == [4.0] * 4
    assert graphs.run("other", lambda: ones + 1, undo=lambda: None).tolist() == [2.0] * 4


def test_results_outlive_other_work_whatever_was_recorded_first() -> None:
    graphs = Graphs()
    sizes = [4, 700, 4, 90, 700, 4]
    inputs = [torch.full((size,), float(number), device="cuda") for number, size in enumerate(sizes)]

    def result(number: int) -> torch.Tensor:
        return graphs.run(number, lambda: (inputs[number] * 2).sum().expand(3) * torch.ones(3, device="cuda"), undo=int)

    for number in reversed(range(len(sizes))):
        result(number)
    results = [result(number) for number in range(len(sizes))]
    assert [value[0].item() for value in results] == [2.0 * number * size for number, size in enumerate(sizes)]
