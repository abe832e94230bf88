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
# calls before any sample, unless they are slow: a GPU's clock rises, caches and branches are learnt
WARM_UPS = 3
SLOW_MS = 500.0
# what a GPU is kept busy while the host launches, in its own clock, which is slower or as fast
LEAST_HEAD_START_S, CYCLES_A_SECOND = 1e-3, 2e9
# sets of inputs that take turns on a GPU, at most
MOST_COPIES = 8
# how long the best of a ceiling is looked for
CEILING_SECONDS = 1.0
BOOTSTRAPS = 2000
# runs of consecutive rounds that are drawn together, since neighbours are alike
BLOCKS = 5
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Effort:
    """How long to measure one case, and the fewest and most rounds, each time it is visited."""

    seconds: float
    fewest: int
    most: int
    visits: int = 1

    def rounds(self, round_ms: float) -> int:
        """How many rounds of ``round_ms`` to measure."""
        return min(max(round(self.seconds * 1e3 / round_ms), self.fewest), self.most)


FULL = Effort(seconds=3.0, fewest=5, most=200)
# a GPU's clock is exact and nobody else's work is on it
FULL_GPU = Effort(seconds=0.5, fewest=10, most=100)
QUICK = Effort(seconds=0.6, fewest=3, most=40, visits=5)


@dataclass(frozen=True)
class Ceilings:
    """What this device did at best in this process: a large copy and a large matrix product."""

    copy_gb_s: float
    matmul_tflop_s: float


class Clock:
    """Times calls on one device.

    On a GPU a sample is one call between two events, after the L2 cache was overwritten. Its inputs
    are not those of the call before. On the CPU it is as many calls as make a millisecond, with
    warm caches.

    Args:
        launches_count: on a GPU, what the host takes to launch is part of the time. If not, the GPU
            is kept busy meanwhile, as it is inside a network.
    """

    def __init__(self, device: torch.device, launches_count: bool = False) -> None:
        self._device = device
        self._launches_count = launches_count
        self._launch_s = self._head_start_s = 0.0
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
            _scratch(self._device).zero_()
            if not self._launches_count:
                torch.cuda._sleep(int(self._head_start_s * CYCLES_A_SECOND))
            start.record()
            launching = time.perf_counter()
            call()
            self._launch_s = time.perf_counter() - launching
            end.record()
            end.synchronize()
        return start.elapsed_time(end)

    def copies(self, input_bytes: int) -> int:
        """How many sets of inputs take turns, so that none is in the L2 cache of a GPU any more."""
        if not self._on_gpu:
            return 1
        return min(1 + math.ceil(_cache_bytes(self._device) / max(input_bytes, 1)), MOST_COPIES)

    def warm_up(self, call: Callable[[], object]) -> tuple[int, float]:
        """How many calls make a sample, and about how many milliseconds that sample takes."""
        one, launch_s = self.sample(call, 1), self._launch_s
        for _ in range(WARM_UPS - 1 if one < SLOW_MS else 0):
            one, launch_s = min(one, self.sample(call, 1)), min(launch_s, self._launch_s)
        self._head_start_s = max(LEAST_HEAD_START_S, 2 * launch_s)
        repeats = 1 if self._on_gpu else math.ceil(SHORTEST_SAMPLE_MS / max(one, 1e-4))
        return repeats, one * repeats


def interleave(
    calls: Sequence[Callable[[], object]], clocks: Sequence[Clock], effort: Effort
) -> Samples:
    """Time ``calls``, which ran before, in rounds of each once, so that drift hits all alike.

    The order within a round is drawn anew, so that none always runs after the same other.

    Returns: [calls, rounds] milliseconds.
    """
    plans = [clock.warm_up(call) for call, clock in zip(calls, clocks, strict=True)]
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


def interval(samples: Samples) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    low, high = np.percentile(np.median(samples[_draws(len(samples))], axis=1), INTERVAL)
    return float(low), float(high)


def speedup(baseline: Samples, samples: Samples) -> tuple[float, float, float]:
    """How many times faster than ``baseline``, by medians, and the 95 % bootstrap interval.

    Rounds are drawn, not samples: both calls of a round saw the same state of the machine.
    """
    drawn = _draws(len(samples))
    ratios = np.median(baseline[drawn], axis=1) / np.median(samples[drawn], axis=1)
    low, high = np.percentile(ratios, INTERVAL)
    return float(np.median(baseline) / np.median(samples)), float(low), float(high)


@cache
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The copy rate, bytes read and written, and the matrix rate in ``dtype``, at their best."""
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
    before = torch.backends.cuda.matmul.allow_tf32
    # float32 convolutions may take TF32 where products may not
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        matmul_ms = _best(clock, lambda: torch.mm(left, right, out=product))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return Ceilings(2 * copied_bytes / copy_ms / 1e6, 2 * n**3 / matmul_ms / 1e9)


@cache
def _scratch(device: torch.device) -> torch.Tensor:
    """Four times as large as the L2 cache."""
    return torch.empty(4 * _cache_bytes(device), dtype=torch.int8, device=device)


def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def _draws(rounds: int) -> NDArray[np.int64]:
    """[BOOTSTRAPS, about rounds]: the rounds of each resampling; blocks, then rounds in them."""
    blocks = min(BLOCKS, rounds)
    random = np.random.default_rng(0)
    edges = np.linspace(0, rounds, blocks + 1).round().astype(np.int64)
    drawn = random.integers(blocks, size=(BOOTSTRAPS, blocks, 1))
    place = random.random((BOOTSTRAPS, blocks, math.ceil(rounds / blocks)))
    start, end = edges[drawn], edges[drawn + 1]
    return (start + place * (end - start)).astype(np.int64).reshape(BOOTSTRAPS, -1)


def _best(clock: Clock, call: Callable[[], Any]) -> float:
    """The least milliseconds of a call, in a second, since others may use the machine meanwhile."""
    call()
    until = time.monotonic() + CEILING_SECONDS
    least = clock.sample(call, 1)
    while time.monotonic() < until:
        least = min(least, clock.sample(call, 1))
    return least
