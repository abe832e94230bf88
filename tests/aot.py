"""Compiles what a launch would launch, for GPUs that are not there, and reads the machine code.

``compiled(module)`` runs ``LAUNCHES`` of a module in a process for each GPU (Triton compiles or
interprets, one of them a process): functions that launch kernels on CPU tensors, which
nobody reads. Each launch compiles its kernel, specialised as on the GPU, and launches nothing.
"""

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# multiprocessors of an A100, H100 and B200
GPUS = {80: 108, 90: 132, 100: 148}
# as nvdisasm calls their machine code
ARCHITECTURES = {80: "SM80", 90: "SM90a", 100: "SM100a"}
INSTRUCTION_BYTES = 16
# a flag of a section of an ELF file
EXECUTABLE = 0x4
# shared memory that one program can have, in bytes
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Args:
        launch: which of ``LAUNCHES`` launched it.
        kernel: name of the Triton function.
        registers, spilled_bytes: a thread's.
        shared_bytes: a program's.
        sass: how often each instruction stands in the machine code, by its first name and by its
            name with the width, such as "LDG" and "LDG.128".
        ttgir, ptx: the code before that.
    """

    launch: str
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    stages: int
    sass: dict[str, int]
    ttgir: str
    ptx: str

    def loops(self) -> Iterator[str]:
        """The bodies of the innermost loops of the ttgir."""
        for body in re.findall(r"scf\.for [^\n]*\{\n(.*?)\n\s*scf\.yield", self.ttgir, re.DOTALL):
            yield body.rpartition("scf.for ")[2]


@cache
def compiled(module: str) -> dict[int, list[Compiled]]:
    """What each of ``module.LAUNCHES`` compiles to, for each of ``GPUS``."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = {
        capability: subprocess.Popen(
            [sys.executable, "-m", "tests.aot", module, str(capability)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for capability in GPUS
    }  # fmt: skip
    found = {}
    for capability, process in processes.items():
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
        found[capability] = [Compiled(**row) for row in json.loads(output)]
    return found


def table(kernels: list[Compiled], instructions: tuple[str, ...]) -> str:
    """Registers, shared memory and counts of ``instructions``, a line a kernel."""
    lines = [f"{'launch':44} {'kernel':28} regs spill shared " + " ".join(instructions)]
    for k in kernels:
        counts = " ".join(f"{k.sass.get(name, 0):{len(name)}}" for name in instructions)
        lines.append(
            f"{k.launch:44} {k.kernel:28} {k.registers:4} {k.spilled_bytes:5} "
            f"{k.shared_bytes:6} {counts}"
        )
    return "\n".join(lines)


def _main(module: str, capability: int) -> None:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fastunet.ops import _triton
    from fastunet.ops.conv_relu.tiles import Gpu

    class NoGpu:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(NoGpu())
    multiprocessors = GPUS[capability]
    _triton.gpu = lambda device: Gpu((capability // 10, capability % 10), multiprocessors)  # type: ignore[assignment]
    launch_of = JITFunction.run
    found: list[Any] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch_of(self, *args, grid=grid, warmup=True, **kwargs)
        if all(kernel is not other for other in found):
            found.append(kernel)
        # nothing that could be launched again

    JITFunction.run = run
    launches: list[str] = []
    for name, launch in import_module(module).LAUNCHES.items():
        with torch.no_grad():
            launch()
        launches += [name] * (len(found) - len(launches))
    listings = _disassembled([kernel.asm["cubin"] for kernel in found], ARCHITECTURES[capability])
    rows = [asdict(_read(*each)) for each in zip(launches, found, listings, strict=True)]
    json.dump(rows, sys.stdout)


def _tool(name: str, *arguments: str) -> str:
    """What one of the tools that Triton brings prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.check_output([str(path), *arguments], text=True)


def _code(cubin: bytes) -> bytes:
    """The machine code of an ELF file: its executable sections."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size)[2:] for i in range(count)]
    return b"".join(
        cubin[offset : offset + length]
        for flags, _, offset, length in sections
        if flags & EXECUTABLE
    )


def _disassembled(cubins: list[bytes], architecture: str) -> list[list[str]]:
    """The names of each one's instructions; all in one call, of which most is nvdisasm's start."""
    codes = [_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        listing = _tool("nvdisasm", "-ndf", "-b", architecture, file.name)
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)"
    names = iter(re.findall(pattern, listing, re.MULTILINE))
    found = [list(islice(names, len(code) // INSTRUCTION_BYTES)) for code in codes]
    assert sum(map(len, found)) * INSTRUCTION_BYTES == sum(map(len, codes))
    assert next(names, None) is None
    return found


def _read(launch: str, kernel: Any, instructions: list[str]) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    sass: dict[str, int] = {}
    for full in instructions:
        first = full.partition(".")[0]
        width = re.search(r"\.(64|128)(?=\.|$)", full)
        for name in {first, first + (width[0] if width else "")}:
            sass[name] = sass.get(name, 0) + 1
    return Compiled(
        launch=launch,
        kernel=kernel.metadata.name,
        registers=int(resources["REG"]),
        spilled_bytes=int(resources["STACK"]) + int(resources["LOCAL"]),
        shared_bytes=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        sass=sass,
        ttgir=kernel.asm["ttgir"],
        ptx=kernel.asm["ptx"],
    )


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
