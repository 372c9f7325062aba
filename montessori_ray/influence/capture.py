"""CUDA graphs: work on fixed tensors, recorded once and replayed; for passes whose kernels are shorter than launches.

A gradient of one example of a 1.1B student took 107 ms launched kernel by kernel and 19 ms replayed (one H100,
bfloat16).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

WARM_UPS = 2
"""Runs before a recording: kernels are chosen, compiled and given their memory by then."""


def can_record(device: torch.device) -> bool:
    return device.type == "cuda"


class Graphs:
    """Recorded pieces of work by key, which share their memory: one runs at a time."""

    def __init__(self) -> None:
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._refused = False

    def run(self, key: Hashable, work: Callable[[], Tensor], undo: Callable[[], object]) -> Tensor:
        """What `work` returns, replayed where it was recorded; a copy of it, which no other piece of work overwrites.

        Args:
            key: of this work; it has read and written the same tensors every time.
            work: to record where the key is new. What cannot be recorded (it waits for the device, say) is told once,
                and from then on all work runs as it is.
            undo: takes back what runs before a recording changed.
        """
        if key not in self._recorded and not self._refused:
            try:
                self._recorded[key] = self._record(work)
            except RuntimeError as error:
                self._refused = True
                _log.warning("passes are launched kernel by kernel, which is slower: no CUDA graph of them (%s)", error)
            undo()
        if self._refused:
            return work()
        graph, result = self._recorded[key]
        graph.replay()
        return result.clone()  # its memory may be what a piece recorded earlier works in

    def _record(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # that of the recording, to which autograd's nodes are bound by then
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, a process group's watchdog say, may ask the device things that a recording would forbid them.
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(self._stream), recording:  # one that fails leaves its stream the current one
            result = work()
        return graph, result
