"""Which kernel a convolution gets: the rule, the cache, and what fastunet tune lets in."""

import importlib.util
import json
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from fastunet_benchmarks import floors, tune
from rich.console import Console

from fastunet.ops.conv_relu import tiles
from fastunet.ops.conv_relu.tiles import Gpu, Problem, Tile

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

WIDE = Problem("forward", torch.bfloat16, 1, 0, 64, 64, 568, 568, pool=True)
TINY = Problem("forward", torch.float16, 1, 8, 8, 64, 8, 8, pool=True)
TILE = Tile("tma", 64, 8, 8, 64, 4, 2)


H200, A100, T4 = Gpu((9, 0), 132), Gpu((8, 0), 108), Gpu((7, 5), 40)


def test_rule() -> None:
    for gpu in (H200, Gpu((10, 0), 148)):
        tile = tiles.expected(WIDE, gpu)
        assert tile is not None
        assert tile.kernel == "tma"
    # less shared memory, or none of the instructions
    for gpu in (T4, A100, Gpu((12, 0), 170)):
        assert tiles.expected(WIDE, gpu) is None
    assert tiles.expected(replace(WIDE, c=63), H200) is None
    assert tiles.expected(replace(WIDE, c=1024, c_out=1024, pool=False), H200) == (
        tiles.LIBRARY_FUSED
    )
    first = tiles.expected(replace(WIDE, c=1), A100)
    assert first is not None
    assert first.kernel == "pointer"


def test_rule_of_gradients() -> None:
    weight = replace(WIDE, kind="weight gradient", pool=False)
    assert tiles.expected(weight, H200) is None
    data = replace(WIDE, kind="data gradient", pool=False, masked=True)
    assert tiles.expected(data, H200) is not None
    # without a pass to fuse, with few pixels or many channels the library is faster
    for other in (
        replace(data, masked=False),
        replace(data, height=280, width=280),
        replace(data, c=256),
    ):
        assert tiles.expected(other, H200) is None
        assert tiles.expected(replace(other, kind="forward"), H200) == tiles.LIBRARY_FUSED


@pytest.mark.parametrize(
    ("batch", "channels", "size", "pixels"),
    [(1, 128, 280, 128), (16, 128, 280, 256), (1, 512, 64, 128), (16, 512, 64, 256)],
)
def test_blocks_as_measured(batch: int, channels: int, size: int, pixels: int) -> None:
    """Large blocks where they keep all multiprocessors busy."""
    layer = (batch, 0, channels, channels, size, size)
    tile = tiles.expected(Problem("forward", torch.bfloat16, *layer, pool=True), H200)
    assert tile is not None
    assert tile.pixels == pixels


def test_blocks_cover_the_image_with_little_beyond_it() -> None:
    for problem in tune.problems(572, 1, torch.bfloat16):
        for tile in tiles.candidates(problem):
            if tile.kernel == "tma" and problem.kind != "weight gradient":
                rows = -(-problem.height // tile.block_h) * tile.block_h
                columns = -(-problem.width // tile.block_w) * tile.block_w
                assert rows * columns <= 1.5 * problem.height * problem.width, problem.key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_width_has_candidates(dtype: torch.dtype) -> None:
    for widths in ((1, 2, 3), (4, 8, 12), (5, 8, 64)):
        for problem in tune.problems(60, 1, dtype, widths):
            assert tiles.candidates(problem) or problem.kind == "weight gradient"
            for gpu in (A100, H200):
                tile = tiles.expected(problem, gpu)
                assert tile in (None, tiles.LIBRARY_FUSED, *tiles.candidates(problem))


def test_cache_comes_before_the_rule(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    path.write_text(tiles.text({WIDE.key: None, TINY.key: TILE}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached = tiles.read(path)
    assert tiles.choose(WIDE, H200, cached) is None
    assert tiles.choose(TINY, A100, cached) == TILE
    # other sizes were not measured
    other = replace(WIDE, height=570)
    assert tiles.choose(other, H200, cached) == tiles.expected(other, H200)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"tiles": 3}',
        '{"tiles": {"a": {"kernel": "tma"}}}',
        '{"tiles": {"a": {"kernel": "other", "block_n": 64}}}',
        json.dumps({"tiles": {"a": {**vars(TILE), "block_n": 63}}}),
        json.dumps({"tiles": {"a": {**vars(TILE), "more": 1}}}),
        "\0",
    ],
)
def test_corrupt_cache_is_ignored_with_one_warning(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    path.write_text(text)
    with pytest.warns(
        RuntimeWarning, match=r"cache\.json is not a cache of `fastunet tune`"
    ) as seen:
        assert tiles.read(path) == {}
    assert len(seen) == 1


def test_problems_are_those_of_the_network() -> None:
    found = list(tune.problems(572, 2, torch.bfloat16))
    assert len({problem.key for problem in found}) == len(found) == 3 * 18 - 1
    assert sum(problem.pool for problem in found) == 4
    assert {problem.b for problem in found} == {2}


@needs_triton
def test_measures_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = import_module("fastunet.ops.conv_relu.gpu")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(gpu, "_allows_tf32", lambda: True)
    wrong = replace(TILE, stages=1)
    convolve = gpu.convolve

    def sometimes_wrong(*args: Any, **kwargs: Any) -> None:
        convolve(*args, **kwargs)
        if wrong in args:
            args[4].add_(1)

    monkeypatch.setattr(gpu, "convolve", sometimes_wrong)
    broken = replace(TILE, block_n=48)
    monkeypatch.setattr(tiles, "candidates", lambda problem: [TILE, wrong, broken])
    library, right, *refused = tune.measure(TINY, device)
    assert library.tile is None
    for one in (library, right):
        assert one.ms is not None
        assert one.ms > 0
    for one in refused[:2]:
        assert one.ms is None
        assert one.refused


@needs_triton
@pytest.mark.parametrize("kind", ["data gradient", "weight gradient"])
def test_measures_gradients(kind: tiles.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = Problem(kind, torch.float16, 1, 0, 8, 16, 9, 9)
    tile = replace(TILE, block_h=1, block_w=16) if kind == "weight gradient" else TILE
    monkeypatch.setattr(tiles, "candidates", lambda problem: [tile])
    for one in tune.measure(problem, device):
        assert not one.refused


def test_library_stays_unless_clearly_slower() -> None:
    library = tune.Measurement(None, 1.0)
    level, faster = tune.Measurement(TILE, 0.99), tune.Measurement(TILE, 0.5)
    refused = tune.Measurement(TILE, None, "wrong")
    assert tune.fastest([library, level, refused]) is library
    assert tune.fastest([library, level, faster]) is faster
    assert tune.fastest([library]) is library


@needs_triton
def test_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "new" / "cache.json"
    monkeypatch.setattr(tiles, "cache_path", lambda device: path)
    seen: list[str] = []

    def measure(problem: Problem, device: torch.device) -> list[tune.Measurement]:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(problem.key)
        return [tune.Measurement(None, 1.0), tune.Measurement(TILE, 0.5)]

    monkeypatch.setattr(tune, "measure", measure)
    options: dict[str, Any] = {"dtypes": ["float32"], "size": 44, "batch": 1, "widths": (8, 16, 32)}
    with pytest.raises(KeyboardInterrupt):
        tune.tune(torch.device("cpu"), console=Console(quiet=True), **options)
    assert tiles.read(path) == dict.fromkeys(seen, TILE)
    monkeypatch.setattr(tune, "measure", lambda problem, device: [tune.Measurement(None, 1.0)])
    tune.tune(torch.device("cpu"), console=Console(quiet=True), **options)
    kept = tiles.read(path)
    assert {key: kept[key] for key in seen} == dict.fromkeys(seen, TILE)
    assert len(kept) == 3 * 10 - 1


def test_page_of_counts_is_current() -> None:
    page = Path(__file__).parents[1] / "docs" / "maths" / "conv_relu.md"
    assert floors.table() in page.read_text(encoding="utf-8")
