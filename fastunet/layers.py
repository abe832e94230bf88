"""The arrows of figure 1: a class per kind."""

from types import ModuleType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops.conv_softmax.reference import first_largest

Answer = Literal["logit", "probability", "label"]
ANSWERS = get_args(Answer)


class ConvReLU(nn.Conv2d):
    """Blue arrow: 3x3 convolution and ReLU; batch normalisation between or after on request."""

    def __init__(
        self, c_in: int, c_out: int, padding: int, norm: str | None, ops: ModuleType
    ) -> None:
        super().__init__(c_in, c_out, 3, padding=padding)
        self.norm = nn.Identity() if norm is None else nn.BatchNorm2d(c_out)
        self.relu_first = norm == "batch-after"
        self.conv_relu, self.conv_norm_relu = ops.conv_relu, ops.conv_norm_relu

    def forward(self, x: Tensor, skip: Tensor | None = None, pool: bool = False) -> Any:
        """[B, C, H, W] to [B, C_out, H', W'], and its max-pooled copy on request."""
        if not self.relu_first:
            return self.conv_norm_relu(x, self, self.norm, skip=skip, pool=pool)
        padding = int(self.padding[0])
        y = self.norm(self.conv_relu(x, self.weight, self.bias, padding=padding, skip=skip))
        return (y, F.max_pool2d(y, 2)) if pool else y


class ConvPair(nn.Module):
    """Two blue arrows, followed by dropout at the end of the contracting path.

    Without normalisation the two are one operator, and their modules only hold the weights.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        padding: int,
        norm: str | None,
        ops: ModuleType,
        dropout: float = 0.0,
        c_mid: int | None = None,
    ) -> None:
        super().__init__()
        c_mid = c_mid or c_out
        self.conv1 = ConvReLU(c_in, c_mid, padding, norm, ops)
        self.conv2 = ConvReLU(c_mid, c_out, padding, norm, ops)
        self.dropout = nn.Dropout(dropout)
        self.padding = padding
        self.fused = norm is None
        self.conv_relu_pair = ops.conv_relu_pair

    def forward(self, x: Tensor, skip: Tensor | None = None, pool: bool = False) -> Any:
        """[B, C, H, W] to [B, C_out, H', W'], and its max-pooled copy (red arrow) on request."""
        drops = self.training and self.dropout.p > 0
        if self.fused:
            y = self.conv_relu_pair(
                x,
                self.conv1.weight,
                self.conv1.bias,
                self.conv2.weight,
                self.conv2.bias,
                padding=self.padding,
                skip=skip,
                pool=pool and not drops,
            )
        else:
            y = self.conv2(self.conv1(x, skip), pool=pool and not drops)
        if not drops:
            return y
        y = self.dropout(y)
        return (y, F.max_pool2d(y, 2)) if pool else y


class UpConv(nn.ConvTranspose2d):
    """Green arrow: 2x2 transposed convolution of stride 2, with a ReLU in the released network."""

    def __init__(self, c_in: int, c_out: int, relu: bool, ops: ModuleType) -> None:
        super().__init__(c_in, c_out, 2, stride=2)
        self.relu = relu
        self.up_conv = ops.up_conv

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[B, C, H, W] to [B, C_out, 2 H, 2 W]."""
        y = self.up_conv(x, self.weight, self.bias)
        return F.relu(y, inplace=True) if self.relu else y


class BilinearUp(nn.Conv2d):
    """Green arrow without learnt interpolation: 1x1 convolution, then bilinear up-sampling.

    The two commute; in this order the convolution has a quarter of the pixels.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C_out, 2 H, 2 W]."""
        return F.interpolate(super().forward(x), scale_factor=2, mode="bilinear")


class Head(nn.Conv2d):
    """Last arrow: 1x1 convolution to the classes, and what it says of them on request."""

    def __init__(self, c_in: int, n_classes: int, sigmoid: bool, ops: ModuleType) -> None:
        super().__init__(c_in, n_classes, 1)
        self.sigmoid = sigmoid
        self.conv_softmax, self.conv_argmax = ops.conv_softmax, ops.conv_argmax

    def forward(self, x: Tensor, output: Answer = "logit") -> Tensor:
        """[B, C, H, W] to [B, K, H, W], or to labels [B, H, W]."""
        if output != "logit" and not self.sigmoid and self.out_channels > 1:
            fused = self.conv_softmax if output == "probability" else self.conv_argmax
            return fused(x, self.weight, self.bias)
        y = super().forward(x)
        if output == "logit":
            return y.sigmoid() if self.sigmoid else y
        p = y.to(torch.promote_types(y.dtype, torch.float32)).sigmoid()
        return p if output == "probability" else decided(p)


def decided(p: Tensor) -> Tensor:
    """Labels [B, H, W] of probabilities [B, K, H, W]; one class is there above 0.5."""
    return (p[:, 0] > 0.5).to(torch.uint8) if p.shape[1] == 1 else first_largest(p)


def lowered(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The weights that autocast to ``dtype`` would convert in every call, converted once.

    For ``torch.func.functional_call``, which uses them instead of the model's own. None of a
    network with batch norm, whose weights are folded in float32.
    """
    if dtype is None or any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return {}
    return {
        name: value.to(dtype)
        for name, value in model.named_parameters()
        if value.dtype == torch.float32
    }
