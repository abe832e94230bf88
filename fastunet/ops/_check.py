"""Argument checks whose messages name the operator, the argument, what was wanted and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor


def bad_value(operator: str, argument: str, want: str, got: object) -> ValueError:
    """The ValueError for an argument that has the right type and a value that cannot work."""
    return ValueError(f"{operator}: {argument} must be {want}, got {got}")


def bad_type(operator: str, argument: str, want: str, got: object) -> TypeError:
    """The TypeError for an argument of a type or dtype that cannot work."""
    return TypeError(f"{operator}: {argument} must be {want}, got {got}")


def describe(tensor: Tensor) -> str:
    """Shape and dtype, as error messages show them."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def check_tensor(operator: str, argument: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise bad_type(operator, argument, "a torch.Tensor", type(value).__name__)


def check_floating(operator: str, argument: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` holds floating-point numbers."""
    if not tensor.is_floating_point():
        raise bad_type(operator, argument, "floating point", describe(tensor))


def check_shape(operator: str, argument: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless ``tensor`` has exactly ``shape``."""
    if tensor.ndim != len(shape) or any(
        have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        raise bad_value(operator, argument, f"of shape {list(shape)}", describe(tensor))


def check_same_kind(
    operator: str, name: str, tensor: Tensor, other_name: str, other: Tensor
) -> None:
    """Raise unless both tensors share device and, outside autocast, dtype."""
    if tensor.device != other.device:
        raise bad_value(operator, name, f"on {other.device} as {other_name} is", tensor.device)
    if tensor.dtype != other.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise bad_type(operator, name, f"{other.dtype} as {other_name} is", tensor.dtype)
