"""3x3 convolution + bias + ReLU, with the skip concatenation and the pooled copy folded in."""

from .op import conv3x3, conv_relu, conv_relu_pair
from .winograd_rule import use_winograd

__all__ = ["conv3x3", "conv_relu", "conv_relu_pair", "use_winograd"]
