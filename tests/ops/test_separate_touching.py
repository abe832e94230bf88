"""separate_touching against the largest and smallest id of each window, by scipy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from fastunet import separate_touching
from fastunet.ops.weight_map import reference
from fastunet.ops.weight_map.reference import separate_touching_reference

Array = np.ndarray[Any, Any]
OPERATOR = torch.ops.fastunet.separate_touching
# whoever serves the device, and the fallback of all devices
SERVERS: dict[str, Callable[..., Any]] = {
    "registered": OPERATOR,
    "reference": separate_touching_reference,
}


def random_labels(shape: tuple[int, ...], seed: int) -> Array:
    """int64 blocks of cells that touch, some background and some negative ids."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(-1, 6, [-(-size // 4) for size in shape])
    for axis in range(len(shape)):
        coarse = coarse.repeat(4, axis)
    labels = coarse[tuple(slice(size) for size in shape)]
    return np.where(rng.random(shape) < 0.03, rng.integers(0, 9, shape), labels)


def exact(labels: Array, width: int) -> Array:
    window = 2 * width + 1
    cells = np.where(labels > 0, labels, 0)
    largest = ndimage.maximum_filter(cells, window, mode="constant", cval=0)
    nothing = labels.max(initial=0) + 1
    smallest = -ndimage.maximum_filter(
        np.where(labels > 0, -labels, -nothing), window, mode="constant", cval=-nothing
    )
    return np.where((labels > 0) & ((largest != labels) | (smallest != labels)), 0, labels)


def check(serve: Callable[..., Any]) -> None:
    shapes = [(1, 1, 1), (1, 1, 50), (1, 50, 1), (1, 37, 70), (9, 14, 20), (20, 1, 20)]
    for seed, shape in enumerate(shapes):
        labels = random_labels(shape, seed)
        for dtype in (torch.int32, torch.int64):
            # the lower halves of the 64-bit ids are all the same
            shift = 0 if dtype == torch.int32 else 32
            for width in (0, 1, 2, 3, 7, 1000):
                # filters wider than twice the volume see it whole in any case
                wanted = exact(labels, min(width, max(shape))) << shift
                tensor = torch.from_numpy(labels << shift).to(dtype)[None]
                carved = serve(tensor, width)
                assert carved.dtype == dtype
                np.testing.assert_array_equal(carved[0].numpy(), wanted)


@pytest.mark.parametrize("serve", SERVERS)
def test_forward(serve: str) -> None:
    check(SERVERS[serve])


def test_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows one pixel too narrow, and the smallest id of the window forgotten, are seen."""
    maximum = reference._window_maximum

    def narrower(values: Tensor, axis: int, width: int) -> Tensor:
        return maximum(values, axis, max(width - 1, 0))

    def only_largest(values: Tensor, axis: int, width: int) -> Tensor:
        return values if (values < 0).all() else maximum(values, axis, width)

    for mutant in (narrower, only_largest):
        monkeypatch.setattr(reference, "_window_maximum", mutant)
        with pytest.raises(AssertionError):
            check(separate_touching_reference)


def test_images_of_a_batch_are_apart(device: torch.device) -> None:
    labels = torch.from_numpy(random_labels((5, 30, 40), 1)).to(device)
    carved = separate_touching(labels, 2)
    assert torch.equal(carved, torch.stack([separate_touching(image, 2) for image in labels]))
    assert separate_touching(labels[:0]).shape == (0, 30, 40)
    assert separate_touching(labels[:, :0]).shape == (5, 0, 40)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.uint32, np.int32, np.int64])
def test_integer_types(dtype: type) -> None:
    labels: Array = np.abs(random_labels((30, 40), 2)).astype(dtype)
    carved = separate_touching(labels)
    assert isinstance(carved, np.ndarray)
    assert carved.dtype == labels.dtype
    np.testing.assert_array_equal(carved, exact(labels.astype(np.int64), 1))
    assert separate_touching(torch.from_numpy(labels)).dtype == torch.from_numpy(labels).dtype


def test_input_is_left_alone() -> None:
    labels = random_labels((30, 40), 3)
    before = labels.copy()
    separate_touching(labels)[:] = 7
    separate_touching(labels, 0)[:] = 7
    separate_touching(labels, 10**30)[:] = 7
    assert np.array_equal(labels, before)


def test_strides(device: torch.device) -> None:
    labels = torch.from_numpy(random_labels((60, 80), 4)).to(device)
    for view in (labels.T, labels[3:50:2, 5::3], labels[:1].expand(2, 60, 80)[:, ::7]):
        assert torch.equal(separate_touching(view), separate_touching(view.contiguous()))


def test_nuclei_have_a_gap(nuclei_folder: Path) -> None:
    touched = 0
    for path in sorted((nuclei_folder / "labels").glob("*.png"))[:40]:
        labels = np.asarray(Image.open(path)).astype(np.int32)
        touched += not np.array_equal(exact(labels, 1), labels)
        carved = separate_touching(labels)
        assert np.array_equal(exact(carved, 1), carved)
        # two nuclei of a pixel each may vanish together, whole populations may not
        assert (carved > 0).sum() > 0.8 * (labels > 0).sum()
    assert touched > 0


def test_registration(device: torch.device) -> None:
    labels = torch.from_numpy(random_labels((2, 9, 11), 5)).to(device)
    torch.library.opcheck(OPERATOR, (labels[:, None], 2))
    compiled = torch.compile(separate_touching, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(labels, 2), separate_touching(labels, 2))


LABELS = torch.zeros(4, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "labels must be of integer ids, got .* float32", (torch.ones(4, 4), 1)),
        (TypeError, "labels must be a torch.Tensor or numpy.ndarray, got list", ([[1]], 1)),
        (ValueError, r"labels must be \[H, W\] or \[B, H, W\], got \[1, 1, 4, 4\]",
         (LABELS[None, None], 1)),
        (ValueError, "width must be >= 0, got -1", (LABELS, -1)),
        (TypeError, "width must be an int, got float", (LABELS, 1.0)),
        (TypeError, "width must be an int, got bool", (LABELS, True)),
    ],
)  # fmt: skip
def test_rejects(error: type[Exception], message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=f"separate_touching: {message}"):
        separate_touching(*arguments)
