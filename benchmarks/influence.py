"""Points a second of influence scoring, against the paper's published procedure, in one run on one device.

    python benchmarks/influence.py --json influence.json                    # the quickstart's student on CPUs
    python benchmarks/influence.py --rows FILE.jsonl --shape tinyllama      # real lengths, 1.1B random weights

The paper's procedure: for every point read weights and optimizer state from disk, take the step on a sequence padded to
1,024 tokens, and run the reference rows in batches of 8 padded to 1,024, with logits everywhere. It is measured on
`--paper-rows` reference rows and its evaluation scaled to all of them; everything else is measured as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from montessori_ray.config import Score, WorkerResources
from montessori_ray.influence.scorer import Scorer, join_alone
from montessori_ray.influence.update import OPTIMIZER_JSON, AdamW
from montessori_ray.models import prune_layers, resolve_model
from montessori_ray.training.chat import ChatFormat
from montessori_ray.training.student_state import OPTIMIZER_TENSORS

PADDED = 1024
PAPER_BATCH = 8
EMBEDDED = "embedded:smollm2-135m-instruct"
TINYLLAMA = LlamaConfig(
    vocab_size=49152, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
"""TinyLlama-1.1B's shape, with the embedded model's vocabulary, whose tokenizer is used."""

RULE = AdamW(step=100, learning_rate=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    rows = _rows(arguments.rows)
    reference, examples = rows[: arguments.reference], rows[arguments.reference :][: arguments.points]
    if len(examples) < 2:
        sys.exit(f"{len(rows)} rows are too few for {arguments.reference} reference rows and 2 points")
    join_alone()
    with TemporaryDirectory() as folder:
        student = _student(Path(folder), arguments.shape)
        result: dict[str, Any] = {
            "machine": _machine(device, arguments.threads),
            "student": arguments.shape,
            "reference_rows": len(reference),
            "points": len(examples),
            "seconds": {
                "paper": _paper(student, reference[: arguments.paper_rows], len(reference), examples[:2], device)
            },
        }
        for estimator in ("exact", "first_order", "corrected"):
            result["seconds"][estimator] = _ours(student, reference, examples, estimator, arguments)
        result |= _floor(student, reference, device)
    _ratios(result)
    _print(result)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


def _ours(student: Path, reference: list[Any], examples: list[Any], estimator: Any, arguments: Any) -> dict[str, Any]:
    """Seconds a point, in its parts: medians over the points, after one that is not counted."""
    gpu = arguments.device.startswith("cuda")
    settings = Score(
        estimator=estimator, reference_tokens=arguments.tokens, worker=WorkerResources(cpus=1, gpus=float(gpu)),
        compile=arguments.compile, recheck=0,
    )  # fmt: skip
    scorer = Scorer(student, reference, settings, chat_template=None, max_length=PADDED, worker="benchmark")
    points = [{"example_id": str(number), **row} for number, row in enumerate(examples)]
    scorer.score(points[0])
    start = time.perf_counter()
    scores = [scorer.score(point) for point in points]
    whole = (time.perf_counter() - start) / len(points)
    parts = {
        name: statistics.median(getattr(score, f"{name}_seconds") for score in scores)
        for name in ("step", "evaluate", "restore")
    }
    totals = [score.step_seconds + score.evaluate_seconds + score.restore_seconds for score in scores]  # type: ignore[operator]
    spread = statistics.stdev(totals) if len(totals) > 1 else 0.0
    return {"point": whole, "spread": spread, **parts, "wait": whole - statistics.fmean(totals)}


def _paper(student: Path, few: list[Any], all_rows: int, examples: list[Any], device: torch.device) -> dict[str, Any]:
    """The published procedure; the evaluation of `few` rows is scaled to `all_rows`."""
    chat = ChatFormat.load(student, None, PADDED)
    reference = [_padded(chat, row) for row in few]
    parts: dict[str, list[float]] = {"load": [], "step": [], "evaluate": []}
    for example in examples:
        clock = _Clock(device)
        model: Any = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
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
    return {"point": sum(medians.values()), "spread": 0.0, **medians, "measured_reference_rows": len(few)}


def _padded(chat: ChatFormat, row: dict[str, str]) -> tuple[list[int], list[int]]:
    encoded = chat.encode(row["instruction"], row["response"])
    filling = PADDED - len(encoded.input_ids)
    return encoded.input_ids + [chat.pad_token_id] * filling, encoded.labels + [-100] * filling


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


def _floor(student: Path, reference: list[Any], device: torch.device) -> dict[str, Any]:
    """What the evaluation must take: its multiplications at the rate of the student's own matrix products."""
    chat = ChatFormat.load(student, None, PADDED)
    encoded = [chat.encode(row["instruction"], row["response"]) for row in reference]
    model: Any = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    head = model.get_output_embeddings().weight.numel()
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.config.tie_word_embeddings
    body = sum(parameter.numel() for parameter in model.parameters()) - embedding - (0 if tied else head)
    tokens, asked = sum(len(row.input_ids) for row in encoded), sum(row.response_tokens for row in encoded)
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    rate = _matmul_rate(device, hidden, inner)
    return {
        "reference_tokens": tokens,
        "response_tokens": asked,
        "matmul_flops_per_s": rate,
        "evaluate_floor_s": 2 * (body * tokens + head * asked) / rate,
    }


def _matmul_rate(device: torch.device, hidden: int, inner: int) -> float:
    """Operations a second of a product of the shape of the student's widest layer."""
    left, right = torch.randn(1024, hidden, device=device), torch.randn(hidden, inner, device=device)
    return 2 * 1024 * hidden * inner / _best(lambda: left @ right, device)


def _best(work: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(20):
        clock = _Clock(device)
        work()
        seconds.append(clock.lap())
    return min(seconds)


def _student(folder: Path, shape: str) -> Path:
    """A student with moments on disk."""
    if shape == "quickstart":
        prune_layers(resolve_model(EMBEDDED), list(range(10, 20)), folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(TINYLLAMA)
        AutoTokenizer.from_pretrained(resolve_model(EMBEDDED)).save_pretrained(folder)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for name, parameter in model.named_parameters():
        moments[f"exp_avg.{name}"] = 1e-4 * torch.randn(parameter.shape, generator=generator)
        moments[f"exp_avg_sq.{name}"] = 1e-7 * torch.rand(parameter.shape, generator=generator)
    save_file(moments, folder / OPTIMIZER_TENSORS)
    (folder / OPTIMIZER_JSON).write_text(json.dumps(asdict(RULE)), encoding="utf-8")
    return folder


def _rows(path: Path) -> list[dict[str, str]]:
    lines: Iterable[str] = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{"instruction": row["instruction"], "response": row.get("response") or row["output"]} for row in rows]


def _machine(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {threads} threads of {os.cpu_count()}"


def _ratios(result: dict[str, Any]) -> None:
    """Points a second of one over another, which says more than either on this machine alone."""
    seconds = {name: parts["point"] for name, parts in result["seconds"].items()}
    result["points_per_s"] = {name: 1 / value for name, value in seconds.items()}
    result["ratio_exact_over_paper"] = seconds["paper"] / seconds["exact"]
    result["ratio_first_order_over_paper"] = seconds["paper"] / seconds["first_order"]
    result["ratio_corrected_over_exact"] = seconds["exact"] / seconds["corrected"]
    result["evaluate_share_of_floor"] = result["evaluate_floor_s"] / result["seconds"]["exact"]["evaluate"]


def _print(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; student {result['student']}, {result['reference_rows']} reference rows, "
          f"{result['reference_tokens']} tokens, {result['points']} points")  # fmt: skip
    names = ("load", "step", "evaluate", "restore", "wait", "point", "spread")
    print("".join(["seconds a point".ljust(18), *(name.rjust(10) for name in names)]))
    for estimator, parts in result["seconds"].items():
        cells = [f"{parts[name]:.4f}" if name in parts else "-" for name in names]
        print("".join([estimator.ljust(18), *(cell.rjust(10) for cell in cells)]))
    for name, value in result.items():
        if name.startswith(("ratio_", "evaluate_share")):
            print(f"{name}: {value:.3g}")


def _arguments() -> argparse.Namespace:
    shipped = Path(__file__).parent.parent / "configs/data/reference.jsonl"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=shipped, help="JSONL with instruction and response (or output)")
    parser.add_argument("--reference", type=int, default=48, help="rows of it that are the reference set")
    parser.add_argument("--points", type=int, default=8, help="rows after these that are scored")
    parser.add_argument("--paper-rows", type=int, default=8, help="reference rows the paper's procedure is measured on")
    parser.add_argument("--shape", choices=("quickstart", "tinyllama"), default="quickstart")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=512, help="score.reference_tokens")
    parser.add_argument("--compile", action="store_true", help="score.compile")
    parser.add_argument("--json", help="write the numbers here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
