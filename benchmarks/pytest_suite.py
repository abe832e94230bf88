"""The quick cases, one test a contender, reported by pytest-benchmark: ``pytest --benchmark``.

pytest-benchmark would time one contender after the other. The contenders of a case are timed in
turns instead, as by ``fastunet bench``, and pytest-benchmark's clock reads those times.
"""

from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastunet.backends import keep_freed_memory

from .cases import Case, Contender, dtype_name
from .measure import Timing, time_cases
from .record import environment
from .run import choose, plan
from .timing import Samples

SETTING = choose(quick=True)
TRIALS = [
    pytest.param(case, contender, id=f"{case.operator}: {case.name}: {contender.name}")
    for case in plan((), SETTING)
    for contender in case.contenders
]


class Replay:
    """A clock that is read before and after each call, and tells the times that it was given."""

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, samples: Samples) -> None:
        """Let the next calls have taken ``samples`` milliseconds."""
        self._readings = (second for ms in samples for second in (0.0, ms / 1e3))

    def __call__(self) -> float:
        return next(self._readings)


REPLAY = Replay()


@pytest.fixture(scope="session")
def timings(request: pytest.FixtureRequest) -> dict[tuple[str, ...], Timing]:
    """By case and contender, of all cases of which a test was selected."""
    # as the command line's process does
    keep_freed_memory()
    cases: list[Case] = []
    for item in request.session.items:
        case = item.callspec.params["case"]  # type: ignore[attr-defined]
        if case not in cases:
            cases.append(case)
    return {
        (*case.key, timing.row.contender): timing
        for case, found in time_cases(cases, SETTING, environment(SETTING.device))
        for timing in found
    }


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(("case", "contender"), TRIALS)
def test_benchmark(
    benchmark: BenchmarkFixture,
    timings: dict[tuple[str, ...], Timing],
    case: Case,
    contender: Contender,
) -> None:
    timing = timings[(*case.key, contender.name)]
    if timing.row.status == "skipped":
        pytest.skip(f"{contender.name}: {timing.row.reason}")
    if timing.row.status != "timed":
        pytest.fail(f"{contender.name} {timing.row.status}: {timing.row.reason}", pytrace=False)
    benchmark.group = f"{case.operator}: {case.name}, {dtype_name(case.dtype)}"
    benchmark.extra_info.update(timing.row.flat())
    REPLAY.load(timing.samples)
    benchmark.pedantic(lambda: None, rounds=len(timing.samples))
