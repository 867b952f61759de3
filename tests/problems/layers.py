"""Kinds of layers: convolutions with their options, norms with their gains, embeddings; mostly one kind a model."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.problems.table import Instance, Params, Table, ids, listed, named, positive, real

TABLE = Table()
problem = TABLE.problem


# -- convolutions ------------------------------------------------------------------------------------------------------


def classifier(shape: tuple[int, ...], num_data: int, *layers: nn.Module) -> Instance:
    """Classify what the layers make of data of the given shape."""
    X = real(num_data, *shape)
    body = nn.Sequential(*layers, nn.Flatten()).double().eval()
    with torch.no_grad():
        width = body(X).shape[1]
    model = nn.Sequential(body, nn.Linear(width, 2, bias=False)).double().eval()
    return Instance(model, nn.CrossEntropyLoss(), listed(model), X, ids(2, num_data))


@problem("conv1d-options", (2, 3), "classes")
def _() -> Instance:
    # Padding 'same' of an even kernel is one more on the right; the second layer is depth-wise.
    first = nn.Conv1d(2, 4, 2, dilation=3, padding="same", groups=2)
    second = nn.Conv1d(4, 4, 3, stride=2, padding=1, groups=4, bias=False)
    return classifier((2, 6), 5, first, nn.Tanh(), second)


@problem("conv2d-options", (1, 3), "classes")
def _() -> Instance:
    # The stride leaves the last column of the padded image unread.
    first = nn.Conv2d(2, 4, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2), groups=2, bias=False)
    return classifier((2, 4, 7), 4, first, nn.ReLU(inplace=True), nn.Conv2d(4, 2, (1, 2), padding="valid"))


@problem("conv2d-depthwise-separable", (3, 1), "classes")
def _() -> Instance:
    depthwise, pointwise = nn.Conv2d(2, 4, 3, padding="same", groups=2), nn.Conv2d(4, 2, 1)
    return classifier((2, 3, 3), 4, depthwise, nn.GELU(), pointwise, nn.AdaptiveAvgPool2d(1))


@problem("conv3d-options", (1, 2), "classes")
def _() -> Instance:
    first = nn.Conv3d(2, 2, (2, 1, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2), groups=2)
    return classifier((2, 2, 3, 3), 3, first, nn.Sigmoid())


@problem("conv-padding-modes", (2, 2), "classes")
def _() -> Instance:
    first = nn.Conv1d(2, 2, 3, padding=2, padding_mode="circular")
    return classifier((2, 5), 4, first, nn.Tanh(), nn.Conv1d(2, 2, 2, padding="same", padding_mode="reflect"))


@problem("conv-transpose1d-positions", (1, 3), "classes", "sequence")
def _() -> Instance:
    model = nn.Sequential(
        nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Tanh(),
        nn.ConvTranspose1d(4, 3, 2, dilation=2, bias=False),
    ).double()
    return Instance(model, nn.CrossEntropyLoss(), listed(model), real(4, 2, 2), ids(3, 4, 6))


@problem("conv-transpose2d-options", (2, 1), "classes")
def _() -> Instance:
    first = nn.ConvTranspose2d(2, 4, (2, 3), stride=(2, 1), padding=(0, 1), output_padding=(1, 0), groups=2)
    return classifier((2, 2, 2), 3, first, nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 1, 2, dilation=2, bias=False))


def functional_layers(params: dict[str, Tensor], X: Tensor) -> Tensor:
    """Layers without modules: an embedding, a convolution, a norm, and linear layers with and without bias."""
    h = F.embedding(X, params["table"]).transpose(1, 2)
    h = torch.tanh(F.conv1d(h, params["kernel"], params["shift"], padding="same", dilation=2, groups=2))
    h = F.layer_norm(h.transpose(1, 2), (4,), params["gain"], bias=params["offset"])
    return F.linear(input=F.linear(h, weight=params["narrow"]).flatten(1), weight=params["W"], bias=params["b"])


@problem("callable-of-layers", (2, 1, 3), "classes")
def _() -> Instance:
    params: Params = {"W": real(3, 3), "gain": positive(4), "kernel": real(4, 1, 2), "table": real(5, 2)}
    params |= {"b": real(3), "shift": real(4), "narrow": real(1, 4), "offset": real(4)}
    params = {name: p.requires_grad_() for name, p in params.items()}
    forward = partial(functional_layers, params)
    return Instance(functional_layers, nn.CrossEntropyLoss(), params, ids(5, 6, 3), ids(3, 6), forward=forward)


# -- norms -------------------------------------------------------------------------------------------------------------


def affine(norm: Any) -> Any:
    """Give a norm a gain, a bias and statistics other than one and zero."""
    with torch.no_grad():
        norm.weight.copy_(positive(*norm.weight.shape))
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_(real(*norm.bias.shape))
        if getattr(norm, "running_mean", None) is not None:
            norm.running_mean.copy_(0.3 * real(*norm.running_mean.shape))
            norm.running_var.copy_(positive(*norm.running_var.shape))
    return norm


class HandwrittenNorm(nn.Module):
    """A norm by the root mean square, written as a product with a parameter; then a scale of the whole layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.rand(width))

    def forward(self, X: Tensor) -> Tensor:
        return X + self.scale * (self.weight * (X * torch.rsqrt(X.pow(2).mean(-1, keepdim=True) + 1e-3)))


@problem("norms-of-vectors", (2, 3), "classes")
def _() -> Instance:
    norms = [affine(nn.LayerNorm(4)), affine(nn.BatchNorm1d(4)), affine(nn.RMSNorm(4, eps=1e-3))]
    model = nn.Sequential(nn.Linear(3, 4), norms[0], nn.Tanh(), norms[1], nn.Sigmoid(), norms[2], nn.Linear(4, 2))
    model = model.double().eval()
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(5, 3), ids(2, 5))


@problem("norms-handwritten", (3, 2), "sequence")
def _() -> Instance:
    # As many positions as data in the first mini-batch.
    model = nn.Sequential(nn.Linear(2, 3), HandwrittenNorm(3), nn.Tanh(), nn.Linear(3, 2)).double()
    return Instance(model, nn.MSELoss(), named(model), real(5, 3, 2), real(5, 3, 2))


@problem("norms-of-images", (2, 1), "classes")
def _() -> Instance:
    # An instance norm folds data into channels and repeats its gain for each.
    norms = [affine(nn.GroupNorm(2, 4)), affine(nn.InstanceNorm2d(4, affine=True)), affine(nn.BatchNorm2d(4))]
    return classifier((2, 2, 3), 3, nn.Conv2d(2, 4, 1), norms[0], nn.Tanh(), norms[1], nn.GELU(), norms[2])


@problem("layer-norm-over-positions", (3, 2), "sequence")
def _() -> Instance:
    # The gain has one entry a position and channel; one layer has no bias.
    norms = affine(nn.LayerNorm((3, 2))), affine(nn.LayerNorm((3, 2), bias=False))
    model = nn.Sequential(norms[0], nn.Tanh(), nn.Linear(2, 2), norms[1]).double()
    return Instance(model, nn.MSELoss(), listed(model), real(5, 3, 2), real(5, 3, 2))


# -- embeddings --------------------------------------------------------------------------------------------------------


class TimeFirstTokens(nn.Module):
    """An embedding with padding that is looked up time first, and is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(4, 2, padding_idx=0), nn.Linear(2, 2)

    def forward(self, X: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embedding(X.T)).cumsum(0))
        return F.linear(h, self.embedding.weight).movedim(0, 2)  # [N, C, T]


@problem("tied-padded-embedding-time-major", (3, 2), "classes", "sequence", "cut")
def _() -> Instance:
    # The padded row is constant as a token, yet not as a class.
    model = TimeFirstTokens().double()
    with torch.no_grad():
        model.embedding.weight[0] = 0.4
    X = ids(4, 5, 3)
    X[0, 0] = X[3, 2] = 0
    return Instance(model, nn.CrossEntropyLoss(), named(model), X, ids(4, 5, 3))
