"""Fine-tuning against plain PyTorch: the same weights and moments at every ZeRO stage, and after kills."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from montessori_ray.config import Lora, Optimizer, Training, WorkerResources
from montessori_ray.telemetry.progress import ProgressBoard, ProgressChannel
from montessori_ray.training import sft, sft_loop
from montessori_ray.training.chat import ChatFormat, Encoded, collate
from montessori_ray.training.ray_train import TrainingFailed, run_training

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
VOCABULARY = ["<pad>", "<|user|>", "<|assistant|>", "<|end|>", *(f"w{index}" for index in range(60))]
MAX_LENGTH = 24
SEED = 7
TRAINING = Training(
    optimizer=Optimizer(learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.5),
    batch_size=8, micro_batch_size=2, epochs=2, warmup_ratio=1.0, decay_ratio=0.0, checkpoint_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A tiny random Llama with tied embeddings and sizes that two ranks cannot divide evenly."""
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=20, intermediate_size=33, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<|user|>", "<|assistant|>"]
    PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<pad>", additional_special_tokens=special
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[str]:
    """25 rows in two files: the last of four batches holds one example, fewer than there are ranks."""
    folder = tmp_path_factory.mktemp("rows")
    generator = torch.Generator().manual_seed(1)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(f"w{int(index)}" for index in torch.randint(0, 60, (count,), generator=generator))

    examples = [{"example_id": f"e{i}", "instruction": words(2, 9), "response": words(1, 14)} for i in range(25)]
    examples[4]["instruction"] = " ".join(["w1"] * MAX_LENGTH)  # leaves no room for a response
    for part in range(2):
        pq.write_table(pa.Table.from_pylist(examples[part * 13 : part * 13 + 13]), folder / f"part-{part}.parquet")
    return [str(folder / f"part-{part}.parquet") for part in range(2)]


def train(student: Path, rows: list[str], output: Path, name: str, training: Training, **overrides) -> dict:
    arguments = {
        "model": student, "rows": rows, "output": str(output), "training": training, "chat_template": TEMPLATE,
        "max_length": MAX_LENGTH, "seed": SEED, "keep_optimizer": True, "name": name,
        "storage": str(output.parent / "train"), "progress": ProgressChannel(),
    }  # fmt: skip
    return sft.fine_tune(**(arguments | overrides))


def plain_pytorch(student: Path, rows: list[str], lora: LoraConfig | None = None):
    """The same training as a loop over whole batches: no micro-batches, ranks, sharding or wrapper."""
    chat = ChatFormat.load(student, TEMPLATE, MAX_LENGTH)
    table = [row for path in rows for row in pq.read_table(path).to_pylist()]
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    if lora is not None:
        torch.manual_seed(SEED)
        model.add_adapter(lora)
    settings = TRAINING.optimizer
    adamw = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=settings.weight_decay)
    losses, tokens = [], 0
    for step in range(8):
        indices = sft_loop.batch_indices(len(table), 8, SEED, step // 4, step % 4)
        encoded = [chat.encode(table[index]["instruction"], table[index]["response"]) for index in indices]
        batch = collate(encoded)
        loss = model(**batch).loss  # transformers' own: mean over the labels that are not -100
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        adamw.param_groups[0]["lr"] = settings.learning_rate * (step + 1) / 8
        adamw.step()
        losses.append(loss.item())
        tokens += int((batch["labels"] != -100).sum())
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moments = {
        f"{key}.{name}": adamw.state[parameter][key]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key in ("exp_avg", "exp_avg_sq")
    }
    return weights, moments, losses, tokens


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "zero_stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_equals_plain_pytorch(cluster, student, rows, tmp_path, workers, zero_stage):
    training = TRAINING.model_copy(update={"workers": workers, "zero_stage": zero_stage})
    metrics = train(student, rows, tmp_path / "out", f"stage{zero_stage}x{workers}", training)
    weights, moments, losses, tokens = plain_pytorch(student, rows)

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.dtype == torch.float32
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), weights[name], atol=2e-6, rtol=0, msg=lambda m, n=name: f"{n} {m}"
        )
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")  # tied: saved once
    optimizer = load_file(tmp_path / "out/optimizer.safetensors")
    assert optimizer.keys() == moments.keys()
    for name, value in moments.items():
        torch.testing.assert_close(optimizer[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n} {m}")
    assert json.loads((tmp_path / "out/optimizer.json").read_text()) == {
        "step": 8, "learning_rate": 3e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 0.5,
    }  # fmt: skip
    assert metrics["loss_first"] == pytest.approx(losses[0], abs=1e-6)
    assert metrics["loss_last"] == pytest.approx(losses[-1], abs=1e-5)
    assert (metrics["steps"], metrics["tokens"], metrics["rows_skipped"]) == (8, tokens, 2)
    assert ChatFormat.load(tmp_path / "out", None, MAX_LENGTH).encode("w1", "w2").response_tokens == 2


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "zero_stage"), [(1, 0), (2, 2), (2, 3)])
def test_an_adapter_equals_plain_pytorch(cluster, student, rows, tmp_path, workers, zero_stage):
    training = TRAINING.model_copy(update={"workers": workers, "zero_stage": zero_stage})
    lora = Lora(rank=3, alpha=6, targets=("q_proj", "down_proj"))
    train(student, rows, tmp_path / "out", f"lora{zero_stage}x{workers}", training, lora=lora)
    expected = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    weights, moments, _, _ = plain_pytorch(student, rows, expected)

    assert (tmp_path / "out/model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # finds the adapter beside the weights
    assert weights.keys() == dict(saved.named_parameters()).keys()
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], atol=2e-6, rtol=0)
    optimizer = load_file(tmp_path / "out/optimizer.safetensors")
    assert optimizer.keys() == moments.keys()
    assert all("lora_" in name for name in moments)
    for name, value in moments.items():
        torch.testing.assert_close(optimizer[name], value, atol=1e-6, rtol=1e-5)
    assert ChatFormat.load(tmp_path / "out", None, MAX_LENGTH).encode("w1", "w2").response_tokens == 2
    with pytest.raises(TrainingFailed, match=r"the student is an adapter already.*leave student\.lora out"):
        train(tmp_path / "out", rows, tmp_path / "twice", f"twice{zero_stage}x{workers}", training, lora=lora)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_killed_training_makes_the_same_weights(cluster, student, rows, tmp_path, zero_stage):
    """Rank 1 is killed twice. The first time Ray Train starts the ranks again, the second is one failure too many, and
    the next call of the same name goes on."""
    training = TRAINING.model_copy(update={"workers": 2, "zero_stage": zero_stage})
    train(student, rows, tmp_path / "calm", f"calm{zero_stage}", training)

    def deadly_loop(settings):
        step = sft_loop.train_step
        steps = []

        def deadly_step(engine, *arguments):
            steps.append(engine.global_steps)
            for moment in (3, 5):
                mark = settings["marks"] / f"killed-{moment}"
                if engine.global_steps == moment and torch.distributed.get_rank() == 1 and not mark.exists():
                    mark.write_text(str(steps))
                    time.sleep(2)  # Ray Train counts a reported checkpoint when its controller has next looked
                    os.kill(os.getpid(), signal.SIGKILL)
            return step(engine, *arguments)

        sft_loop.train_step = deadly_step
        return sft.fine_tune_loop(settings)

    job = sft.FineTuning(
        model=str(student), rows=tuple(rows), output=str(tmp_path / "killed"), training=training,
        chat_template=TEMPLATE, max_length=MAX_LENGTH, seed=SEED, keep_optimizer=True, progress=ProgressChannel(),
    )  # fmt: skip
    name, storage = f"killed{zero_stage}", str(tmp_path / "train")
    with pytest.raises(TrainingFailed, match="died"):
        run_training(
            deadly_loop, {"job": job, "marks": tmp_path}, name=name, storage=storage, workers=2,
            worker=WorkerResources(), max_failures=1,
        )  # fmt: skip
    assert (tmp_path / "killed-3").read_text() == "[0, 1, 2, 3]"
    assert (tmp_path / "killed-5").read_text() == "[2, 3, 4, 5]"  # from the checkpoint of step 2
    metrics = train(student, rows, tmp_path / "killed", name, training)

    calm, killed = (load_file(tmp_path / which / "model.safetensors") for which in ("calm", "killed"))
    assert all(torch.equal(calm[name], killed[name]) for name in calm)
    calm, killed = (load_file(tmp_path / which / "optimizer.safetensors") for which in ("calm", "killed"))
    assert all(torch.equal(calm[name], killed[name]) for name in calm)
    assert metrics["steps"] == 8


@pytest.mark.slow
def test_bfloat16_checkpointing_and_progress(cluster, student, rows, tmp_path):
    """Lower precision and recomputation change the speed, not what is learned; every step is reported."""
    board = ProgressBoard.remote()
    update = {"precision": "bfloat16", "gradient_checkpointing": True, "zero_stage": 2, "workers": 2}
    metrics = train(
        student, rows, tmp_path / "out", "bfloat16", TRAINING.model_copy(update=update), keep_optimizer=False,
        progress=ProgressChannel("warm_up", board),
    )  # fmt: skip
    _, _, losses, _ = plain_pytorch(student, rows)
    assert metrics["loss_last"] == pytest.approx(losses[-1], abs=0.02)
    assert not list((tmp_path / "out").glob("optimizer*"))
    progress, _ = ray.get(board.read.remote("warm_up"))
    assert (progress.done, progress.total, progress.unit) == (8, 8, "steps")
    rates = [value for _, name, value in progress.curves if name == "learning_rate"]
    assert rates == pytest.approx([3e-3 * step / 8 for step in range(1, 9)])


@pytest.mark.slow
def test_a_template_that_cannot_be_used_is_said_in_a_sentence(cluster, student, rows, tmp_path):
    with pytest.raises(TrainingFailed, match=r"training no-template failed: .* no chat template"):
        run_training(
            sft.fine_tune_loop, {"job": _job(student, rows, tmp_path)}, name="no-template", storage=str(tmp_path),
            workers=1, worker=WorkerResources(), max_failures=0,
        )  # fmt: skip


def _job(student: Path, rows: list[str], output: Path) -> sft.FineTuning:
    return sft.FineTuning(
        model=str(student), rows=tuple(rows), output=str(output), training=TRAINING, chat_template=None,
        max_length=MAX_LENGTH, seed=SEED, keep_optimizer=False, progress=ProgressChannel(),
    )  # fmt: skip


def test_learning_rate_rises_stays_and_falls():
    settings = Training(optimizer=Optimizer(learning_rate=2.0), warmup_ratio=0.2, decay_ratio=0.3)
    rates = [sft_loop.learning_rate_at(step, 10, settings) for step in range(1, 11)]
    fall = [1 + math.cos(math.pi * k / 4) for k in (1, 2, 3)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, *fall])
    rising = settings.model_copy(update={"warmup_ratio": 1.0, "decay_ratio": 0.0})
    assert [sft_loop.learning_rate_at(step, 4, rising) for step in range(1, 5)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert sft_loop.learning_rate_at(1, 1, Training(optimizer=Optimizer(learning_rate=2.0))) == 2.0


@pytest.mark.parametrize("size", [1, 2, 5, 7, 16])
def test_every_example_is_dealt_once_in_equal_passes(size):
    batch = [Encoded([index] * (index % 5 + 1), [index] * (index % 5 + 1)) for index in range(size)]
    shares = [sft_loop.deal(batch, micro_batch_size=2, rank=rank, world=3) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert all(1 <= len(micro) <= 2 for share in shares for micro in share)
    dealt = [e.input_ids[0] for share in shares for micro in share for e in micro if e.response_tokens]
    assert sorted(dealt) == list(range(size))


def test_an_epoch_sees_every_row_once_in_an_order_of_its_own():
    def epoch(number: int) -> list[int]:
        return [index for position in range(3) for index in sft_loop.batch_indices(21, 8, SEED, number, position)]

    assert sorted(epoch(0)) == sorted(epoch(1)) == list(range(21))
    assert epoch(0) != epoch(1)
    assert epoch(0) == epoch(0)
