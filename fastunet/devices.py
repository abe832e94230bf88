"""Which device and which precision a run takes."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """The device called ``name``; "auto" is the first GPU, or the CPU where there is none.

    Raises: ValueError if this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from None
    return device


def autocast_dtype(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """The dtype for autocast on ``device``, None for float32.

    "auto" is bfloat16 where the processor multiplies it natively (AVX-512 BF16 or AMX, NVIDIA
    compute capability 8.0 and later), float32 elsewhere, where it would cost time.

    Raises: ValueError for an unknown precision.
    """
    if precision == "auto":
        return torch.bfloat16 if _gains_from_bfloat16(device) else None
    if precision not in PRECISIONS:
        want = ", ".join(["auto", *PRECISIONS])
        raise ValueError(f"precision must be one of {want}, got {precision!r}")
    return PRECISIONS[precision]


def autocast(
    device: torch.device, dtype: torch.dtype | None, *, cached: bool = True
) -> AbstractContextManager[object]:
    """The autocast context for ``dtype``, which may keep converted weights; none for None."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=cached)


@contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """PyTorch's deterministic algorithms alone; where there is none, an error."""
    if not on:
        yield
        return
    # cuBLAS reads it when it is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _gains_from_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return any(
            getattr(torch.cpu, probe, bool)()
            for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    return False
