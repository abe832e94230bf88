"""What ``fastunet bench`` prints: a table a case, why others took no part, what changed."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from . import record
from .cases import OURS
from .record import Row, digits

COLUMNS = ("contender", "ms", "p20 to p80", "speed-up", "rate", "ceiling")


def case(rows: Sequence[Row], console: Console) -> None:
    """The contenders that were timed, narrow enough for 80 columns."""
    timed = [row for row in rows if row.status == "timed"]
    if not timed:
        return
    title = f"{timed[0].operator}: {timed[0].case}, {timed[0].dtype}"
    for row in timed:
        if row.contender == OURS:
            # of several operators each is named; here is room for who they are
            served = sorted({part.rpartition(" ")[2] for part in row.backend.split(", ")})
            title += f"; {OURS} by {', '.join(served)}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for column in COLUMNS:
        table.add_column(f"{column} ", justify="right", no_wrap=True)
    for row in timed:
        _, contender, _, ms, _, *cells = (cell.replace(" to ", "-") for cell in row.cells())
        table.add_row(*(f"{cell} " for cell in (contender, ms, *cells)))
    console.print(table)


def changes(rows: list[Row], old: list[Row], path: Path, console: Console) -> None:
    """fastunet's rows against those of an older file, and how many medians agree with it."""
    for difference in record.moved(rows, old):
        console.print(f"not where {path} was measured: {difference}")
    found = record.changes(rows, old)
    ours = [change for change in found if change.row.contender == OURS]
    if not ours:
        console.print(f"{path} has no row of fastunet in common with this run")
        return
    table = Table("operator", "case", "ms before", "ms now", "times faster", title=f"since {path}")
    for change in ours:
        table.add_row(
            change.row.operator,
            f"{change.row.case}, {change.row.dtype}",
            digits(change.old.ms),
            digits(change.row.ms),
            f"{change.factor:.2f}x" + ("" if change.clear else ", p20 to p80 overlap"),
        )
    console.print(table)
    agree = sum(change.same for change in found)
    console.print(f"the intervals of {agree} of {len(found)} medians overlap with those of {path}")


def slow(rows: list[Row], console: Console) -> None:
    """Rows under what ``--fail-under`` asks for."""
    for row in rows:
        console.print(f"{row.operator}: {digits(row.speedup)}x ({row.case}, {row.dtype})")
