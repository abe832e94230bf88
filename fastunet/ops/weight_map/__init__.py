"""The border weight map of the U-Net paper, and the carving of touching cells."""

from .op import separate_touching, weight_map

__all__ = ["separate_touching", "weight_map"]
