"""Copy and crop: the skip connection's centre beside the up-sampled features."""

from .op import crop_concat

__all__ = ["crop_concat"]
