"""Launches of the convolution's kernels for ``tests.aot``: every tile that can be chosen."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from fastunet_benchmarks.tune import problems
from torch import Tensor

from fastunet.ops._triton import gpu
from fastunet.ops.conv_relu import tiles
from fastunet.ops.conv_relu.tiles import Problem, Tile
from fastunet.ops.conv_relu.triton_gradients import (
    data_gradient,
    mask_gradient,
    sum_of_pixels,
    weight_gradient,
)
from fastunet.ops.conv_relu.triton_kernels import convolve
from fastunet.ops.up_conv.triton_kernels import up_convolve

CPU = torch.device("cpu")


def images(b: int, c: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(b, c, height, width, dtype=dtype, memory_format=torch.channels_last)


def _sources(problem: Problem, padding: int) -> list[Tensor]:
    height, width = (n + 2 - 2 * padding for n in (problem.height, problem.width))
    channels = [c for c in (problem.c_skip, problem.c) if c]
    return [images(problem.b, c, height, width, problem.dtype) for c in channels]


def forward(problem: Problem, tile: Tile) -> Callable[[], Any]:
    def launch() -> None:
        p, dtype = problem, problem.dtype
        weight = images(p.c_out, p.c_skip + p.c, 3, 3, dtype)
        y = images(p.b, p.c_out, p.height, p.width, dtype)
        pooled = images(p.b, p.c_out, p.height // 2, p.width // 2, dtype) if p.pool else None
        bias = torch.empty(p.c_out, dtype=dtype)
        convolve(_sources(p, 0), weight, bias, 0, y, tile, relu=True, pooled=pooled)

    return launch


def data(problem: Problem, tile: Tile) -> Callable[[], Any]:
    def launch() -> None:
        p, dtype = problem, problem.dtype
        masked, grad = _sources(p, 2)[-1], images(p.b, p.c_out, p.height, p.width, dtype)
        data_gradient(masked, images(p.c, p.c_out, 3, 3, dtype), 0, grad, tile, mask=grad)

    return launch


def weights(problem: Problem, tile: Tile) -> Callable[[], Any]:
    def launch() -> None:
        p = problem
        masked = images(p.b, p.c_out, p.height, p.width, p.dtype)
        weight_gradient(masked, _sources(p, 0), 0, tile, gpu(CPU).multiprocessors)

    return launch


def mask(dtype: torch.dtype, pool: bool) -> Callable[[], Any]:
    def launch() -> None:
        y, pooled = images(1, 64, 568, 568, dtype), images(1, 64, 284, 284, dtype)
        mask_gradient(y, pooled if pool else None, y, True)

    return launch


def up(c: int) -> Callable[[], Any]:
    def launch() -> None:
        x, y = images(1, c, 28, 28, torch.bfloat16), images(1, c // 2, 56, 56, torch.bfloat16)
        weight = images(c, c // 2, 2, 2, torch.bfloat16)
        up_convolve(x, weight, weight[0, :, 0, 0].contiguous(), y)

    return launch


LAUNCHERS = {"forward": forward, "data gradient": data, "weight gradient": weights}


def _launches() -> dict[str, Callable[[], Any]]:
    has_descriptors = gpu(CPU).capability[0] in tiles.DESCRIPTOR_MAJORS
    launches: dict[str, Callable[[], Any]] = {
        f"mask {dtype} {'pool' if pool else ''}": mask(dtype, pool)
        for dtype, pool in product((torch.bfloat16, torch.float32), (False, True))
    }
    launches["sum"] = lambda: sum_of_pixels(images(1, 64, 568, 568, torch.bfloat16))
    for c in (1024, 512, 256, 128) if has_descriptors else ():
        launches[f"up_conv {c}"] = up(c)
    seen = set()
    of_figure = [*problems(572, 1, torch.bfloat16), *problems(572, 1, torch.float32)]
    # those that also pool come first: they need the most registers
    for problem in sorted(of_figure, key=lambda problem: not problem.pool):
        for tile in tiles.candidates(problem):
            what = (tile, problem.kind, problem.c_skip > 0, problem.dtype)
            if what not in seen and (has_descriptors or tile.kernel == "pointer"):
                seen.add(what)
                block = f"{tile.block_n}x{tile.block_h}x{tile.block_w}x{tile.block_k}"
                name = f"{tile.kernel} {block} {problem.key}"
                launches[name] = LAUNCHERS[problem.kind](problem, tile)
    return launches


LAUNCHES = _launches()
