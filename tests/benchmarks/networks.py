"""The three networks of the benchmark, with data and loss; both sides build them from the same seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.items import BATCH_SIZE

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model in eval mode, its loss, its trainable parameters and data in batches."""

    model: nn.Module
    loss: nn.Module
    params: list[nn.Parameter]
    data: list[Batch]

    @property
    def num_params(self) -> int:
        """The number of columns of the matrices."""
        return sum(p.numel() for p in self.params)

    def doubled(self) -> Problem:
        """The same in float64: model and data are converted, not drawn anew."""
        model = copy.deepcopy(self.model).double()
        data = [(X.double() if X.is_floating_point() else X, y) for X, y in self.data]
        return Problem(model, self.loss, list(model.parameters()), data)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            projection = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C_in, H, W]`` to ``[N, C_out, H / stride, W / stride]``."""
        hidden = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


def resnet18(num_classes: int = 10) -> nn.Sequential:
    """A ResNet-18 for 32x32 images: a 3x3 stem without pooling, then four stages of two blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    channels_in = 64
    for stage, channels_out in enumerate((64, 128, 256, 512)):
        layers.append(ResidualBlock(channels_in, channels_out, stride=1 if stage == 0 else 2))
        layers.append(ResidualBlock(channels_out, channels_out, stride=1))
        channels_in = channels_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


class TransformerBlock(nn.Module):
    """Causal self-attention and a two-layer network, each after a layer norm and inside a shortcut."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attend(self, x: Tensor) -> Tensor:
        """Causal attention over the tokens of ``x``, shape ``[N, T, width]``."""
        num_data, num_tokens, width = x.shape
        heads = self.query_key_value(x).view(num_data, num_tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(mixed.transpose(1, 2).reshape(num_data, num_tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, T, width]`` to the same shape."""
        x = x + self.attend(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class SmallGPT(nn.Module):
    """A decoder-only transformer; its logits have the classes on axis 1, as cross-entropy wants them."""

    def __init__(
        self, num_symbols: int = 96, num_tokens: int = 64, width: int = 128, num_layers: int = 4, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.symbols = nn.Embedding(num_symbols, width)
        self.positions = nn.Parameter(0.02 * torch.randn(num_tokens, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_symbols, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token numbers ``[N, T]`` to logits ``[N, num_symbols, T]``."""
        hidden = self.symbols(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(hidden))).transpose(1, 2)


def _mlp() -> tuple[nn.Module, Callable[[int], Batch]]:
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return model, lambda n: (torch.rand(n, 784), torch.randint(10, (n,)))


def _resnet18() -> tuple[nn.Module, Callable[[int], Batch]]:
    return resnet18(), lambda n: (torch.rand(n, 3, 32, 32), torch.randint(10, (n,)))


def _gpt() -> tuple[nn.Module, Callable[[int], Batch]]:
    return SmallGPT(), lambda n: (torch.randint(96, (n, 64)), torch.randint(96, (n, 64)))


_NETWORKS: dict[str, Callable[[], tuple[nn.Module, Callable[[int], Batch]]]] = {
    "mlp": _mlp,
    "resnet18": _resnet18,
    "gpt": _gpt,
}


def build(name: str, num_data: int, device: str = "cpu", dtype: str = "float32") -> Problem:
    """Build a network, and ``num_data`` random data for it, from a fixed seed."""
    torch.manual_seed(0)
    model, draw = _NETWORKS[name]()
    model = model.to(device, getattr(torch, dtype)).eval()
    X, y = draw(num_data)
    X = X.to(getattr(torch, dtype)) if X.is_floating_point() else X
    data = list(zip(X.to(device).split(BATCH_SIZE), y.to(device).split(BATCH_SIZE)))
    return Problem(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
