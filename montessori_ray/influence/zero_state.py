"""The state of a DeepSpeed engine, in memory: put moments in, remember it, go back to it, fingerprint it.

DeepSpeed's own ways do not serve: its checkpoints load at the world size they were saved with only, its `safe_set_*`
functions fail on ZeRO-3 when sizes do not divide, and its state dicts copy everything once more. So this module reads
the flat float32 partitions that the optimizer steps, which are private attributes: the version is checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from montessori_ray.influence.fingerprint import checksum, generator_states, set_generator_states
from montessori_ray.influence.moments import MOMENTS, ReadMoment
from montessori_ray.influence.update import change_along

DEEPSPEED_VERSION = "0.19.8"
"""The release whose partition layout `masters` knows."""

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `[source, source + length)` of a flattened parameter lie at `[offset, offset + length)` of a master."""

    parameter: Tensor
    source: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Master:
    """A float32 tensor that this rank's optimizer steps, and the pieces of parameters in it; the rest is padding."""

    tensor: Tensor
    pieces: tuple[Piece, ...]


def masters(engine: Any) -> list[Master]:
    """This rank's masters, for ZeRO stages 0 to 3 in float32."""
    assert deepspeed.__version__ == DEEPSPEED_VERSION, (
        f"deepspeed {deepspeed.__version__} is installed; scoring knows the partitions of {DEEPSPEED_VERSION} only"
    )
    stage = engine.zero_optimization_stage()
    rank, world = dist.get_rank(), dist.get_world_size()
    if stage == 0:
        whole = (p for group in engine.optimizer.param_groups for p in group["params"])
        return [Master(p, (Piece(p, 0, 0, p.numel()),)) for p in whole]
    zero = engine.optimizer
    if stage in (1, 2):
        groups = zip(
            zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets,
            strict=True,
        )  # fmt: skip
        return [Master(flat, _window(params, offsets, rank * len(flat), len(flat))) for flat, params, offsets in groups]
    partitions = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
    return [Master(flat, _shards(params, rank, world)) for flat, params in partitions]


def _window(parameters: Sequence[Tensor], offsets: Sequence[int], start: int, length: int) -> tuple[Piece, ...]:
    """Stages 1 and 2: all parameters lie end to end at `offsets`; a rank's master is a window of that."""
    pieces = []
    for parameter, offset in zip(parameters, offsets, strict=True):
        low, high = max(offset, start), min(offset + parameter.numel(), start + length)
        if low < high:
            pieces.append(Piece(parameter, low - offset, low - start, high - low))
    return tuple(pieces)


def _shards(parameters: Sequence[Any], rank: int, world: int) -> tuple[Piece, ...]:
    """Stage 3: each parameter is cut into `world` equal shards, the last one padded; a master joins a rank's shards."""
    pieces, offset = [], 0
    for parameter in parameters:
        shard = parameter.partition_numel()
        source = rank * shard
        length = min(shard, parameter.ds_numel - source)
        if length > 0:
            pieces.append(Piece(parameter, source, offset, length))
        offset += shard
    return tuple(pieces)


class EngineState:
    """Remembers an engine's state, masters, moments, step counts, counters and random generators, and restores it.

    Each rank keeps its own partition (12 bytes a weight, divided by the ranks of a sharded group).
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._masters = masters(engine)
        self.snapshot = "none"
        self._saved: list[Tensor] = []
        self._frozen = [parameter for parameter in engine.module.parameters() if not parameter.requires_grad]
        self._saved_counters: dict[str, int] = {}
        self._saved_generators: list[Tensor] = []

    def set_moments(self, step: int, read: ReadMoment | None) -> None:
        """Give the optimizer its moments.

        Args:
            step: steps the moments hold.
            read: returns a parameter's moments; None sets zeros.
        """
        for master in self._masters:
            flat = {moment: torch.zeros_like(master.tensor) for moment in MOMENTS}
            for piece, moment in product(master.pieces, MOMENTS):
                if read is not None:
                    part = read(moment, piece.parameter).reshape(-1)[piece.source : piece.source + piece.length]
                    flat[moment].view(-1)[piece.offset : piece.offset + piece.length] = part
            group = self._engine.basic_optimizer.param_groups[0]
            device = master.tensor.device if group["fused"] or group["capturable"] else "cpu"
            count = torch.tensor(float(step), dtype=torch.float32, device=device)
            self._engine.basic_optimizer.state[master.tensor] = {"step": count, **flat}

    def save(self) -> None:
        """Remember the present state."""
        self.snapshot, self._saved = copies(self._tensors())
        self._saved_counters = {name: getattr(self._engine, name) for name in COUNTERS}
        self._saved_generators = generator_states()

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the remembered state, bit for bit."""
        torch._foreach_copy_(self._tensors(), self._saved)
        self._refresh_working_copies()
        for name, value in self._saved_counters.items():
            setattr(self._engine, name, value)
        set_generator_states(self._saved_generators)

    def gradient(self, backward: Callable[[], None]) -> list[Tensor]:
        """The gradient that `backward` leaves in the engine, one tensor a master; masters and moments are spoiled.

        Every stage keeps gradients elsewhere, and gives them all to the optimizer in the masters' layout: after a step
        with a first moment of zero, that moment is (1 - beta1) times the gradient.
        """
        state = self._engine.basic_optimizer.state
        moments = [state[master.tensor]["exp_avg"] for master in self._masters]
        torch._foreach_zero_(moments)
        with _unclipped(self._engine):
            backward()
            self._engine.step()
        scale = 1 - self._engine.basic_optimizer.param_groups[0]["betas"][0]
        return [moment / scale for moment in moments]

    def drop_gradients(self) -> None:
        """Forget what an interrupted backward pass or step has left in the engine.

        On several ranks that helps only where all were interrupted alike: others wait in a collective.
        """
        self._engine.zero_grad()
        if self._engine.zero_optimization_stage() == 0:
            return
        zero = self._engine.optimizer
        zero.zero_grad(set_to_none=True)
        for bucket in zero.ipg_buckets.values():
            bucket.params.clear()
            bucket.elements = 0
        zero.averaged_gradients.clear()
        zero.backward_active_depth = 0

    @torch.no_grad()
    def change_along(self, gradient: list[Tensor]) -> float:
        """Inner product of a gradient, as `gradient` returns it, with how far the masters are from the saved ones."""
        saved = self._saved[:: len(self._saved) // len(self._masters)]
        total = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for master, before, slopes in zip(self._masters, saved, gradient, strict=True):
            total += change_along(master.tensor.detach().flatten(), before.flatten(), slopes.flatten()).to(total.device)
        if self._engine.zero_optimization_stage() > 0:  # each rank has its own part
            dist.all_reduce(total)
        return total.item()

    def digest(self) -> str:
        """A fingerprint of the state and of the working copies made from it, equal on all ranks of the group."""
        working: list[Tensor] = list(self._engine.module.buffers())
        if self._engine.zero_optimization_stage() in (1, 2):
            working += self._engine.optimizer.bit16_groups_flat
        elif self._engine.zero_optimization_stage() == 3:
            working += self._engine.optimizer.fp16_partitioned_groups_flat
        working += [getattr(parameter, "ds_tensor", parameter) for parameter in self._frozen]
        counters = [getattr(self._engine, name) for name in COUNTERS]
        mine = [counters, *(checksum(tensor) for tensor in (*self._tensors(), *working, *generator_states()))]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return hashlib.sha256(repr(everyone).encode()).hexdigest()

    def _refresh_working_copies(self) -> None:
        """Make the weights that the forward pass reads from the masters, as the end of a step does."""
        stage, zero = self._engine.zero_optimization_stage(), self._engine.optimizer
        if stage in (1, 2):
            zero.update_lp_params()
        elif stage == 3:
            zero.parameter_offload.partition_all_parameters()  # drops gathered copies of the stepped weights
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            zero.checkpoint_event_epilogue()  # gathers the small parameters that stay whole

    def _tensors(self) -> list[Tensor]:
        """Masters, moments and step counts of this rank, always in the same order."""
        state = self._engine.basic_optimizer.state
        return [
            tensor
            for master in self._masters
            for tensor in (master.tensor.detach(), *(state[master.tensor][key] for key in (*MOMENTS, "step")))
        ]


def copies(tensors: Sequence[Tensor]) -> tuple[str, list[Tensor]]:
    """Where copies of tensors are kept, and the copies.

    They lie beside the tensors, unless on a GPU they would take more than half of what is free now (the other half is
    for the passes): then in pinned host memory, which takes longer to restore from.
    """
    device = tensors[0].device
    if device.type == "cuda" and not leaves_room(sum(tensor.nbytes for tensor in tensors), _free_memory(device)):
        pinned = [torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor) for tensor in tensors]
        return "pinned host memory", pinned
    return str(device), [tensor.clone() for tensor in tensors]


def leaves_room(size: int, free: int) -> bool:
    """Whether `size` bytes may be taken of `free` ones."""
    return 2 * size <= free


def _free_memory(device: torch.device) -> int:
    """Bytes of a GPU that nobody uses, those that torch keeps at hand among them."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def _unclipped(engine: Any) -> Iterator[None]:
    """Take an engine's gradients as they are, however large."""
    sharded = engine.zero_optimization_stage() > 0
    owner, name = (engine.optimizer, "clip_grad") if sharded else (engine._config, "gradient_clipping")
    limit = getattr(owner, name)
    setattr(owner, name, 0.0)
    try:
        yield
    finally:
        setattr(owner, name, limit)
