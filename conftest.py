"""``pytest --benchmark`` runs the benchmarks and nothing else; plain ``pytest`` runs none."""

import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "benchmarks" / "pytest_suite.py"


# as the console script does; before any hook runs, tests/conftest.py has imported torch
if "--benchmark" in sys.argv:
    from fastunet_command import spin_briefly

    spin_briefly()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        dest="run_benchmarks",
        help="run the quick benchmarks through pytest-benchmark, and no tests; choose with -k",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("run_benchmarks"):
        return
    if config.args_source == pytest.Config.ArgsSource.ARGS:
        raise pytest.UsageError(f"--benchmark takes no paths, got {config.args}; choose with -k")
    config.args = [str(SUITE)]
    # pyproject.toml turns it off for the tests
    config.option.benchmark_disable = False
