"""The committed rows, and the tables that are made of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import record, results
from benchmarks.cases import OURS
from benchmarks.record import Environment, Row
from benchmarks.run import BENCHES

PLACE = Environment("abc1234", "Processor", None, "2.13.0", "3.6.0", 2, "off")
GPU = replace(PLACE, device="NVIDIA H100", driver="580.1")


def row(contender: str, ms: float, **values: object) -> Row:
    known: dict[str, object] = {
        "operator": "conv_relu",
        "case": "1 x 1 -> 64, 572x572, forward",
        "dtype": "float32",
        "layout": "contiguous",
        "environment": PLACE,
        "baseline": "eager",
        "status": "timed",
        "ms": ms,
        "low_ms": 0.98 * ms,
        "high_ms": 1.02 * ms,
    }
    return Row(contender=contender, **{**known, **values})  # type: ignore[arg-type]


def case(ms: dict[str, float], **values: object) -> list[Row]:
    return [row(contender, each, **values) for contender, each in ms.items()]


WON = case({"eager": 4.0, "eager channels_last": 3.0, OURS: 2.0})
LOST = case({"eager": 1.0, "torch.compile": 0.5, OURS: 1.0}, case="2 x 1 -> 64, 572x572, forward")
LEVEL = case({"eager": 1.0, OURS: 1.01}, case="3 x 1 -> 64, 572x572, forward")
NETWORK = case(
    {"eager": 9.0, "OpenVINO": 2.7, OURS: 3.0},
    operator="unet",
    case="1 x 64..1024 channels, 572x572, prediction",
)


def test_speeds() -> None:
    text = results.speeds({"processor": [*WON, *LOST, *NETWORK]})
    assert text.splitlines()[0] == "Processor, 2 threads, torch 2.13.0, commit abc1234:"
    network = "| U-Net prediction, 1 x 572x572, 3.00 ms | float32 | 3.00 |  | 0.900 OpenVINO |"
    assert network in text
    operator = "| `conv_relu`, forward, 2 cases | float32 | 1.41 (1.00 to 2.00) | 1.50 | "
    assert operator + "0.866 (0.500 to 1.50) |" in text


def test_losses_are_listed() -> None:
    refused = replace(row(OURS, 1.0, case="4"), ms=None, status="refused", reason="off by 3")
    text = results.details({"processor": [*WON, *LOST, *LEVEL, refused]})
    assert "In 1 of 3 cases another was faster" in text
    lost = "| conv_relu | 2 x 1 -> 64, 572x572, forward | float32 | 1.00 | torch.compile | 0.500 |"
    assert lost in text
    assert "- conv_relu: fastunet refused: off by 3 (4)" in text


def test_says_what_was_not_measured() -> None:
    every = ", ".join(f"`{name}`" for name in BENCHES)
    assert results.speeds({"cpu": WON}).endswith(f"Not measured on a GPU yet: {every}.")
    on_gpu = [replace(each, environment=GPU) for each in WON]
    last = results.speeds({"cpu": WON, "gpu": on_gpu}).splitlines()[-1]
    assert "`conv_relu`," not in last
    assert "`unet`" in last
    assert "Not measured on a CPU yet: `conv_relu_pair`," in results.speeds({"cpu": WON})
    whole = [replace(each, operator=name) for name in BENCHES for each in WON]
    assert "a CPU" not in results.speeds({"cpu": whole})
    skipped = [replace(each, ms=None, status="refused") for each in on_gpu]
    assert results.speeds({"cpu": WON, "gpu": [*on_gpu[:1], *skipped]}).endswith(f"{every}.")


def test_sections() -> None:
    page = "a\n<!-- speeds: written by make readme-table -->\nold\n<!-- speeds: end -->\nb\n"
    new = results.with_section(page, "speeds", "new")
    assert new == page.replace("old", "new")
    with pytest.raises(ValueError, match="the page has no <!-- speeds"):
        results.with_section("a", "speeds", "new")


def test_pages_are_current() -> None:
    files = results.read()
    for path, kind in results.PAGES.items():
        page = path.read_text(encoding="utf-8")
        text = results.section(kind, files)
        assert results.with_section(page, kind, text) == page, "stale: make readme-table"


def test_committed_rows_are_whole() -> None:
    files = results.read()
    assert files
    for name, rows in files.items():
        measured = {each.operator for each in rows}
        # the pages name what is missing
        assert measured <= set(BENCHES)
        for each in rows:
            assert record.slug(each.environment) == name
            assert "dirty" not in each.environment.commit
            assert each.status == "timed" or each.reason
            assert each.environment.driver or not each.environment.device.startswith("NVIDIA")
        folder = results.RESULTS / name
        assert {chart.name for chart in folder.glob("speedup-*")} == {
            f"speedup-{each.operator}-{each.dtype}{suffix}"
            for each in rows
            if each.ms
            for suffix in (".png", ".svg")
        }
        assert all(chart.stat().st_size > 10_000 for chart in folder.iterdir())
        table = results.RESULTS / f"{name}.md"
        assert table.read_text(encoding="utf-8") == record.markdown(rows)


def test_update_keeps_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = "<!-- speeds: written by make readme-table -->", "<!-- speeds: end -->"
    page.write_text(f"before\n{begin}{end}after")
    results.update(page, "speeds", "text")
    assert page.read_text() == f"before\n{begin}\ntext\n{end}after"
