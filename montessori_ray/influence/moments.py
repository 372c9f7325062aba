"""AdamW's moments of a warmed student, read from the file beside its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from montessori_ray.errors import ModelError
from montessori_ray.models import OPTIMIZER_TENSORS

MOMENTS = ("exp_avg", "exp_avg_sq")

ReadMoment = Callable[[str, Tensor], Tensor]
"""`read("exp_avg", parameter)`: the whole moment of a parameter, float32 on the CPU, shaped as the whole parameter."""


@contextmanager
def open_moments(student: Path, names: Mapping[Tensor, str]) -> Iterator[ReadMoment]:
    """Open a warmed student's moments.

    Args:
        student: its directory.
        names: parameter -> its name in the model.

    Raises:
        ModelError: there is no such file, or (while reading) it belongs to another model.
    """
    path = student / OPTIMIZER_TENSORS
    if not path.exists():
        raise ModelError(f"{student} says that steps were taken but has no {path.name}: warm up again")
    with safe_open(path, framework="pt") as stored:
        known = set(stored.keys())

        def read(moment: str, parameter: Tensor) -> Tensor:
            key = f"{moment}.{names[parameter]}"
            if key not in known:
                raise ModelError(f"{path} has no {key}: it belongs to another model than {student}; warm up again")
            tensor: Tensor = stored.get_tensor(key)
            return tensor

        yield read
