"""AdamW's moments of a warmed student, read from the file beside its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from montessori_ray.errors import ModelError
from montessori_ray.models import OPTIMIZER_TENSORS

MOMENTS = ("exp_avg", "exp_avg_sq")

_OTHER_MODEL = "it belongs to another model; warm this one up again"

ReadMoment = Callable[[str, Tensor], Tensor]
"""`read("exp_avg", parameter)`: the whole moment of a parameter, float32 on the CPU, shaped as the whole parameter."""


@contextmanager
def open_moments(student: Path, names: Mapping[Tensor, str]) -> Iterator[ReadMoment]:
    """Open a warmed student's moments.

    Args:
        student: its directory.
        names: parameter -> its name in the model.

    Raises:
        ModelError: there is no such file, it is damaged, or (some only while reading) it belongs to another model.
    """
    path = student / OPTIMIZER_TENSORS
    if not path.exists():
        raise ModelError(f"{student} says that steps were taken but has no {path.name}: warm up again")
    try:
        stored = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged ({error}): copy it again, or warm up again") from None
    with stored:
        known = set(stored.keys())
        if others := known - {f"{moment}.{name}" for moment in MOMENTS for name in names.values()}:
            raise ModelError(f"{path} has {min(others)}, which this student lacks: {_OTHER_MODEL}")

        def read(moment: str, parameter: Tensor) -> Tensor:
            key = f"{moment}.{names[parameter]}"
            if key not in known:
                raise ModelError(f"{path} has no {key}: {_OTHER_MODEL}")
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # of the whole one, where it is sharded
            if tuple(stored.get_slice(key).get_shape()) != shape:
                raise ModelError(f"{path} has {key} in another shape than {shape}: {_OTHER_MODEL}")
            tensor: Tensor = stored.get_tensor(key)
            return tensor

        yield read
