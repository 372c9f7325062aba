"""First-order and corrected scores against gradients taken by autograd in float64, and against exact ones."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from montessori_ray.influence import reference
from montessori_ray.influence.estimators import Baseline, Corrected, FirstOrder
from montessori_ray.influence.reference import ReferenceSet
from montessori_ray.training.chat import Encoded
from tests.influence.conftest import (
    BACKENDS,
    EXAMPLES,
    REFERENCE,
    RULE,
    VOCAB,
    Backend,
    exact,
    loss_of,
    reference_set,
    student,
)

pytestmark = pytest.mark.usefixtures("alone")


def stepped(
    model: LlamaForCausalLM, moments: dict[str, torch.Tensor], example: Encoded | None, rate: float
) -> LlamaForCausalLM:
    """The model in float64 after torch's own AdamW step on `example` (None: a zero gradient)."""
    model = copy.deepcopy(model).double()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=RULE.betas, eps=RULE.eps, weight_decay=RULE.weight_decay
    )
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(RULE.step)),
            "exp_avg": moments[f"exp_avg.{name}"].double(),
            "exp_avg_sq": moments[f"exp_avg_sq.{name}"].double(),
        }
        parameter.grad = torch.zeros_like(parameter)
    if example is not None:
        loss_of(model, example).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RULE.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return model


def slope(at: LlamaForCausalLM, rows: list[Encoded], to: LlamaForCausalLM) -> float:
    """Gradient of the mean loss of rows at one model, times the way from it to another."""
    at.zero_grad()
    torch.stack([loss_of(at, row) for row in rows]).mean().backward()
    pairs = zip(at.parameters(), to.parameters(), strict=True)
    return sum(float((a.grad * (b - a)).sum().detach()) for a, b in pairs)  # type: ignore[operator]


def first_order(warmed: Path, backend: Backend, baseline: Baseline) -> FirstOrder:
    tried = student(warmed, backend)
    return FirstOrder(tried, reference_set(), baseline=baseline, verify_every=1, worker="here")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("baseline", ["null_step", "warmed"])
def test_first_order_is_the_gradient_times_the_step(
    model: LlamaForCausalLM, moments: dict[str, torch.Tensor], warmed: Path, backend: Backend, baseline: Baseline
) -> None:
    estimator = first_order(warmed, backend, baseline)
    origin = stepped(model, moments, None, RULE.learning_rate)
    if baseline == "warmed":
        origin = copy.deepcopy(model).double()
    for example in EXAMPLES:
        score = estimator.score(example)
        expected = slope(origin, REFERENCE, stepped(model, moments, example.encoded, RULE.learning_rate))
        assert score.influence == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert score.influence_se is None
        assert score.estimator == "first_order"


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_in_chunks_give_the_same_scores(warmed: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = first_order(warmed, backend, "null_step")
    expected = [at_once.score(example).influence for example in EXAMPLES]
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 2 * VOCAB)
    chunked = first_order(warmed, backend, "null_step")
    assert [chunked.score(example).influence for example in EXAMPLES] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("backend", [None, 0])
def test_corrected_measures_its_sample_and_takes_the_rest_from_gradients(
    model: LlamaForCausalLM, moments: dict[str, torch.Tensor], warmed: Path, backend: Backend
) -> None:
    rows = REFERENCE[1:3]
    sample = ReferenceSet(rows, 40)
    estimator = Corrected(
        student(warmed, backend), reference_set(), sample, baseline="null_step", verify_every=1, worker="here"
    )
    origin = stepped(model, moments, None, RULE.learning_rate)
    for example in EXAMPLES:
        after = stepped(model, moments, example.encoded, RULE.learning_rate)
        measured = sum(float((loss_of(after, row) - loss_of(origin, row)).detach()) for row in rows) / len(rows)
        expected = measured + slope(origin, REFERENCE, after) - slope(origin, rows, after)
        assert estimator.score(example).influence == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_corrected_by_all_rows_is_exact(warmed: Path) -> None:
    corrected = Corrected(
        student(warmed), reference_set(), reference_set(), baseline="null_step", verify_every=1, worker="here"
    )
    whole = exact(student(warmed))
    for example in EXAMPLES:
        score = corrected.score(example)
        assert score.influence == pytest.approx(whole.score(example).influence, abs=1e-9)


def test_estimates_come_nearer_to_exact_scores_as_steps_get_smaller(warmed: Path) -> None:
    def error(rate: float) -> float:
        """Root mean square of the differences in units of the exact scores'."""
        rule = replace(RULE, learning_rate=rate)
        kwargs = {"baseline": "null_step", "verify_every": 1, "worker": "here"}
        estimator = FirstOrder(student(warmed, rule=rule), reference_set(), **kwargs)  # type: ignore[arg-type]
        whole = exact(student(warmed, rule=rule))
        estimates = torch.tensor([estimator.score(example).influence for example in EXAMPLES])
        scores = torch.tensor([whole.score(example).influence for example in EXAMPLES])
        return float((estimates - scores).norm() / scores.norm())

    assert error(1e-4) < 0.02 < error(3e-3) < error(3e-2)


@pytest.mark.parametrize("backend", [0, 1, 2, 3])
def test_backends_give_the_same_scores(warmed: Path, backend: Backend) -> None:
    local, zero = exact(student(warmed)), exact(student(warmed, backend))
    for example in EXAMPLES:
        mine, theirs = local.score(example), zero.score(example)
        assert mine.influence == pytest.approx(theirs.influence, abs=1e-6)
        assert mine.influence_se == pytest.approx(theirs.influence_se, abs=1e-6)
