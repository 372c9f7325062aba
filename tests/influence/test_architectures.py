"""Exact scores of students of several families, and of adapters, against the definition in plain PyTorch."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from montessori_ray.config import Lora
from montessori_ray.influence.estimators import FirstOrder
from montessori_ray.training.adapters import add_adapter
from montessori_ray.training.engine import load_model
from tests.influence.conftest import EXAMPLES, REFERENCE, RULE, VOCAB, Backend, exact, loss_of, reference_set, student

pytestmark = pytest.mark.usefixtures("alone")

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def warmed_one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A warmed student on disk; the adapter sits on the Llama with tied embeddings."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(FAMILIES.get(request.param, FAMILIES["tied"]), dtype=torch.float32)
    model.save_pretrained(folder)
    if request.param == "adapter":
        add_adapter(model, Lora(rank=3, alpha=6), seed=0)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        if "lora_B" in name:  # zeros in a fresh adapter
            parameter.data = 0.1 * torch.randn_like(parameter)
    if request.param == "adapter":
        model.save_pretrained(folder)
    moments = {f"exp_avg.{name}": 1e-2 * torch.randn_like(parameter) for name, parameter in trained.items()}
    moments |= {f"exp_avg_sq.{name}": 1e-4 * torch.rand_like(parameter) for name, parameter in trained.items()}
    save_file({name: moment.detach() for name, moment in moments.items()}, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps(asdict(RULE)))
    return request.param, folder


def losses_after(folder: Path, example: Any) -> tuple[list[float], set[str]]:
    """Reference losses after one step of torch's AdamW (None: with a zero gradient), and names of what it moved."""
    model = load_model(folder, 0).eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    stored = load_file(folder / "optimizer.safetensors")
    optimizer = torch.optim.AdamW(
        trained.values(), lr=RULE.learning_rate, betas=RULE.betas, eps=RULE.eps, weight_decay=RULE.weight_decay
    )
    for name, parameter in trained.items():
        moments = {key: stored[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(RULE.step)), **moments}
        parameter.grad = torch.zeros_like(parameter)
    if example is not None:
        loss_of(model, example).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), RULE.max_grad_norm)
    optimizer.step()
    with torch.no_grad():
        losses = [float(loss_of(model, row)) for row in REFERENCE]
    return losses, {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("warmed_one", [*FAMILIES, "adapter"], indirect=True)
def test_scores_equal_the_definition(warmed_one: tuple[str, Path]) -> None:
    name, folder = warmed_one
    check_definition(folder, None, is_adapter=name == "adapter")


@pytest.mark.parametrize("warmed_one", list(FAMILIES), indirect=True)
def test_an_engine_gives_the_same_scores(warmed_one: tuple[str, Path]) -> None:
    _, folder = warmed_one
    local, zero = exact(student(folder)), exact(student(folder, 3))
    for example in EXAMPLES[:2]:
        assert zero.score(example).influence == pytest.approx(local.score(example).influence, abs=1e-6)


@pytest.mark.parametrize("warmed_one", ["adapter"], indirect=True)
@pytest.mark.parametrize("backend", [0, 1, 2, 3])
def test_an_adapter_in_an_engine(warmed_one: tuple[str, Path], backend: Backend) -> None:
    _, folder = warmed_one
    check_definition(folder, backend, is_adapter=True)
    kwargs: dict[str, Any] = {"baseline": "null_step", "verify_every": 1, "worker": "here"}
    local = FirstOrder(student(folder), reference_set(), **kwargs)
    zero = FirstOrder(student(folder, backend), reference_set(), **kwargs)
    for example in EXAMPLES[:3]:
        assert zero.score(example).influence == pytest.approx(local.score(example).influence, rel=1e-4, abs=1e-7)


def check_definition(folder: Path, backend: Backend, *, is_adapter: bool) -> None:
    estimator = exact(student(folder, backend))
    before, moved = losses_after(folder, None)
    assert not is_adapter or all("lora_" in parameter for parameter in moved)
    assert estimator.null_step_loss == pytest.approx(sum(before) / len(before), abs=2e-6)
    for example in EXAMPLES[:3]:
        after, _ = losses_after(folder, example.encoded)
        expected = sum(now - then for now, then in zip(after, before, strict=True)) / len(before)
        assert abs(expected) > 1e-4
        assert estimator.score(example).influence == pytest.approx(expected, abs=1e-6)
