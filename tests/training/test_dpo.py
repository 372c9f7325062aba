"""Teacher tuning: token ids as sampled, the DPO loss, and whole trainings against plain PyTorch, also after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from trl.kernels.chunked_logprob import _use_triton

from montessori_ray.config import DpoOptimizer, TuneTeacher
from montessori_ray.errors import DataError
from montessori_ray.preferences import split_by_prompt
from montessori_ray.telemetry.progress import ProgressChannel
from montessori_ray.training import dpo
from montessori_ray.training.ray_train import TrainingFailed

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = ["<s>", "<user>", "<assistant>", "<end>", "<eos>"]
TEMPLATE = (
    "<s> {% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
BETA = 0.1
TUNING = TuneTeacher(
    optimizer=DpoOptimizer(learning_rate=1e-3, max_grad_norm=0.01, weight_decay=0.1),
    batch_size=4,
    micro_batch_size=2,
    epochs=6,
    warmup_ratio=0.34,
    decay_ratio=0.5,
    beta=BETA,
    eval_fraction=0.1,
    checkpoint_steps=2,
)
"""Four training pairs make one step of each of six epochs: no data order matters."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; `add_special_tokens=True` would put a second <s> in front; the EOS is not the end of a turn."""
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["<pad>", *SPECIAL, *WORDS])}))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with tied embeddings, sizes that two ranks cannot divide evenly, and its tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1 + len(SPECIAL) + len(WORDS),
        hidden_size=20,
        intermediate_size=33,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "for models that also see"}')
    return folder


@pytest.fixture(scope="module")
def moved(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that an earlier iteration tuned: all weights of `teacher` a little changed."""
    folder = tmp_path_factory.mktemp("moved")
    policy = dpo.load_teacher(teacher)
    move(policy)
    policy.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def make_pairs(count: int, *, prompts: int) -> list[dict[str, Any]]:
    """Pairs with prompts and completions of many lengths, of `prompts` few-shot prompts in turn."""
    generator = torch.Generator().manual_seed(1)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[int(number)] for number in torch.randint(0, len(WORDS), (length,), generator=generator))

    texts = [f"<s> <user> {words(3, 12)} <end> <assistant> " for _ in range(prompts)]
    return [
        {
            "prompt_id": f"p{number % prompts}",
            "prompt": texts[number % prompts],
            "chosen": words(2, 9),
            "rejected": words(2, 9),
            "chosen_id": f"c{number}",
            "rejected_id": f"r{number}",
            "chosen_influence": -1.0,
            "rejected_influence": 1.0,
        }
        for number in range(count)
    ]


PAIRS = make_pairs(5, prompts=5)
"""One prompt's pair is for evaluation, the other four for training."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pairs")
    for number, rows in enumerate((PAIRS[:2], PAIRS[2:])):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"part-{number}.parquet")
    return [str(folder / f"part-{number}.parquet") for number in range(2)]


# -- token ids ------------------------------------------------------------------------------------------------------


def test_token_ids_are_the_sampled_ones() -> None:
    tokenizer = word_tokenizer()
    vocabulary = tokenizer.get_vocab()
    pair = PAIRS[0]
    (row,) = dpo.tokenized([pair], tokenizer, append_eos=False)
    assert row["prompt_ids"] == [vocabulary[word] for word in pair["prompt"].split()]
    assert row["prompt_ids"].count(vocabulary["<s>"]) == 1
    assert row["chosen_ids"] == [vocabulary[word] for word in pair["chosen"].split()]
    assert row["rejected_ids"] == [vocabulary[word] for word in pair["rejected"].split()]


def test_end_of_turn_is_the_templates_not_the_tokenizers_eos() -> None:
    tokenizer = word_tokenizer()
    (plain,) = dpo.tokenized(PAIRS[:1], tokenizer, append_eos=False)
    (ended,) = dpo.tokenized(PAIRS[:1], tokenizer, append_eos=True)
    end = tokenizer.get_vocab()["<end>"]
    assert ended["chosen_ids"] == [*plain["chosen_ids"], end]
    assert ended["rejected_ids"] == [*plain["rejected_ids"], end]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert dpo.end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_completion_keeps_its_own_tokens_where_one_would_reach_into_the_prompt() -> None:
    raw = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "d": 3, "bc": 4, "cd": 5}, [("b", "c"), ("c", "d")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    pair = {"prompt": "ab", "chosen": "cda", "rejected": "dcd"}
    row = dpo.tokenize_pair(tokenizer, pair, ending=[])
    assert row == {"prompt_ids": [0, 1], "chosen_ids": [5, 0], "rejected_ids": [3, 5]}


def test_prompts_without_room_are_dropped_and_all_of_them_is_an_error() -> None:
    tokenizer = word_tokenizer()
    lengths = sorted(len(pair["prompt"].split()) for pair in PAIRS)
    kept = dpo.drop_long_prompts(PAIRS, tokenizer, lengths[-1])
    assert kept == [pair for pair in PAIRS if len(pair["prompt"].split()) < lengths[-1]]
    assert 0 < len(kept) < len(PAIRS)
    with pytest.raises(DataError, match=rf"tune_teacher\.max_length, now {lengths[0]}"):
        dpo.drop_long_prompts(PAIRS, tokenizer, lengths[0])


# -- the loss -------------------------------------------------------------------------------------------------------


def plain_log_prob(model: Any, prompt_ids: list[int], completion_ids: list[int]) -> torch.Tensor:
    """log p(completion | prompt) of one sequence without padding, token by token."""
    logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0].log_softmax(-1)
    positions = range(len(prompt_ids) - 1, len(prompt_ids) + len(completion_ids) - 1)
    return torch.stack([logits[at, token] for at, token in zip(positions, completion_ids, strict=True)]).sum()


def plain_rewards(policy: Any, reference: Any, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Implicit rewards of chosen and rejected completions, beta x log-ratio (arXiv 2305.18290, section 4)."""
    chosen: list[torch.Tensor] = []
    rejected: list[torch.Tensor] = []
    for row in rows:
        for key, rewards in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            with torch.no_grad():
                expected = plain_log_prob(reference, row["prompt_ids"], row[key])
            rewards.append(BETA * (plain_log_prob(policy, row["prompt_ids"], row[key]) - expected))
    return torch.stack(chosen), torch.stack(rejected)


@pytest.fixture
def trl_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes `score_completions_only` and keeps DeepSpeed, which needs a process group, out of unit tests."""
    monkeypatch.setattr("trl.trainer.utils._use_triton", _use_triton)
    monkeypatch.setattr(dpo, "deepspeed_config", lambda tuning: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # tests that made this process a scoring group set it


def trainer_on_pairs(
    teacher: Path, folder: Path, tuning: TuneTeacher, original: Path | None = None
) -> tuple[dpo.TeacherTrainer, Any, Dataset]:
    """A trainer on all PAIRS, its reference (the untuned teacher, or the `original` one), the pairs as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    policy, reference = (dpo.load_teacher(folder) for folder in (teacher, original or teacher))
    rows = dpo.tokenized(PAIRS, tokenizer, append_eos=True)
    arguments = dpo.training_arguments(tuning, str(folder), 0)
    trainer = dpo.TeacherTrainer(
        model=policy,
        ref_model=None if original is None else dpo.load_teacher(original),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        tuning=tuning,
    )
    return trainer, reference, rows


def move(policy: Any) -> None:
    """Change all weights a little, as training does."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


@pytest.mark.parametrize("completions_only", [False, True])
@pytest.mark.usefixtures("trl_left_as_it_was")
def test_loss_and_rewards_equal_a_plain_transcription(teacher: Path, tmp_path: Path, completions_only: bool) -> None:
    if completions_only:
        dpo.score_completions_only()
    trainer, reference, rows = trainer_on_pairs(teacher, tmp_path, TUNING)
    policy: Any = trainer.model
    assert isinstance(trainer.train_dataset, Dataset)
    before = trainer.before
    assert before == pytest.approx(trainer.reward_metrics() | {"reward_accuracy": 0.5}, abs=1e-5)
    assert before["loss"] == pytest.approx(math.log(2))
    assert before["reward_margin"] == 0.0

    move(policy)
    chosen, rejected = plain_rewards(policy, reference, list(rows))
    assert chosen.abs().min() > 1e-3
    after = trainer.reward_metrics()
    assert after["loss"] == pytest.approx(-F.logsigmoid(chosen - rejected).mean().item(), abs=1e-5)
    assert after["reward_margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert after["reward_accuracy"] == (chosen > rejected).float().mean().item()

    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    loss = trainer.compute_loss(policy, batch)
    expected = -F.logsigmoid(chosen - rejected)[:2].mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    rewards = trainer._metrics["train" if policy.training else "eval"]
    assert rewards["rewards/chosen"][-1] == pytest.approx(chosen[:2].mean().item(), abs=1e-5)
    assert rewards["rewards/rejected"][-1] == pytest.approx(rejected[:2].mean().item(), abs=1e-5)
    parameters = list(policy.parameters())
    gradients = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for gradient, plain in gradients:
        torch.testing.assert_close(gradient, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("trl_left_as_it_was")
def test_rewards_against_the_original_teacher(teacher: Path, moved: Path, tmp_path: Path) -> None:
    """A second iteration's pairs may be ordered already: DPO's loss then does not begin at log 2."""
    trainer, original, rows = trainer_on_pairs(moved, tmp_path, TUNING, original=teacher)
    policy: Any = trainer.model
    chosen, rejected = plain_rewards(policy, original, list(rows))
    assert (chosen - rejected).abs().min() > 1e-3
    assert trainer.before["loss"] == pytest.approx(-F.logsigmoid(chosen - rejected).mean().item(), abs=1e-5)
    assert trainer.before["reward_accuracy"] == (chosen > rejected).float().mean().item()
    assert trainer.reward_metrics() == pytest.approx(trainer.before, abs=1e-5)
    assert isinstance(trainer.train_dataset, Dataset)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    expected = -F.logsigmoid(chosen - rejected)[:2].mean()
    assert trainer.compute_loss(policy, batch).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.usefixtures("trl_left_as_it_was")
def test_a_tuning_that_diverges_is_no_teacher(teacher: Path, tmp_path: Path) -> None:
    """The trainer's log would replace such a loss by zero."""
    optimizer = DpoOptimizer(learning_rate=1e30, max_grad_norm=1.0, weight_decay=0.1)
    tuning = TUNING.model_copy(update={"optimizer": optimizer, "checkpoint_steps": 1000})
    trainer, _, _ = trainer_on_pairs(teacher, tmp_path, tuning)
    trainer.add_callback(dpo.Reporter(ProgressChannel("tune_teacher", None)))
    with pytest.raises(TrainingFailed, match=r"at step \d+ the reward margin of the pairs became nan: lower"):
        trainer.train()


@pytest.mark.usefixtures("trl_left_as_it_was")
def test_losses_are_added_with_their_weights(teacher: Path, tmp_path: Path) -> None:
    """Margins by token (length-normalised DPO, arXiv 2411.15124) and the mean likelihood of the chosen tokens."""
    losses = {"sigmoid_norm": 0.5, "sft": 2.0}
    tuning = TUNING.model_copy(update={"losses": losses, "micro_batch_size": len(PAIRS)})
    trainer, reference, rows = trainer_on_pairs(teacher, tmp_path, tuning)
    policy: Any = trainer.model
    move(policy)
    assert trainer.eval_dataset is not None
    (batch,) = trainer.get_eval_dataloader(trainer.eval_dataset)
    chosen, rejected = plain_rewards(policy, reference, list(rows))
    lengths = [torch.tensor([len(row[key]) for row in rows]) for key in ("chosen_ids", "rejected_ids")]
    by_token = -F.logsigmoid(chosen / lengths[0] - rejected / lengths[1]).mean()
    likelihood = sum(plain_log_prob(policy, row["prompt_ids"], row["chosen_ids"]) for row in rows) / lengths[0].sum()
    expected = 0.5 * by_token - 2.0 * likelihood
    assert trainer.compute_loss(policy, batch).item() == pytest.approx(expected.item(), abs=1e-5)


# -- whole trainings ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    yield
    ray.shutdown()


def tune(teacher: Path, parts: list[str], folder: Path, **overrides: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": teacher,
        "pairs": parts,
        "output": str(folder / "tuned"),
        "settings": TUNING,
        "seed": 0,
        "append_eos": True,
        "name": "tune",
        "storage": str(folder / "train"),
        "progress": ProgressChannel(),
    }
    return dpo.tune_teacher(**(arguments | overrides))


@pytest.fixture(scope="module")
def plain_training(teacher: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The weights and last metrics of the same training as a loop over whole batches without any framework."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    rows = list(dpo.tokenized(split_by_prompt(PAIRS, 0.1, 0)[0], tokenizer, append_eos=True))
    reference = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    settings = TUNING.optimizer
    groups = [
        {"params": [p for p in policy.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in policy.parameters() if p.ndim == 1], "weight_decay": 0.0},  # norms, as in Trainer
    ]
    adamw = torch.optim.AdamW(groups, lr=0.0)
    losses, margin = [], torch.tensor(0.0)
    # Six steps: two that rise, one at the peak, three that fall along a half cosine which ends after them.
    for factor in (0.5, 1.0, 1.0, *(0.5 + 0.5 * math.cos(math.pi * step / 4) for step in (1, 2, 3))):
        chosen, rejected = plain_rewards(policy, reference, rows)
        margin = (chosen - rejected).mean()
        loss = -F.logsigmoid(chosen - rejected).mean()
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        for group in adamw.param_groups:
            group["lr"] = settings.learning_rate * factor
        adamw.step()
        losses.append(loss.item())
    metrics = {"loss": sum(losses) / len(losses), "last_loss": losses[-1], "last_reward_margin": margin.item()}
    return {name: tensor.detach().clone() for name, tensor in policy.state_dict().items()}, metrics


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("workers", "zero_stage"), [(1, 0), (2, 2), (2, 3)])
def test_tuning_equals_plain_pytorch(
    teacher: Path,
    parts: list[str],
    tmp_path: Path,
    plain_training: tuple[dict[str, torch.Tensor], dict[str, float]],
    workers: int,
    zero_stage: int,
) -> None:
    settings = TUNING.model_copy(update={"workers": workers, "zero_stage": zero_stage})
    result = tune(teacher, parts, tmp_path, settings=settings)
    weights, metrics = plain_training
    assert result["pairs"] == {"train": 4, "evaluation": 1, "dropped": 0}
    assert result["train"]["steps"] == 6
    assert {name: result["train"][name] for name in metrics} == pytest.approx(metrics, abs=1e-4)

    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert tuned.dtype == torch.float32
    original = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    for name, tensor in tuned.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=1e-4)
        assert not torch.equal(tensor, original[name])
    for name in ("config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "tuned" / name).read_text()) == json.loads((teacher / name).read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned").chat_template == TEMPLATE

    (held,) = split_by_prompt(PAIRS, 0.1, 0)[1]
    reference = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    rows = list(dpo.tokenized([held], AutoTokenizer.from_pretrained(teacher), append_eos=True))
    chosen, rejected = plain_rewards(tuned, reference, rows)
    assert result["eval_before"]["loss"] == pytest.approx(math.log(2))
    assert result["eval_after"]["reward_margin"] == pytest.approx((chosen - rejected).item(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("workers", "zero_stage"), [(1, 0), (2, 3)])
def test_the_original_teacher_as_reference(
    teacher: Path, moved: Path, parts: list[str], tmp_path: Path, workers: int, zero_stage: int
) -> None:
    settings = TUNING.model_copy(update={"workers": workers, "zero_stage": zero_stage})
    result = tune(moved, parts, tmp_path, settings=settings, reference=teacher)
    rows = list(
        dpo.tokenized(split_by_prompt(PAIRS, 0.1, 0)[1], AutoTokenizer.from_pretrained(teacher), append_eos=True)
    )
    original = dpo.load_teacher(teacher)
    for name, folder in (("eval_before", moved), ("eval_after", tmp_path / "tuned")):
        chosen, rejected = plain_rewards(dpo.load_teacher(folder), original, rows)
        assert result[name]["reward_margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert result["eval_before"]["reward_margin"] != pytest.approx(result["eval_after"]["reward_margin"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("workers", "zero_stage"), [(1, 2), (2, 3)])
def test_bfloat16_passes_keep_float32_weights(teacher: Path, tmp_path: Path, workers: int, zero_stage: int) -> None:
    """Also a teacher with pairs of a single prompt: there is nothing to evaluate with."""
    pairs = make_pairs(4, prompts=1)
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "pairs.parquet")
    one_step = {"precision": "bfloat16", "optimizer": DpoOptimizer(learning_rate=1e-6), "epochs": 1}
    settings = TUNING.model_copy(update=one_step | {"workers": workers, "zero_stage": zero_stage})
    result = tune(teacher, [str(tmp_path / "pairs.parquet")], tmp_path, settings=settings)
    assert (result["eval_before"], result["eval_after"]) == ({}, {})
    original, tuned = (load_file(folder / "model.safetensors") for folder in (teacher, tmp_path / "tuned"))
    # One step of AdamW moves a weight by the rate, 1e-6: less than bfloat16 can tell apart.
    moves = torch.cat([(tuned[name] - original[name]).abs().flatten() for name in original])
    assert 0.5e-6 < moves.median() < 1.5e-6
    assert moves.max() < 1e-5


@dataclass(frozen=True)
class KilledOnce(ProgressChannel):
    """Writes down every step and kills its own process, once, after the fifth."""

    log: str = ""

    def update(
        self, done: int, total: int | None = None, *, unit: str = "rows", note: str = "", **metrics: float
    ) -> None:
        """Called by the trainer after every step, and once before the first."""
        if not done:
            return
        steps = Path(self.log)
        killed = steps.exists() and steps.read_text().split().count("5") > 0
        with steps.open("a") as file:
            file.write(f"{done} ")
        if done == 5 and not killed:
            time.sleep(2)  # Ray Train's controller polls for reports: one in its last half second would be lost
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_continues_to_the_same_weights(
    teacher: Path, parts: list[str], tmp_path: Path, workers: int
) -> None:
    # Two steps an epoch, so that the data order counts.
    two_steps = {"batch_size": 2, "micro_batch_size": 1, "epochs": 4}
    settings = TUNING.model_copy(update=two_steps | {"workers": workers, "zero_stage": 2 * (workers - 1)})
    undisturbed = tune(teacher, parts, tmp_path / "undisturbed", settings=settings)
    log = tmp_path / "steps"
    killed = tune(teacher, parts, tmp_path / "killed", settings=settings, progress=KilledOnce(log=str(log)))
    assert [int(step) for step in log.read_text().split()] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert killed == undisturbed
    # A driver that died before it took the result gives the same command again: nothing is left to train.
    again = tune(teacher, parts, tmp_path / "killed", settings=settings, output=str(tmp_path / "again" / "tuned"))
    assert again == undisturbed
    expected, *others = (
        load_file(tmp_path / name / "tuned" / "model.safetensors") for name in ("undisturbed", "killed", "again")
    )
    for weights in others:
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
