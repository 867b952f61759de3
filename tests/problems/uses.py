"""Uses of parameters that a look at layer calls can miss: views, second uses, foreign code, writes in place."""

import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.problems.table import Instance, Table, ids, listed, mlp, named, real

TABLE = Table()
problem = TABLE.problem


class WeightViews(nn.Module):
    """A weight whose slices are two layers' weights, and a bias likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5))

    def forward(self, X: Tensor) -> Tensor:
        h = torch.tanh(F.linear(X, self.weight[:3], self.bias[:3]))
        return F.linear(h, self.weight[3:], self.bias[3:])


@problem("weight-slices", (2, 3))
def _() -> Instance:
    model = WeightViews().double()
    return Instance(model, nn.MSELoss(), listed(model), real(5, 3), real(5, 2))


class WeightAndTranspose(nn.Module):
    """An autoencoder: a weight as it is, and as a view of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2))

    def forward(self, X: Tensor) -> Tensor:
        return F.linear(torch.sigmoid(F.linear(X, self.weight, self.bias)), self.weight.T)


@problem("weight-and-its-transpose", (2, 3))
def _() -> Instance:
    model = WeightAndTranspose().double()
    return Instance(model, nn.MSELoss(), named(model), real(5, 3), real(5, 3))


class WeightAndPenalty(nn.Module):
    """A layer whose weight is also read by an ordinary product, and whose bias is another layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.bias = self.first.bias

    def forward(self, X: Tensor) -> Tensor:
        h = torch.tanh(self.first(X))
        return self.second(h) * (X @ self.first.weight).sin()


@problem("weight-read-twice", (3, 2), "classes")
def _() -> Instance:
    model = WeightAndPenalty().double()
    return Instance(model, nn.CrossEntropyLoss(), listed(model), real(5, 3), ids(3, 5))


@problem("layer-under-two-names", (3, 2), "classes")
def _() -> Instance:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Sigmoid(), nn.Linear(3, 3)).double()
    return Instance(model, nn.CrossEntropyLoss(), listed(model), real(5, 3), ids(3, 5))


class UnlikeUses(nn.Module):
    """A layer used on rows [N, T, d] and on rows [N, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 2), nn.Linear(2, 3)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(X)).mean(1))))


@problem("layer-used-on-unlike-rows", (2, 3), "classes")
def _() -> Instance:
    model = UnlikeUses().double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(5, 2, 2), ids(3, 5))


class Unsupported(nn.Module):
    """Ordinary layers among others: two contractions, a gate, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, 3), nn.Linear(2, 3)
        self.bilinear, self.matrix = nn.Parameter(torch.randn(2, 3, 2)), nn.Parameter(torch.randn(2, 2))
        self.gate, self.gain = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.rand(3))

    def forward(self, X: Tensor) -> Tensor:
        h = self.gain * torch.tanh(self.first(X))
        h = torch.einsum("nj,ojk,nk->no", h, self.bilinear, X) @ self.matrix
        return self.gate.exp() * self.head(torch.tanh(h))


@problem("layers-known-and-unknown", (2, 1, 2), "core", "classes")
def _() -> Instance:
    model = Unsupported().double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(5, 2), ids(3, 5))


class Bilinear(nn.Module):
    """A bilinear layer and learned slopes between linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slope, self.bilinear = nn.Linear(2, 3), nn.PReLU(3), nn.Bilinear(3, 2, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.bilinear(self.slope(self.first(X)), X)))


@problem("bilinear-and-slopes", (3, 2))
def _() -> Instance:
    model = Bilinear().double()
    return Instance(model, nn.MSELoss(), listed(model), real(5, 2), real(5, 2))


class ComputedWeight(nn.Linear):
    """A layer whose weight is computed from two parameters: a direction and a length for each output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.length = nn.Parameter(torch.rand(outputs, 1) + 0.5)

    def forward(self, X: Tensor) -> Tensor:
        return F.linear(X, self.length * self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


@problem("computed-weight", (3, 2))
def _() -> Instance:
    # The bias is a layer's, the weight is not. (Torch's own ``weight_norm`` has a wrong second derivative on the CPU.)
    model = nn.Sequential(ComputedWeight(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    return Instance(model, nn.MSELoss(), named(model), real(5, 2), real(5, 2))


@problem("scripted-part", (2, 3), "classes")
def _() -> Instance:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.Tanh()))
    model = nn.Sequential(scripted, nn.Linear(3, 3)).double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(5, 2), ids(3, 5))


class Vmapped(nn.Module):
    """A linear layer that is applied to one datum at a time under ``vmap``, then an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, X: Tensor) -> Tensor:
        return self.second(torch.vmap(lambda x: torch.tanh(self.first(x)))(X))


@problem("vmap-inside", (3, 2))
def _() -> Instance:
    model = Vmapped().double()
    return Instance(model, nn.MSELoss(), listed(model), real(5, 2), real(5, 2))


class FlatConv1D(nn.Module):
    """Hugging Face's ``Conv1D``: a transposed weight, and rows that are flattened."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.first, self.second = Conv1D(3, 2), Conv1D(3, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape))

    def forward(self, X: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(X)).cumsum(1)).transpose(1, 2)


@problem("hugging-face-conv1d", (2, 1), "classes", "sequence")
def _() -> Instance:
    model = FlatConv1D().double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(3, 2, 2), ids(3, 3, 2))


class InPlace(nn.Module):
    """Writes into what layers gave: whole, as a slice, masked; and into what a layer with a fixed weight was given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight.requires_grad_(False)

    def forward(self, X: Tensor) -> Tensor:
        h = self.first(X)
        h.add_(X)
        h[:, :1].mul_(2.0)
        h = F.relu_(h).clone()
        k = self.second(h)
        h.mul_(3.0).sub_(1.0)  # the second layer's bias does not need what it was given
        k.masked_fill_(X > 1.0, 0.0).tanh_()
        return self.head(h + k)


@problem("writes-in-place", (3, 2), "classes")
def _() -> Instance:
    model = InPlace().double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(5, 3), ids(2, 5))


class InputWritten(nn.Module):
    """A layer whose input, the model's own copy of the data, is written to after its use: its bias needs no input."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.head = nn.Parameter(torch.randn(3)), nn.Linear(3, 2)
        self.register_buffer("weight", torch.randn(3, 3))

    def forward(self, X: Tensor) -> Tensor:
        X = X.clone()
        h = F.linear(X, self.weight, self.bias)
        X.zero_().add_(h)
        return self.head(torch.tanh(X))


@problem("input-written-after-use", (2, 3))
def _() -> Instance:
    model = InputWritten().double()
    return Instance(model, nn.MSELoss(), listed(model), real(5, 3), real(5, 2))


class Gradient(nn.Module):
    """A prediction that is itself a gradient: a force, minus the derivative of an energy by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = mlp(2, 3, 1)

    def forward(self, X: Tensor) -> Tensor:
        return -torch.func.grad(lambda X: self.energy(X).sum())(X)


@problem("prediction-is-a-gradient", (3, 2))
def _() -> Instance:
    model = Gradient().double()
    return Instance(model, nn.MSELoss(), listed(model), real(5, 2), real(5, 2))


def ensemble(stacked: bool) -> Instance:
    """Two networks whose outputs are multiplied: one parameter holds both weights, or each has its own."""
    if stacked:
        params = {"W": real(2, 3, 2).requires_grad_(), "b": real(2, 3).requires_grad_()}
    else:
        params = {name: real(*shape).requires_grad_() for name, shape in (("W", (3, 2)), ("b", (3,)))}

    def member(W: Tensor, b: Tensor, X: Tensor) -> Tensor:
        return torch.tanh(F.linear(X, W, b))

    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        if stacked:
            return torch.vmap(member, in_dims=(0, 0, None))(params["W"], params["b"], X).prod(0)
        return member(params["W"], params["b"], X) * member(params["W"][:, :1], params["b"], X[:, 1:])

    return Instance(model, nn.MSELoss(), params, real(5, 2), real(5, 3), forward=partial(model, params))


problem("vmap-over-members", (2, 3))(partial(ensemble, True))
problem("weight-and-its-slice", (2, 3))(partial(ensemble, False))
