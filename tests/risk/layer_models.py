"""Models that use their parameters in every way that notes know, and in ways that they must not rely on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.risk.small import normal

ALL = frozenset({"all"})
NONE: frozenset[str] = frozenset()
Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A model at one mini-batch, and the names of the parameters that its notes cover."""

    name: str
    make: Callable[[], tuple[Any, Any]]
    covered: frozenset[str] = ALL

    def build(self) -> tuple[list[str], list[Tensor], Forward]:
        """Names and values of the parameters, and the forward."""
        torch.manual_seed(0)
        model, X = self.make()
        if not isinstance(model, nn.Module):
            params, function = model
            return list(params), list(params.values()), lambda: function(params, X)
        model = model.double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.7)
        return [n for n, _ in model.named_parameters()], list(model.parameters()), lambda: model(X)


class Of(nn.Module):
    """A module of parts and of a function of them and of X."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, X: Any) -> Tensor:
        """Call the function."""
        return self.function(self, X)


def of(name: str, function: Callable[..., Tensor], X: Tensor, covered: frozenset[str] = ALL, **parts: Any) -> Case:
    """A case of parts; parameters are given as tensors, modules as functions that make them."""

    def make() -> tuple[nn.Module, Tensor]:
        made = {n: p.clone() if isinstance(p, Tensor) else p() for n, p in parts.items()}
        return Of(function, **made), X

    return Case(name, make, covered)


def layers(name: str, X: Tensor, *make: Callable[[], nn.Module], covered: frozenset[str] = ALL) -> Case:
    """A case of layers one after the other."""
    return Case(name, lambda: (nn.Sequential(*(m() for m in make)), X), covered)


def numbers(high: int, *shape: int) -> Tensor:
    """Indices below a limit, with repetitions."""
    return (7 * torch.arange(torch.Size(shape).numel()) % 11 % high).reshape(shape)


def convolutions() -> list[Case]:
    """Every option, in one to three dimensions."""
    cases = []
    for dim in (1, 2, 3):
        X = normal(3, 4, *(6, 5, 4)[:dim])
        plain, transposed = getattr(nn, f"Conv{dim}d"), getattr(nn, f"ConvTranspose{dim}d")
        options: list[dict[str, Any]] = [
            {"kernel_size": 3, "stride": 2, "padding": 1},
            {"kernel_size": 2, "padding": "same"},
            {"kernel_size": 2, "padding": "valid", "dilation": 2, "groups": 2},
            {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "bias": False},
            {"kernel_size": (3, 2, 1)[:dim], "stride": (2, 1, 3)[:dim], "padding": (0, 1, 0)[:dim], "groups": 4},
        ]
        for option in options:
            make = lambda plain=plain, option=option: plain(4, 8, **option)  # noqa: E731
            cases.append(layers(f"conv{dim}d {option}", X, make, nn.Tanh, nn.Flatten))
        options = [
            {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
            {"kernel_size": 2, "dilation": 2, "groups": 2},
            {"kernel_size": 2, "dilation": 3, "output_padding": 2},
        ]
        for option in options:
            make = lambda transposed=transposed, option=option: transposed(4, 6, **option)  # noqa: E731
            cases.append(layers(f"conv_transpose{dim}d {option}", X, make, nn.Tanh, nn.Flatten))
    return cases


def norms() -> list[Case]:
    """Scale and shift after each normalisation."""
    last, channels = normal(3, 5, 4), normal(3, 4, 5, 2)

    def batch_norm() -> nn.Module:
        norm = nn.BatchNorm2d(4)
        norm.running_mean, norm.running_var = normal(4), normal(4).square() + 0.5
        return norm.eval()

    return [
        layers("layer norm", last, lambda: nn.LayerNorm(4)),
        layers("layer norm of two axes", last, lambda: nn.LayerNorm((5, 4))),
        layers("layer norm without bias", last, lambda: nn.LayerNorm(4, bias=False)),
        layers("rms norm", last, lambda: nn.RMSNorm(4)),
        layers("batch norm", channels, batch_norm),
        layers("batch norm in training", channels, lambda: nn.BatchNorm2d(4), covered=NONE),
        layers("batch norm of vectors", normal(3, 4), lambda: nn.BatchNorm1d(4).eval()),
        layers("group norm", channels, lambda: nn.GroupNorm(2, 4)),
        layers("instance norm", channels, lambda: nn.InstanceNorm2d(4, affine=True)),
    ]


def embeddings() -> list[Case]:
    """Tables, with and without a datum axis."""
    tokens, table = numbers(6, 3, 4), lambda: nn.Embedding(6, 2)
    places = lambda: nn.Embedding(5, 2)  # noqa: E731

    def with_positions(shape: tuple[int, ...]) -> Callable[..., Tensor]:
        def forward(m: Any, X: Tensor) -> Tensor:
            steps = torch.arange(X.shape[1]).reshape(shape)
            return m.head((m.tokens(X) + m.positions(steps)).tanh())

        return forward

    head = lambda: nn.Linear(2, 2)  # noqa: E731
    parts = {"tokens": table, "positions": places, "head": head}
    return [
        layers("embedding", tokens, table, lambda: nn.Linear(2, 3)),
        layers("embedding with padding", tokens, lambda: nn.Embedding(6, 2, padding_idx=1)),
        layers("embedding with padding from the end", tokens, lambda: nn.Embedding(6, 2, padding_idx=-1)),
        layers("embedding by frequency", tokens, lambda: nn.Embedding(6, 2, scale_grad_by_freq=True), covered=NONE),
        layers("embedding of one index a datum", numbers(6, 4), table),
        of("position embedding [T]", with_positions((-1,)), tokens, **parts),
        of("position embedding [1, T]", with_positions((1, -1)), tokens, **parts),
        of("position embedding, one datum", with_positions((1, -1)), tokens[:1], **parts),
        of("position embedding first", lambda m, X: m.p(torch.arange(4)) + m.t(X), tokens, p=places, t=table),
        of("repeated positions", lambda m, X: m.t(X) + m.p(torch.tensor([0, 1, 1, 0])), tokens, p=places, t=table),
        of(
            "positions used twice",
            lambda m, X: (e := m.p(torch.arange(4))) * m.t(X) + e,
            tokens,
            p=places,
            t=table,
        ),
        of("tied embedding and head", lambda m, X: F.linear(m.t(X).tanh(), m.t.weight), tokens, t=table),
    ]


def bare_parameters() -> list[Case]:
    """Parameters that are added or multiplied by hand."""
    X, images, p, q = normal(4, 5, 3), normal(3, 4, 5, 2), normal(3, seed=1), normal(6, 3, seed=2)

    def in_place(m: Any, X: Tensor) -> Tensor:
        Y = X * 2
        Y += m.p
        return Y.tanh()

    def class_token(m: Any, X: Tensor) -> Tensor:
        rows = torch.cat([m.token.expand(len(X), -1, -1), X], 1)
        return (m.head(rows).tanh() + m.positions[: rows.shape[1]]).mean(1)

    def two_uses(m: Any, X: Tensor) -> Tensor:
        view = m.q[:5]
        return X + view + (X + view).tanh()

    def half_known(m: Any, X: Tensor) -> Tensor:
        view = m.q[:5]
        return X + view + view.square().sum()

    token = normal(1, 1, 3, seed=3)
    parts = {"token": token, "positions": normal(6, 3, seed=4), "head": lambda: nn.Linear(3, 3)}
    return [
        of("addend", lambda m, X: (X + m.p).tanh(), X, p=p),
        of("addend on the left", lambda m, X: (m.p + X).tanh(), X, p=p),
        of("addend in place", in_place, X, p=p),
        of("torch.add", lambda m, X: torch.add(X, m.p), X, p=p),
        of("torch.add with alpha", lambda m, X: torch.add(X, m.p, alpha=2), X, NONE, p=p),
        of("factor", lambda m, X: (X * m.p).tanh(), X, p=p),
        of("scalar factor", lambda m, X: (X * m.p).tanh(), X, p=normal()),
        of("layer scale of channels", lambda m, X: X.sin() * m.p[:, None, None], images, p=normal(4)),
        of("rms norm by hand", lambda m, X: m.p * X * (X.square().mean(-1, keepdim=True) + 1).rsqrt(), X, p=p),
        of("positions cut", lambda m, X: (X + m.q[: X.shape[1]]).tanh(), X, q=q),
        of("positions reversed", lambda m, X: (X + m.q[1:].flip(0)).tanh(), X, NONE, q=q),
        of("positions transposed", lambda m, X: X.mT * m.q[None, 1:].transpose(1, 2), X, q=q),
        of("reshaped", lambda m, X: X + m.q.view(2, 3, 3)[1, 0].unsqueeze(0), X, q=q),
        of("a view used twice", two_uses, X, q=q),
        of("a view used in another way too", half_known, X, NONE, q=q),
        of("a parameter of each datum", lambda m, X: X + m.q[:4, None], X, NONE, q=q),
        of("difference", lambda m, X: X - m.p, X, NONE, p=p),
        of("class token", class_token, X, **parts),
        of("as many positions as data", lambda m, X: (X + m.q[:5]).tanh(), normal(5, 5, 3), q=q),
        of(
            "time first",
            lambda m, X: (X.transpose(0, 1) + m.q[:5, None]).tanh().transpose(0, 1),
            normal(5, 5, 3),
            q=q,
        ),
    ]


def linear_layers() -> list[Case]:
    """Rows in every order, and functions that are linear layers by another name."""
    X, sequence = normal(5, 3), normal(4, 6, 3)
    W, b, one = normal(3, 2, seed=1), normal(2, seed=2), lambda: nn.Linear(3, 3)

    def conv1d_of_hugging_face(m: Any, X: Tensor) -> Tensor:
        return torch.addmm(m.b, X.view(-1, 3), m.W).view(*X.shape[:-1], 2).tanh()

    def time_major(m: Any, X: Tensor) -> Tensor:
        return m.one(X.transpose(0, 1)).tanh().cumsum(0).transpose(0, 1)

    def windows(m: Any, X: Tensor) -> Tensor:
        cut = X.reshape(4, 3, 2, 3).flatten(0, 1)
        return m.one(cut).tanh().mean(1).reshape(4, 3, 3)

    def windows_first(m: Any, X: Tensor) -> Tensor:
        cut = X.reshape(4, 3, 2, 3).transpose(0, 1).flatten(0, 1)
        return m.one(cut).tanh().mean(1).reshape(3, 4, 3).transpose(0, 1)

    def shuffled(m: Any, X: Tensor) -> Tensor:
        order = torch.tensor([3, 0, 4, 1, 2])
        return m.one(X[order]).tanh()[order.argsort()]

    def masked(m: Any, X: Tensor) -> Tensor:
        keep = torch.ones(4, 6, 1, dtype=X.dtype).tril(2)
        return m.one(X * keep).tanh() * keep

    def only_some(m: Any, X: Tensor) -> Tensor:
        return m.one(X[torch.arange(24).reshape(4, 6) % 3 > 0]).tanh().reshape(4, 4, 3)

    def mixed(m: Any, X: Tensor) -> Tensor:
        return m.one(X + X.mean(0)).tanh() + m.one(X).tanh().mean(0)

    def twice(m: Any, X: Tensor) -> Tensor:
        return m.one(m.one(X).tanh())

    return [
        layers("in-place ReLU", X, lambda: nn.Linear(3, 4), lambda: nn.ReLU(inplace=True), lambda: nn.Linear(4, 2)),
        layers("sequence", sequence, one, nn.Tanh, lambda: nn.Linear(3, 2, bias=False)),
        layers("two axes of positions", normal(3, 2, 4, 3), one),
        of("Hugging Face Conv1D", conv1d_of_hugging_face, sequence, W=W, b=b),
        of("matmul", lambda m, X: (X @ m.W + m.b).tanh(), sequence, W=W, b=b),
        of("torch.mm", lambda m, X: torch.mm(X, m.W), X, W=W),
        of("matmul with a transpose", lambda m, X: X @ m.W.T + m.b, X, W=normal(2, 3), b=b),
        of("linear with a transpose", lambda m, X: F.linear(X, m.W.t(), m.b), X, W=W, b=b),
        of("a part of the weight", lambda m, X: F.linear(X, m.W[:2], m.b), X, frozenset({"b"}), W=normal(4, 3), b=b),
        of("a square part of the weight", lambda m, X: X @ m.W.view(3, 3), X, frozenset(), W=normal(3, 3)),
        of("time first", time_major, normal(6, 6, 3), one=one),
        of("windows", windows, sequence, one=one),
        of("windows first", windows_first, sequence, one=one),
        of("shuffled rows", shuffled, X, NONE, one=one),
        of("masks", masked, sequence, one=one),
        of("some positions", only_some, sequence, one=one),
        of("mixed data", mixed, X, NONE, one=one),
        of("a weight used twice", twice, X, one=one),
        of("a weight used twice, on sequences", twice, sequence, one=one),
        of("one datum", twice, sequence[:1], one=one),
        of("a weight used in two ways", lambda m, X: X @ m.W + F.linear(X, m.W), X, W=normal(3, 3)),
        of(
            "a weight that is an input",
            lambda m, X: m.one(X) @ F.linear(m.one.weight, m.one.weight),
            X,
            frozenset({"one.bias"}),
            one=one,
        ),
        of("a weight with a penalty", lambda m, X: m.one(X) + m.one.weight.sum(), X, frozenset({"one.bias"}), one=one),
    ]


def inside_of_models() -> list[Case]:
    """What a model does with gradients, vmap and scripts."""
    X = normal(5, 3)
    one = lambda: nn.Linear(3, 3)  # noqa: E731

    def overwritten(m: Any, X: Tensor) -> Tensor:
        Y = X.clone()
        Z = m.one(Y.detach())
        return Z * 1

    def energy(m: Any, X: Tensor) -> Tensor:
        X = X.detach().requires_grad_()
        return torch.autograd.grad(m.one(X).square().sum(), X, create_graph=True)[0]

    def under_vmap(m: Any, X: Tensor) -> Tensor:
        return torch.func.vmap(lambda x: F.linear(x, m.one.weight, m.one.bias))(X)

    def logged(m: Any, X: Tensor) -> Tensor:
        m.one(X).sum()
        return X @ m.one.weight.T.contiguous().clone() + m.one.bias

    def halves(m: Any, X: Tensor) -> Tensor:
        with torch.no_grad():
            m.one(X)
        return m.one(X).tanh()

    def clipped(m: Any, X: Tensor) -> Tensor:
        Y = m.one(X)
        Y.register_hook(lambda g: g.clamp(-0.01, 0.01))
        return Y.tanh()

    def checkpointed(m: Any, X: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda X: m.one(X).tanh(), X, use_reentrant=False)  # type: ignore[no-any-return]

    def function(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return F.linear(torch.relu(X @ params["W"]), params["V"], params["b"])

    params = {"W": normal(3, 4), "V": normal(2, 4), "b": normal(2)}
    scripted = lambda: torch.jit.trace(nn.Linear(3, 3).double(), X)  # noqa: E731
    return [
        of("detached input", overwritten, X, one=one),
        of("a gradient inside of the model", energy, X, NONE, one=one),
        of("vmap inside of the model", under_vmap, X, NONE, one=one),
        of("a call that leads nowhere", logged, X, frozenset({"one.bias"}), one=one),
        of("a call without gradients", halves, X, one=one),
        of("a hook that is not linear", clipped, X, NONE, one=one),
        of("checkpointing", checkpointed, X, one=one),
        of(
            "a traced module",
            lambda m, X: m.two(m.one(X)),
            X,
            frozenset({"two.weight", "two.bias"}),
            one=scripted,
            two=one,
        ),
        Case(
            "a callable of parameters and X",
            lambda: (({n: p.clone().requires_grad_() for n, p in params.items()}, function), X),
        ),
    ]


def attention() -> list[Case]:
    """Multi-head attention as one call."""
    X = normal(3, 5, 4)
    layer = lambda **options: lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, **options)  # noqa: E731

    def time_first(m: Any, X: Tensor) -> Tensor:
        return m.layer(X.transpose(0, 1)).transpose(0, 1)

    def of_two(m: Any, X: Tensor) -> Tensor:
        return m.attention(X, 2 * X, 2 * X, need_weights=False)[0]

    def causal(m: Any, X: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(X.shape[1], dtype=X.dtype)
        return m.layer(X, mask, is_causal=True)

    heads = lambda **options: lambda: nn.MultiheadAttention(4, 2, batch_first=True, **options)  # noqa: E731
    return [
        of("encoder layer", lambda m, X: m.layer(X), X, layer=layer(batch_first=True)),
        of("encoder layer, time first", time_first, normal(5, 5, 4), layer=layer()),
        of("causal encoder layer", causal, X, layer=layer(batch_first=True)),
        of(
            "attention weights",
            lambda m, X: m.attention(X, X, X)[1],
            X,
            frozenset({"attention.in_proj_weight", "attention.in_proj_bias"}),
            attention=heads(),
        ),
        of("attention to others", of_two, X, NONE, attention=heads()),
        of("attention with biases", lambda m, X: m.attention(X, X, X)[0], X, NONE, attention=heads(add_bias_kv=True)),
    ]


CASES = [
    *linear_layers(),
    *bare_parameters(),
    *embeddings(),
    *norms(),
    *convolutions(),
    *attention(),
    *inside_of_models(),
]
