"""The 2x2 up-convolution."""

from .op import up_conv

__all__ = ["up_conv"]
