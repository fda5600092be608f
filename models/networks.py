"""The three digit classifiers, as torch modules: images float32 [N, 1, 8, 8] in, logits float32 [N, 10] out.

They are small on purpose, and each brings what its family asks of a quantizer: the residual network ties activations
through its sums, the mobile network has depthwise convolutions, hard activations and gates, the transformer has
products of two activations, normalisation and softmax.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLASSES = 10


def _conv_norm(fan_in: int, fan_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias and its batch normalisation; keeps the map's size at stride 1."""
    conv = nn.Conv2d(fan_in, fan_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(fan_out))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, as in He et al. 2016 (arXiv 1512.03385), figure 2."""

    def __init__(self, fan_in: int, fan_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv_norm(fan_in, fan_out, 3, stride=stride)
        self.conv2 = _conv_norm(fan_out, fan_out, 3)
        self.shortcut = _conv_norm(fan_in, fan_out, 1, stride=stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x))) + self.shortcut(x))


def digits_resnet() -> nn.Module:
    """Ten convolutions in four residual blocks, the last of which halves the map."""
    return nn.Sequential(
        _conv_norm(1, 32, 3),
        nn.ReLU(),
        ResidualBlock(32, 32),
        ResidualBlock(32, 32),
        ResidualBlock(32, 32),
        ResidualBlock(32, 40, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, CLASSES),
    )


class Gate(nn.Module):
    """Squeeze-and-excite: scales each channel by a number in [0, 1] made from the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 4, 1),
            nn.ReLU(),
            nn.Conv2d(channels // 4, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(x)


class MobileBlock(nn.Module):
    """Expand, filter each channel, gate, project: Howard et al. 2019 (arXiv 1905.02244), figure 4."""

    def __init__(self, fan_in: int, expanded: int, fan_out: int, *, stride: int = 1, gated: bool) -> None:
        super().__init__()
        self.expand = nn.Sequential(_conv_norm(fan_in, expanded, 1), nn.Hardswish())
        filters = _conv_norm(expanded, expanded, 3, stride=stride, groups=expanded)
        self.depthwise = nn.Sequential(filters, nn.Hardswish())
        self.gate = Gate(expanded) if gated else nn.Identity()
        self.project = _conv_norm(expanded, fan_out, 1)
        self.residual = stride == 1 and fan_in == fan_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.gate(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


def digits_mobile() -> nn.Module:
    """Five inverted residual blocks, three of them gated, one of which halves the map."""
    return nn.Sequential(
        _conv_norm(1, 16, 3),
        nn.Hardswish(),
        MobileBlock(16, 48, 16, gated=True),
        MobileBlock(16, 64, 24, stride=2, gated=False),
        MobileBlock(24, 96, 24, gated=True),
        MobileBlock(24, 96, 32, gated=False),
        MobileBlock(32, 128, 32, gated=True),
        _conv_norm(32, 128, 1),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, CLASSES),
    )


class Attention(nn.Module):
    """Multi-head self-attention; query, key and value are layers of their own, so each may get its own format."""

    def __init__(self, tokens: int, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        # Sizes other than the batch are constants: the exported file then reshapes without computing shapes.
        self.split = (-1, tokens, heads, width // heads)
        self.joined = (-1, tokens, width)
        self.scale = (width // heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(x).reshape(self.split).transpose(1, 2) for layer in layers)
        weights = torch.softmax(query @ key.transpose(2, 3) * self.scale, dim=-1)
        return self.out((weights @ value).transpose(1, 2).reshape(self.joined))


class TransformerBlock(nn.Module):
    """Attention, then two linear layers, each on normalised input beside a shortcut (pre-norm)."""

    def __init__(self, tokens: int, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(tokens, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """2x2 patches as 16 tokens, learned positions, mean over tokens (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        tokens = 16
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.to_tokens = (-1, width, tokens)
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(TransformerBlock(tokens, width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).reshape(self.to_tokens).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "digits_resnet": digits_resnet,
    "digits_mobile": digits_mobile,
    "digits_vit": VisionTransformer,
}
