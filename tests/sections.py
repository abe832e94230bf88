"""Synthetic sections and a network small enough for tests."""

import numpy as np

from fastunet import UNet, separate_touching
from fastunet.data import Section, standardise
from fastunet.synthetic import cells
from fastunet.train import Config


def section(seed: int = 0, size: int = 96) -> Section:
    image, labels = cells(size=(size, size), count=6, seed=seed)
    ids = separate_touching(labels.astype(np.int32))
    return Section(f"page {seed}", standardise(image[None]), (ids > 0).astype(np.uint8), ids)


def small_model(**options: float) -> UNet:
    return UNet(1, 2, widths=(4, 8, 16), **options)  # type: ignore[arg-type]


def small_config(**options: object) -> Config:
    settings = {"steps": 8, "tile": 60, "validate_every": 3, "lr": 1e-3, "precision": "float32"}
    return Config(**{**settings, **options})  # type: ignore[arg-type]
