"""Exact scores against an independent transcription of the definition in plain PyTorch; restoring; poison."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import deepspeed
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from montessori_ray.errors import ModelError
from montessori_ray.influence.estimators import Exact, Example
from montessori_ray.influence.scorer import join_alone
from montessori_ray.influence.update import AdamW
from montessori_ray.influence.zero_student import ZeroStudent
from montessori_ray.training.chat import Encoded

VOCAB = 61
RULE = AdamW(step=5, learning_rate=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, max_grad_norm=0.7)


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    torch.set_num_threads(1)
    join_alone()
    yield
    deepspeed.comm.destroy_process_group()


def row(length: int, seed: int) -> Encoded:
    tokens = torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    prompt = max(1, length // 2)
    return Encoded(tokens, [-100] * prompt + tokens[prompt:])


REFERENCE = [row(length, seed) for seed, length in enumerate((6, 14, 9, 23, 11))]
EXAMPLES = [Example(f"example-{seed}", row(8 + seed, 100 + seed)) for seed in range(6)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=30,  # no multiple of the shards
        intermediate_size=46,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
    )
    return cast(LlamaForCausalLM, LlamaForCausalLM(config).eval())


@pytest.fixture(scope="module")
def moments(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"exp_avg.{name}"] = 1e-2 * torch.randn(parameter.shape, generator=generator)
        tensors[f"exp_avg_sq.{name}"] = 1e-4 * torch.rand(parameter.shape, generator=generator)
    return tensors


@pytest.fixture(scope="module")
def warmed(model: LlamaForCausalLM, moments: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("warmed")
    model.save_pretrained(directory)
    save_file(moments, directory / "optimizer.safetensors")
    fields = {name: getattr(RULE, name) for name in AdamW.__slots__}
    (directory / "optimizer.json").write_text(json.dumps(fields))
    return directory


def student(warmed: Path, stage: int = 0, rule: AdamW = RULE) -> ZeroStudent:
    return ZeroStudent(warmed, REFERENCE, zero_stage=stage, reference_tokens=40, pad_token_id=0, rule=rule)


def exact(backend: ZeroStudent, baseline: str = "null_step", verify_every: int = 1) -> Exact:
    return Exact(backend, baseline=baseline, verify_every=verify_every, worker="here")  # type: ignore[arg-type]


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


def loss_of(model: LlamaForCausalLM, row: Encoded) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
    return loss


@torch.no_grad()
def reference_losses(model: LlamaForCausalLM) -> list[float]:
    return [float(loss_of(model, row)) for row in REFERENCE]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("baseline", ["null_step", "warmed"])
def test_scores_equal_the_definition(
    model: LlamaForCausalLM, moments: dict[str, torch.Tensor], warmed: Path, stage: int, baseline: str
) -> None:
    estimator = exact(student(warmed, stage), baseline)
    before = plain_step(model, moments, None) if baseline == "null_step" else reference_losses(model)
    assert estimator.warmed_loss == pytest.approx(mean(reference_losses(model)), abs=1e-6)
    assert estimator.null_step_loss == pytest.approx(mean(plain_step(model, moments, None)), abs=1e-6)
    for example in EXAMPLES:
        score = estimator.score(example)
        after = plain_step(model, moments, example.encoded)
        assert score.loss_after == pytest.approx(mean(after), abs=1e-6)
        assert score.influence == pytest.approx(mean(after) - mean(before), abs=1e-6)
        differences = torch.tensor(after) - torch.tensor(before)
        assert score.influence_se == pytest.approx(float(differences.std() / len(REFERENCE) ** 0.5), abs=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_restore_is_bit_exact(warmed: Path, stage: int) -> None:
    backend = student(warmed, stage)
    digest, losses = backend.digest(), backend.reference_losses()
    for example in EXAMPLES[:3]:
        backend.step(example.encoded)
        assert backend.digest() != digest
        assert not torch.equal(backend.reference_losses(), losses)
        backend.restore()
        assert backend.digest() == digest
        assert torch.equal(backend.reference_losses(), losses)
    backend.null_step()
    assert backend.digest() != digest
    backend.restore()
    assert backend.digest() == digest


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


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_poison_is_quarantined_and_changes_nothing(warmed: Path, stage: int) -> None:
    backend = student(warmed, stage)
    estimator = exact(backend)
    good = estimator.score(EXAMPLES[0])
    tokens = EXAMPLES[1].encoded.input_ids
    masked = estimator.score(Example("masked", Encoded(tokens, [-100] * len(tokens))))
    assert masked.quarantine == "no response token within student.max_length"
    assert masked.influence is None
    embedding = backend._engine.module.model.get_input_embeddings()
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
    backend = student(warmed)
    estimator = exact(backend)
    backend.restore = lambda: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="not restored exactly"):
        estimator.score(EXAMPLES[0])


def test_moments_of_another_model_are_refused(warmed: Path, tmp_path: Path) -> None:
    for file in warmed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({"exp_avg.other.weight": torch.zeros(1)}, tmp_path / "optimizer.safetensors")
    with pytest.raises(ModelError, match="belongs to another model"):
        student(tmp_path)
