"""Normalisation by the statistics of the batch or of each image, ReLU and pooled copy."""

from .op import Norm, norm_relu, unsupported, why_not

__all__ = ["Norm", "norm_relu", "unsupported", "why_not"]
