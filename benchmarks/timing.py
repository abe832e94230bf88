"""How a time is taken, and the ceilings that it is held against."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Samples = NDArray[np.float64]

# a sample shorter than this is mostly the clock and the scheduler
SHORTEST_SAMPLE_MS = 1.0
BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Effort:
    """How long to measure one case, and the fewest and most rounds."""

    seconds: float
    fewest: int
    most: int

    def rounds(self, round_ms: float) -> int:
        """How many rounds of ``round_ms`` to measure."""
        return min(max(round(self.seconds * 1e3 / round_ms), self.fewest), self.most)


FULL = Effort(seconds=5.0, fewest=15, most=200)
QUICK = Effort(seconds=0.6, fewest=7, most=50)


@dataclass(frozen=True)
class Ceilings:
    """What this device did at best in this process: a large copy and a large matrix product."""

    copy_gb_s: float
    matmul_tflop_s: float


class Clock:
    """Times calls on one device.

    On a GPU a sample is one call between two events, after the L2 cache was overwritten: that write
    also keeps the GPU busy while the host launches. On the CPU it is as many calls as make a
    millisecond, with warm caches.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"

    def sample(self, call: Callable[[], object], repeats: int) -> float:
        """Milliseconds of one ``call``, the mean of ``repeats`` in a row."""
        if self._on_gpu:
            return self._sample_gpu(call)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e3 / repeats

    def _sample_gpu(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self._device):
            self.evict()
            start.record()
            call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end)

    def evict(self) -> None:
        """Overwrite the L2 cache of a GPU."""
        if self._on_gpu:
            _scratch(self._device).zero_()

    def wait(self) -> None:
        """Wait until a GPU has done what it was given."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)

    def repeats(self, call: Callable[[], object]) -> tuple[int, float]:
        """How many calls make a sample, and about how many milliseconds that sample takes."""
        one = max(self.sample(call, 1), 1e-4)
        repeats = 1 if self._on_gpu else math.ceil(SHORTEST_SAMPLE_MS / one)
        return repeats, one * repeats


def interleave(
    calls: Sequence[Callable[[], object]], clocks: Sequence[Clock], effort: Effort
) -> Samples:
    """Time ``calls``, which ran before, in rounds of each once, so that drift hits all alike.

    The order within a round is drawn anew, so that none always runs after the same other.

    Returns: [calls, rounds] milliseconds.
    """
    plans = [clock.repeats(call) for call, clock in zip(calls, clocks, strict=True)]
    round_ms = sum(sample_ms for _, sample_ms in plans)
    samples = np.empty((len(calls), effort.rounds(round_ms)))
    order = np.random.default_rng(0)
    collects = gc.isenabled()
    gc.disable()
    try:
        for j in range(samples.shape[1]):
            for i in order.permutation(len(calls)):
                samples[i, j] = clocks[i].sample(calls[i], plans[i][0])
    finally:
        if collects:
            gc.enable()
    return samples


def summary(samples: Samples) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    median, p20, p80 = np.percentile(samples, (50, 20, 80))
    return float(median), float(p20), float(p80)


def speedup(baseline: Samples, samples: Samples) -> tuple[float, float, float]:
    """How many times faster than ``baseline``, by medians, and the 95 % bootstrap interval.

    Rounds are drawn, not samples: both calls of a round saw the same state of the machine.
    """
    rounds = len(samples)
    drawn = np.random.default_rng(0).integers(rounds, size=(BOOTSTRAPS, rounds))
    ratios = np.median(baseline[drawn], axis=1) / np.median(samples[drawn], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(np.median(baseline) / np.median(samples)), float(low), float(high)


@cache
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The copy rate, bytes read and written, and the matrix rate in ``dtype``; the best of 15."""
    clock = Clock(device)
    copied_bytes, n = (1 << 30, 8192) if device.type == "cuda" else (1 << 27, 1024)
    source = torch.ones(copied_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy_ms = _best(clock, lambda: target.copy_(source))
    left, right = (
        torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        for seed in (0, 1)
    )
    product = torch.empty_like(left)
    matmul_ms = _best(clock, lambda: torch.mm(left, right, out=product))
    return Ceilings(2 * copied_bytes / copy_ms / 1e6, 2 * n**3 / matmul_ms / 1e9)


@cache
def _scratch(device: torch.device) -> torch.Tensor:
    """Four times as large as the L2 cache."""
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(4 * cache_bytes, dtype=torch.int8, device=device)


def _best(clock: Clock, call: Callable[[], Any]) -> float:
    call()
    return min(clock.sample(call, 1) for _ in range(15))
