"""Charts of the rows: speed-ups by operator, and the roofline."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastunet.files import replacing

from .cases import OURS
from .record import Row, digits, flop_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
OURS_COLOUR = "#d1495b"
OTHER_COLOURS = ("#5f6b7a", "#9aa7b5", "#7fb0b2", "#c8b889")


def require() -> None:
    """Raise ModuleNotFoundError, saying what to install, where there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'fastunet[plot]'")


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Write ``speedup-<operator>`` for each operator and ``roofline``, as PNG and SVG.

    Returns: the files. Rows that were not timed are left out, and so is a chart without rows.
    """
    timed = [row for row in rows if row.ms is not None]
    figures = {
        f"speedup-{operator}": speedups([row for row in timed if row.operator == operator])
        for operator in dict.fromkeys(row.operator for row in timed)
    }
    counted = [row for row in timed if row.gb_s and row.tflop_s]
    if counted:
        figures["roofline"] = roofline(counted)
    paths = [folder / f"{name}.{suffix}" for name in figures for suffix in FORMATS]
    for path in paths:
        with replacing(path) as temporary:
            figures[path.stem].savefig(temporary, dpi=150, bbox_inches="tight")
    return paths


def speedups(rows: list[Row]) -> "Figure":
    """A bar a row, as long as its speed-up, with its interval; the time stands beside it."""
    from matplotlib.figure import Figure

    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.case}\n{row.dtype}", []).append(row)
    figure = Figure(figsize=(9, 1.2 + 0.25 * (len(rows) + len(groups))))
    axes = figure.subplots()
    colours, ticks, y = _colours(rows), [], 0
    for group in groups.values():
        ticks.append(y + (len(group) - 1) / 2)
        for row in group:
            low, high = row.speedup_low or 0.0, row.speedup_high or 0.0
            axes.barh(y, row.speedup or 0.0, color=colours[row.contender])
            axes.plot((low, high), (y, y), color="black", linewidth=1)
            axes.text(high, y, f"  {digits(row.ms)} ms", va="center", fontsize=8)
            y += 1
        y += 1
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(ticks, list(groups), fontsize=8)
    axes.set_xlabel(f"times faster than {rows[0].baseline}; the line is the 95 % interval")
    axes.set_xlim(0, 1.15 * max(row.speedup_high or 0.0 for row in rows))
    axes.set_ylim(y - 1, -1)
    _legend(axes, colours, rows[0])
    return figure


def roofline(rows: list[Row]) -> "Figure":
    """Each row's rate over its operations a byte, under what copying and multiplying allow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5))
    axes = figure.subplots()
    colours = _colours(rows)
    key: list[str] = []
    for row in rows:
        ours = row.contender == OURS
        at = (_intensity(row), row.tflop_s or 0.0)
        size, marker = (11, "o") if ours else (6, "x")
        colour = colours[row.contender]
        axes.plot(*at, marker=marker, markersize=size, color=colour, alpha=0.8, zorder=3 + ours)
        if ours:
            key.append(f"{len(key) + 1}  {row.case}, {row.dtype}")
            axes.annotate(
                f"{len(key)}", at, ha="center", va="center", fontsize=7, color="white", zorder=5
            )
    left, right = (f(_intensity(row) for row in rows) for f in (min, max))
    for dtype, (copy_gb_s, matmul_tflop_s) in _ceilings(rows).items():
        ridge = matmul_tflop_s * 1e3 / copy_gb_s
        x = (min(left, ridge) / 2, ridge, max(right, ridge) * 2)
        y = [min(intensity * copy_gb_s / 1e3, matmul_tflop_s) for intensity in x]
        axes.plot(x, y, color="black", linewidth=1)
        text = f"{dtype}: {digits(copy_gb_s)} GB/s, {flop_rate(matmul_tflop_s)}"
        axes.annotate(text, (ridge, y[1]), (0, 5), textcoords="offset points", fontsize=8)
    axes.loglog()
    axes.set_ylim(min(row.tflop_s or 0.0 for row in rows) / 2, 2 * axes.get_ylim()[1])
    axes.grid(which="both", alpha=0.2)
    axes.set_xlabel("operations a byte (FLOP/B)")
    axes.set_ylabel("TFLOP/s")
    axes.text(1.02, 1, "\n".join(key), transform=axes.transAxes, va="top", fontsize=7)
    _legend(axes, colours, rows[0])
    return figure


def _legend(axes: "Axes", colours: dict[str, str], row: Row) -> None:
    from matplotlib.patches import Patch

    axes.set_title(
        f"{row.environment.device}, torch {row.environment.torch}", fontsize=9, loc="left", pad=24
    )
    axes.legend(
        [Patch(color=colour) for colour in colours.values()],
        list(colours),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(colours),
        fontsize=8,
        frameon=False,
    )


def _colours(rows: list[Row]) -> dict[str, str]:
    """A colour a contender, fastunet's always the same."""
    others = [name for name in dict.fromkeys(row.contender for row in rows) if name != OURS]
    return {
        **{name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(others)},
        OURS: OURS_COLOUR,
    }


def _intensity(row: Row) -> float:
    return (row.tflop_s or 0.0) * 1e3 / (row.gb_s or 1.0)


def _ceilings(rows: list[Row]) -> dict[str, tuple[float, float]]:
    return {row.dtype: (row.copy_gb_s or 0.0, row.matmul_tflop_s or 0.0) for row in rows}
