"""U-Nets that people use, written from their documented structure: names, order and arguments."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoubleConv(nn.Module):
    """Two 3x3 convolutions with batch normalisation and ReLU."""

    def __init__(self, c_in: int, c_out: int, c_mid: int | None = None) -> None:
        super().__init__()
        c_mid = c_mid or c_out
        layers: list[nn.Module] = []
        for inputs, outputs in ((c_in, c_mid), (c_mid, c_out)):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    """Max-pooling, then two convolutions."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(c_in, c_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    """Up-sampling, padded to the skip's size, and two convolutions of [skip, up]."""

    up: nn.Module

    def __init__(self, c_in: int, c_out: int, bilinear: bool) -> None:
        super().__init__()
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(c_in, c_out, c_in // 2)
        else:
            self.up = nn.ConvTranspose2d(c_in, c_in // 2, 2, stride=2)
            self.conv = DoubleConv(c_in, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        rows, columns = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class OutConv(nn.Module):
    """The 1x1 convolution at the end."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ClassicUNet(nn.Module):
    """The one with (n_channels, n_classes, bilinear); ``width`` is 64 there."""

    def __init__(
        self, n_channels: int, n_classes: int, bilinear: bool = False, width: int = 64
    ) -> None:
        super().__init__()
        self.n_channels, self.n_classes, self.bilinear = n_channels, n_classes, bilinear
        w, factor = width, 2 if bilinear else 1
        self.inc = DoubleConv(n_channels, w)
        self.down1 = Down(w, 2 * w)
        self.down2 = Down(2 * w, 4 * w)
        self.down3 = Down(4 * w, 8 * w)
        self.down4 = Down(8 * w, 16 * w // factor)
        self.up1 = Up(16 * w, 8 * w // factor, bilinear)
        self.up2 = Up(8 * w, 4 * w // factor, bilinear)
        self.up3 = Up(4 * w, 2 * w // factor, bilinear)
        self.up4 = Up(2 * w, w, bilinear)
        self.outc = OutConv(w, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x5 = self.down4(x4)
        x = self.up1(x5, x4)
        x = self.up2(x, x3)
        x = self.up3(x, x2)
        x = self.up4(x, x1)
        return self.outc(x)


class PathBlock(nn.Module):
    """Two convolutions, each with ReLU and then, on request, batch normalisation."""

    def __init__(self, c_in: int, c_out: int, padding: bool, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (c_in, c_out):
            layers += [nn.Conv2d(inputs, c_out, 3, padding=int(padding)), nn.ReLU()]
            if batch_norm:
                layers.append(nn.BatchNorm2d(c_out))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class PathUp(nn.Module):
    """Up-sampling, and two convolutions of [up, cropped skip]."""

    up: nn.Module

    def __init__(
        self, c_in: int, c_out: int, up_mode: str, padding: bool, batch_norm: bool
    ) -> None:
        super().__init__()
        if up_mode == "upconv":
            self.up = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        else:
            upsample = nn.Upsample(mode="bilinear", scale_factor=2)
            self.up = nn.Sequential(upsample, nn.Conv2d(c_in, c_out, 1))
        self.conv_block = PathBlock(c_in, c_out, padding, batch_norm)

    def centre_crop(self, skip: Tensor, size: torch.Size) -> Tensor:
        _, _, height, width = skip.size()
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        return skip[:, :, top : top + size[0], left : left + size[1]]

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        up = self.up(x)
        return self.conv_block(torch.cat([up, self.centre_crop(skip, up.shape[2:])], 1))


class PathUNet(nn.Module):
    """The one with (in_channels, n_classes, depth, wf, padding, batch_norm, up_mode)."""

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
        self.padding, self.depth = padding, depth
        widths = [2 ** (wf + level) for level in range(depth)]
        self.down_path = nn.ModuleList(
            PathBlock(c_in, c_out, padding, batch_norm)
            for c_in, c_out in zip([in_channels, *widths], widths, strict=False)
        )
        self.up_path = nn.ModuleList(
            PathUp(2 * width, width, up_mode, padding, batch_norm)
            for width in reversed(widths[:-1])
        )
        self.last = nn.Conv2d(widths[0], n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, down in enumerate(self.down_path):
            x = down(x)
            if i != len(self.down_path) - 1:
                skips.append(x)
                x = F.max_pool2d(x, 2)
        for i, up in enumerate(self.up_path):
            x = up(x, skips[-i - 1])
        return self.last(x)


class HubUNet(nn.Module):
    """The one of torch.hub with (in_channels, out_channels, init_features) and named layers."""

    def __init__(
        self, in_channels: int = 3, out_channels: int = 1, init_features: int = 32
    ) -> None:
        super().__init__()
        f = init_features
        self.encoder1, self.pool1 = self._block(in_channels, f, "enc1"), nn.MaxPool2d(2, stride=2)
        self.encoder2, self.pool2 = self._block(f, 2 * f, "enc2"), nn.MaxPool2d(2, stride=2)
        self.encoder3, self.pool3 = self._block(2 * f, 4 * f, "enc3"), nn.MaxPool2d(2, stride=2)
        self.encoder4, self.pool4 = self._block(4 * f, 8 * f, "enc4"), nn.MaxPool2d(2, stride=2)
        self.bottleneck = self._block(8 * f, 16 * f, "bottleneck")
        self.upconv4 = nn.ConvTranspose2d(16 * f, 8 * f, 2, stride=2)
        self.decoder4 = self._block(16 * f, 8 * f, "dec4")
        self.upconv3 = nn.ConvTranspose2d(8 * f, 4 * f, 2, stride=2)
        self.decoder3 = self._block(8 * f, 4 * f, "dec3")
        self.upconv2 = nn.ConvTranspose2d(4 * f, 2 * f, 2, stride=2)
        self.decoder2 = self._block(4 * f, 2 * f, "dec2")
        self.upconv1 = nn.ConvTranspose2d(2 * f, f, 2, stride=2)
        self.decoder1 = self._block(2 * f, f, "dec1")
        self.conv = nn.Conv2d(f, out_channels, 1)

    @staticmethod
    def _block(c_in: int, c_out: int, name: str) -> nn.Sequential:
        block = nn.Sequential()
        for i, inputs in ((1, c_in), (2, c_out)):
            conv = nn.Conv2d(inputs, c_out, 3, padding=1, bias=False)
            block.add_module(f"{name}conv{i}", conv)
            block.add_module(f"{name}norm{i}", nn.BatchNorm2d(c_out))
            block.add_module(f"{name}relu{i}", nn.ReLU(inplace=True))
        return block

    def forward(self, x: Tensor) -> Tensor:
        enc1 = self.encoder1(x)
        enc2 = self.encoder2(self.pool1(enc1))
        enc3 = self.encoder3(self.pool2(enc2))
        enc4 = self.encoder4(self.pool3(enc3))
        bottleneck = self.bottleneck(self.pool4(enc4))
        dec4 = self.decoder4(torch.cat((self.upconv4(bottleneck), enc4), dim=1))
        dec3 = self.decoder3(torch.cat((self.upconv3(dec4), enc3), dim=1))
        dec2 = self.decoder2(torch.cat((self.upconv2(dec3), enc2), dim=1))
        dec1 = self.decoder1(torch.cat((self.upconv1(dec2), enc1), dim=1))
        return torch.sigmoid(self.conv(dec1))
