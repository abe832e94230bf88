"""Compiles what a launch would launch, for GPUs that are not there, and reads the machine code.

``compiled(module)`` runs ``LAUNCHES`` of a module in a process for each GPU (Triton compiles or
interprets, one of them a process): functions that launch kernels on CPU tensors, which
nobody reads. Each launch compiles its kernel, specialised as on the GPU, and launches nothing.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# multiprocessors of an A100, H100 and B200
GPUS = {80: 108, 90: 132, 100: 148}
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
    rows: list[dict[str, Any]] = []
    for name, launch in import_module(module).LAUNCHES.items():
        before = len(found)
        with torch.no_grad():
            launch()
        rows += [asdict(_read(name, kernel)) for kernel in found[before:]]
    json.dump(rows, sys.stdout)


def _read(launch: str, kernel: Any) -> Compiled:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run(
                [str(tools / tool), *flags, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    sass: dict[str, int] = {}
    for full in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", listing, re.M):
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
