"""Tables of the rows in benchmarks/results: speeds for the project's README, and what was lost.

``python -m benchmarks.results`` writes them between the marks of README.md and of
benchmarks/results/README.md, and draws the charts anew.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fastunet.files import replacing

from . import plots, record
from .cases import OURS, RECORDED
from .figure import PAPER_SIZE
from .record import Row, digits
from .run import BENCHES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {ROOT / "README.md": "speeds", RESULTS / "README.md": "results"}
CHANNELS_LAST = "eager channels_last"

Case = list[Row]


def read(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """The rows of each file, by its name without ending."""
    return {path.stem: record.read(path) for path in sorted(folder.glob("*.json"))}


def section(kind: str, files: dict[str, list[Row]]) -> str:
    """What stands between the marks called ``kind``: "speeds" or "results"."""
    return speeds(files) if kind == "speeds" else details(files)


def speeds(files: dict[str, list[Row]]) -> str:
    """How many times faster fastunet is on each device: figure 1's network, and each operator."""
    parts = []
    for rows in files.values():
        cases = _cases(rows)
        paper = [case for case in cases if f" {PAPER_SIZE}x{PAPER_SIZE}, " in case[0].case]
        parts += [_where(rows), "", *_table([*_networks(paper), *_operators(cases)]), ""]
    return "\n".join([*parts, *_unmeasured(files)])


def details(files: dict[str, list[Row]]) -> str:
    """The network at every size, and every case in which another was faster, on each device."""
    parts = []
    for name, rows in files.items():
        cases = _cases(rows)
        lost = [(case, rival) for case in cases if (rival := _winner(case))]
        parts += [
            f"## {name}",
            "",
            f"{_where(rows)} [every row]({name}.md), charts in [{name}]({name}).",
            "",
            f"![Roofline of conv_relu]({name}/roofline-conv_relu.png)",
            "",
            *_table(_networks(cases)),
            "",
            f"In {len(lost)} of {len(cases)} cases another was faster, with intervals apart:",
            "",
            "| operator | case | dtype | fastunet, ms | faster | ms |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for case, rival in lost:
            ours = _of(case, OURS)
            assert ours is not None
            cells = (*ours.case_key, digits(ours.ms), rival.contender, digits(rival.ms))
            parts.append(record.line(cells))
        parts += ["", "Who took no part:", "", *(f"- {note}" for note in record.notes(rows)), ""]
    return "\n".join([*parts, *_unmeasured(files)])


def update(path: Path, kind: str, text: str) -> None:
    """Put ``text`` between the marks called ``kind`` of a page."""
    page = path.read_text(encoding="utf-8")
    with replacing(path) as temporary:
        temporary.write_text(with_section(page, kind, text), encoding="utf-8")


def with_section(page: str, kind: str, text: str) -> str:
    """``page`` with ``text`` between its marks.

    Raises: ValueError if they are not there.
    """
    begin, end = (f"<!-- {kind}: {word} -->" for word in ("written by make readme-table", "end"))
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def _networks(cases: Sequence[Case]) -> Iterable[tuple[str, ...]]:
    """A line of the table for each case of the network."""
    for case in cases:
        for name in (OURS, RECORDED):
            ours = _of(case, name)
            if ours is None or ours.operator != "unet":
                continue
            batch, _, rest = ours.case.partition(" x ")
            graph = ", CUDA graph" if name == RECORDED else ""
            channels, size, *_ = rest.split(", ")
            norm = " with batch norm" if channels.endswith(" with batch norm") else ""
            title = f"U-Net {ours.direction}{norm}{graph}, {batch} x {size}"
            yield f"{title}, {digits(ours.ms)} ms", ours.dtype, *_ratios([case], name)


def _operators(cases: Sequence[Case]) -> Iterable[tuple[str, ...]]:
    """A line of the table for all cases of an operator, a dtype and a direction."""
    for operator in BENCHES:
        of_operator = [case for case in cases if case[0].operator == operator != "unet"]
        for dtype, direction in dict.fromkeys((c[0].dtype, c[0].direction) for c in of_operator):
            found = [c for c in of_operator if (c[0].dtype, c[0].direction) == (dtype, direction)]
            title = ", ".join(filter(None, (f"`{operator}`", direction)))
            yield f"{title}, {len(found)} cases", dtype, *_ratios(found)


def _ratios(cases: list[Case], name: str = OURS) -> tuple[str, str, str]:
    """Over the baseline, over channels_last, over the fastest other."""
    baseline: list[float] = []
    channels_last: list[float] = []
    fastest: list[float] = []
    names = set()
    for case in cases:
        ours, best = _of(case, name), _fastest_other(case)
        assert ours is not None
        names.add(best.contender)
        for found, row in (
            (baseline, _of(case, ours.baseline)),
            (channels_last, _of(case, CHANNELS_LAST)),
            (fastest, best),
        ):
            if row is not None:
                found.append((row.ms or 0.0) / (ours.ms or 1.0))
    rival = f" {names.pop()}" if len(names) == 1 else ""
    return _spread(baseline), _spread(channels_last), _spread(fastest) + rival


def _spread(ratios: list[float]) -> str:
    """The geometric mean, and the least and the most of several."""
    if not ratios:
        return ""
    mean = digits(float(np.exp(np.log(ratios).mean())))
    return mean if len(ratios) == 1 else f"{mean} ({digits(min(ratios))} to {digits(max(ratios))})"


def _table(lines: Iterable[tuple[str, ...]]) -> list[str]:
    columns = (
        "",
        "dtype",
        "over eager or scipy",
        "over eager channels_last",
        "over the fastest other",
    )
    return [record.line(columns), record.line("---" for _ in columns), *map(record.line, lines)]


def _where(rows: Sequence[Row]) -> str:
    place = rows[0].environment
    parts = [place.device, f"{place.threads} threads", f"torch {place.torch}"]
    if place.driver:
        parts += [f"driver {place.driver}", f"Triton {place.triton}", f"TF32 {place.tf32}"]
    return f"{', '.join(parts)}, commit {record.commits(rows)}:"


def _unmeasured(files: dict[str, list[Row]]) -> Iterable[str]:
    """What no CPU and what no GPU has measured yet."""
    ours = [
        row
        for rows in files.values()
        for row in rows
        if row.ms is not None and row.contender == OURS
    ]
    for device, on_gpu in (("a CPU", False), ("a GPU", True)):
        measured = {row.operator for row in ours if bool(row.environment.driver) == on_gpu}
        missing = ", ".join(f"`{name}`" for name in BENCHES if name not in measured)
        if missing:
            yield f"Not measured on {device} yet: {missing}."
        elif on_gpu:
            yield f"Every operator and the network have been measured on {device}."


def _cases(rows: Sequence[Row]) -> list[Case]:
    """The rows that were timed, by case, of the cases in which fastunet was."""
    found: dict[tuple[str, str, str], Case] = {}
    for row in rows:
        if row.ms is not None:
            found.setdefault(row.case_key, []).append(row)
    return [case for case in found.values() if _of(case, OURS) and len(case) > 1]


def _of(case: Case, contender: str) -> Row | None:
    return next((row for row in case if row.contender == contender), None)


def _fastest_other(case: Case) -> Row:
    others = (row for row in case if row.contender not in (OURS, RECORDED))
    return min(others, key=lambda row: row.ms or 0.0)


def _winner(case: Case) -> Row | None:
    """The fastest other, if it is faster and the intervals of the medians are apart."""
    ours = _of(case, OURS)
    assert ours is not None
    best = _fastest_other(case)
    return best if (best.high_ms or 0.0) < (ours.low_ms or 0.0) else None


def main() -> int:
    """Write the sections and the charts."""
    files = read()
    for path, kind in PAGES.items():
        update(path, kind, section(kind, files))
    for name, rows in files.items():
        drawn = plots.draw(rows, RESULTS / name)
        for chart in (RESULTS / name).iterdir():
            # of rows that are gone
            if chart not in drawn:
                chart.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
