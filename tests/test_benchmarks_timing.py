"""How benchmarks time: clocks, rounds that take turns, intervals."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import timing
from benchmarks.timing import (
    Clock,
    Effort,
    interleave,
    interval,
    measure_ceilings,
    speedup,
    summary,
)

CPU = torch.device("cpu")


class DriftingClock(Clock):
    """A machine that gets slower with every sample; ``speed`` is that of one contender."""

    seconds = 1.0

    def __init__(self, speed: float, log: list[float]) -> None:
        super().__init__(CPU)
        self.speed, self.log = speed, log

    def sample(self, call: Callable[[], object], repeats: int) -> float:
        self.log.append(self.speed)
        return (1 + len(self.log) / 20) / self.speed


def test_interleaving_spreads_drift() -> None:
    log: list[float] = []
    clocks = [DriftingClock(speed, log) for speed in (1.0, 2.0, 4.0)]
    samples = interleave([lambda: None] * 3, clocks, Effort(1e-6, fewest=40, most=99))
    assert samples.shape == (3, 40)
    rounds = np.array(log[-120:]).reshape(40, 3)
    assert (np.sort(rounds) == (1.0, 2.0, 4.0)).all()
    assert len({tuple(order) for order in rounds}) > 1
    # one after the other, the last would have come out at less than half of its speed
    ratio, low, high = speedup(samples[0], samples[2])
    assert low <= 4 <= high
    assert ratio == pytest.approx(4, rel=0.05)


def test_speedup_of_noise_holds_one() -> None:
    noise = np.random.default_rng(0).lognormal(0, 0.2, (2, 50))
    ratio, low, high = speedup(noise[0], noise[1])
    assert low < 1 < high
    assert low < ratio < high
    assert speedup(noise[0], noise[0]) == (1, 1, 1)


def test_summary() -> None:
    assert summary(np.linspace(0, 100, 101)) == (50, 20, 80)


def test_clock(device: torch.device) -> None:
    clock = Clock(device)
    # the small one takes one thread, which a busy machine does not hold up every time
    small, large = (torch.ones(n, device=device) for n in (1 << 10, 1 << 24))
    few, many = (
        min(clock.sample(partial(x.add_, 1), 1) for _ in range(20)) for x in (small, large)
    )
    assert 0 < few < many / 4
    repeats, _ = clock.warm_up(lambda: small.add_(1))
    assert repeats == 1 if device.type == "cuda" else repeats > 1
    ceilings = measure_ceilings(device, torch.float32)
    copied = torch.empty_like(large)
    copy_ms = min(clock.sample(lambda: copied.copy_(large), 1) for _ in range(5))
    assert 0.2 < 2 * large.nbytes / copy_ms / 1e6 / ceilings.copy_gb_s < 5


def test_intervals_hold_what_changes_between_visits() -> None:
    random = np.random.default_rng(0)
    # five visits of 20 rounds, whose levels differ by more than their rounds
    levels = np.repeat([1.0, 1.02, 1.05, 1.06, 1.1], 20)
    low, high = interval(levels + random.normal(0, 0.001, 100))
    assert low < 1.02 < 1.06 < high
    level = interval(1 + random.normal(0, 0.001, 100))
    assert level[1] - level[0] < 0.002
    assert interval(np.array([3.0])) == (3, 3)


@pytest.mark.parametrize(("input_bytes", "copies"), [(0, 8), (50 << 20, 2), (1 << 30, 2)])
def test_gpu_inputs_take_turns(
    monkeypatch: pytest.MonkeyPatch, input_bytes: int, copies: int
) -> None:
    monkeypatch.setattr(timing, "_cache_bytes", lambda device: 50 << 20)
    assert Clock(torch.device("cuda")).copies(input_bytes) == copies
    assert Clock(CPU).copies(input_bytes) == 1


def test_gpu_sample_is_one_call_with_a_cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, other: "Event") -> float:
            return 0.25

    class Scratch:
        def zero_(self) -> None:
            log.append("evict")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(timing, "_scratch", lambda device: Scratch())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("busy"))
    clock = Clock(torch.device("cuda"))
    assert clock.sample(lambda: log.append("call"), 5) == 0.25
    assert log == ["evict", "busy", "event", "call", "event", "synchronize"]
    del log[:]
    Clock(torch.device("cuda"), launches_count=True).sample(lambda: log.append("call"), 5)
    assert log == ["evict", "event", "call", "event", "synchronize"]
    assert clock.warm_up(lambda: log.append("call")) == (1, 0.25)
