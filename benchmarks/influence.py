"""Points a second of influence scoring, against the paper's published procedure, in one run on one device.

    python benchmarks/influence.py --json influence.json                    # the quickstart's student on CPUs
    python benchmarks/influence.py --rows FILE.jsonl --shape tinyllama      # real lengths, 1.1B random weights
    python benchmarks/influence.py --precision bfloat16 float32             # both procedures in each

The paper's procedure: for every point read weights and optimizer state from disk, take the step on a sequence padded to
1,024 tokens, and run the reference rows in batches of 8 padded to 1,024, with logits everywhere. It is measured on
`--paper-rows` reference rows and its evaluation scaled to all of them; everything else is measured as it is. In
`bfloat16` its weights and moments are that, as published; ours are float32 always, and only passes are in bfloat16.
The numbers of the first `--precision` are on top, those of others under `beside`.

The quickstart's student is warmed up on a few rows first, so that its moments are real and what the cheap estimators
say of the points can be compared with the exact scores (in the most exact precision asked for). Floors count the
operations that are needed (matrix products, causal attention, logits of response tokens) at the measured rate of the
student's own products, and the bytes that a step must read and write at the measured rate of a copy.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from montessori_ray.config import Score, WorkerResources
from montessori_ray.influence.agreement import agreement
from montessori_ray.influence.reference import Precision
from montessori_ray.influence.scorer import Scorer, join_alone
from montessori_ray.influence.update import OPTIMIZER_JSON, AdamW
from montessori_ray.models import prune_layers, resolve_model
from montessori_ray.training.chat import FILLING, ChatFormat, Encoded, collate
from montessori_ray.training.student_state import OPTIMIZER_TENSORS

PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bfloat16")
"""The most exact first."""

PADDED = 1024
PAPER_BATCH = 8
EMBEDDED = "embedded:smollm2-135m-instruct"
TINYLLAMA = LlamaConfig(
    vocab_size=49152, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
"""TinyLlama-1.1B's shape, with the embedded model's vocabulary, whose tokenizer is used."""

ONE_GPU = [
    "--device", "cuda", "--shape", "tinyllama", "--reference", "192", "--points", "64", "--paper-rows", "192",
    "--tokens", "16384", "--precision", "bfloat16", "tf32",
]  # fmt: skip
"""Arguments for one GPU: what the paper's procedure computes in, and tf32 beside it."""

WARM_STEPS, WARM_BATCH = 4, 4
"""Steps of the quickstart student's warm-up and rows a step: enough for moments that are not noise."""

RULE = AdamW(step=WARM_STEPS, learning_rate=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    device = torch.device(arguments.device)
    rows = read_rows(arguments.rows)
    reference, rest = rows[: arguments.reference], rows[arguments.reference :]
    examples, warm_up = rest[: arguments.points], rest[arguments.points :][: WARM_STEPS * WARM_BATCH]
    needed = arguments.reference + arguments.points + WARM_STEPS
    if arguments.points < 2:
        sys.exit(f"--points {arguments.points} has no spread: give 2 or more")
    if len(rows) < needed:
        sys.exit(
            f"{len(rows)} rows are too few, {needed} are needed: {arguments.reference} of reference, "
            f"{arguments.points} points and {WARM_STEPS} to warm up on"
        )
    join_alone()
    with TemporaryDirectory() as folder:
        student = make_student(Path(folder) / "student", arguments.shape, warm_up, device)
        measured = {name: _measured(student, reference, examples, name, arguments) for name in arguments.precision}
    influences = {name: found.pop("influences") for name, found in measured.items()}
    gold = influences[min(influences, key=PRECISIONS.index)]["exact"]
    for name, found in measured.items():
        found["agreement_with_exact"] = {
            estimator: _agreement(values, gold) for estimator, values in influences[name].items() if values is not gold
        }
    result: dict[str, Any] = {
        "machine": describe_machine(device, arguments.threads),
        "student": arguments.shape,
        "reference_rows": len(reference),
        "points": len(examples),
        **measured.pop(arguments.precision[0]),
        "beside": measured,
    }
    _print(result)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


def _measured(
    student: Path, reference: list[Any], examples: list[Any], precision: Precision, arguments: Any
) -> dict[str, Any]:
    """Both procedures and the floors in one precision."""
    device = torch.device(arguments.device)
    published = _in_bfloat16(student) if precision == "bfloat16" else student
    result: dict[str, Any] = {"precision": precision, "seconds": {}, "influences": {}}
    with _matmuls(precision):
        few = reference[: arguments.paper_rows]
        result["seconds"]["paper"] = _paper(published, few, len(reference), examples[:3], device)
    for estimator in ("exact", "first_order", "corrected"):
        result["seconds"][estimator], result["influences"][estimator] = _ours(
            student, reference, examples, estimator, precision, arguments
        )
    with _matmuls(precision):
        result |= _floor(published, reference, examples, arguments.tokens, device)
    return result | _ratios(result)


@contextmanager
def _matmuls(precision: Precision) -> Iterator[None]:
    """float32 products as the precision says."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    yield
    torch.set_float32_matmul_precision(before)


def _in_bfloat16(student: Path) -> Path:
    """A copy beside it with weights and moments as the published code keeps them."""
    folder = student.with_name("published")
    model: Any = AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(student).save_pretrained(folder)
    moments = load_file(student / OPTIMIZER_TENSORS)
    save_file({name: moment.bfloat16() for name, moment in moments.items()}, folder / OPTIMIZER_TENSORS)
    return folder


def _ours(
    student: Path, reference: list[Any], examples: list[Any], estimator: Any, precision: Precision, arguments: Any
) -> tuple[dict[str, Any], list[float]]:
    """Seconds a point, in its parts: medians over the points; and the influences.

    After what is not counted: a first point, on a GPU all of them, since passes are recorded there once a length.
    """
    gpu = arguments.device.startswith("cuda")
    settings = Score(
        estimator=estimator, reference_tokens=arguments.tokens, worker=WorkerResources(cpus=1, gpus=float(gpu)),
        compile=arguments.compile, recheck=0, precision=precision,
    )  # fmt: skip
    scorer = Scorer(student, reference, settings, chat_template=None, max_length=PADDED, worker="benchmark")
    points = [{"example_id": str(number), **row} for number, row in enumerate(examples)]
    for point in points if gpu else points[:1]:
        scorer.score(point)
    start = time.perf_counter()
    scores = list(scorer.score_each(points))
    whole = (time.perf_counter() - start) / len(points)
    parts = {
        name: statistics.median(getattr(score, f"{name}_seconds") for score in scores)
        for name in ("step", "evaluate", "restore")
    }
    totals = [score.step_seconds + score.evaluate_seconds + score.restore_seconds for score in scores]  # type: ignore[operator]
    wait = whole - statistics.fmean(totals)
    seconds = {"point": statistics.median(totals) + wait, "spread": statistics.stdev(totals), **parts, "wait": wait}
    del scorer
    gc.collect()  # or a GPU would hold the students of all estimators
    torch.cuda.empty_cache()
    return seconds, [float(score.influence) for score in scores]  # type: ignore[arg-type]


def _agreement(estimates: list[float], gold: list[float]) -> dict[str, Any]:
    """Of estimates with exact scores of the same points."""
    rows = [
        {"example_id": str(number), "prompt_id": "all", "influence": mine, "recheck_influence": exact}
        for number, (mine, exact) in enumerate(zip(estimates, gold, strict=True))
    ]
    return agreement(rows)


def _paper(student: Path, few: list[Any], all_rows: int, examples: list[Any], device: torch.device) -> dict[str, Any]:
    """The published procedure; the evaluation of `few` rows is scaled to `all_rows`."""
    chat = ChatFormat.load(student, None, PADDED)
    reference = [_padded(chat, row) for row in few]
    parts: dict[str, list[float]] = {"load": [], "step": [], "evaluate": []}
    for example in examples:
        clock = _Clock(device)
        model: Any = AutoModelForCausalLM.from_pretrained(student, dtype="auto")
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RULE.learning_rate, fused=True)
        with safe_open(student / OPTIMIZER_TENSORS, framework="pt", device=str(device)) as stored:
            for name, parameter in model.named_parameters():
                moments = {key: stored.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(float(RULE.step), device=device), **moments}
        parts["load"].append(clock.lap())
        _loss(model, [_padded(chat, example)], device).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RULE.max_grad_norm)
        optimizer.step()
        parts["step"].append(clock.lap())
        with torch.no_grad():
            for first in range(0, len(reference), PAPER_BATCH):
                _loss(model, reference[first : first + PAPER_BATCH], device).item()
        parts["evaluate"].append(clock.lap() * all_rows / len(reference))
    medians = {name: statistics.median(values) for name, values in parts.items()}
    points = [sum(values) for values in zip(*parts.values(), strict=True)]
    return {
        "point": statistics.median(points), "spread": statistics.stdev(points), **medians,
        "measured_reference_rows": len(few),
    }  # fmt: skip


def _padded(chat: ChatFormat, row: dict[str, str]) -> tuple[list[int], list[int]]:
    encoded = chat.encode(row["instruction"], row["response"])
    filling = PADDED - len(encoded.input_ids)
    return encoded.input_ids + [FILLING] * filling, encoded.labels + [-100] * filling


def _loss(model: Any, rows: list[tuple[list[int], list[int]]], device: torch.device) -> torch.Tensor:
    ids, labels = (torch.tensor(column, device=device) for column in zip(*rows, strict=True))
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


class _Clock:
    """Seconds between laps, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        now, before = time.perf_counter(), self._last
        self._last = now
        return now - before


def _floor(
    student: Path, reference: list[Any], examples: list[Any], tokens: int, device: torch.device
) -> dict[str, Any]:
    """What the evaluation and the step must take: see the top of this file."""
    chat = ChatFormat.load(student, None, PADDED)
    model: Any = AutoModelForCausalLM.from_pretrained(student, dtype="auto")
    config = model.config
    rows, points = (
        [chat.encode(row["instruction"], row["response"]) for row in some] for some in (reference, examples)
    )
    rate = _matmul_rate(device, model.dtype, tokens, config.hidden_size, config.intermediate_size)
    weights = sum(parameter.numel() for parameter in model.parameters())
    copy_rate = _copy_rate(device)
    operations = statistics.median(_operations(model, [point]) for point in points)
    return {
        "reference_tokens": sum(len(row.input_ids) for row in rows),
        "response_tokens": sum(row.response_tokens for row in rows),
        "matmul_flops_per_s": rate,
        "copy_bytes_per_s": copy_rate,
        "evaluate_floor_s": _operations(model, rows) / rate,
        # Three passes' worth of products; read weights, moments and gradient, write gradient and stepped weights.
        "step_floor_s": 3 * operations / rate + 6 * 4 * weights / copy_rate,
    }


def _operations(model: Any, rows: list[Encoded]) -> int:
    """Additions and multiplications of a forward pass over rows without padding."""
    head = model.get_output_embeddings().weight.numel()
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.config.tie_word_embeddings
    body = sum(parameter.numel() for parameter in model.parameters()) - embedding - (0 if tied else head)
    # Queries with keys and weights with values, each 2 x T^2 / 2 x hidden: a token attends to those before it.
    attention = 2 * model.config.num_hidden_layers * model.config.hidden_size
    return sum(
        2 * body * len(row.input_ids) + 2 * head * row.response_tokens + attention * len(row.input_ids) ** 2
        for row in rows
    )


def _matmul_rate(device: torch.device, dtype: torch.dtype, tokens: int, hidden: int, inner: int) -> float:
    """Operations a second of a product of the shape of the student's widest layer and a batch of the reference set."""
    left, right = (torch.randn(shape, device=device, dtype=dtype) for shape in ((tokens, hidden), (hidden, inner)))
    return 2 * tokens * hidden * inner / best(lambda: left @ right, device)


def _copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy of a buffer larger than any cache reads and writes."""
    source = torch.zeros(2**27, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source), device)


def best(work: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(repeats):
        clock = _Clock(device)
        work()
        seconds.append(clock.lap())
    return min(seconds)


def make_student(folder: Path, shape: str, warm_up: list[Any], device: torch.device) -> Path:
    """A student with moments on disk: of a few steps, or random where its weights are."""
    if shape == "quickstart":
        prune_layers(resolve_model(EMBEDDED), list(range(10, 20)), folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        moments = _warm_up(model, ChatFormat.load(folder, None, PADDED), warm_up)
    else:
        torch.manual_seed(0)
        with device:
            model = LlamaForCausalLM(TINYLLAMA)
        AutoTokenizer.from_pretrained(resolve_model(EMBEDDED)).save_pretrained(folder)
        moments = {}
        for name, parameter in model.named_parameters():
            moments[f"exp_avg.{name}"] = 1e-4 * torch.randn_like(parameter)
            moments[f"exp_avg_sq.{name}"] = 1e-7 * torch.rand_like(parameter)
    model.save_pretrained(folder)
    save_file(moments, folder / OPTIMIZER_TENSORS)
    (folder / OPTIMIZER_JSON).write_text(json.dumps(asdict(RULE)), encoding="utf-8")
    return folder


def _warm_up(model: Any, chat: ChatFormat, rows: list[Any]) -> dict[str, Tensor]:
    """Take `WARM_STEPS` steps of torch's AdamW with a rising rate; returns the moments by parameter name."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    for step in range(WARM_STEPS):
        batch = [chat.encode(row["instruction"], row["response"]) for row in rows[step::WARM_STEPS]]
        for encoded in batch:
            tensors = collate([encoded])
            (model(**tensors).loss / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RULE.max_grad_norm)
        optimizer.param_groups[0]["lr"] = RULE.learning_rate * (step + 1) / WARM_STEPS
        optimizer.step()
        optimizer.zero_grad()
    return {
        f"{key}.{name}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other line separators
    rows = [json.loads(line) for line in lines if line.strip()]
    return [{"instruction": row["instruction"], "response": row.get("response") or row["output"]} for row in rows]


def describe_machine(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {threads} threads of {os.cpu_count()}"


def _ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Points a second of one over another, which says more than either on this machine alone."""
    seconds = {name: parts["point"] for name, parts in result["seconds"].items()}
    exact = result["seconds"]["exact"]
    return {
        "points_per_s": {name: 1 / value for name, value in seconds.items()},
        "ratio_exact_over_paper": seconds["paper"] / seconds["exact"],
        "ratio_first_order_over_paper": seconds["paper"] / seconds["first_order"],
        "ratio_corrected_over_exact": seconds["exact"] / seconds["corrected"],
        "ratio_exact_over_paper_at_floor": seconds["paper"] / (result["evaluate_floor_s"] + result["step_floor_s"]),
        "restore_share_of_point": exact["restore"] / exact["point"],
        "evaluate_share_of_floor": result["evaluate_floor_s"] / exact["evaluate"],
        "step_share_of_floor": result["step_floor_s"] / exact["step"],
    }


def _print(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; student {result['student']}, {result['reference_rows']} reference rows, "
          f"{result['reference_tokens']} tokens, {result['points']} points")  # fmt: skip
    for found in (result, *result["beside"].values()):
        _print_precision(found)


def _print_precision(result: dict[str, Any]) -> None:
    print(f"\n{result['precision']}")
    names = ("load", "step", "evaluate", "restore", "wait", "point", "spread")
    print("".join(["seconds a point".ljust(18), *(name.rjust(10) for name in names)]))
    for estimator, parts in result["seconds"].items():
        cells = [f"{parts[name]:.4f}" if name in parts else "-" for name in names]
        print("".join([estimator.ljust(18), *(cell.rjust(10) for cell in cells)]))
    for name, value in result.items():
        if name.startswith("ratio_") or "_share_of_" in name:
            print(f"{name}: {value:.3g}")
    for estimator, found in result["agreement_with_exact"].items():
        told = ("spearman", "pearson", "same_sign", "noise", "spread")
        said = ", ".join(f"{key} {found[key]:.4g}" for key in told if found[key] is not None)
        print(f"{estimator} against exact: {said}")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    shipped = Path(__file__).parent.parent / "configs/data/reference.jsonl"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=shipped, help="JSONL with instruction and response (or output)")
    parser.add_argument("--reference", type=int, default=32, help="rows of it that are the reference set")
    parser.add_argument("--points", type=int, default=16, help="rows after these that are scored")
    parser.add_argument("--paper-rows", type=int, default=8, help="reference rows the paper's procedure is measured on")
    parser.add_argument("--shape", choices=("quickstart", "tinyllama"), default="quickstart")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["float32"], help="tf32 needs a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=512, help="score.reference_tokens")
    parser.add_argument("--compile", action="store_true", help="score.compile")
    parser.add_argument("--json", help="write the numbers here")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
