"""What launching a Triton kernel needs to know of the GPU. Imported only where Triton is."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Gpu:
    """A GPU as the choice of a kernel sees it.

    Args:
        capability: compute capability, (9, 0) for Hopper; (0, 0) where it is not NVIDIA's.
        multiprocessors: how many programs run at once, if each fills one.
    """

    capability: tuple[int, int]
    multiprocessors: int


@cache
def gpu(device: torch.device) -> Gpu:
    """The properties of ``device``; those of a small Hopper where kernels are interpreted."""
    if device.type != "cuda":
        return Gpu((9, 0), 4)
    properties = torch.cuda.get_device_properties(device)
    capability = (0, 0) if torch.version.hip else (properties.major, properties.minor)
    return Gpu(capability, properties.multi_processor_count)
