"""Row losses against the model's own `loss`, one row at a time, over architectures that differ in their heads."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.utils import import_utils

from montessori_ray.errors import DataError
from montessori_ray.influence import reference
from montessori_ray.influence.reference import (
    ChunkedCrossEntropy,
    ReferenceSet,
    ResponseLoss,
    influence_and_se,
    require_responses,
    response_inputs,
    row_weights,
)
from montessori_ray.training.chat import Encoded

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama_tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=8),
    "gemma3_windows": lambda: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=4.0),
}
PLAIN_HEADS = {"llama", "llama_tied", "qwen2", "gpt2", "gemma3", "gemma3_windows"}


def model_of(architecture: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def random_rows(lengths: list[int]) -> list[Encoded]:
    """Rows of random tokens whose last third, at least one token, is the response."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        tokens = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        prompt = min(length - 1, max(1, 2 * length // 3))
        rows.append(Encoded(tokens, [-100] * prompt + tokens[prompt:]))
    return rows


def own_loss(model: torch.nn.Module, row: Encoded) -> float:
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_rows_equal_the_models_own_loss(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 5 * VOCAB)  # several chunks a batch
    model = model_of(architecture)
    rows = random_rows([3, 17, 9, 2, 30, 11, 17])
    loss = ResponseLoss(model)
    losses = ReferenceSet(rows, 40).losses(lambda batch: loss(**batch.tensors))
    assert loss._head_is_enough == (architecture in PLAIN_HEADS)
    torch.testing.assert_close(losses, torch.tensor([own_loss(model, row) for row in rows]).double(), rtol=0, atol=3e-6)


def test_gradient_equals_the_models_own() -> None:
    model = model_of("llama_tied")
    (row,) = random_rows([20])
    inputs = {"input_ids": torch.tensor([row.input_ids]), "labels": torch.tensor([row.labels])}
    model(**inputs).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    ResponseLoss(model)(**response_inputs([row], torch.device("cpu")))[0].backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("architecture", sorted(PLAIN_HEADS))
def test_a_pass_of_a_fixed_shape_is_the_same(architecture: str) -> None:
    model = ResponseLoss(model_of(architecture))
    rows = random_rows([20, 9])
    gradients = []
    for length in (None, 32):
        inputs = response_inputs(rows, torch.device("cpu"), length=length)
        losses = model(**inputs)
        losses.sum().backward()
        gradients.append([losses.detach(), *(parameter.grad for parameter in model.parameters())])
        model.zero_grad()
    assert inputs["input_ids"].shape == (2, 32)
    assert inputs["positions"].tolist() == list(range(64))  # of any rows
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("architecture", "masks"), [("llama", 0), ("gemma3", 0), ("gemma3_windows", 2)])
def test_no_mask_is_made_where_causality_is_all_not_even_while_a_graph_is_recorded(
    architecture: str, masks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers decides it by the device's values, and otherwise when a stream is being recorded."""
    model, attend, seen = ResponseLoss(model_of(architecture)), F.scaled_dot_product_attention, []

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs.get("attn_mask"))
        return attend(*args, **kwargs)

    inputs = response_inputs(random_rows([17, 9]), torch.device("cpu"))
    launched = model(**inputs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for recording in (False, True):
        monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda recording=recording: recording)
        seen.clear()
        assert torch.equal(model(**inputs), launched)
        assert len(seen) == SIZES["num_hidden_layers"]
        assert sum(mask is not None for mask in seen) == masks


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_gradient_holds_one_chunk_of_logits_and_is_the_same(bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 8 * VOCAB)
    head = ChunkedCrossEntropy(torch.nn.Linear(16, VOCAB))

    def gradients() -> tuple[list[torch.Tensor], int]:
        """Of states and embedding, and the numbers kept for the backward pass."""
        states = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        kept: dict[int, int] = {}
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.update({x.data_ptr(): x.numel()}) or x, lambda x: x
            ),
            torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
        ):
            losses = head(states, torch.arange(60))
        return list(torch.autograd.grad(losses.mean(), [states, head.weight, head.bias])), sum(kept.values())

    (again, few), _ = gradients(), monkeypatch.setattr(reference, "checkpoint", lambda f, *chunk, **_: f(*chunk))
    at_once, many = gradients()
    assert all(map(torch.equal, again, at_once))
    assert few < 60 * VOCAB < many


def test_batches_keep_to_the_budget() -> None:
    batches = ReferenceSet(random_rows([3, 17, 9, 2, 30, 11, 17]), 40).batches
    assert sorted(row for batch in batches for row in batch.rows) == list(range(7))
    for batch in batches:
        assert len(batch.rows) == 1 or batch.tensors["input_ids"].numel() <= 40
    small = ReferenceSet(random_rows([3, 17, 9, 2, 30, 11, 17]), 160).gradient_batches
    assert sorted(row for batch in small for row in batch.rows) == list(range(7))
    assert [len(batch.rows) for batch in small] == [1, 1, 1, 1, 2, 1]  # of 20 tokens


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_split_the_rows_and_run_the_same_passes(world: int) -> None:
    model = ResponseLoss(model_of("llama"))
    rows = random_rows([3, 17, 9, 2, 30, 11, 17])
    shares = [ReferenceSet(rows, 40, rank=rank, world=world) for rank in range(world)]
    assert len({tuple(len(batch.rows) for batch in share.batches) for share in shares}) == 1
    losses = [share.losses(lambda batch: model(**batch.tensors)) for share in shares]
    together = torch.stack(losses).nanmean(dim=0)
    alone = ReferenceSet(rows, 40).losses(lambda batch: model(**batch.tensors))
    torch.testing.assert_close(together, alone, rtol=0, atol=3e-6)


def test_a_row_without_response_is_refused() -> None:
    rows, encoded = [{"instruction": "a"}, {"instruction": "b" * 90}], [*random_rows([5]), Encoded([1, 2], [-100] * 2)]
    with pytest.raises(DataError, match=r"^row 1 \('b{60}'\) has no response token within student.max_length: raise"):
        require_responses(rows, encoded)
    with pytest.raises(DataError, match=r"^row held-out-7 \("):
        require_responses([rows[0], {**rows[1], "example_id": "held-out-7"}], encoded)
    with pytest.raises(DataError, match="empty"):
        ReferenceSet([], 40)


def test_influence_and_standard_error() -> None:
    before, after = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.5, 1.5, 3.5]).double()
    influence, error = influence_and_se(before, after, torch.full((3,), 1 / 3).double())
    assert influence == pytest.approx(1 / 6)
    assert error == pytest.approx(math.sqrt(sum((d - 1 / 6) ** 2 for d in (0.5, -0.5, 0.5)) / 2 / 3))


def test_standard_error_of_a_weighted_mean_is_its_spread_over_samples() -> None:
    """Against the spread of the weighted mean over 20,000 draws of the rows' differences."""
    generator = torch.Generator().manual_seed(0)
    weights = row_weights([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "token", 0)
    draws = torch.randn(20_000, 10, generator=generator, dtype=torch.float64)
    errors = [influence_and_se(torch.zeros(10).double(), draw, weights)[1] ** 2 for draw in draws[:2000]]
    assert sum(errors) / len(errors) == pytest.approx(float((draws @ weights).var()), rel=0.1)
