"""The network of figure 1, whose ``forward`` reads as the figure does."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops as fused_ops
from .layers import ANSWERS, Answer, BilinearUp, ConvPair, Head, UpConv
from .ops._library import waits_for_python
from .ops.crop_concat.reference import centre_crop
from .recompute import made_again, others_keep, recomputed

PAPER_WIDTHS = (64, 128, 256, 512, 1024)
# devices whose memory runs out before their time does
RECOMPUTING = {"cuda"}


class UNet(nn.Module):
    """The U-Net of Ronneberger, Fischer and Brox.

    Args:
        in_channels: channels of an image.
        n_classes: channels of the output, one logit a class.
        widths: channels of each level, from the top; their number is that of the levels.
        padding: "valid" (the paper's; 572 pixels become 388) or "same" (as many as came in).
        norm: None (the paper's), "batch" for batch normalisation before each ReLU, "batch-after"
            for after it.
        up: "transpose" (the paper's 2x2 up-convolution), "bilinear" (with a 1x1 convolution), or
            "aligned": bilinear with aligned corners and without a convolution, where the pairs
            of the expanding path end with the channels of the next level; "same" padding only.
        dropout: probability at the end of the contracting path, in training.
        variant: "paper" is the figure; "release" the authors' published network, which has a ReLU
            after each up-convolution, twice the outputs in the last of them, the up-sampled
            features before the skip, and dropout after the last two pairs of the contracting path.
        odd: what becomes of sizes that do not halve evenly. None: "valid" refuses them, "same"
            mirrors the image up to one that does. "pad": up-sampled features get zeros up to the
            skip's size; "same" padding only. "crop": the skip is cropped, the output is smaller.
        activation: None for logits, or "sigmoid" for the probability of each class on its own.
        recompute: what is computed again in backward instead of being kept. True: all but what
            goes between the levels, a forward pass more. False: nothing. None: on a GPU large
            pooled copies and up-convolutions, which take little. The result is the same.
        ops: the module whose operators run, ``fastunet.ops`` or ``fastunet.ops.eager``.
    Raises: ValueError for arguments that cannot work.
    Source: Ronneberger et al. 2015, figure 1 and section 3 (initialisation).
    """

    def __init__(
        self,
        in_channels: int = 1,
        n_classes: int = 2,
        *,
        widths: Sequence[int] = PAPER_WIDTHS,
        padding: Literal["valid", "same"] = "valid",
        norm: Literal["batch", "batch-after"] | None = None,
        up: Literal["transpose", "bilinear", "aligned"] = "transpose",
        dropout: float = 0.5,
        variant: Literal["paper", "release"] = "paper",
        odd: Literal["pad", "crop"] | None = None,
        activation: Literal["sigmoid"] | None = None,
        recompute: bool | None = None,
        ops: ModuleType = fused_ops,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("padding", padding, ("valid", "same")),
            ("norm", norm, (None, "batch", "batch-after")),
            ("up", up, ("transpose", "bilinear", "aligned")),
            ("variant", variant, ("paper", "release")),
            ("odd", odd, (None, "pad", "crop")),
            ("activation", activation, (None, "sigmoid")),
        ):
            if value not in allowed:
                want = " or ".join(map(repr, allowed))
                raise ValueError(f"UNet: {name} must be {want}, got {value!r}")
        if padding == "valid" and (up == "aligned" or odd == "pad"):
            raise ValueError("UNet: padding must be 'same' for up='aligned' and odd='pad'")
        if up == "aligned" and variant == "release":
            raise ValueError("UNet: variant must be 'paper' for up='aligned'")
        widths = tuple(widths)
        for name, sizes in (
            ("in_channels", [in_channels]),
            ("n_classes", [n_classes]),
            ("widths", widths),
        ):
            if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
                raise ValueError(f"UNet: {name} must be positive integers, got {sizes}")
        if not 0 <= dropout < 1:
            raise ValueError(f"UNet: dropout must be within 0 <= dropout < 1, got {dropout}")

        self.in_channels, self.n_classes, self.widths = in_channels, n_classes, widths
        self.padding, self.norm, self.up, self.dropout = padding, norm, up, dropout
        self.variant, self.odd, self.activation = variant, odd, activation
        self.recompute = recompute
        self.levels = len(widths)
        release, pad = variant == "release", int(padding == "same")

        self.contracting = nn.ModuleList()
        c = in_channels
        for level, width in enumerate(widths):
            dropped = level >= self.levels - (2 if release else 1)
            self.contracting.append(ConvPair(c, width, pad, norm, ops, dropout if dropped else 0.0))
            c = width
        self.up_convs, self.expanding = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(self.levels - 1)):
            width = c_out = widths[level]
            c_up = widths[1] if release and level == 0 else width
            if up == "transpose":
                self.up_convs.append(UpConv(c, c_up, release, ops))
            elif up == "bilinear":
                self.up_convs.append(BilinearUp(c, c_up))
            else:
                aligned = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
                self.up_convs.append(aligned)
                c_up, c_out = c, widths[max(level - 1, 0)]
            self.expanding.append(ConvPair(width + c_up, c_out, pad, norm, ops, c_mid=width))
            c = c_out
        self.head = Head(c, n_classes, activation == "sigmoid", ops)
        self.reset_parameters()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this network again: ``UNet(**model.config)``."""
        names = (
            "in_channels", "n_classes", "padding", "norm", "up", "dropout", "variant", "odd",
            "activation",
        )  # fmt: skip
        return {"widths": list(self.widths), **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], **options: Any) -> "UNet":
        """The network that a state dict belongs to, with its weights.

        Known are the state dicts of this class and of three widely used PyTorch U-Nets, told by
        their keys: ``inc.double_conv.0.weight`` (n_channels, n_classes, bilinear),
        ``down_path.0.block.0.weight`` (in_channels, n_classes, depth, wf, padding, batch_norm,
        up_mode) and ``encoder1.enc1conv1.weight`` (in_channels, out_channels, init_features). The
        network computes what the original does in evaluation and in training.

        Args:
            state: tensors by key, also inside a checkpoint's "state_dict", "model" or the like;
                prefixes such as "module." are removed, entries that are no tensors ignored.
            options: further arguments for ``UNet``, above all those that weights do not tell, such
                as padding="same" for the second. Without them they are the original's defaults.
        Returns: a float32 network on the CPU, in training mode, as a new one is.
        Raises: TypeError if ``state`` is no mapping; ValueError, with the keys and shapes that do
            not fit the closest layout, if it is none of these.
        """
        # the other way round this module is the one that is imported
        from .compat import recognise

        config, weights = recognise(state, options)
        model = cls(**config)
        model.load_state_dict(weights)
        return model

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 2 / N), N the inputs of one neuron; biases are zero."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                taps = 1 if isinstance(module, nn.ConvTranspose2d) else module.weight[0, 0].numel()
                nn.init.normal_(module.weight, std=(2 / (taps * module.in_channels)) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, output: Answer = "logit") -> Tensor:
        """What the network says of images [B, in_channels, H, W].

        Args:
            x: images.
            output: "logit", which ``activation`` makes a probability, in the layers' dtype;
                "probability", by softmax, with ``activation`` or for one class by sigmoid, in
                float32 (float64 for a network of float64); or "label", the most probable class,
                of one class 1 where its probability is above 0.5. Of the last two a softmax is
                one operator with the head, which keeps no logits.
        Returns: [B, n_classes, H', W'], or labels [B, H', W'] uint8 (int32 for more than 256
            classes).

        H' is ``output_size(H)``: smaller by the margins for "valid", H for "same", which mirrors
        the bottom and right of an image up to a multiple of 2^(levels - 1) and crops the result,
        unless ``odd`` says otherwise.

        Raises: ValueError for another number of channels or output, and for a size that does not
            fit, with the nearest sizes that do.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"UNet: x must be [B, {self.in_channels}, H, W], got {list(x.shape)}")
        if output not in ANSWERS:
            want = " or ".join(map(repr, ANSWERS))
            raise ValueError(f"UNet: output must be {want}, got {output!r}")
        height, width = (self.output_size(n) for n in x.shape[2:])
        if self.padding == "same" and self.odd is None:
            x = self._mirror_to_grid(x)

        skips = []
        again: AbstractContextManager[None] = nullcontext()
        for pair in self.contracting[:-1]:
            with again:
                skip, x = self._run(pair, x, None, True)
            again = self._made_again(x, partial(F.max_pool2d, skip.detach(), 2))
            skips.append(skip)
        with again:
            x = self._run(self.contracting[-1], x)
        for up_conv, pair in zip(self.up_convs, self.expanding, strict=True):
            x = self._run(self._expand, up_conv, pair, x, skips.pop())
        y: Tensor = self.head(x, output)
        return y[..., :height, :width]

    def _expand(self, up_conv: nn.Module, pair: nn.Module, x: Tensor, skip: Tensor) -> Any:
        """One level of the expanding path."""
        below, x = x.detach(), up_conv(x)
        again = self._made_again(x, partial(up_conv, below))
        if self.odd == "pad":
            x = _pad_around(x, skip.shape[2], skip.shape[3])
        if self.variant == "release":
            # the released network's order: up-sampled features first
            x, skip = centre_crop(skip, x.shape[2], x.shape[3]), x
        with again:
            return pair(x, skip=skip)

    def _made_again(self, x: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[None]:
        """Within, ``x`` is not kept for backward but made again, where that is wanted."""
        # a compiler finds by itself what to keep
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or others_keep():
            return nullcontext()
        # what is small takes little memory, and may be made by other kernels than without gradients
        small = waits_for_python(x.numel(), x)
        wanted = self.recompute is None and x.device.type in RECOMPUTING and not small
        return made_again(x, make) if wanted else nullcontext()

    def _run(self, level: Callable[..., Any], *arguments: Any) -> Any:
        """One level of the network, computed again in backward on request."""
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self, level, *arguments)
        return level(*arguments)

    def output_size(self, size: int) -> int:
        """Height or width of the output for an input of ``size`` pixels.

        Raises: ValueError if ``size`` does not fit, with the nearest sizes that do.
        """
        if self.odd == "crop" and size >= self.smallest_size:
            size = size - (size - self.smallest_size) % self.grid
        if self.padding == "same":
            if size < self.grid:
                raise ValueError(f"UNet: x must be at least {self.grid} pixels, got {size}")
            return size
        if size >= self.smallest_size and (size - self.smallest_size) % self.grid == 0:
            return size - 2 * self.margin
        above = self.fitting_size(size)
        near = f"{above - self.grid} and {above}" if above > self.smallest_size else f"{above}"
        raise ValueError(
            f"UNet: x must have a height and width that fit unpadded convolutions, got {size} "
            f"pixels; the nearest that fit: {near}"
        )

    def fitting_size(self, size: int) -> int:
        """The smallest height or width that fits and is at least ``size`` pixels."""
        if self.padding == "same":
            size = max(size, self.grid)
            return size + -size % self.grid if self.odd == "crop" else size
        steps = max(0, -(-(size - self.smallest_size) // self.grid))
        return self.smallest_size + steps * self.grid

    @property
    def grid(self) -> int:
        """Pixels of one bottom-level pixel, 2^(levels - 1): the step of the pooling grid."""
        return 2 ** (self.levels - 1)

    @property
    def smallest_size(self) -> int:
        """The smallest height or width that fits."""
        if self.padding == "same":
            return self.grid
        # downwards every level loses 4 pixels and halves; upwards every level must keep one
        bottom = 5
        while self._output_of_bottom(bottom) < 1:
            bottom += 1
        size = bottom
        for _ in range(self.levels - 1):
            size = 2 * size + 4
        return size

    def _output_of_bottom(self, bottom: int) -> int:
        """Output size where the bottom level's input has ``bottom`` pixels; none below 1."""
        size = bottom - 4
        for _ in range(self.levels - 1):
            if size < 1:
                return 0
            size = 2 * size - 4
        return size

    @property
    def margin(self) -> int:
        """Pixels of context that an output pixel needs on each side: 92 for the paper's network.

        For "valid" it is what the output lost on each side; for "same" the largest distance over
        which an input pixel changes an output pixel.
        """
        if self.padding == "valid":
            # 4 pixels a level and path, each 2^level input pixels wide, over both sides
            return sum(4 * 2**level for level in range(self.levels - 1)) + 2 * self.grid
        reach, reaches = 0, []
        for _ in range(self.levels - 1):
            reach += 2
            reaches.append(reach)
            reach = -(-reach // 2)
        reach += 2
        for skip_reach in reversed(reaches):
            reach = max(2 * reach + (self.up != "transpose"), skip_reach) + 2
        return reach

    @property
    def border(self) -> int:
        """Outermost output pixels of a "valid" tile that depend on where its edge lies.

        Bilinear up-sampling repeats the edge, which spoils one pixel a level; otherwise 0.
        """
        return self.grid - 1 if self.padding == "valid" and self.up == "bilinear" else 0

    def _mirror_to_grid(self, x: Tensor) -> Tensor:
        bottom, right = (-n % self.grid for n in x.shape[2:])
        return F.pad(x, (0, right, 0, bottom), mode="reflect") if bottom or right else x


def _pad_around(x: Tensor, height: int, width: int) -> Tensor:
    """``x`` amid zeros, [B, C, height, width]; the odd one goes to the bottom and right."""
    rows, columns = height - x.shape[2], width - x.shape[3]
    if not (rows or columns):
        return x
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
