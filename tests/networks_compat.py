"""Three widely used U-Nets, written anew in plain PyTorch from their documented structure.

Each has the keys, the order of concatenation and the treatment of odd sizes of the original, of
which nothing else is taken; ``fastunet.UNet.from_state_dict`` is tested against them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _twice(c_in: int, c_mid: int, c_out: int) -> nn.Sequential:
    """Twice: convolution without bias, batch normalisation, ReLU."""
    layers: list[nn.Module] = []
    for before, after in ((c_in, c_mid), (c_mid, c_out)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class _DoubleConv(nn.Module):
    def __init__(self, c_in: int, c_out: int, c_mid: int | None = None) -> None:
        super().__init__()
        self.double_conv = _twice(c_in, c_mid or c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class _Down(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), _DoubleConv(c_in, c_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class _PaddedUp(nn.Module):
    def __init__(self, c_in: int, c_out: int, bilinear: bool) -> None:
        super().__init__()
        self.up: nn.Module
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = _DoubleConv(c_in, c_out, c_in // 2)
        else:
            self.up = nn.ConvTranspose2d(c_in, c_in // 2, 2, stride=2)
            self.conv = _DoubleConv(c_in, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        rows, columns = (a - b for a, b in zip(skip.shape[2:], x.shape[2:], strict=True))
        before = columns // 2, rows // 2
        x = F.pad(x, (before[0], columns - before[0], before[1], rows - before[1]))
        return self.conv(torch.cat([skip, x], 1))


class PaddingUNet(nn.Module):
    """(n_channels, n_classes, bilinear): skip first, odd sizes padded with zeros."""

    def __init__(
        self, n_channels: int, n_classes: int, bilinear: bool = False, width: int = 64
    ) -> None:
        super().__init__()
        w = [width * 2**level for level in range(5)]
        halved = 2 if bilinear else 1
        self.inc = _DoubleConv(n_channels, w[0])
        self.down1, self.down2, self.down3 = (_Down(w[i], w[i + 1]) for i in range(3))
        self.down4 = _Down(w[3], w[4] // halved)
        self.up1, self.up2, self.up3 = (
            _PaddedUp(w[i], w[i - 1] // halved, bilinear) for i in (4, 3, 2)
        )
        self.up4 = _PaddedUp(w[1], w[0], bilinear)
        self.outc = nn.ModuleDict({"conv": nn.Conv2d(w[0], n_classes, 1)})

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.inc(x)]
        for down in (self.down1, self.down2, self.down3, self.down4):
            skips.append(down(skips[-1]))
        x = skips.pop()
        for up in (self.up1, self.up2, self.up3, self.up4):
            x = up(x, skips.pop())
        return self.outc["conv"](x)


class _Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, padding: bool, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in (c_in, c_out):
            layers += [nn.Conv2d(before, c_out, 3, padding=int(padding)), nn.ReLU()]
            if batch_norm:
                layers.append(nn.BatchNorm2d(c_out))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class _CroppedUp(nn.Module):
    def __init__(
        self, c_in: int, c_out: int, up_mode: str, padding: bool, batch_norm: bool
    ) -> None:
        super().__init__()
        self.up: nn.Module = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        if up_mode == "upsample":
            self.up = nn.Sequential(
                nn.Upsample(mode="bilinear", scale_factor=2), nn.Conv2d(c_in, c_out, 1)
            )
        self.conv_block = _Block(c_in, c_out, padding, batch_norm)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        top, left = ((a - b) // 2 for a, b in zip(skip.shape[2:], x.shape[2:], strict=True))
        skip = skip[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        return self.conv_block(torch.cat([x, skip], 1))


class CroppingUNet(nn.Module):
    """(in_channels, n_classes, depth, wf, padding, batch_norm, up_mode): skip last, cropped."""

    def __init__(
        self,
        in_channels: int = 1,
        n_classes: int = 2,
        depth: int = 5,
        wf: int = 6,
        padding: bool = False,
        batch_norm: bool = False,
        up_mode: str = "upconv",
    ) -> None:
        super().__init__()
        w = [2 ** (wf + level) for level in range(depth)]
        self.down_path = nn.ModuleList(
            _Block(c_in, c_out, padding, batch_norm)
            for c_in, c_out in zip([in_channels, *w], w, strict=False)
        )
        self.up_path = nn.ModuleList(
            _CroppedUp(w[i], w[i - 1], up_mode, padding, batch_norm)
            for i in reversed(range(1, depth))
        )
        self.last = nn.Conv2d(w[0], n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down_path:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = skips.pop()
        for up in self.up_path:
            x = up(x, skips.pop())
        return self.last(x)


class NamedUNet(nn.Module):
    """(in_channels, out_channels, init_features): named blocks, skip last, a sigmoid."""

    def __init__(
        self, in_channels: int = 3, out_channels: int = 1, init_features: int = 32
    ) -> None:
        super().__init__()
        w = [init_features * 2**level for level in range(5)]
        for number, (c_in, c_out) in enumerate(zip([in_channels, *w], w[:4], strict=False), 1):
            setattr(self, f"encoder{number}", self._block(c_in, c_out, f"enc{number}"))
        self.bottleneck = self._block(w[3], w[4], "bottleneck")
        for number in (4, 3, 2, 1):
            up = nn.ConvTranspose2d(w[number], w[number - 1], 2, stride=2)
            setattr(self, f"upconv{number}", up)
            block = self._block(w[number], w[number - 1], f"dec{number}")
            setattr(self, f"decoder{number}", block)
        self.conv = nn.Conv2d(w[0], out_channels, 1)

    @staticmethod
    def _block(c_in: int, c_out: int, name: str) -> nn.Sequential:
        block = nn.Sequential()
        for number, before in ((1, c_in), (2, c_out)):
            convolution = nn.Conv2d(before, c_out, 3, padding=1, bias=False)
            block.add_module(f"{name}conv{number}", convolution)
            block.add_module(f"{name}norm{number}", nn.BatchNorm2d(c_out))
            block.add_module(f"{name}relu{number}", nn.ReLU())
        return block

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for number in (1, 2, 3, 4):
            x = getattr(self, f"encoder{number}")(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottleneck(x)
        for number in (4, 3, 2, 1):
            x = getattr(self, f"upconv{number}")(x)
            x = getattr(self, f"decoder{number}")(torch.cat([x, skips.pop()], 1))
        return self.conv(x).sigmoid()
