"""The quick cases, one test a contender, timed by pytest-benchmark: ``pytest --benchmark``."""

from functools import lru_cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import Case, Contender, dtype_name
from .checks import Judge, RefusedError
from .run import BENCHES, choose
from .timing import QUICK, Clock

SETTING = choose(quick=True)
TRIALS = [
    pytest.param(case, contender, id=f"{case.operator}: {case.name}: {contender.name}")
    for bench in BENCHES.values()
    for case in bench.cases(SETTING)
    for contender in case.contenders
]

# the contenders of a case follow one another, so its inputs are made once
judge_of = lru_cache(maxsize=1)(Judge)


@pytest.mark.parametrize(("case", "contender"), TRIALS)
def test_benchmark(benchmark: BenchmarkFixture, case: Case, contender: Contender) -> None:
    if contender.skip:
        pytest.skip(f"{contender.name}: {contender.skip}")
    try:
        trial = judge_of(case).admit(contender)
    except RefusedError as error:
        pytest.fail(f"{contender.name} is refused: {error}", pytrace=False)
    clock = Clock(SETTING.device_of(contender))
    repeats, sample_ms = clock.repeats(trial.call)

    def evict() -> None:
        clock.evict()
        clock.wait()

    def call() -> None:
        trial.call()
        clock.wait()

    benchmark.group = f"{case.operator}: {case.name}, {dtype_name(case.dtype)}"
    benchmark.extra_info["backend"] = trial.backend
    benchmark.pedantic(
        call,
        # pytest-benchmark prepares single calls only
        setup=evict if repeats == 1 else None,
        rounds=QUICK.rounds(sample_ms * len(case.contenders)),
        iterations=repeats,
    )
