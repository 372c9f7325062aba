"""Tuning the teacher on preference pairs by DPO (paper section 3.3): TRL's trainer under Ray Train and DeepSpeed.

The driver calls `tune_teacher`; every rank runs `dpo_loop`. TRL's own preparation of rows is left out: it would append
an end-of-sequence token to every text and tokenize a rendered prompt with a second BOS, while the teacher must be tuned
on exactly the tokens it was sampled with.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict, cast

import deepspeed
import fsspec
import pyarrow.parquet as pq
import ray.train
import torch
import torch.nn.functional as F
import trl.trainer.utils
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.models.utils import prepare_deepspeed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from montessori_ray.artifacts.storage import Storage
from montessori_ray.config import TuneTeacher
from montessori_ray.errors import DataError
from montessori_ray.preferences import Pair, split_by_prompt
from montessori_ray.telemetry.progress import ProgressChannel
from montessori_ray.training.chat import end_of_turn, open_tokenizer, token_ids
from montessori_ray.training.ray_train import TrainingFailed, run_training
from montessori_ray.training.sft_loop import learning_rate_at
from montessori_ray.training.student_state import keep_processors, save_weights

GENERATION_CONFIG = "generation_config.json"


class TokenizedPair(TypedDict):
    """A preference pair as token ids; a completion continues the prompt."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class DpoSettings:
    """What every rank is told."""

    model: Path
    reference: Path | None
    pairs: tuple[str, ...]
    output: str
    tuning: TuneTeacher
    seed: int
    append_eos: bool
    progress: ProgressChannel


def tune_teacher(
    *,
    model: Path,
    reference: Path | None = None,
    pairs: Sequence[str],
    output: str,
    settings: TuneTeacher,
    seed: int,
    append_eos: bool,
    name: str,
    storage: str,
    progress: ProgressChannel,
) -> dict[str, Any]:
    """Tune the teacher on preference pairs and save it; continues a run of the same `name` and `storage`.

    Args:
        model: the teacher's folder; all nodes see it.
        reference: folder of the reference policy, if that is another model than the untuned teacher.
        pairs: Parquet parts with the columns of `preferences.Pair`.
        output: folder or URL for the tuned teacher: float32 weights, tokenizer and chat template, generation config.
        settings: DPO settings.
        seed: orders the pairs and decides which prompts are kept out for evaluation.
        append_eos: whether a sample ended with the end-of-turn token, which its text does not show (prompt style
            `paper`), or with a stop text that is part of it (`prefill`).
        name: name of the training, one for each set of inputs and settings.
        storage: folder or URL of its checkpoints.
        progress: where steps, loss, reward margin and reward accuracy go.

    Returns:
        `pairs` (counts `train`, `evaluation`, `dropped`: prompt too long), `train` (`steps`, mean `loss`, and the last
        step's `last_loss`, `last_reward_margin`, `last_reward_accuracy`), `eval_before` and `eval_after` (`loss`,
        `reward_margin`, `reward_accuracy`, `logp_chosen`, `logp_rejected` over the evaluation pairs; empty if there
        are none).

    Raises:
        DataError: no pair is left for training.
    """
    told = DpoSettings(
        model=model.absolute(),
        reference=None if reference is None else reference.absolute(),
        pairs=tuple(pairs),
        output=output,
        tuning=settings,
        seed=seed,
        append_eos=append_eos,
        progress=progress,
    )
    return run_training(
        dpo_loop, {"dpo": told}, name=name, storage=storage, workers=settings.workers, worker=settings.worker
    )


def dpo_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """What one rank does: prepare the pairs, train from the last checkpoint on, evaluate, save.

    `settings["dpo"]` is a `DpoSettings`; returns what `tune_teacher` does.
    """
    told: DpoSettings = settings["dpo"]
    score_completions_only()
    torch.set_autocast_cache_enabled(False)  # see sft_loop.train
    # Ray Train has initialized torch.distributed; DeepSpeed must know before a ZeRO 3 model counts ranks as it loads.
    deepspeed.init_distributed()
    tokenizer = open_tokenizer(told.model)
    pairs = read_pairs(told.pairs)
    kept = drop_long_prompts(pairs, tokenizer, told.tuning.max_length)
    training, evaluation = split_by_prompt(kept, told.tuning.eval_fraction, told.seed)
    with TemporaryDirectory() as folder:
        # Before the model: with ZeRO 3 the arguments decide how it is loaded.
        arguments = training_arguments(told.tuning, folder, told.seed)
        steps = num_steps(told.tuning, len(training))
        told.progress.update(0, steps, unit="steps", note="log-probabilities by the reference policy")
        trainer = TeacherTrainer(
            model=load_teacher(told.model),
            ref_model=None if told.reference is None else load_teacher(told.reference),
            args=arguments,
            train_dataset=tokenized(training, tokenizer, append_eos=told.append_eos),
            eval_dataset=tokenized(evaluation, tokenizer, append_eos=told.append_eos) if evaluation else None,
            processing_class=tokenizer,
            callbacks=[Reporter(told.progress)],
            tuning=told.tuning,
        )
        trainer.remove_callback(PrinterCallback)
        train(trainer)
        result = {
            "pairs": {"train": len(training), "evaluation": len(evaluation), "dropped": len(pairs) - len(kept)},
            "train": training_summary(trainer.state),
            "eval_before": trainer.before,
            "eval_after": trainer.reward_metrics(),
        }
        save_teacher(trainer, told)
    return result


# -- pairs ----------------------------------------------------------------------------------------------------------


def read_pairs(parts: Iterable[str]) -> list[Pair]:
    """The rows of Parquet parts (paths or URLs), in order."""
    rows: list[Pair] = []
    for part in parts:
        with fsspec.open(part, "rb") as file:
            rows.extend(pq.read_table(file).to_pylist())
    return rows


def drop_long_prompts(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Pair]:
    """Pairs whose prompt leaves room for at least one token of a completion.

    Raises:
        DataError: none does.
    """
    lengths = {prompt: len(token_ids(tokenizer, prompt)) for prompt in {pair["prompt"] for pair in pairs}}
    kept = [pair for pair in pairs if lengths[pair["prompt"]] < max_length]
    if not kept:
        raise DataError(
            f"all {len(pairs)} preference pairs have prompts of {min(lengths.values())} tokens or more, which leaves "
            f"no room for a completion: raise tune_teacher.max_length, now {max_length}, or lower synthesize.shots"
        )
    return kept


def tokenized(pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, *, append_eos: bool) -> Dataset:
    """The pairs as token ids, in order; see `tokenize_pair`."""
    ending = [end_of_turn(tokenizer)] if append_eos else []
    return Dataset.from_list([dict(tokenize_pair(tokenizer, pair, ending)) for pair in pairs])


def tokenize_pair(tokenizer: PreTrainedTokenizerBase, pair: Pair, ending: list[int]) -> TokenizedPair:
    """A pair as the token ids the teacher saw and wrote; `ending` is appended to both completions.

    The prompt is rendered already: no special token is added. A completion's ids are what follows the prompt's own in
    the ids of both texts together, or its own ids where a token would reach across the boundary, since sampling began
    after the prompt's last token.
    """
    prompt_ids = token_ids(tokenizer, pair["prompt"])

    def completion_ids(text: str) -> list[int]:
        whole = token_ids(tokenizer, pair["prompt"] + text)
        aligned = whole[: len(prompt_ids)] == prompt_ids
        return (whole[len(prompt_ids) :] if aligned else token_ids(tokenizer, text)) + ending

    return TokenizedPair(
        prompt_ids=prompt_ids,
        chosen_ids=completion_ids(pair["chosen"]),
        rejected_ids=completion_ids(pair["rejected"]),
    )


# -- the trainer ----------------------------------------------------------------------------------------------------


class TeacherTrainer(DPOTrainer):
    """TRL's DPO trainer on rows that are token ids already, with exact reward metrics over a whole dataset and the
    learning rates of fine-tuning, of which none is zero.

    The reference log-probabilities are computed once, before training, so no second model is kept, and held in memory
    on every rank: TRL's own way needs a folder that all ranks share.
    """

    before: dict[str, float]
    """`reward_metrics` of the untrained weights."""

    def __init__(self, *, tuning: TuneTeacher, **arguments: Any) -> None:
        self._tuning = tuning
        super().__init__(**arguments)
        self.before = self._metrics_before()
        # With ZeRO 3 the hooks of these engines would gather weights beside the training engine's own, by an order that
        # is past: "pop from an empty deque" in a later forward pass.
        engines: list[Any] = [self._precompute_engine, self.ref_model] if self.is_deepspeed_enabled else []
        for engine in filter(None, engines):
            engine.destroy()
        self._precompute_engine = self.ref_model = None

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The rate after each number of steps: `sft_loop.learning_rate_at` the next one."""

        def factor(steps: int) -> float:
            rate = learning_rate_at(steps + 1, num_training_steps, self._tuning)
            return rate / self._tuning.optimizer.learning_rate

        stepped = cast("torch.optim.Optimizer", optimizer or self.optimizer)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(stepped, factor)
        return self.lr_scheduler

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        chosen, rejected = self.log_probs(self.ref_model or self._untrained(), dataset)
        return dataset.add_column("ref_chosen_logps", chosen.tolist()).add_column(
            "ref_rejected_logps", rejected.tolist()
        )

    def _untrained(self) -> Any:
        """The model to train, ready for forward passes before its training engine is there."""
        if self.is_deepspeed_enabled and self._precompute_engine is None:
            self._precompute_engine = prepare_deepspeed(cast("PreTrainedModel", self.model), self.accelerator)
        return self._precompute_engine or self.model

    def log_probs(self, model: Any, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities `[N]` of all chosen and all rejected completions given their prompts, on every rank."""
        was_training = model.training
        model.eval()
        chosen, rejected = [], []
        for batch in self.get_eval_dataloader(dataset):
            pair = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(model, batch))
            chosen.append(pair[0].cpu())
            rejected.append(pair[1].cpu())
        model.train(was_training)
        return torch.cat(chosen), torch.cat(rejected)

    def _metrics_before(self) -> dict[str, float]:
        """Needs no forward pass where the reference policy is the untrained teacher."""
        if self.eval_dataset is None:
            return {}
        reference = self._reference(self.eval_dataset)
        policy = reference if self.ref_model is None else self.log_probs(self._untrained(), self.eval_dataset)
        return pair_metrics(*policy, *reference, self.beta)

    def reward_metrics(self) -> dict[str, float]:
        """Metrics of the current weights over the evaluation pairs, empty if there are none."""
        if self.eval_dataset is None:
            return {}
        policy = self.log_probs(self.model_wrapped, self.eval_dataset)
        return pair_metrics(*policy, *self._reference(self.eval_dataset), self.beta)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: a checkpoint's weights are in DeepSpeed's own files, and `save_teacher` writes the final ones."""

    @staticmethod
    def _reference(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(dataset["ref_chosen_logps"][:]), torch.tensor(dataset["ref_rejected_logps"][:])


def score_completions_only() -> None:
    """Have TRL project completion tokens alone to the vocabulary on every device, as it does on GPUs.

    On a CPU it projects the prompt too and throws the result away: 47 % of the training time of a 135M model with
    prompts of 250 tokens (measured). The switch is a private name of the pinned TRL.
    """
    trl.trainer.utils._use_triton = lambda device: True  # type: ignore[attr-defined]


def pair_metrics(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
) -> dict[str, float]:
    """DPO loss and implicit rewards from log-probabilities `[N]` (arXiv 2305.18290, equation 7).

    A tie counts as half in `reward_accuracy`, so that it is 0.5 before training.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return {
        "loss": -F.logsigmoid(margin).mean().item(),
        "reward_margin": margin.mean().item(),
        "reward_accuracy": ((margin.sign() + 1) / 2).mean().item(),
        "logp_chosen": chosen.mean().item(),
        "logp_rejected": rejected.mean().item(),
    }


def training_arguments(tuning: TuneTeacher, folder: str, seed: int) -> DPOConfig:
    """TRL's arguments for these settings; `folder` takes checkpoints until they are reported."""
    accumulation = tuning.batch_size // (tuning.micro_batch_size * tuning.workers)
    optimizer = tuning.optimizer
    return DPOConfig(
        output_dir=folder,
        seed=seed,
        use_cpu=not tuning.worker.gpus,
        # DPO
        beta=tuning.beta,
        loss_type=list(tuning.losses),
        loss_weights=list(tuning.losses.values()),
        max_length=tuning.max_length,
        precompute_ref_log_probs=True,
        # batches
        per_device_train_batch_size=tuning.micro_batch_size,
        per_device_eval_batch_size=tuning.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=tuning.epochs,
        # AdamW
        optim="adamw_torch_fused",  # see `training.engine`
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.max_grad_norm,
        # memory and precision
        gradient_checkpointing=tuning.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=False,
        deepspeed=deepspeed_config(tuning),
        # checkpoints and logs
        save_strategy="steps",
        save_steps=tuning.checkpoint_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
    )


def num_steps(tuning: TuneTeacher, num_pairs: int) -> int:
    """Optimizer steps of the whole training; the last one of an epoch may have fewer pairs."""
    return tuning.epochs * math.ceil(num_pairs / tuning.batch_size)


def deepspeed_config(tuning: TuneTeacher) -> dict[str, Any]:
    """DeepSpeed's settings; `auto` takes the trainer's.

    bfloat16 is torch's autocast on float32 weights: DeepSpeed's own `bf16` makes its float32 masters from weights
    already rounded to bfloat16, which loses what an earlier tuning at a rate of 1e-6 changed.
    """
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": tuning.zero_stage},
    }
    if tuning.precision == "bfloat16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def load_teacher(folder: Path) -> PreTrainedModel:
    """A teacher with float32 weights; with ZeRO 3 sharded as the arguments made before say."""
    return cast("PreTrainedModel", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


# -- running it -----------------------------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """Steps to the progress board, checkpoints to Ray Train; on every rank, since a report is a barrier."""

    def __init__(self, progress: ProgressChannel) -> None:
        self.progress = progress

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Metrics of one step, the same on all ranks.

        Raises:
            TrainingFailed: the rewards are not finite.
        """
        if not logs or "rewards/margins" not in logs:
            return
        if not math.isfinite(logs["rewards/margins"]):
            raise TrainingFailed(
                f"at step {state.global_step} the reward margin of the pairs became {logs['rewards/margins']}: lower "
                "tune_teacher.optimizer.learning_rate"
            )
        if state.is_world_process_zero:
            self.progress.update(
                state.global_step,
                state.max_steps,
                unit="steps",
                loss=float(logs["loss"]),
                reward_margin=logs["rewards/margins"],
                reward_accuracy=logs["rewards/accuracies"],
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """No checkpoint of the last step: the teacher itself is saved next."""
        control.should_save &= state.global_step < state.max_steps

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Each rank reports its own files; Ray Train merges them."""
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        checkpoint = ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report({"step": state.global_step}, checkpoint=checkpoint)
        shutil.rmtree(folder)


def train(trainer: TeacherTrainer) -> None:
    """Train from the last reported checkpoint on, or from the start."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.train()
        return
    with checkpoint.as_directory() as folder:
        trainer.train(resume_from_checkpoint=folder)


def training_summary(state: TrainerState) -> dict[str, float]:
    """Loss and rewards of the whole training from its log, which checkpoints carry over a restart."""
    steps = [entry for entry in state.log_history if "rewards/margins" in entry]
    return {
        "steps": state.global_step,
        "loss": sum(float(entry["loss"]) for entry in steps) / len(steps),
        "last_loss": float(steps[-1]["loss"]),
        "last_reward_margin": steps[-1]["rewards/margins"],
        "last_reward_accuracy": steps[-1]["rewards/accuracies"],
    }


def save_teacher(trainer: TeacherTrainer, told: DpoSettings) -> None:
    """Write the tuned weights in float32 and everything else as the original teacher has it; all ranks take part.

    float32, because a change of 1e-6 is below the bfloat16 spacing of most weights and the next iteration starts from
    it; vLLM casts on loading.
    """
    model = cast("PreTrainedModel", trainer.accelerator.unwrap_model(trainer.model))
    model.generation_config = GenerationConfig()  # saving one checks it strictly, which some published ones fail
    tokenizer = open_tokenizer(told.model)
    writes = trainer.is_world_process_zero()
    with Storage(told.output).folder_writer("") if writes else nullcontext(Path()) as folder:
        save_weights(trainer.model_wrapped, model, tokenizer, folder)
        if writes:
            keep_configuration(told, folder)


def keep_configuration(told: DpoSettings, folder: Path) -> None:
    """The original's model and generation configuration, which the trainer changed (padding token, `use_cache`)."""
    keep_processors(told.model, folder)
    config = AutoConfig.from_pretrained(told.model)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    original = told.model / GENERATION_CONFIG
    if original.exists():
        shutil.copy(original, folder)
    else:
        (folder / GENERATION_CONFIG).unlink()
