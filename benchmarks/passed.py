"""A pytest plugin: tests that passed before are not run again, so that a run can be cut off.

``pytest -p benchmarks.passed --passed=FILE`` adds each test that passes or is skipped to FILE.
"""

from pathlib import Path

import pytest

FILE = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed", type=Path, help="file with the tests that need not be run again")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FILE] = config.getoption("passed")
    config.stash[FILE].touch()
    config.pluginmanager.register(_Notes(config.stash[FILE]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    passed = set(config.stash[FILE].read_text().splitlines())
    again = [item for item in items if item.nodeid not in passed]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = again


class _Notes:
    """Writes a test down when its last phase is over and none has failed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid not in self._failed:
            with self._file.open("a") as file:
                file.write(f"{report.nodeid}\n")
