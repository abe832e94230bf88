"""The 1x1 convolution that ends the network, with the softmax or argmax over its outputs."""

from .op import conv_argmax, conv_softmax

__all__ = ["conv_argmax", "conv_softmax"]
