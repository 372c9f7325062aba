"""Exact scores against an independent transcription of the definition in plain PyTorch; restoring; poison."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from montessori_ray.errors import ModelError
from montessori_ray.influence import update
from montessori_ray.influence.estimators import Example
from montessori_ray.influence.local_student import LocalStudent
from montessori_ray.influence.reference import LossMean
from montessori_ray.influence.update import AdamW
from montessori_ray.influence.zero_student import ZeroStudent
from montessori_ray.training.chat import Encoded
from tests.influence.conftest import (
    BACKENDS,
    EXAMPLES,
    REFERENCE,
    RULE,
    Backend,
    exact,
    loss_of,
    reference_set,
    student,
)

pytestmark = pytest.mark.usefixtures("alone")


def plain_step(model: LlamaForCausalLM, moments: dict[str, torch.Tensor], example: Encoded | None) -> list[float]:
    """Reference losses after one AdamW step on `example` (None: a zero gradient) from the warmed state."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RULE.learning_rate, betas=RULE.betas, eps=RULE.eps, weight_decay=RULE.weight_decay
    )
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(RULE.step)),
            "exp_avg": moments[f"exp_avg.{name}"].clone(),
            "exp_avg_sq": moments[f"exp_avg_sq.{name}"].clone(),
        }
        parameter.grad = torch.zeros_like(parameter)
    if example is not None:
        loss_of(model, example).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RULE.max_grad_norm)
    optimizer.step()
    return reference_losses(model)


@torch.no_grad()
def reference_losses(model: LlamaForCausalLM) -> list[float]:
    return [float(loss_of(model, row)) for row in REFERENCE]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def token_mean(losses: list[float], first: int = 0) -> float:
    """Mean over the response tokens of reference rows from `first` on, from the rows' own means."""
    tokens = [row.response_tokens for row in REFERENCE[first : first + len(losses)]]
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)


MEANS: dict[str, Callable[[list[float]], float]] = {
    "example": mean,
    "token": token_mean,
    "batch": lambda losses: mean([token_mean(losses[first : first + 2], first) for first in range(0, len(losses), 2)]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("baseline", ["null_step", "warmed"])
@pytest.mark.parametrize("loss_mean", ["example", "token", "batch"])
def test_scores_equal_the_definition(
    model: LlamaForCausalLM,
    moments: dict[str, torch.Tensor],
    warmed: Path,
    backend: Backend,
    baseline: str,
    loss_mean: LossMean,
) -> None:
    estimator = exact(student(warmed, backend), baseline, loss_mean)
    before = plain_step(model, moments, None) if baseline == "null_step" else reference_losses(model)
    assert estimator.warmed_loss == pytest.approx(MEANS[loss_mean](reference_losses(model)), abs=1e-6)
    assert estimator.null_step_loss == pytest.approx(MEANS[loss_mean](plain_step(model, moments, None)), abs=1e-6)
    for example in EXAMPLES:
        score = estimator.score(example)
        after = plain_step(model, moments, example.encoded)
        assert score.loss_after == pytest.approx(MEANS[loss_mean](after), abs=1e-6)
        assert score.influence == pytest.approx(MEANS[loss_mean](after) - MEANS[loss_mean](before), abs=1e-6)
        if loss_mean == "example":
            differences = torch.tensor(after) - torch.tensor(before)
            assert score.influence_se == pytest.approx(float(differences.std() / len(REFERENCE) ** 0.5), abs=1e-6)


@contextmanager
def interrupted(tried: Any, place: str) -> Iterator[None]:
    """Something fails in the forward pass, in the middle of the backward pass, or in the optimizer's step."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    def fail_later(module: Any, inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(fail)

    here = isinstance(tried, LocalStudent)
    layers = (tried._masters.modules["warmed"] if here else tried._module).model.get_decoder().layers
    with pytest.MonkeyPatch.context() as patch:
        if place == "step":
            patch.setattr(*((update, "adamw") if here else (tried._engine.basic_optimizer, "step")), fail)
        hook = layers[0].register_forward_hook({"forward": fail, "backward": fail_later}.get(place, lambda *_: None))
        yield
        hook.remove()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["forward", "backward", "step"])
def test_an_interruption_leaves_no_trace(warmed: Path, backend: Backend, place: str) -> None:
    tried = student(warmed, backend)
    estimator = exact(tried)
    expected = [estimator.score(example).loss_after for example in EXAMPLES[:2]]
    with interrupted(tried, place), pytest.raises(RuntimeError):
        estimator.score(EXAMPLES[2])
    assert [estimator.score(example).loss_after for example in EXAMPLES[:2]] == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_restore_is_bit_exact(warmed: Path, backend: Backend) -> None:
    tried, reference = student(warmed, backend), reference_set()
    digest, losses = tried.digest(), tried.reference_losses(reference)
    for example in EXAMPLES[:3]:
        tried.step(example.encoded)
        assert tried.digest() != digest
        assert not torch.equal(tried.reference_losses(reference), losses)
        tried.restore()
        assert tried.digest() == digest
        assert torch.equal(tried.reference_losses(reference), losses)
    tried.null_step()
    assert tried.digest() != digest
    tried.restore()
    assert tried.digest() == digest
    tried.step(EXAMPLES[0].encoded)
    tried.reference_gradient(reference)
    assert tried.digest() == digest
    assert torch.equal(tried.reference_losses(reference), losses)


@pytest.mark.parametrize("backend", [None, 0])
def test_a_student_without_a_finite_loss_scores_nothing(warmed: Path, backend: Backend) -> None:
    diverging = student(warmed, backend, replace(RULE, learning_rate=float("inf")))
    with pytest.raises(ModelError, match=r"reference loss is 4\.\d+, and nan after a step.*diverged.*learning_rate"):
        exact(diverging)


def test_scores_do_not_depend_on_their_neighbours(warmed: Path) -> None:
    forward = exact(student(warmed))
    scores = {example.example_id: forward.score(example).influence for example in EXAMPLES}
    backward = exact(student(warmed))
    for example in [*reversed(EXAMPLES), *EXAMPLES]:
        assert backward.score(example).influence == scores[example.example_id]


def test_fresh_moments(model: LlamaForCausalLM, warmed: Path) -> None:
    rule = AdamW.fresh(1e-3)
    estimator = exact(student(warmed, rule=rule))
    assert estimator.null_step_loss == estimator.warmed_loss
    stepped = copy.deepcopy(model)
    loss_of(stepped, EXAMPLES[0].encoded).backward()
    torch.nn.utils.clip_grad_norm_(stepped.parameters(), rule.max_grad_norm)
    torch.optim.AdamW(stepped.parameters(), lr=1e-3, weight_decay=0.0).step()
    assert estimator.score(EXAMPLES[0]).loss_after == pytest.approx(mean(reference_losses(stepped)), abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_poison_is_quarantined_and_changes_nothing(warmed: Path, backend: Backend) -> None:
    poisoned = student(warmed, backend)
    estimator = exact(poisoned)
    good = estimator.score(EXAMPLES[0])
    tokens = EXAMPLES[1].encoded.input_ids
    masked = estimator.score(Example("masked", Encoded(tokens, [-100] * len(tokens))))
    assert masked.quarantine == "no response token within student.max_length"
    assert masked.influence is None
    module = poisoned._engine.module if isinstance(poisoned, ZeroStudent) else poisoned._masters.modules["warmed"]  # type: ignore[attr-defined]
    embedding = module.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    assert estimator.score(EXAMPLES[1]).quarantine == "loss of the example is nan"
    handle.remove()
    handle = embedding.register_forward_hook(spoil_gradient)
    reason = estimator.score(EXAMPLES[1]).quarantine
    assert reason in ("gradient of the example is not finite", "reference loss not finite after the step")
    handle.remove()
    again = estimator.score(EXAMPLES[0])
    assert (again.influence, again.loss_after) == (good.influence, good.loss_after)


def spoil_gradient(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * torch.inf)


def test_a_state_that_is_not_restored_is_noticed(warmed: Path) -> None:
    broken = student(warmed)
    estimator = exact(broken)
    broken.restore = lambda: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="not restored exactly"):
        estimator.score(EXAMPLES[0])


def test_moments_of_another_model_are_refused(warmed: Path, tmp_path: Path) -> None:
    for file in warmed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({"exp_avg.other.weight": torch.zeros(1)}, tmp_path / "optimizer.safetensors")
    with pytest.raises(ModelError, match="belongs to another model"):
        student(tmp_path)
