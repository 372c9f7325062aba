"""Fine-tuning on one rank of a Ray Train run, around a DeepSpeed engine; `train` reads top to bottom.

Data order, learning rate and dropout are functions of the seed and the step number, so a checkpoint is the engine's
state and a few counters, and a continued training makes the same weights as one that was never stopped: bit for bit on
CPUs; on GPUs a backward pass may not repeat its last bits.

The loss of a step is the mean over all response tokens of its batch, whatever the micro-batches and ranks: every rank
knows the batch's number of tokens, weights its sums by `ranks / tokens`, and DeepSpeed's mean over ranks takes the
`ranks` away again.

Shapes: B examples of a micro-batch, L padded tokens.
"""

from __future__ import annotations

import math
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from montessori_ray.config import Training
from montessori_ray.errors import DataError, ModelError
from montessori_ray.training.adapters import add_adapter, copy_base, on_adapter
from montessori_ray.training.chat import FILLING, IGNORED, ChatFormat, Encoded, collate
from montessori_ray.training.engine import build_engine, load_model, set_learning_rate
from montessori_ray.training.ray_train import TrainingFailed
from montessori_ray.training.sft import FineTuning
from montessori_ray.training.student_state import keep_processors, save_optimizer, save_weights

CHECKPOINT_TAG = "engine"


@dataclass(frozen=True)
class Counters:
    """Where a training stands; kept in its checkpoints beside the engine."""

    step: int = 0
    tokens: int = 0
    rows_skipped: int = 0
    loss_first: float = math.nan
    loss_last: float = math.nan
    seconds: float = 0.0


def train(job: FineTuning) -> dict[str, Any]:
    """This rank's whole training; what it returns is described at `sft.fine_tune`."""
    training = job.training
    started = time.monotonic()
    torch.set_autocast_cache_enabled(False)  # it would keep every weight's bfloat16 copy to the end of a pass
    chat = ChatFormat.load(job.model, job.chat_template, job.max_length)
    table = read_examples(job.rows)
    steps_an_epoch = math.ceil(len(table) / training.batch_size)
    total = steps_an_epoch * training.epochs

    model = load_model(job.model, training.zero_stage)
    if job.lora is not None:
        add_adapter(model, job.lora, job.seed)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = ResponseLossSum(model, autocast=training.precision == "bfloat16")
    engine = build_engine(loss, training.optimizer, training.zero_stage)
    engine.train()
    counters = restore_checkpoint(engine)
    started -= counters.seconds

    rate = learning_rate_at(counters.step, total, training)
    while counters.step < total:
        epoch, position = divmod(counters.step, steps_an_epoch)
        batch = encode_batch(table, batch_indices(len(table), training.batch_size, job.seed, epoch, position), chat)
        rate = learning_rate_at(counters.step + 1, total, training)
        set_learning_rate(engine, rate)
        seed_dropout(job.seed, counters.step)
        value = train_step(engine, batch, training.micro_batch_size)
        counters = advance(counters, batch, value, time.monotonic() - started)
        if dist.get_rank() == 0:
            job.progress.update(counters.step, total, unit="steps", loss=value, learning_rate=rate)
        if counters.step % training.checkpoint_steps == 0 and counters.step < total:
            report_checkpoint(engine, counters)

    if on_adapter(model) and dist.get_rank() == 0:
        copy_base(Path(job.model), Path(job.output))  # first: the tokenizer that is saved has the chat template
    save_weights(engine, model, chat.tokenizer, Path(job.output))
    if dist.get_rank() == 0:
        keep_processors(Path(job.model), Path(job.output))
    if job.keep_optimizer:
        save_optimizer(engine, model, training.optimizer, rate, Path(job.output))
    return {
        "loss_first": counters.loss_first,
        "loss_last": counters.loss_last,
        "steps": counters.step,
        "tokens": counters.tokens,
        "seconds": time.monotonic() - started,
        "peak_memory_gb": peak_memory_gb(),
        "rows_skipped": counters.rows_skipped,
    }


class ResponseLossSum(nn.Module):
    """A causal language model that returns the sum of its cross entropies over response tokens.

    The forward pass, not DeepSpeed, does the mixed precision: under autocast the weights and their gradients stay
    float32 at every ZeRO stage, so master weights are simply the weights.
    """

    def __init__(self, model: Any, *, autocast: bool) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Scalar in float32 for inputs (B, L); labels are -100 where no loss is asked for."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        targets_BL = labels[:, 1:]  # noqa: N806
        asked = targets_BL != IGNORED
        return F.cross_entropy(output.logits[:, :-1][asked].float(), targets_BL[asked], reduction="sum")


def train_step(engine: Any, batch: Sequence[Encoded], micro_batch_size: int) -> float:
    """One AdamW step on a batch shared by all ranks; returns the mean loss over its response tokens.

    Every rank is given the whole batch and takes its share. A batch without response tokens changes nothing (NaN).

    Raises:
        TrainingFailed: the loss is not finite; the weights are still those before the step.
    """
    tokens = sum(example.response_tokens for example in batch)
    if not tokens:
        return math.nan
    rank, world = dist.get_rank(), dist.get_world_size()
    device = get_accelerator().current_device_name()
    total = torch.zeros((), dtype=torch.float64, device=device)
    share = deal([example for example in batch if example.response_tokens], micro_batch_size, rank, world)
    for number, examples in enumerate(share, start=1):
        engine.set_gradient_accumulation_boundary(number == len(share))
        tensors = {name: tensor.to(device) for name, tensor in collate(examples).items()}
        loss = engine(**tensors)
        total += loss.detach()
        engine.backward(loss * (world / tokens), scale_wrt_gas=False)
    dist.all_reduce(total)
    value = float(total) / tokens
    if not math.isfinite(value):
        raise TrainingFailed(f"the loss became {value}: lower optimizer.learning_rate or use precision float32")
    engine.step()
    return value


def deal(batch: Sequence[Encoded], micro_batch_size: int, rank: int, world: int) -> list[list[Encoded]]:
    """This rank's micro-batches: examples of similar length together, as many passes on every rank.

    ZeRO gathers weights and reduces gradients in every pass, so no rank may have fewer. Where a short last batch has
    fewer examples than ranks, a rank left without one passes its longest example with all labels masked.
    """
    by_length = sorted(batch, key=lambda example: len(example.input_ids))
    passes = math.ceil(len(batch) / (micro_batch_size * world))
    parts = np.array_split(np.arange(len(batch)), passes * world)[rank::world]
    idle = Encoded(by_length[-1].input_ids, [IGNORED] * len(by_length[-1].labels))
    return [[by_length[index] for index in part] or [idle] for part in parts]


def read_examples(paths: Sequence[str]) -> pa.Table:
    """Instructions and responses of all rows, in order, as Arrow text (about a kilobyte a row).

    Raises:
        DataError: there are none.
    """
    tables = []
    for path in paths:
        with fsspec.open(path, "rb") as file:
            tables.append(pq.read_table(file, columns=["instruction", "response"]))
    table = pa.concat_tables(tables)
    if not len(table):
        raise DataError("the set to train on has no rows")
    return table


def batch_indices(rows: int, batch_size: int, seed: int, epoch: int, position: int) -> list[int]:
    """Rows of the batch at `position` of an epoch: a permutation by seed and epoch, the last batch may be short."""
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return [int(index) for index in order[position * batch_size : (position + 1) * batch_size]]


def encode_batch(table: pa.Table, indices: list[int], chat: ChatFormat) -> list[Encoded]:
    """The batch as token ids; a third of a millisecond a row, so rows are kept as text and tokenized when used.

    A row that the chat template cannot render, or not so that its response can be told from its prompt, has no response
    token, as one whose prompt fills `max_length`.
    """

    def encoded(row: dict[str, str]) -> Encoded:
        try:
            return chat.encode(row["instruction"], row["response"])
        except ModelError:
            return Encoded([FILLING], [IGNORED])

    return [encoded(row) for row in table.take(indices).to_pylist()]


def seed_dropout(seed: int, step: int) -> None:
    """Random numbers that depend on seed, step and rank alone, so that checkpoints need no generator state."""
    state = np.random.SeedSequence([seed, step, dist.get_rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def learning_rate_at(step: int, total: int, training: Training) -> float:
    """Rate of step 1..total: warmup-stable-decay (paper: 0.1 / 0.5 / 0.4 of the steps).

    Rises linearly so that the last step of the rise has the peak rate; with `warmup_ratio` 1 that is the training's
    last step. Falls as a half cosine, as `transformers.get_wsd_schedule` does, that would reach 0 one step after the
    end, so that every step trains.
    """
    rise = round(training.warmup_ratio * total)
    fall = round(training.decay_ratio * total)
    peak = training.optimizer.learning_rate
    if step <= rise:
        return peak * step / rise if rise else 0.0
    if step <= total - fall:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - (total - fall)) / (fall + 1)))


def advance(counters: Counters, batch: Sequence[Encoded], loss: float, seconds: float) -> Counters:
    """The counters after a step on `batch`."""
    return Counters(
        step=counters.step + 1,
        tokens=counters.tokens + sum(example.response_tokens for example in batch),
        rows_skipped=counters.rows_skipped + sum(not example.response_tokens for example in batch),
        loss_first=loss if math.isnan(counters.loss_first) else counters.loss_first,
        loss_last=counters.loss_last if math.isnan(loss) else loss,
        seconds=seconds,
    )


def report_checkpoint(engine: Any, counters: Counters) -> None:
    """Hand the engine's state and the counters to Ray Train; every rank gives the part it holds."""
    with tempfile.TemporaryDirectory() as folder:
        state = {"counters": asdict(counters)}
        engine.save_checkpoint(folder, tag=CHECKPOINT_TAG, client_state=state, exclude_frozen_parameters=True)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"step": counters.step, "loss": counters.loss_last}, checkpoint=checkpoint)


def restore_checkpoint(engine: Any) -> Counters:
    """Bring the engine to the last reported checkpoint, if there is one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Counters()
    with checkpoint.as_directory() as folder:
        # Not strict: what an adapter sits on is in no checkpoint.
        _, client_state = engine.load_checkpoint(folder, tag=CHECKPOINT_TAG, load_module_strict=False)
    return Counters(**client_state["counters"])


def peak_memory_gb() -> float:
    """Most memory this process held: of its GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
