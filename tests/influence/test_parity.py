"""The quickstart's student, warmed up in plain PyTorch: scores equal a transcription of the paper's definition.

The transcription shares no code with the library beyond where the model comes from: it tokenizes and masks by itself,
steps with torch's AdamW, and runs the reference rows in batches of their order, padded, through the model's own logits.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from montessori_ray.config import Score
from montessori_ray.influence.scorer import Scorer
from montessori_ray.influence.update import AdamW
from montessori_ray.models import SMOLLM2, prune_layers, resolve_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone")]

MAX_LENGTH = 80
BATCH = 4
RULE = AdamW(step=12, learning_rate=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, max_grad_norm=1.0)
ROWS = [json.loads(line) for line in Path("configs/data/reference.jsonl").read_text(encoding="utf-8").splitlines()]
REFERENCE, EXAMPLES, WARM_UP = ROWS[:10], ROWS[10:13], ROWS[13:37]


class Warmed(NamedTuple):
    """A student after `RULE.step` steps, in memory and on disk."""

    model: Any
    optimizer: torch.optim.AdamW
    tokenizer: Any
    folder: Path


@pytest.fixture(scope="module")
def warmed_up(tmp_path_factory: pytest.TempPathFactory) -> Warmed:
    folder = tmp_path_factory.mktemp("quickstart")
    prune_layers(resolve_model(SMOLLM2), list(range(10, 20)), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RULE.learning_rate, betas=RULE.betas, eps=RULE.eps, weight_decay=RULE.weight_decay
    )
    for number in range(RULE.step):
        step(model, optimizer, tokenizer, WARM_UP[2 * number : 2 * number + 2])
    model.save_pretrained(folder)
    moments = {
        f"{key}.{name}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
    }
    save_file(moments, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps(asdict(RULE)))
    return Warmed(model, optimizer, tokenizer, folder)


def step(model: Any, optimizer: torch.optim.AdamW, tokenizer: Any, rows: list[dict[str, str]]) -> None:
    optimizer.zero_grad()
    nats, tokens = response_nats(model, tokenizer, rows)
    (nats.sum() / tokens.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), RULE.max_grad_norm)
    optimizer.step()


def response_nats(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy and number of the response tokens of each row of one padded batch."""
    texts = []
    for row in rows:
        turn = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        response = tokenizer(row["response"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        texts.append((ids, response[: MAX_LENGTH - len(ids)]))
    width = max(len(ids) + len(response) for ids, response in texts)
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    learned = torch.zeros(len(rows), width, dtype=torch.bool)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, (ids, response) in enumerate(texts):
        length = len(ids) + len(response)
        inputs[index, :length] = torch.tensor(ids + response)
        mask[index, :length] = 1
        learned[index, len(ids) : length] = True
    logits = model(input_ids=inputs, attention_mask=mask).logits[:, :-1]
    nats = -logits.log_softmax(-1).gather(-1, inputs[:, 1:, None])[..., 0] * learned[:, 1:]
    return nats.double().sum(1), learned[:, 1:].sum(1)


@torch.no_grad()
def reference_losses(model: Any, tokenizer: Any) -> dict[str, float]:
    """By `score.loss_mean`: over rows, over tokens, and over batches of the batch's mean over tokens (the paper's)."""
    batches = [REFERENCE[first : first + BATCH] for first in range(0, len(REFERENCE), BATCH)]
    measured = [response_nats(model, tokenizer, batch) for batch in batches]
    nats, tokens = (torch.cat(column) for column in zip(*measured, strict=True))
    return {
        "example": float((nats / tokens).mean()),
        "token": float(nats.sum() / tokens.sum()),
        "batch": sum(float(some.sum() / count.sum()) for some, count in measured) / len(measured),
    }


@pytest.fixture(scope="module")
def definition(warmed_up: Warmed) -> list[dict[str, float]]:
    """Reference loss after one step on each example minus before, both as the paper has them."""
    torch.set_num_threads(2)
    before = reference_losses(warmed_up.model, warmed_up.tokenizer)
    changes = []
    for example in EXAMPLES:
        model, optimizer = copy.deepcopy((warmed_up.model, warmed_up.optimizer))
        step(model, optimizer, warmed_up.tokenizer, [example])
        after = reference_losses(model, warmed_up.tokenizer)
        changes.append({mean: after[mean] - before[mean] for mean in before})
    return changes


@pytest.mark.parametrize("backend", ["local", "zero"])
@pytest.mark.parametrize("loss_mean", ["example", "token", "batch"])
def test_scores_equal_the_papers_definition(
    warmed_up: Warmed, definition: list[dict[str, float]], loss_mean: str, backend: str
) -> None:
    settings = Score(baseline="warmed", loss_mean=loss_mean, loss_batch=BATCH, backend=backend, reference_tokens=512)  # type: ignore[arg-type]
    scorer = Scorer(warmed_up.folder, REFERENCE, settings, chat_template=None, max_length=MAX_LENGTH, worker="here")
    for number, (example, change) in enumerate(zip(EXAMPLES, definition, strict=True)):
        score = scorer.score({"example_id": str(number), **example})
        assert abs(change[loss_mean]) > 1e-3
        assert score.influence == pytest.approx(change[loss_mean], abs=1e-6)
