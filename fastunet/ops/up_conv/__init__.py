"""The 2x2 up-convolution, with bias and ReLU."""

from .op import up_conv

__all__ = ["up_conv"]
