"""Where a point's time goes on one device: every piece of the work that scoring does, by itself.

    python benchmarks/gpu/passes.py --rows FILE.jsonl [--precision bfloat16 tf32] [--compile] [--profile]

Takes the student and the arguments of `benchmarks/gpu/influence.py`. For each precision: seconds (best of some) of the
evaluation of the reference set, launched and recorded, of an example's gradient, launched and recorded, and how far the
recorded one is off; of the step, the gradient's norm, the inner product, the check of the restored state, and the
gradient of the reference loss; with `--profile` the kernels that take the evaluation's time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
import influence

from montessori_ray.influence.local_student import LocalStudent
from montessori_ray.influence.reference import Precision, ReferenceSet
from montessori_ray.influence.update import AdamW, exact_norm
from montessori_ray.training.chat import ChatFormat

REPEATS = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = 15


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--profile"]
    arguments = influence.parse_arguments([*influence.ONE_GPU, *words])
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    rows = influence.read_rows(arguments.rows)
    with TemporaryDirectory() as folder:
        directory = influence.make_student(Path(folder) / "student", arguments.shape, rows[-16:], device)
        chat = ChatFormat.load(directory, None, influence.PADDED)
        encoded = [chat.encode(row["instruction"], row["response"]) for row in rows]
        example = sorted(encoded, key=lambda row: len(row.input_ids))[len(encoded) // 2]
        measured = ReferenceSet(encoded[: arguments.reference], arguments.tokens, device=device)
        student = LocalStudent(
            directory, rule=AdamW.load(directory), device=device,
            compiled=arguments.compile,
        )  # fmt: skip
        result = {
            precision: _measured(student, measured, example, precision, "--profile" in sys.argv)
            for precision in arguments.precision
        }
    print(influence.describe_machine(device, arguments.threads))
    for precision, pieces in result.items():
        print(f"\n{precision}, milliseconds")
        for name, value in pieces.items():
            print(f"{name:40} {value:10.3g}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


def _measured(
    student: LocalStudent, reference: ReferenceSet, example: Any, precision: Precision, profiled: bool
) -> dict[str, float]:
    """Milliseconds of each piece, and the relative difference of a recorded gradient."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    pieces: dict[str, float] = {}
    gradients = []
    for way in ("launched", "recorded"):
        student.set_precision(precision, recorded=way == "recorded")
        student.null_step()
        pieces[f"evaluation, {way}"] = _best(lambda: student.reference_losses(reference))
        if profiled:
            _print_kernels(lambda: student.reference_losses(reference), f"{precision}, {way}")
        student.restore()
        buffer = student._copies.gradient
        pieces[f"gradient, {way}"] = _best(lambda: student._gradient_of(example))
        buffer.zero_()
        student._gradient_of(example)
        gradients.append(buffer.float().clone())
        pieces["norm"] = _best(lambda: exact_norm(student._copies.gradient))
    launched, recorded = gradients
    pieces["recorded gradient, relative difference"] = float((recorded - launched).norm() / launched.norm())
    del gradients, launched, recorded
    pieces["gradient of the reference loss"] = _best(lambda: student.reference_gradient(reference))
    slopes = student.reference_gradient(reference)
    pieces["step, measured along a gradient"] = _best(lambda: _stepped(student, lambda: student.change_along(slopes)))
    pieces["step, written"] = _best(lambda: _stepped(student, student._write))
    pieces["check of the state"] = _best(student.digest)
    return pieces


def _stepped(student: LocalStudent, work: Callable[[], Any]) -> None:
    student.null_step()
    work()
    student.restore()


def _best(work: Callable[[], Any]) -> float:
    """Milliseconds, after a run that compiles and records."""
    work()
    return 1e3 * influence.best(work, DEVICE, REPEATS)


def _print_kernels(work: Callable[[], Any], title: str) -> None:
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=kinds) as seen:
        influence.best(work, DEVICE, 1)
    by_time = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(f"\nkernels of an evaluation ({title}), milliseconds and calls")
    for kernel in sorted(seen.key_averages(), key=lambda kernel: -getattr(kernel, by_time))[:KERNELS]:
        print(f"{getattr(kernel, by_time) / 1e3:10.2f} {kernel.count:7d}  {kernel.key[:90]}")


if __name__ == "__main__":
    main()
