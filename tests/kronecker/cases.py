"""Risks for the Kronecker family: the table of problems as far as its layers are modules, and some of full rank.

An eigenbasis is determined only where eigenvalues are separated. The problems of this module have enough data for
factors of full rank, so that even an eigenvalue-corrected matrix is one matrix.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.kronecker.oracle import KroneckerOracle
from tests.problems import PROBLEMS, Instance, Problem
from tests.problems.models import Shared
from tests.problems.sequences import Attention, MaskedAttention, masked_attention
from tests.problems.table import Table, ids, listed, mlp, named, positive, real

FISHERS = ("type-2", "mc", "empirical", "forward-only")
APPROXIMATIONS = ("expand", "reduce")
SAMPLES, SEED = 2, 5

TABLE = Table()
problem = TABLE.problem


# -- linear layers -----------------------------------------------------------------------------------------------------


@problem("kf-linear-ce", (4, 1, 5), "classes")
def _() -> Instance:
    model = nn.Linear(3, 3).double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(10, 3), ids(3, 10))


@problem("kf-mlp-mse", (6, 3))
def _() -> Instance:
    model = mlp(3, 4, 3)
    return Instance(model, nn.MSELoss(), listed(model), real(9, 3), real(9, 3))


@problem("kf-mlp-bce-sum", (9,))
def _() -> Instance:
    model = mlp(2, 3, 3)
    return Instance(model, nn.BCEWithLogitsLoss(reduction="sum"), named(model), real(9, 2), ids(2, 9, 3).double())


class Mixing(nn.Module):
    """Linear layers at each position, with positions mixed between them; data first or time first inside."""

    def __init__(self, outputs: int, time_first: bool = False, classes: bool = False) -> None:
        super().__init__()
        self.time_first, self.classes = time_first, classes
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, outputs)

    def forward(self, X: Tensor) -> Tensor:
        X, axis = (X.transpose(0, 1), 0) if self.time_first else (X, 1)
        h = self.first(X).tanh()
        f = self.second(h + h.cumsum(axis))
        f = f.transpose(0, 1) if self.time_first else f
        return f.transpose(1, 2) if self.classes else f


@problem("kf-sequence-ce", (3, 1, 2), "classes", "sequence")
def _() -> Instance:
    model = Mixing(3, classes=True).double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(6, 2, 2), ids(3, 6, 2))


@problem("kf-sequence-time-first-mse", (3, 4), "sequence")
def _() -> Instance:
    model = Mixing(2, time_first=True).double()
    return Instance(model, nn.MSELoss(), named(model), real(7, 3, 2), real(7, 3, 2))


@problem("kf-used-twice-ce", (6, 3), "classes")
def _() -> Instance:
    model = Shared().double()
    return Instance(model, nn.CrossEntropyLoss(), listed(model), real(9, 3), ids(3, 9))


class HuggingFace(nn.Module):
    """Two of Hugging Face's ``Conv1D`` on sequences."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.first, self.second = Conv1D(4, 3), Conv1D(3, 4)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape))

    def forward(self, X: Tensor) -> Tensor:
        return self.second(self.first(X).tanh().cumsum(1)).transpose(1, 2)


@problem("kf-hugging-face", (5, 2), "classes", "sequence")
def _() -> Instance:
    model = HuggingFace().double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(7, 2, 3), ids(3, 7, 2))


# -- convolutions ------------------------------------------------------------------------------------------------------


def pooled(X: Tensor, y: Tensor, loss: nn.Module, *layers: nn.Module) -> Instance:
    """Layers, then a head on the average over positions."""
    body = nn.Sequential(*layers).double()
    with torch.no_grad():
        width = body(X).shape[1]
    model = nn.Sequential(body, nn.Tanh(), Averaged(), nn.Linear(width, 3)).double()
    return Instance(model, loss, named(model), X, y)


class Averaged(nn.Module):
    """The mean over all positions but channels, weighted so that no two count alike."""

    def forward(self, X: Tensor) -> Tensor:
        rows = X.flatten(2)
        return (rows * torch.linspace(0.5, 1.5, rows.shape[2], dtype=X.dtype)).mean(2)


@problem("kf-conv1d", (6, 4), "classes")
def _() -> Instance:
    first = nn.Conv1d(4, 4, 2, dilation=3, padding="same", groups=2)
    second = nn.Conv1d(4, 3, 3, stride=2, padding=1)
    return pooled(real(10, 4, 6), ids(3, 10), nn.CrossEntropyLoss(), first, nn.Tanh(), second)


@problem("kf-conv2d", (7, 5), "classes")
def _() -> Instance:
    first = nn.Conv2d(2, 4, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2), groups=2)
    return pooled(real(12, 2, 4, 7), ids(3, 12), nn.CrossEntropyLoss(), first, nn.ReLU(inplace=True))


@problem("kf-conv2d-depthwise", (9,))
def _() -> Instance:
    depthwise, pointwise = nn.Conv2d(3, 3, 2, groups=3), nn.Conv2d(3, 4, 1)
    return pooled(real(9, 3, 3, 3), real(9, 3), nn.MSELoss(), depthwise, nn.GELU(), pointwise)


@problem("kf-conv3d", (8,))
def _() -> Instance:
    first = nn.Conv3d(2, 2, (2, 1, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2), bias=False)
    return pooled(real(8, 2, 2, 3, 3), real(8, 3), nn.MSELoss(reduction="sum"), first)


@problem("kf-conv-transpose2d", (7, 5), "classes")
def _() -> Instance:
    first = nn.ConvTranspose2d(4, 4, (2, 3), stride=(2, 1), padding=(0, 1), output_padding=(1, 0), groups=2)
    return pooled(real(12, 4, 2, 2), ids(3, 12), nn.CrossEntropyLoss(), first, nn.Sigmoid())


# -- embeddings, norms, attention --------------------------------------------------------------------------------------


class Looked(nn.Module):
    """An embedding that is averaged, and a head."""

    def __init__(self, padding_idx: int | None) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3, padding_idx=padding_idx), nn.Linear(3, 3)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.randn(5, 3))

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.embedding(X).tanh().cumsum(1).mean(1))


def looked(padding_idx: int | None) -> Instance:
    """Three tokens a datum; some are padding, in one datum two of them."""
    model, X = Looked(padding_idx).double(), ids(5, 9, 3)
    X[0, :2] = 1
    return Instance(model, nn.CrossEntropyLoss(), named(model), X, ids(3, 9))


problem("kf-embedding", (5, 4), "classes")(partial(looked, None))
problem("kf-embedding-padding", (5, 4), "classes")(partial(looked, 1))


class Normed(nn.Module):
    """A layer norm, a batch norm in evaluation mode, and bare parameters that are broadcast along data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.batch, self.head = (
            nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Linear(4, 2),
        )  # fmt: skip
        self.shift, self.temperature = nn.Parameter(torch.randn(4)), nn.Parameter(torch.tensor(0.7))
        with torch.no_grad():
            for norm in (self.layer, self.batch):
                norm.weight.copy_(positive(4))
                norm.bias.copy_(real(4))
        self.batch.running_mean, self.batch.running_var = real(4), positive(4)

    def forward(self, X: Tensor) -> Tensor:
        h = self.batch(self.layer(self.first(X)).tanh() + self.shift)
        return self.temperature.exp() * self.head(h.sigmoid())


@problem("kf-norms", (5, 5))
def _() -> Instance:
    model = Normed().double().eval()
    return Instance(model, nn.MSELoss(), named(model), real(10, 3), real(10, 2))


class TakenApart(nn.Module):
    """``nn.MultiheadAttention`` on one input, data first, with its projections as modules, for the oracle."""

    def __init__(self, inner: nn.MultiheadAttention) -> None:
        super().__init__()
        width, self.heads = inner.embed_dim, inner.num_heads
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.project.weight, self.project.bias = inner.in_proj_weight, inner.in_proj_bias
        self.out.weight, self.out.bias = inner.out_proj.weight, inner.out_proj.bias

    def forward(self, X: Tensor, hidden: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.project(X).chunk(3, dim=-1))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores = scores if hidden is None else scores.masked_fill(hidden[:, None], -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class AttentionByHand(nn.Module):
    """The network of ``Attention``."""

    def __init__(self, model: Attention) -> None:
        super().__init__()
        self.attention, self.readout = TakenApart(model.attention), model.readout

    def forward(self, X: Tensor) -> Tensor:
        return self.readout(self.attention(X).tanh())


class MaskedAttentionByHand(nn.Module):
    """The network of ``MaskedAttention``."""

    def __init__(self, model: MaskedAttention) -> None:
        super().__init__()
        self.embedding, self.attention, self.readout = model.embedding, TakenApart(model.attention), model.readout

    def forward(self, X: Tensor) -> Tensor:
        h, T = self.embedding(X), X.shape[1]
        hidden = (X == 0)[:, None, :] | torch.ones(T, T, dtype=torch.bool).triu(1)
        return self.readout(h + self.attention(h, hidden)).transpose(1, 2)


def attentive(batch_first: bool, train: bool, num_data: int) -> Instance:
    """``nn.MultiheadAttention`` with as many positions as data in the first mini-batch."""
    model = Attention(batch_first).double().train(train)
    with torch.no_grad():
        model.attention.in_proj_bias.copy_(real(12))
        model.attention.out_proj.bias.copy_(real(4))
    X, y = real(num_data, 3, 4), real(num_data, 3, 2)
    return Instance(model, nn.MSELoss(), named(model), X, y, forward=AttentionByHand(model))


problem("kf-attention", (3, 6), "sequence")(partial(attentive, True, True, 9))
problem("kf-attention-time-first-eval", (3, 4), "sequence")(partial(attentive, False, False, 7))


@problem("kf-attention-masked", (3, 4), "classes", "sequence")
def _() -> Instance:
    instance = masked_attention(True)
    instance.forward = MaskedAttentionByHand(instance.model)
    with torch.no_grad():
        instance.model.attention.in_proj_bias.copy_(real(6))
    X, y = 1 + ids(3, 7, 3), ids(3, 7, 3)
    X[1, 2:], X[3, 1:] = 0, 0
    y[X == 0] = -100
    instance.X, instance.y = X, y
    return instance


# -- which parameters have no factors ----------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose table is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(X)).tanh().cumsum(1)).transpose(1, 2)


@problem("kf-tied", (4, 3), "classes", "sequence")
def _() -> Instance:
    model = Tied().double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), ids(4, 7, 2), ids(4, 7, 2))


class Recurrent(nn.Module):
    """An LSTM with a head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.lstm(X)[0][:, -1])


@problem("kf-lstm", (5, 4), "classes")
def _() -> Instance:
    model = Recurrent().double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(9, 3, 2), ids(3, 9))


#: Beginnings of the names of parameters that get the exact diagonal, by problem.
DIAGONAL: dict[str, tuple[str, ...]] = {
    "kf-tied": ("embedding.weight",),
    "kf-lstm": ("lstm.",),
    "lstm-time-major-input": ("lstm.",),
    "tied-embeddings": ("token.weight",),
    "windowed-attention": ("bias",),
}


def names_of(instance: Instance) -> list[str]:
    """Return a name of each parameter: its key, else what the model calls it, else its number."""
    if isinstance(instance.params, dict):
        return list(map(str, instance.params))
    known = dict(instance.model.named_parameters()) if isinstance(instance.model, nn.Module) else {}
    places = {id(p): n for n, p in known.items()}
    return [places.get(id(p), str(i)) for i, p in enumerate(instance.params)]


def positions_in(table: dict[str, tuple[str, ...]], name: str, instance: Instance) -> list[int]:
    """Return the positions of the parameters that a table lists for a problem."""
    return [i for i, n in enumerate(names_of(instance)) if n.startswith(table.get(name, ()))]


def made(build: Callable[[], Instance], sizes: Sequence[int] | None = None) -> Instance:
    """Build a risk anew from a fixed seed, as one mini-batch unless sizes are given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        instance = build()
    instance.cut((len(instance.y),) if sizes is None else sizes)
    return instance


def problem_of(name: str) -> Problem:
    """Return a problem of this module, or of the table of all."""
    return TABLE[name] if name in TABLE else PROBLEMS[name]


@cache
def oracle_of(name: str) -> KroneckerOracle:
    """Build the oracle of a problem once, on tensors of its own."""
    instance = problem_of(name).make()
    return KroneckerOracle(instance, positions_in(DIAGONAL, name, instance))


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} against {list(expected.shape)}"
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def options_of(fisher: str, approx: str, separate: bool) -> dict[str, Any]:
    """Return the options of an oracle's matrix."""
    sampling = {"mc_samples": SAMPLES, "seed": SEED} if fisher == "mc" else {}
    return {"fisher": fisher, "approx": approx, "separate": separate, **sampling}


def keywords_of(fisher: str, approx: str | None, separate: bool) -> dict[str, Any]:
    """Return the same options as keywords of an operator, which has no approximation where it is ``None``."""
    sampling = {"mc_samples": SAMPLES, "seed": SEED} if fisher == "mc" else {}
    chosen = {} if approx is None else {"kfac_approx": approx}
    return {"fisher_type": fisher, "separate_weight_and_bias": separate, **chosen, **sampling}


def build(cls: Callable[..., Any], instance: Instance, **keywords: Any) -> Any:
    """Construct an operator as a user would."""
    options = {"check_deterministic": False, **instance.options, **keywords}
    if instance.weight_fn is not None:
        options["weight_fn"] = instance.weight_fn
    return cls(instance.model, instance.loss, instance.params, instance.data, **options)
