"""The native extension, and who serves which operator on which device."""

import ctypes
import importlib
import importlib.util
import re
import sys
import warnings
from dataclasses import dataclass

import torch

OPERATORS = (
    "conv_relu",
    "up_conv",
    "crop_concat",
    "conv_softmax",
    "conv_argmax",
    "weighted_cross_entropy",
    "weight_map",
    "separate_touching",
)
# who serves if it is not Python code, and if it is
DEVICES = {"cpu": ("cpp", "onednn"), "cuda": ("cuda", "triton")}

# Python code that calls a native kernel alone
BY_NATIVE = (("conv_softmax", "cpu"), ("conv_argmax", "cpu"))

# glibc's mallopt: names of parameters, and the size from which memory is mapped apart
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_BYTES = 1 << 30


@dataclass(frozen=True)
class Row:
    """Who serves ``operator`` on ``device``, and why nothing faster does."""

    operator: str
    device: str
    backend: str  # "reference", "cpp", "onednn", "triton" or "cuda"; and what serves beside
    why: str


def load_extension(name: str) -> str:
    """Import the extension module ``name``; return why it is not there, or "".

    A missing extension is normal; one that is there and does not load is worth a warning.
    """
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return "the native extension is not built"
        return _broken(name, error)
    except (ImportError, OSError, RuntimeError) as error:
        return _broken(name, error)
    return ""


def _broken(name: str, error: Exception) -> str:
    why = f"the native extension does not load: {error}"
    warnings.warn(f"{name}: {why}; PyTorch's own operators serve", RuntimeWarning, stacklevel=4)
    return why


EXTENSION_MISSING = load_extension("fastunet._C")


def report() -> list[Row]:
    """Who serves each public operator on each device, as the dispatcher has it registered.

    Returns: one row an operator and device. ``why`` is empty where a kernel serves.
    """
    return [_row(operator, device) for operator in OPERATORS for device in DEVICES]


def _row(operator: str, device: str) -> Row:
    registered = torch._C._dispatch_dump(f"fastunet::{operator}")
    key = device.upper()
    kernel = re.search(rf"^{key}: registered at (.+?):\d+", registered, re.MULTILINE)
    if kernel is None:
        return Row(operator, device, "reference", _why_reference(device))
    native, python = DEVICES[device]
    is_python = kernel[1].endswith(".py") and (operator, device) not in BY_NATIVE
    backend = python if is_python else native
    return Row(operator, device, backend + _beside(operator, device), "")


def _beside(operator: str, device: str) -> str:
    """What serves beside the backend that is registered."""
    # operators are registered after this module is loaded
    from .ops import _amx
    from .ops.conv_relu import winograd_rule

    of_gpus = {"conv_relu": ", cudnn", "up_conv": ", gradients by cudnn"}
    if device == "cuda":
        return of_gpus.get(operator, "")
    if operator == "up_conv":
        return ", gradients by matrix products"
    amx = "" if _amx.why_not_here() else ", amx for bfloat16"
    if operator in ("conv_softmax", "conv_argmax"):
        return amx
    if operator != "conv_relu":
        return ""
    winograd = "" if winograd_rule.why_not_here() else ", Winograd F(4x4, 3x3) for float32"
    return winograd + amx


def _why_reference(device: str) -> str:
    reasons = [EXTENSION_MISSING]
    if device == "cuda":
        if not torch.cuda.is_available():
            reasons.append("no GPU that this torch can use")
        if importlib.util.find_spec("triton") is None:
            reasons.append("Triton is not installed")
    return "; ".join(filter(None, reasons)) or "no kernel for it yet"


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for later tensors of this process.

    Otherwise every large activation is returned to the system and its pages are faulted in again
    by the next one. For processes that are ours, such as the command line's: the setting is
    the whole process's.

    Returns: whether it was done; False without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    largest = 2**31 - 1
    return bool(
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES) and libc.mallopt(_M_TRIM_THRESHOLD, largest)
    )
