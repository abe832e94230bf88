"""Checkpoints: one safetensors file that holds weights, optimiser state and how to go on.

Tensors are named ``model.<key>`` and ``optimizer.<parameter>.<name>``, and ``trained.<key>`` where
the network's weights are an average of those that are trained; the metadata holds the network's
arguments and the run's state as JSON. Nothing in it is code.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import replacing
from .unet import UNet

FORMAT = "fastunet-1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file."""


def save_checkpoint(
    path: Path,
    model: UNet,
    optimizer: torch.optim.Optimizer | None = None,
    state: dict[str, Any] | None = None,
    *,
    trained: UNet | None = None,
) -> None:
    """Write ``path`` whole or not at all.

    Args:
        path: the file, ending in .safetensors.
        model: the network, on any device.
        optimizer: its optimiser, to resume from.
        state: what else to resume from; JSON values.
        trained: the network to resume from, where ``model`` is an average of it.
    Raises: OSError, naming the file, if the disk refuses.
    """
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    if trained is not None:
        tensors |= {f"trained.{key}": value for key, value in trained.state_dict().items()}
    if optimizer is not None:
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{index}.{name}": value
                for name, value in values.items()
                if value is not None
            }
    metadata = {
        "format": FORMAT,
        "model": json.dumps(model.config),
        "state": json.dumps(state or {}),
    }
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(contiguous, temporary, metadata)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path}: cannot be written: {error}") from error


def load_model(path: str | Path, device: torch.device | str = "cpu", **options: Any) -> UNet:
    """The network in a checkpoint, in evaluation mode.

    Args:
        path: a file that ``fastunet train`` or ``fastunet convert`` wrote.
        device: where the network goes.
        options: further arguments for ``UNet``, such as ``ops``.
    Returns: the network with its weights.
    Raises: CheckpointError, a ValueError, if the file is missing, damaged or of another kind.
    """
    model, _, _ = load_checkpoint(Path(path), **options)
    return model.to(device).eval()


def load_checkpoint(
    path: Path, **options: Any
) -> tuple[UNet, dict[int, dict[str, Tensor]], dict[str, Any]]:
    """The network, the optimiser's tensors by parameter, and the run's state.

    Raises: CheckpointError if the file is missing, damaged or of another kind.
    """
    weights: dict[str, Tensor] = {}
    optimizer: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not a fastunet checkpoint ({FORMAT})")
            for key in file.keys():  # noqa: SIM118
                kind, _, rest = key.partition(".")
                if kind == "model":
                    weights[rest] = file.get_tensor(key)
                elif kind == "optimizer":
                    index, _, name = rest.partition(".")
                    optimizer.setdefault(int(index), {})[name] = file.get_tensor(key)
        model = UNet(**json.loads(metadata["model"]), **options)
        model.load_state_dict(weights)
        return model, optimizer, json.loads(metadata["state"])
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {error}") from error


def load_trained(path: Path) -> dict[str, Tensor]:
    """The weights that are trained in a checkpoint whose network is an average of them."""
    with safe_open(path, "pt") as file:
        keys = [key for key in file.keys() if key.startswith("trained.")]  # noqa: SIM118
        return {key.removeprefix("trained."): file.get_tensor(key) for key in keys}


def read_weights(path: Path) -> Any:
    """What a file of another program's weights holds; no code in it is run.

    Args:
        path: what ``torch.save`` wrote, or safetensors (ending in .safetensors).
    Returns: most often a mapping from keys to tensors, on the CPU.
    Raises: CheckpointError if the file is missing, damaged, of another kind, a checkpoint of
        fastunet already, or cannot be opened without running code.
    """
    try:
        if path.suffix.lower() != ".safetensors":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True)
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") == FORMAT:
                raise CheckpointError(f"{path}: is a fastunet checkpoint already")
        return load_file(path)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    # a damaged pickle can raise anything
    except Exception as error:
        reason = "damaged, or not a file of weights"
        name = re.search(r"\bGLOBAL (\S+)", str(error))
        if name or "TorchScript" in str(error):
            reason = (
                f"opening it would run code ({name[1] if name else 'TorchScript'}), which fastunet "
                "never does; wanted tensors alone, as torch.save(model.state_dict(), ...) writes"
            )
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[int, dict[str, Tensor]]
) -> None:
    """Give ``optimizer`` the tensors of a checkpoint, in its parameters' memory layout."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in tensors.items():
        parameter = parameters[index]
        optimizer.state[parameter] = {
            name: torch.empty_like(parameter).copy_(value)
            if value.shape == parameter.shape
            # fused optimisers count steps on the device
            else value.to(parameter.device, copy=True)
            for name, value in values.items()
        }
