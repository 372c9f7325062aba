"""Loss of a student on rows, one number a row: its mean cross entropy over the response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from montessori_ray.influence.reference import ReferenceSet, ResponseLoss, require_responses
from montessori_ray.training.chat import ChatFormat


def row_losses(
    model: str,
    rows: Sequence[dict[str, Any]],
    *,
    chat_template: str | None,
    max_length: int,
    tokens_a_pass: int,
    threads: int,
    gpu: bool,
) -> list[float]:
    """Losses of the rows, in their order, by the same code that measures the reference loss while scoring.

    Args:
        model: model directory.
        rows: with `instruction` and `response`.
        chat_template: the student's, None for the tokenizer's own.
        max_length: tokens of a row; longer ones are cut at the end.
        tokens_a_pass: padded tokens in one forward pass.
        threads: CPU threads.
        gpu: use the GPU Ray gave this process.

    Raises:
        DataError: a row has no response token.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if gpu else "cpu")
    chat = ChatFormat.load(Path(model), chat_template, max_length)
    encoded = [chat.encode(row["instruction"], row["response"]) for row in rows]
    require_responses(rows, encoded)
    reference = ReferenceSet(encoded, tokens_a_pass, device=device)
    student: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loss = ResponseLoss(student.to(device).eval())
    losses: list[float] = reference.losses(lambda batch: loss(**batch.tensors)).tolist()
    return losses
