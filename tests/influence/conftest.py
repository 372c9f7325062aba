"""A tiny warmed student with moments of its own, on every backend, and rows to score."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from montessori_ray.influence.estimators import Exact, Example, Student
from montessori_ray.influence.local_student import LocalStudent
from montessori_ray.influence.reference import LossMean, ReferenceSet
from montessori_ray.influence.scorer import join_alone, leave
from montessori_ray.influence.update import AdamW
from montessori_ray.influence.zero_student import ZeroStudent
from montessori_ray.training.chat import Encoded
from tests.tiny import write_student

VOCAB = 61
RULE = AdamW(step=5, learning_rate=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, max_grad_norm=0.7)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    torch.set_num_threads(1)
    join_alone()
    yield
    leave()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("student")
    write_student(directory)
    return directory


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


Backend = int | None
"""ZeRO stage of backend `zero`; None is `local`."""

BACKENDS: list[Backend] = [None, 0, 1, 2, 3]


def student(warmed: Path, backend: Backend = None, rule: AdamW = RULE) -> Student:
    if backend is None:
        return LocalStudent(warmed, rule=rule, device=torch.device("cpu"))
    return ZeroStudent(warmed, zero_stage=backend, rule=rule)


def reference_set(mean: LossMean = "example") -> ReferenceSet:
    return ReferenceSet(REFERENCE, 40, mean=mean, mean_batch=2)


def exact(warmed: Student, baseline: str = "null_step", mean: LossMean = "example") -> Exact:
    return Exact(warmed, reference_set(mean), baseline=baseline, verify_every=1, worker="here")  # type: ignore[arg-type]


def loss_of(model: LlamaForCausalLM, row: Encoded) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
    return loss
