"""The reference loss: what influence is a change of.

The reference loss is a weighted mean over the reference examples of each example's mean loss over its response tokens
(`row_weights`; equal weights by default). Rows are tokenized once, sorted by length and cut into batches by a budget of
padded tokens; logits are computed only where a response token is predicted, and only a chunk of positions at a time (at
49,152 words a full batch of 8,192 tokens would hold 1.6 GB of logits, most of them for tokens nobody asks about).

Shapes: R rows of a batch, T padded tokens, N positions asked for in a batch, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from montessori_ray.errors import DataError
from montessori_ray.influence.attention import use_fused_attention
from montessori_ray.training.chat import FILLING, IGNORED, Encoded, collate

Precision = Literal["float32", "tf32", "bfloat16"]
"""Of forward and backward passes: float32; its matrix products with 10 bits of mantissa (NVIDIA GPUs); bfloat16."""

LossMean = Literal["example", "token", "batch"]
"""What the reference loss is a mean of, see `row_weights`."""

CPU = torch.device("cpu")

GRADIENT_SHARE = 8
"""What a batch's tokens are divided by for passes with a gradient. These keep the activations of all layers, about 3 MB
a token for a student of 1.1B in bfloat16 (counted); passes without keep those of one layer."""

CHUNK_LOGITS = 2**25
"""Logits held at once: 128 MiB in float32."""


class ChunkedCrossEntropy(nn.Module):
    """Cross entropy of hidden states against words, through the output embedding whose parameters it shares.

    A module of its own, which computes all chunks in one call, so that an engine with sharded weights gathers the
    embedding once a batch.
    """

    def __init__(self, embedding: nn.Linear) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.bias = embedding.bias
        self.compiled = False
        """A chunk passes through `torch.compile`: logits are read as they are, without a float32 copy of them."""

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """Float32 cross entropies (N,) of words (N,) after hidden states (N, H)."""
        losses = _compiled_cross_entropies() if self.compiled else _cross_entropies
        head = self.weight, self.bias
        rows = max(1, CHUNK_LOGITS // len(self.weight))
        chunks = list(zip(hidden.split(rows), words.split(rows), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.cat([losses(*chunk, *head) for chunk in chunks])
        # For a gradient a chunk's logits are computed again, or those of all chunks would wait for the backward pass.
        return torch.cat(
            [checkpoint(losses, *chunk, *head, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        )


def _cross_entropies(hidden: Tensor, words: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Some families (Mamba) keep their states in float32 whatever their weights are.
    return F.cross_entropy(F.linear(hidden.to(weight.dtype), weight, bias).float(), words, reduction="none")


@functools.cache
def _compiled_cross_entropies() -> Callable[..., Tensor]:
    return torch.compile(_cross_entropies, dynamic=True)


class ResponseLoss(nn.Module):
    """A causal language model that returns every row's mean cross entropy over its response tokens.

    The model is wrapped, rather than its parts called from outside, so that an engine which gathers sharded weights in
    forward hooks sees one whole forward pass. With a plain head no step of a pass waits for the device.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.precision: Precision = "float32"
        use_fused_attention(model)
        embedding = model.get_output_embeddings()
        split = isinstance(embedding, nn.Linear) and model.get_decoder() is not model  # Llama 4's is the whole model
        self.head = ChunkedCrossEntropy(embedding) if split else None
        self._head_is_enough: bool | None = None if self.head else False

    def try_head(self, device: torch.device) -> bool:
        """Whether the logits are the output embedding of the decoder's states, found out by a first short pass."""
        if self._head_is_enough is None:
            self._head_is_enough = self._compare_heads(device)
        return self._head_is_enough

    def forward(self, input_ids: Tensor, positions: Tensor, words: Tensor, counts: Tensor) -> Tensor:
        """Losses (R,) in float64 of rows, given as `response_inputs` makes them. Cross entropy is float32."""
        plain = self.try_head(input_ids.device)
        enabled = self.precision == "bfloat16"  # without its cache, which would hold a copy of every weight
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False):
            if self.head is not None and plain:
                losses = self.head(self._states(input_ids).flatten(0, 1)[positions], words)
            else:
                losses = self._by_row(input_ids, positions, words)
        # Unique positions, then one sum a row: unlike index_add this is deterministic on CUDA.
        dense = torch.zeros(input_ids.shape, dtype=torch.float64, device=losses.device)
        dense.view(-1)[positions] = losses.double()
        return dense.sum(dim=1) / counts

    @torch.no_grad()
    def _compare_heads(self, device: torch.device) -> bool:
        """Whether the model's logits are its output embedding of the decoder's states and nothing else.

        Some families scale or cap their logits (Gemma 2, Cohere, Granite) under names of their own, so it is tried on a
        few tokens instead of looked up; in the first forward pass, where an engine has gathered the weights.
        """
        assert self.head is not None
        words = torch.arange(1, 9, device=device) % self.model.config.get_text_config().vocab_size
        own = F.cross_entropy(self._logits(words[None], len(words))[0].float(), words, reduction="none")
        return torch.allclose(self.head(self._states(words[None])[0], words), own, rtol=1e-5, atol=1e-5)

    def _states(self, input_ids: Tensor) -> Tensor:
        """The decoder's last hidden states (R, T, H)."""
        mask = _nothing_hidden(input_ids)
        output = self.model.get_decoder()(input_ids=input_ids, attention_mask=mask, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def _by_row(self, input_ids: Tensor, positions: Tensor, words: Tensor) -> Tensor:
        """Cross entropies (N,) from the model's own logits, a row at a time."""
        losses = []
        rows, places = positions // input_ids.shape[1], positions % input_ids.shape[1]
        for row, ids in enumerate(input_ids):
            asked = places[rows == row]
            first, last = int(asked[0]), int(asked[-1])
            logits = self._logits(ids[None, : last + 1], last + 1 - first)[0]
            losses.append(F.cross_entropy(logits[asked - first].float(), words[rows == row], reduction="none"))
        return torch.cat(losses)

    def _logits(self, input_ids: Tensor, keep: int) -> Tensor:
        """The model's own logits (1, keep, V) of the last `keep` positions."""
        limit = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        mask = _nothing_hidden(input_ids)
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False, **limit).logits
        return logits[:, -keep:]


def _nothing_hidden(input_ids: Tensor) -> Tensor:
    """A mask of ones (R, T); without one transformers looks for packed rows, which waits for the device."""
    return torch.ones_like(input_ids)


def response_inputs(rows: Sequence[Encoded], device: torch.device, *, length: int | None = None) -> dict[str, Tensor]:
    """Arguments of `ResponseLoss` for rows, on the device.

    Rows are filled up on the right, and no mask goes with them: a causal model's states depend on nothing that follows.

    Args:
        rows: R tokenized rows.
        device: where the arguments go.
        length: T; all shapes then depend on R and T alone, as a recorded pass needs it: every position is asked for,
            and words that are no response count nothing. None: that of the longest row, and only response tokens are
            asked for.

    Returns:
        `input_ids` (R, T), `positions` (N,) in the R x T tokens whose next one is asked for, `words` (N,) these next
        ones, `counts` (R,) response tokens of a row.
    """
    batch = collate(rows)
    missing = 0 if length is None else length - batch["input_ids"].shape[1]
    ids = F.pad(batch["input_ids"], (0, missing), value=FILLING)
    next_words = F.pad(batch["labels"][:, 1:], (0, missing + 1), value=IGNORED)
    counts = (next_words != IGNORED).sum(dim=1)
    asked = (next_words != IGNORED).flatten() if length is None else torch.ones(ids.numel(), dtype=torch.bool)
    positions = asked.nonzero().flatten()
    tensors = {"input_ids": ids, "positions": positions, "words": next_words.flatten()[positions], "counts": counts}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceBatch:
    """Reference rows of one forward pass."""

    rows: tuple[int, ...]
    """Their indices in the reference set."""
    weights: Tensor
    """Their weights in the reference loss (R,), float64; 0 for a row that only fills up."""
    tensors: dict[str, Tensor]
    """Arguments of `ResponseLoss`."""


class ReferenceSet:
    """One rank's share of the tokenized reference rows, in batches of similar length.

    The rows, sorted by length, are dealt to the ranks in turn, the last ones repeated until every rank has as many;
    batches are cut at the same places on all ranks. So all ranks run the same number of passes of the same sizes, which
    an engine with sharded weights needs (its gathers are collective), and none waits long for another.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        tokens: int,
        *,
        mean: LossMean = "example",
        mean_batch: int = 8,
        device: torch.device = CPU,
        rank: int = 0,
        world: int = 1,
    ):
        """
        Args:
            encoded: the reference rows, each with a response token (`require_responses`).
            tokens: padded tokens a batch may hold; a batch has one row at least.
            mean: what the reference loss is a mean of.
            mean_batch: rows of a batch for `mean="batch"`.
            device: where the batches stay.
            rank: index of this rank in the scoring group.
            world: ranks of the scoring group.

        Raises:
            DataError: there is no row.
        """
        if not encoded:
            raise DataError("the reference set is empty: data.reference needs at least one row with a response")
        self.rows = len(encoded)
        self.weights = row_weights([row.response_tokens for row in encoded], mean, mean_batch)
        self._world = world
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index].input_ids))
        weights = [self.weights[index] for index in order]
        filling = -len(order) % world
        order += order[-1:] * filling
        weights += [torch.zeros((), dtype=torch.float64)] * filling
        lengths = [len(encoded[index].input_ids) for index in order[::world]]
        mine, my_weights = order[rank::world], torch.stack(weights[rank::world])

        def batches(tokens: int) -> list[ReferenceBatch]:
            return [
                ReferenceBatch(
                    tuple(mine[span]),
                    my_weights[span].to(device),
                    response_inputs([encoded[index] for index in mine[span]], device),
                )
                for span in _spans(lengths, tokens)
            ]

        self.batches = batches(tokens)
        self.gradient_batches = batches(tokens // GRADIENT_SHARE)

    def mean(self, losses: Tensor) -> float:
        """The reference loss of row losses (rows,)."""
        return float(self.weights @ losses)

    @torch.no_grad()
    def losses(self, loss: Callable[[ReferenceBatch], Tensor]) -> Tensor:
        """This rank's row losses in a float64 CPU tensor (rows,); NaN for rows of other ranks."""
        measured = torch.cat([loss(batch) for batch in self.batches])
        result = torch.full((self.rows,), torch.nan, dtype=torch.float64)
        result[[row for batch in self.batches for row in batch.rows]] = measured.cpu()
        return result

    def weighted_losses(self, loss: Callable[[ReferenceBatch], Tensor]) -> Iterator[Tensor]:
        """This rank's losses, some at a time, as scalars to differentiate: the mean over ranks of their sums is the
        reference loss."""
        for batch in self.gradient_batches:
            yield self._world * (loss(batch) * batch.weights).sum()


def require_responses(rows: Sequence[Mapping[str, Any]], encoded: Sequence[Encoded]) -> None:
    """Refuse rows (`instruction`, maybe `example_id`) that have no loss as they are encoded.

    Raises:
        DataError: a row has no response token; names it, whichever file it is of.
    """
    for number, (row, ids) in enumerate(zip(rows, encoded, strict=True)):
        if not ids.response_tokens:
            raise DataError(
                f"row {row.get('example_id', number)} ({row['instruction'][:60]!r}) has no response token within "
                "student.max_length: raise student.max_length, or leave the row out of its file"
            )


def row_weights(response_tokens: Sequence[int], mean: LossMean, batch: int) -> Tensor:
    """What each reference row's own mean loss counts in the reference loss: float64 (rows,), summing to 1.

    `example`: all rows alike. `token`: by their response tokens, so that all tokens count alike. `batch`: the mean over
    batches of `batch` consecutive rows of each batch's token mean, as the paper's published code computes it.
    """
    tokens = torch.tensor(response_tokens, dtype=torch.float64)
    if mean == "example":
        return torch.full_like(tokens, 1 / len(tokens))
    if mean == "token":
        return tokens / tokens.sum()
    batches = tokens.split(batch)
    return torch.cat([part / part.sum() for part in batches]) / len(batches)


def _spans(lengths: Sequence[int], tokens: int) -> Iterator[slice]:
    """Cut falling lengths into runs whose longest row times their count stays within `tokens`."""
    start = 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, tokens // lengths[start]))
        yield slice(start, stop)
        start = stop


def influence_and_se(before: Tensor, after: Tensor, weights: Tensor) -> tuple[float, float]:
    """Influence and its standard error over the reference rows, from row losses (rows,) before and after a step.

    Influence is the weighted mean of the row differences (negative: the step helps). Its standard error takes the rows
    as a sample: sqrt(R / (R - 1) * sum of (weight * deviation from the mean)^2), which for equal weights is the
    differences' standard deviation over sqrt(R); NaN for a single row.
    """
    difference = after - before
    mean = weights @ difference
    rows = len(difference)
    spread = (weights * (difference - mean)).square().sum()
    return float(mean), float((spread * rows / (rows - 1)).sqrt()) if rows > 1 else math.nan
