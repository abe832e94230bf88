"""More of them: nested, attention, one with a residual encoder, one with instance norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VGGBlock(nn.Module):
    """Two convolutions that share one ReLU module."""

    def __init__(self, c_in: int, c_mid: int, c_out: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(c_in, c_mid, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(c_mid)
        self.conv2 = nn.Conv2d(c_mid, c_out, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        return self.relu(out)


class NestedUNet(nn.Module):
    """UNet++: block ``conv{i}_{j}`` reads all blocks of level i before it and one from below."""

    def __init__(
        self,
        num_classes: int,
        input_channels: int = 3,
        deep_supervision: bool = False,
        width: int = 32,
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(5)]
        self.deep_supervision = deep_supervision
        self.pool = nn.MaxPool2d(2, 2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        for j in range(5):
            for i, c in enumerate(widths[: 5 - j]):
                c_in = (widths[i - 1] if i else input_channels) if j == 0 else j * c + widths[i + 1]
                self.add_module(f"conv{i}_{j}", VGGBlock(c_in, c, c))
        if deep_supervision:
            for j in range(1, 5):
                self.add_module(f"final{j}", nn.Conv2d(width, num_classes, 1))
        else:
            self.final = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        rows: list[list[Tensor]] = []
        for i in range(5):
            x = getattr(self, f"conv{i}_0")(self.pool(x) if i else x)
            rows.append([x])
        for j in range(1, 5):
            for i in range(5 - j):
                below = self.up(rows[i + 1][j - 1])
                rows[i].append(getattr(self, f"conv{i}_{j}")(torch.cat([*rows[i], below], 1)))
        if self.deep_supervision:
            return [getattr(self, f"final{j}")(rows[0][j]) for j in range(1, 5)]
        return self.final(rows[0][4])


class ConvBlock(nn.Module):
    """Two convolutions with bias, batch normalisation and ReLU."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (c_in, c_out):
            layers.append(nn.Conv2d(inputs, c_out, 3, stride=1, padding=1, bias=True))
            layers += [nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UpConv(nn.Module):
    """Nearest up-sampling and a 3x3 convolution."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(c_in, c_out, 3, stride=1, padding=1, bias=True),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class AttentionBlock(nn.Module):
    """A gate between 0 and 1 a pixel, from the features below and the skip."""

    def __init__(self, c_gate: int, c_skip: int, c_mid: int) -> None:
        super().__init__()
        self.W_g = nn.Sequential(nn.Conv2d(c_gate, c_mid, 1), nn.BatchNorm2d(c_mid))
        self.W_x = nn.Sequential(nn.Conv2d(c_skip, c_mid, 1), nn.BatchNorm2d(c_mid))
        self.psi = nn.Sequential(nn.Conv2d(c_mid, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())
        self.relu = nn.ReLU(inplace=True)

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        return skip * self.psi(self.relu(self.W_g(gate) + self.W_x(skip)))


class AttentionUNet(nn.Module):
    """The attention U-Net; ``width`` is 64 there."""

    def __init__(self, img_ch: int = 3, output_ch: int = 1, width: int = 64) -> None:
        super().__init__()
        w = [width * 2**level for level in range(5)]
        self.Maxpool = nn.MaxPool2d(kernel_size=2, stride=2)
        for level, (c_in, c_out) in enumerate(zip([img_ch, *w], w, strict=False), start=1):
            self.add_module(f"Conv{level}", ConvBlock(c_in, c_out))
        for level in range(5, 1, -1):
            c, half = w[level - 1], w[level - 2]
            self.add_module(f"Up{level}", UpConv(c, half))
            self.add_module(f"Att{level}", AttentionBlock(half, half, half // 2))
            self.add_module(f"Up_conv{level}", ConvBlock(c, half))
        self.Conv_1x1 = nn.Conv2d(w[0], output_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level in range(1, 6):
            x = getattr(self, f"Conv{level}")(self.Maxpool(x) if skips else x)
            skips.append(x)
        for level in range(5, 1, -1):
            x = getattr(self, f"Up{level}")(x)
            skip = getattr(self, f"Att{level}")(x, skips[level - 2])
            x = getattr(self, f"Up_conv{level}")(torch.cat((skip, x), dim=1))
        return self.Conv_1x1(x)


class BasicBlock(nn.Module):
    """The residual block of ResNet-18 and 34: one ReLU module, after a norm and after a sum."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNetEncoder(nn.Module):
    """The five outputs of ResNet-34, and the image."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        c = width
        for i, blocks in enumerate((3, 4, 6, 3)):
            c_out = width * 2**i
            layers = [
                BasicBlock(c if b == 0 else c_out, c_out, 1 + (b == 0 < i)) for b in range(blocks)
            ]
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))
            c = c_out

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [x]
        x = self.relu(self.bn1(self.conv1(x)))
        features.append(x)
        x = self.maxpool(x)
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
            features.append(x)
        return features


class Conv2dReLU(nn.Sequential):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, c_in: int, c_out: int) -> None:
        conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class DecoderBlock(nn.Module):
    """Nearest up-sampling to the skip's size and two convolutions of [up, skip]."""

    def __init__(self, c_in: int, c_skip: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = Conv2dReLU(c_in + c_skip, c_out)
        self.attention1 = nn.Identity()
        self.conv2 = Conv2dReLU(c_out, c_out)
        self.attention2 = nn.Identity()

    def forward(
        self, feature_map: Tensor, height: int, width: int, skip_connection: Tensor | None = None
    ) -> Tensor:
        feature_map = F.interpolate(feature_map, size=(height, width), mode="nearest")
        if skip_connection is not None:
            feature_map = torch.cat([feature_map, skip_connection], dim=1)
            feature_map = self.attention1(feature_map)
        feature_map = self.conv1(feature_map)
        feature_map = self.conv2(feature_map)
        return self.attention2(feature_map)


class UnetDecoder(nn.Module):
    """Five blocks, from the smallest features up to the image's size."""

    def __init__(self, c: list[int], c_out: list[int]) -> None:
        super().__init__()
        self.center = nn.Identity()
        self.blocks = nn.ModuleList(
            DecoderBlock(*channels)
            for channels in zip([c[-1], *c_out], [*c[-2:0:-1], 0], c_out, strict=False)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        sizes = [feature.shape[2:] for feature in features][::-1]
        skips = features[1:][::-1]
        x = self.center(skips[0])
        for i, block in enumerate(self.blocks):
            height, width = sizes[i + 1]
            x = block(x, height, width, skips[i + 1] if i + 1 < len(skips) else None)
        return x


class SegmentationUnet(nn.Module):
    """The U-Net of segmentation_models_pytorch with a ResNet-34; ``width`` is 64 there."""

    def __init__(self, in_channels: int = 3, classes: int = 1, width: int = 64) -> None:
        super().__init__()
        self.encoder = ResNetEncoder(in_channels, width)
        channels = [in_channels, width, width, 2 * width, 4 * width, 8 * width]
        self.decoder = UnetDecoder(channels, [4 * width >> level for level in range(5)])
        self.segmentation_head = nn.Sequential(
            nn.Conv2d(4 * width >> 4, classes, 3, padding=1), nn.Identity(), nn.Identity()
        )

    def check_input_shape(self, x: Tensor) -> None:
        height, width = x.shape[-2:]
        if height % 32 or width % 32:
            raise RuntimeError(f"height and width must divide by 32, got {height}x{width}")

    def forward(self, x: Tensor) -> Tensor:
        self.check_input_shape(x)
        return self.segmentation_head(self.decoder(self.encoder(x)))


class ConvDropoutNormReLU(nn.Module):
    """Convolution, instance normalisation, LeakyReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=True)
        self.norm = nn.InstanceNorm2d(c_out, eps=1e-5, affine=True)
        self.nonlin = nn.LeakyReLU(inplace=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, self.nonlin)

    def forward(self, x: Tensor) -> Tensor:
        return self.all_modules(x)


class StackedConvBlocks(nn.Module):
    """Two of them, the first with a stride."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            ConvDropoutNormReLU(c_in, c_out, stride), ConvDropoutNormReLU(c_out, c_out, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class PlainConvUNet(nn.Module):
    """nnU-Net's: strides instead of pooling, instance norm, LeakyReLU; up to 512 channels there."""

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        features: tuple[int, ...] = (32, 64, 128, 256, 512, 512),
    ) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(
                StackedConvBlocks(c_in, c_out, 2 if i else 1)
                for i, (c_in, c_out) in enumerate(
                    zip((input_channels, *features), features, strict=False)
                )
            )
        )
        pairs = list(zip(features[::-1], features[-2::-1], strict=False))
        self.transpconvs = nn.ModuleList(nn.ConvTranspose2d(*pair, 2, 2) for pair in pairs)
        self.decoder = nn.ModuleList(StackedConvBlocks(2 * c, c) for _, c in pairs)
        self.seg_layer = nn.Conv2d(features[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        for i, (up, blocks) in enumerate(zip(self.transpconvs, self.decoder, strict=True)):
            x = blocks(torch.cat((up(x), skips[-i - 2]), 1))
        return self.seg_layer(x)
