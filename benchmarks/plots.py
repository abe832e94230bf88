"""Charts of the rows: speed-ups by operator and dtype, and the roofline."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastunet.files import replacing

from .cases import OURS, RECORDED
from .record import Row, byte_rate, digits, flop_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
OURS_COLOUR = "#d1495b"
OTHER_COLOURS = {
    RECORDED: "#e8a0aa",
    "eager": "#5f6b7a",
    "eager channels_last": "#9aa7b5",
    "torch.compile": "#7fb0b2",
    "torch.compile max-autotune": "#3d7f82",
    "torch.compile freezing": "#3d7f82",
    "cudnn_convolution_relu": "#c8b889",
    "ONNX Runtime": "#c8b889",
    "OpenVINO": "#8a6fa8",
    "scipy, two smallest": "#5f6b7a",
    "scipy, two filters": "#5f6b7a",
    "scipy, sorted": "#9aa7b5",
    "edt, two smallest": "#7fb0b2",
    "cuCIM, two smallest": "#c8b889",
}
UNKNOWN_COLOUR = "#bbbbbb"
# a bar, and what stands around bars, in inches
BAR, MARGIN = 0.15, 1.3
# from this speed-up on, the axis is logarithmic
LOGARITHMIC = 20.0


def available() -> bool:
    """Whether there is matplotlib."""
    return find_spec("matplotlib") is not None


def require() -> None:
    """Raise ModuleNotFoundError, saying what to install, where there is no matplotlib."""
    if not available():
        raise ModuleNotFoundError("plots need matplotlib: pip install 'fastunet[plot]'")


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Write ``speedup-<operator>-<dtype>`` and ``roofline-<operator>``, as PNG and SVG.

    Returns: the files. Rows that were not timed are left out, and so is a chart without rows.
    """
    import matplotlib as mpl

    timed = [row for row in rows if row.ms is not None]
    figures = {
        f"speedup-{operator}-{dtype}": speedups(
            [row for row in timed if (row.operator, row.dtype) == (operator, dtype)]
        )
        for operator, dtype in dict.fromkeys((row.operator, row.dtype) for row in timed)
    }
    counted = [row for row in timed if row.gb_s and row.tflop_s]
    figures |= {
        f"roofline-{operator}": roofline([row for row in counted if row.operator == operator])
        for operator in dict.fromkeys(row.operator for row in counted)
    }
    paths = [folder / f"{name}.{suffix}" for name in figures for suffix in FORMATS]
    # equal rows give equal files
    with mpl.rc_context({"svg.hashsalt": "fastunet"}):
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            with replacing(path) as temporary:
                figures[path.stem].savefig(
                    temporary, dpi=110, bbox_inches="tight", metadata=metadata
                )
    return paths


def speedups(rows: list[Row]) -> "Figure":
    """A bar a row, as long as its speed-up, with its interval; the time stands beside it.

    Forward and backward, or prediction and training, have a panel each.
    """
    from matplotlib.figure import Figure

    panels = [
        [row for row in rows if row.direction == direction]
        for direction in dict.fromkeys(row.direction for row in rows)
    ]
    colours = _colours(rows)
    most = max(len(panel) + len({row.case for row in panel}) for panel in panels)
    figure = Figure(figsize=(6.5 * len(panels), MARGIN + BAR * most), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _bars(axes, panel, colours)
        # bars of all panels are as thick
        axes.set_ylim(most - 0.5, -1)
    _caption(figure, colours, rows, f"{rows[0].operator}, {rows[0].dtype}")
    return figure


def _bars(axes: "Axes", rows: list[Row], colours: dict[str, str]) -> None:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case.removesuffix(f", {row.direction}"), []).append(row)
    most = max(row.speedup or 0.0 for row in rows)
    # an interval that a busy machine stretched must not shrink the bars
    if most < LOGARITHMIC:
        axes.set_xlim(0, 1.25 * most)
    else:
        axes.set_xscale("log")
        axes.set_xlim(0.5 * min(row.speedup or 1.0 for row in rows), 3 * most)
        axes.xaxis.set_major_formatter("{x:g}")
    ticks, y = [], 0
    for group in groups.values():
        ticks.append(y + (len(group) - 1) / 2)
        for row in group:
            ratio, low, high = row.speedup or 0.0, row.speedup_low or 0.0, row.speedup_high or 0.0
            axes.barh(y, ratio, height=0.9, color=colours[row.contender])
            axes.plot((low, high), (y, y), color="black", linewidth=0.8)
            weight = "bold" if row.contender == OURS else "normal"
            at = min(max(high, ratio), axes.get_xlim()[1])
            axes.text(at, y, f"  {digits(row.ms)} ms", va="center", fontsize=7, weight=weight)
            y += 1
        y += 1
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(ticks, list(groups), fontsize=8)
    title = f"{rows[0].direction}\n" if rows[0].direction else ""
    axes.set_xlabel(
        f"{title}times faster than {rows[0].baseline}, with the 95 % interval", fontsize=8
    )
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def roofline(rows: list[Row]) -> "Figure":
    """Each row's rate over its operations a byte, under what copying and multiplying allow.

    A panel a dtype. fastunet's points are numbered as in the key beside them.
    """
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    colours = _colours(rows)
    panels = [[row for row in rows if row.dtype == dtype] for dtype in dtypes]
    numbers = {case: i for i, case in enumerate(dict.fromkeys(row.case for row in rows), 1)}
    key = [f"{number:>2}  {case}" for case, number in numbers.items()]
    height = max(5.0, MARGIN + 0.145 * len(key))
    figure = Figure(figsize=(6.5 * len(panels) + 3.5, height), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _roof(axes, panel, colours, numbers)
    axes.text(1.02, 1, "\n".join(key), transform=axes.transAxes, va="top", fontsize=7)
    _caption(figure, colours, rows, f"{rows[0].operator}, roofline")
    return figure


def _roof(axes: "Axes", rows: list[Row], colours: dict[str, str], numbers: dict[str, int]) -> None:
    from matplotlib.ticker import LogLocator

    for row in rows:
        ours = row.contender == OURS
        at = (_intensity(row), row.tflop_s or 0.0)
        size, marker = (11, "o") if ours else (5, "x")
        colour = colours[row.contender]
        axes.plot(*at, marker=marker, markersize=size, color=colour, alpha=0.75, zorder=3 + ours)
        if ours:
            axes.annotate(
                str(numbers[row.case]),
                at,
                ha="center",
                va="center",
                fontsize=6.5,
                color="white",
                zorder=5,
            )
    left, right = (f(_intensity(row) for row in rows) for f in (min, max))
    copy_gb_s = max(row.copy_gb_s or 0.0 for row in rows)
    matmul_tflop_s = max(row.matmul_tflop_s or 0.0 for row in rows)
    ridge = matmul_tflop_s * 1e3 / copy_gb_s
    x = (min(left, ridge) / 2, ridge, max(right, ridge) * 2)
    y = [min(intensity * copy_gb_s / 1e3, matmul_tflop_s) for intensity in x]
    axes.plot(x, y, color="black", linewidth=1)
    axes.loglog()
    axes.set_ylim(min(row.tflop_s or 0.0 for row in rows) / 2, 2 * axes.get_ylim()[1])
    axes.grid(which="both", alpha=0.2)
    axes.set_title(
        f"{rows[0].dtype}: copies {byte_rate(copy_gb_s)}, products {flop_rate(matmul_tflop_s)}",
        fontsize=9,
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(LogLocator(subs="all"))
        axis.set_minor_formatter("")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda value, _: flop_rate(value))
    axes.set_xlabel("operations a byte (FLOP/B)", fontsize=8)
    axes.tick_params(labelsize=8)


def _caption(figure: "Figure", colours: dict[str, str], rows: list[Row], title: str) -> None:
    from matplotlib.patches import Patch

    where = rows[0].environment
    figure.suptitle(
        f"{title}\n{where.device}, {where.threads} threads, torch {where.torch}", fontsize=10
    )
    figure.legend(
        [Patch(color=colour) for colour in colours.values()],
        list(colours),
        loc="outside lower center",
        ncols=min(len(colours), 4),
        fontsize=8,
        frameon=False,
    )


def _colours(rows: Iterable[Row]) -> dict[str, str]:
    """A colour a contender, the same in every chart, fastunet last."""
    others = [name for name in dict.fromkeys(row.contender for row in rows) if name != OURS]
    return {
        **{name: OTHER_COLOURS.get(name, UNKNOWN_COLOUR) for name in others},
        OURS: OURS_COLOUR,
    }


def _intensity(row: Row) -> float:
    return (row.tflop_s or 0.0) * 1e3 / (row.gb_s or 1.0)
