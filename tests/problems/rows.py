"""Which datum a row of a layer belongs to: time first, permuted, flattened, windowed, routed, or to none at all.

The sizes of mini-batches often equal the number of positions, so that a shape alone says nothing.
"""

from functools import partial

import torch
from torch import Tensor, nn

from tests.problems.table import Instance, Table, ids, listed, named, real

TABLE = Table()
problem = TABLE.problem


class TimeMajor(nn.Module):
    """Linear layers on [T, N, d], with positions mixed in between so that each output depends on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, X: Tensor) -> Tensor:
        h = torch.tanh(self.first(X.transpose(0, 1)))
        return self.second(h + h.cumsum(0)).transpose(0, 1)


@problem("time-major-n-equals-t", (3, 3), "core", "sequence")
def _() -> Instance:
    model = TimeMajor().double()
    return Instance(model, nn.MSELoss(), named(model), real(6, 3, 2), real(6, 3, 2))


class FlatRows(nn.Module):
    """Linear layers on [N·T, d] or on [T·N, d]."""

    def __init__(self, time_major: bool) -> None:
        super().__init__()
        self.time_major = time_major
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, X: Tensor) -> Tensor:
        X = X.transpose(0, 1) if self.time_major else X
        h = torch.tanh(self.first(X.flatten(0, 1))).unflatten(0, X.shape[:2])
        h = h.mean(0) if self.time_major else h.mean(1)
        return self.second(h)


def flat_rows(time_major: bool) -> Instance:
    """As many positions as data in the first mini-batch, one datum in the last."""
    model = FlatRows(time_major).double()
    return Instance(model, nn.CrossEntropyLoss(), listed(model), real(6, 2, 2), ids(3, 6))


problem("flattened-rows-data-first", (2, 3, 1), "classes")(partial(flat_rows, False))
problem("flattened-rows-time-first", (2, 3, 1), "classes")(partial(flat_rows, True))


class Permuted(nn.Module):
    """Row n of the first layer is the last datum but n; what it gives is turned back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, X: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(X.flip(0)).flip(0)))


@problem("permuted-rows", (1, 3, 2))
def _() -> Instance:
    # The first mini-batch has one datum, whose only row is where it should be.
    model = Permuted().double()
    return Instance(model, nn.MSELoss(), listed(model), real(6, 3), real(6, 2))


class Sorted(Permuted):
    """The rows of the first layer are sorted by what is in them: the order differs between mini-batches."""

    def forward(self, X: Tensor) -> Tensor:
        order = X[:, 0].argsort()
        return self.second(torch.tanh(self.first(X[order])[order.argsort()]))


@problem("sorted-rows", (2, 3, 3))
def _() -> Instance:
    model = Sorted().double()
    X = real(8, 3)
    X[:2] = X[X[:2, 0].argsort()]  # in the first mini-batch, the order is that of the data
    return Instance(model, nn.MSELoss(), listed(model), X, real(8, 2))


class Routed(nn.Module):
    """Two experts, each of which sees its share of the data: all, some, or none of a mini-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 3) for _ in range(2))
        self.head = nn.Linear(3, 3)

    def forward(self, X: Tensor) -> Tensor:
        h = X.new_zeros(len(X), 3)
        for number, expert in enumerate(self.experts):
            rows = ((X[:, 0] > 0).long() == number).nonzero()[:, 0]
            h = h.index_add(0, rows, expert(X[rows]))
        return self.head(torch.tanh(h))


@problem("routed-rows", (2, 3, 2), "classes")
def _() -> Instance:
    # The first expert sees all, then two, then none of the data of a mini-batch.
    model, X = Routed().double(), real(7, 2)
    X[:, 0] = X[:, 0].abs() * torch.tensor([-1.0, -1, 1, -1, -1, 1, 1])
    return Instance(model, nn.CrossEntropyLoss(), listed(model), X, ids(3, 7))


class Repeated(nn.Module):
    """A layer that is used once more where a mini-batch asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, X: Tensor) -> Tensor:
        h, again = torch.tanh(self.layer(X)), X[:, :1] > 0
        if again.any():
            h = torch.where(again, torch.tanh(self.layer(h)), h)
        return self.head(h)


@problem("used-again-in-some-batches", (2, 3))
def _() -> Instance:
    model, X = Repeated().double(), real(5, 3)
    X[:, 0] = X[:, 0].abs() * torch.tensor([-1.0, -1, 1, -1, 1])
    return Instance(model, nn.MSELoss(), named(model), X, real(5, 2))


class Windowed(nn.Module):
    """Attention within shifted windows: rows [N·W, w, C], and a table of position biases that is read by indices."""

    def __init__(self, window: int = 2) -> None:
        super().__init__()
        self.window = window
        self.qkv, self.out, self.bias = nn.Linear(2, 6), nn.Linear(2, 2), nn.Parameter(torch.randn(2 * window - 1))

    def forward(self, X: Tensor) -> Tensor:
        windows = X.roll(1, 1).unflatten(1, (-1, self.window)).flatten(0, 1)  # [N·W, w, C]
        q, k, v = self.qkv(windows).chunk(3, dim=-1)
        at = torch.arange(self.window)
        scores = q @ k.transpose(1, 2) + self.bias[at[:, None] - at + self.window - 1]
        h = self.out(scores.softmax(-1) @ v)
        return X + h.reshape(X.shape).roll(-1, 1)


@problem("windowed-attention", (2, 3), "sequence")
def _() -> Instance:
    model = Windowed().double()
    return Instance(model, nn.MSELoss(), named(model), real(5, 4, 2), real(5, 4, 2))


class Positions(nn.Module):
    """Token embeddings with positions: an embedding of [T] or of [1, T] indices, or a slice of a parameter."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.token = nn.Embedding(4, 2)
        self.position = nn.Parameter(torch.randn(4, 2)) if form == "parameter" else nn.Embedding(4, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, X: Tensor) -> Tensor:
        T = X.shape[1]
        if self.form == "parameter":
            position = self.position[:T]
        else:
            position = self.position(torch.arange(T) if self.form == "flat" else torch.arange(T)[None])
        h = self.token(X) + position
        return self.head(torch.tanh(h.cumsum(1))).transpose(1, 2)


def positions(form: str) -> Instance:
    """As many positions as data in the first mini-batch."""
    model = Positions(form).double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), ids(4, 5, 3), ids(3, 5, 3))


for _form in ("flat", "row", "parameter"):
    problem(f"positions-{_form}", (3, 2), "classes", "sequence")(partial(positions, _form))


class ClassToken(nn.Module):
    """One learned token before each sequence, and learned positions; the token is read off."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 2)), nn.Parameter(torch.randn(1, 3, 2))
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(2, 3)

    def forward(self, X: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(X), -1, -1), X], dim=1) + self.position
        h = h + torch.tanh(self.mix(h.transpose(1, 2)).transpose(1, 2))
        return self.head(h[:, 0])


@problem("class-token", (3, 2), "classes")
def _() -> Instance:
    model = ClassToken().double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(5, 2, 2), ids(3, 5))


class Prefix(nn.Module):
    """A layer whose rows are learned prompts, as many as there are data: no row belongs to any datum."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts, self.layer, self.head = nn.Parameter(torch.randn(3, 2)), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, X: Tensor) -> Tensor:
        prefix = torch.tanh(self.layer(self.prompts))  # [P, d]
        return self.head(torch.softmax(X @ prefix.T, -1) @ prefix)


@problem("rows-without-datum", (3, 2))
def _() -> Instance:
    model = Prefix().double()
    return Instance(model, nn.MSELoss(), listed(model), real(5, 2), real(5, 2))


class MaskedRows(nn.Module):
    """Layers whose padded rows are multiplied by zero, before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, X: Tensor) -> Tensor:
        mask = (X[..., :1] != 0).to(X.dtype)
        h = mask * torch.sigmoid(self.first(X))
        return self.second(h.cumsum(1) * mask).transpose(1, 2)


@problem("masked-rows", (1, 3, 2), "classes", "sequence")
def _() -> Instance:
    # One datum is padding as a whole, and the targets of all padding are ignored.
    model, X, y = MaskedRows().double(), real(6, 3, 2), ids(3, 6, 3)
    X[0, 1:], X[2], X[4, 2] = 0.0, 0.0, 0.0
    y[X[..., 0] == 0] = -100
    return Instance(model, nn.CrossEntropyLoss(), named(model), X, y)
