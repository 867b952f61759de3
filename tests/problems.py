"""The table of problems: small empirical risks in float64 that between them meet every form the package accepts.

A problem states by itself how its data reach its model (``forward``), so that the oracles need no help from the
package. Each call of ``Problem.make`` builds everything anew from a fixed seed: the package and the oracle get equal
values but share no tensor.

Tags: ``core`` runs all laws, not only the comparison with the truth; ``no_fisher`` has a loss without Fisher matrices;
``classes`` is cross-entropy, whose Monte-Carlo draws the oracle repeats; ``sequence`` has several positions a datum;
``order`` cannot be cut anew into batches; ``generic`` has a loss the package does not know; ``cut`` has a part that is
cut off from derivatives; ``refused`` may be refused, but must not be wrong.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.oracles import Oracle

Params = list[Tensor] | dict[str, Tensor]


@dataclass
class Instance:
    """One empirical risk, ready to be passed to an operator.

    Attributes:
        model: What is passed as ``model_func``.
        loss: What is passed as ``loss_func``.
        params: What is passed as ``params``.
        X: The inputs of the whole data set.
        y: The targets of the whole data set.
        forward: Maps X to the prediction, at the tensors in ``params``; calls ``model(X)`` when None.
        weight_fn: Example weights, or None.
        options: Further keyword arguments of every operator.
        l2: The factor of the ridge term of Hessian and GGN.
        axis: The axis of data in X.
        one_mapping: Whether the loader yields one mapping with ``labels`` instead of pairs.
        data: The mini-batches, set by ``Problem.make``.
    """

    model: Any
    loss: Callable[[Tensor, Tensor], Tensor]
    params: Params
    X: Any
    y: Tensor
    forward: Callable[[Any], Tensor] | None = None
    weight_fn: Callable[[Any, Tensor], Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    l2: float = 0.0
    axis: int = 0
    one_mapping: bool = False
    data: list[Any] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters as a list."""
        return list(self.params.values()) if isinstance(self.params, Mapping) else list(self.params)

    def cut(self, sizes: Sequence[int]) -> None:
        """Cut the data into mini-batches of the given sizes."""
        assert sum(sizes) == len(self.y)
        self.data, start = [], 0
        for size in sizes:
            X, y = narrow(self.X, self.axis, start, size), self.y[start : start + size]
            self.data.append({**X, "labels": y} if self.one_mapping else (X, y))
            start += size

    def oracle(self) -> Oracle:
        """Return the dense truth of this risk."""
        return Oracle(self.forward or self.model, self.loss, self.tensors, self.data, self.weight_fn, self.l2)


def narrow(X: Any, axis: int, start: int, size: int) -> Any:
    """Cut a tensor, a tuple or a mapping of tensors."""
    if isinstance(X, Tensor):
        return X.narrow(axis, start, size)
    if isinstance(X, Mapping):
        return {key: narrow(value, axis, start, size) for key, value in X.items()}
    return type(X)(narrow(value, axis, start, size) for value in X)


@dataclass(frozen=True)
class Problem:
    """One row of the table.

    Attributes:
        name: Identifier of the row.
        build: Builds the risk; called with the random state seeded by the name.
        sizes: The sizes of the mini-batches, in order.
        tags: See the module's docstring.
    """

    name: str
    build: Callable[[], Instance]
    sizes: tuple[int, ...]
    tags: frozenset[str]

    def make(self, sizes: Sequence[int] | None = None) -> Instance:
        """Build the risk anew, with its own sizes of mini-batches or with others."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            instance = self.build()
        instance.cut(self.sizes if sizes is None else sizes)
        return instance


PROBLEMS: dict[str, Problem] = {}


Build = Callable[[], Instance]


def problem(name: str, sizes: tuple[int, ...], *tags: str) -> Callable[[Build], Build]:
    """Register a function that builds a risk as a row of the table."""

    def register(build: Build) -> Build:
        assert name not in PROBLEMS
        PROBLEMS[name] = Problem(name, build, sizes, frozenset(tags))
        return build

    return register


def real(*shape: int) -> Tensor:
    """Return standard normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    """Return numbers between 0.3 and 1.3 in float64."""
    return torch.rand(shape, dtype=torch.float64) + 0.3


def ids(high: int, *shape: int) -> Tensor:
    """Return random indices below ``high``."""
    return torch.randint(high, shape)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return a small smooth network."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()


def named(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def listed(model: nn.Module) -> list[Tensor]:
    """Return the parameters that require gradients, as a list."""
    return [p for p in model.parameters() if p.requires_grad]


# -- models ------------------------------------------------------------------------------------------------------------


@problem("mlp-relu-inplace-mse", (4, 1, 2), "core")
def _() -> Instance:
    model = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 2)
    ).double()
    return Instance(model, nn.MSELoss(), listed(model), real(7, 4), real(7, 2))


@problem("mlp-tanh-ce-dict", (3, 4), "core", "classes")
def _() -> Instance:
    model = mlp(4, 4, 3)
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(7, 4), ids(3, 7))


@problem("linear-bce", (5, 3), "core")
def _() -> Instance:
    model = nn.Linear(3, 2).double()
    return Instance(model, nn.BCEWithLogitsLoss(), named(model), real(8, 3), ids(2, 8, 2).double())


@problem("cnn-batchnorm-eval-ce", (2, 3), "classes")
def _() -> Instance:
    norm = nn.BatchNorm2d(2)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, stride=2), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    norm.running_mean.copy_(real(2))
    norm.running_var.copy_(positive(2))
    return Instance(model.eval(), nn.CrossEntropyLoss(), listed(model), real(5, 1, 8, 8), ids(3, 5))


@problem("segmentation-ce", (1, 2), "classes", "sequence")
def _() -> Instance:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.GELU(), nn.Conv2d(2, 3, 1)).double()
    return Instance(model, nn.CrossEntropyLoss(), listed(model), real(3, 1, 3, 4), ids(3, 3, 2, 3))


class TinyTransformer(nn.Module):
    """Token and position embeddings, causal attention, a residual network, and one distribution a position."""

    def __init__(self, vocabulary: int = 5, width: int = 4, length: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, X: Tensor) -> Tensor:
        h = self.token(X) + self.position(torch.arange(X.shape[1]))
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(h)).chunk(3, dim=-1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(F.gelu(h)).transpose(1, 2)  # [N, C, T]


@problem("transformer-sdpa-ce", (2, 1), "classes", "sequence")
def _() -> Instance:
    model = TinyTransformer().double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), ids(5, 3, 3), ids(5, 3, 3))


@problem("tied-embeddings", (1, 3), "classes", "sequence")
def _() -> Instance:
    model = TinyTransformer(tied=True).double()
    return Instance(model, nn.CrossEntropyLoss(reduction="sum"), listed(model), ids(5, 4, 3), ids(5, 4, 3))


class Attention(nn.Module):
    """``nn.MultiheadAttention``, data first or time first inside, and a linear readout a position."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.readout = nn.Linear(4, 2)

    def forward(self, X: Tensor) -> Tensor:
        X = X if self.batch_first else X.transpose(0, 1)
        h = torch.tanh(self.attention(X, X, X, need_weights=False)[0])
        return self.readout(h if self.batch_first else h.transpose(0, 1))


def attention(batch_first: bool, train: bool) -> Instance:
    """``nn.MultiheadAttention`` with as many positions as data."""
    model = Attention(batch_first).double().train(train)
    return Instance(model, nn.MSELoss(), listed(model), real(5, 3, 4), real(5, 3, 2))


problem("multihead-attention-train", (3, 2), "sequence")(partial(attention, True, True))
problem("multihead-attention-eval-time-major", (3, 2), "sequence")(partial(attention, False, False))


class Encoder(nn.Module):
    """``nn.TransformerEncoderLayer``, pooled over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=3, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.layer(X).mean(1))


def encoder(train: bool) -> Instance:
    """Use ``nn.TransformerEncoderLayer`` in training or evaluation mode."""
    model = Encoder().double().train(train)
    return Instance(model, nn.CrossEntropyLoss(), listed(model), real(4, 3, 4), ids(2, 4))


problem("encoder-layer-train", (1, 3), "classes")(partial(encoder, True))
problem("encoder-layer-eval", (2, 2), "classes")(partial(encoder, False))


class Recurrent(nn.Module):
    """An LSTM that runs time first."""

    def __init__(self, data_first: bool, every_step: bool) -> None:
        super().__init__()
        self.data_first, self.every_step = data_first, every_step
        self.lstm, self.head = nn.LSTM(2, 3), nn.Linear(3, 2)

    def forward(self, X: Tensor) -> Tensor:
        hidden, _ = self.lstm(X.transpose(0, 1) if self.data_first else X)  # [T, N, H]
        return self.head(hidden.transpose(0, 1)) if self.every_step else self.head(hidden[-1])


@problem("lstm-data-first", (3, 2), "sequence")
def _() -> Instance:
    model = Recurrent(data_first=True, every_step=True).double()
    return Instance(model, nn.MSELoss(), named(model), real(5, 3, 2), real(5, 3, 2))


@problem("lstm-time-major-input", (3, 3), "order", "classes")
def _() -> Instance:
    # X is [T, N, F] with T = N = 3 in each mini-batch: nothing about the shapes says which axis is which. Halves along
    # the first axis are no mini-batches here, so the user has to switch the check off.
    model = Recurrent(data_first=False, every_step=False).double()
    options = {"batch_size_fn": lambda X: X.shape[1], "check_deterministic": False}
    return Instance(model, nn.CrossEntropyLoss(), listed(model), real(3, 6, 2), ids(2, 6), options=options, axis=1)


class PaddedClassifier(nn.Module):
    """An embedding with a padding index, averaged over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3, padding_idx=1), nn.Linear(3, 3)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(X)).mean(1))


@problem("embedding-padding-idx", (2, 3), "classes")
def _() -> Instance:
    model = PaddedClassifier().double()
    with torch.no_grad():
        model.embedding.weight[1] = 0.3  # nothing keeps the padded row at zero
    X = ids(6, 5, 4)
    X[:, 0] = 1
    return Instance(model, nn.CrossEntropyLoss(), named(model), X, ids(3, 5))


class Checkpointed(nn.Module):
    """A network whose body is recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 2)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(torch.sigmoid(checkpoint(self.body, X, use_reentrant=False)))


@problem("checkpoint-non-reentrant", (2, 3))
def _() -> Instance:
    model = Checkpointed().double()
    return Instance(model, nn.MSELoss(), listed(model), real(5, 3), real(5, 2))


class Cube(torch.autograd.Function):
    """A classic custom function: no ``setup_context``, no ``jvp``, a backward that can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad_output


class WithCustomFunction(nn.Module):
    """Two linear layers around a custom function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, X: Tensor) -> Tensor:
        return self.second(Cube.apply(self.first(X)))


@problem("custom-function", (1, 4), "classes")
def _() -> Instance:
    model = WithCustomFunction().double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(5, 3), ids(3, 5))


class CustomWeight(torch.autograd.Function):
    """A classic custom function of the weight itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad_output @ weight, grad_output.T @ x


class WithCustomWeight(nn.Module):
    """One custom linear layer before an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.second = nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 2)

    def forward(self, X: Tensor) -> Tensor:
        return self.second(torch.tanh(CustomWeight.apply(X, self.weight)))


@problem("custom-function-of-a-weight", (3, 2))
def _() -> Instance:
    model = WithCustomWeight().double()
    return Instance(model, nn.MSELoss(), listed(model), real(5, 3), real(5, 2))


class Unattached(nn.Module):
    """Two linear layers, and one that is not used at all; a part of the first can be cut off from derivatives."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.cut = cut
        self.first, self.second, self.unused = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, X: Tensor) -> Tensor:
        h = torch.tanh(self.first(X))
        if self.cut == "no_grad":  # which forward mode does not heed
            with torch.no_grad():
                scale = torch.sigmoid(self.first(X))
        else:
            scale = h.detach() ** 2 if self.cut == "detach" else h**2
        return self.second(h * scale)


def unattached(cut: str) -> Instance:
    """Leave a layer without a use, and maybe a part without derivatives."""
    model = Unattached(cut).double()
    return Instance(model, nn.MSELoss(), named(model), real(5, 3), real(5, 2))


problem("unused-parameters", (2, 3))(partial(unattached, "nothing"))
problem("detached-part", (2, 3), "cut")(partial(unattached, "detach"))
problem("no-grad-section", (2, 3), "cut", "refused")(partial(unattached, "no_grad"))


class Bare(nn.Module):
    """Parameters without a layer around them: a scalar, a vector, a matrix, and positions without a datum axis."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3))
        self.shift = nn.Parameter(torch.randn(3))
        self.matrix = nn.Parameter(torch.randn(2, 3))
        self.position = nn.Parameter(torch.randn(4, 2))

    def forward(self, X: Tensor) -> Tensor:
        return self.log_scale.exp() * torch.tanh((X + self.position) @ self.matrix + self.shift)


@problem("bare-parameters-mse", (2, 1), "core", "sequence")
def _() -> Instance:
    model = Bare().double()
    return Instance(model, nn.MSELoss(), named(model), real(3, 4, 2), real(3, 4, 3))


class Shared(nn.Module):
    """One layer used twice at different depths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(X)))))


@problem("layer-used-twice", (3, 3), "classes")
def _() -> Instance:
    model = Shared().double()
    return Instance(model, nn.CrossEntropyLoss(), listed(model), real(6, 3), ids(3, 6))


def bert() -> nn.Module:
    """Return a BERT classifier with 3 classes and the smallest sizes that work."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 3}
    config = BertConfig(vocab_size=7, max_position_embeddings=5, num_labels=3, type_vocab_size=1, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertForSequenceClassification(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * real(*p.shape))  # the initial weights are so small that most derivatives vanish
    return model.eval()


@problem("hugging-face-bert", (2, 1), "classes")
def _() -> Instance:
    model = bert()
    kept = ("word_embeddings", "query", "attention.output.LayerNorm", "classifier")
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in kept))
    X = {"input_ids": ids(7, 3, 4), "attention_mask": torch.ones(3, 4, dtype=torch.int64)}
    X["attention_mask"][1, 2:] = 0
    return Instance(
        model,
        nn.CrossEntropyLoss(),
        named(model),
        X,
        ids(3, 3),
        forward=lambda X: model(**X).logits,
        one_mapping=True,
    )


# -- forms of parameters, models and inputs ----------------------------------------------------------------------------


@problem("subset-shuffled-list", (2, 4), "classes")
def _() -> Instance:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[2].requires_grad_(False)
    params = [model[4].bias, model[0].weight, model[4].weight]
    return Instance(model, nn.CrossEntropyLoss(), params, real(6, 3), ids(3, 6))


@problem("subset-shuffled-dict", (5, 1))
def _() -> Instance:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    params: Params = {"2.bias": model[2].bias, "0.weight": model[0].weight}
    return Instance(model, nn.MSELoss(), params, real(6, 3), real(6, 2))


@problem("callable-of-x", (2, 3), "core", "classes")
def _() -> Instance:
    W, b = real(3, 3).requires_grad_(), nn.Parameter(real(3))

    def model(X: Tensor) -> Tensor:
        return torch.tanh(X @ W) @ W.T + b

    return Instance(model, nn.CrossEntropyLoss(), [b, W], real(5, 3), ids(3, 5))


@problem("callable-of-params-and-x", (2, 3), "classes")
def _() -> Instance:
    params: Params = {"W": real(3, 4).requires_grad_(), "b": real(4).requires_grad_(), "V": real(4, 3).requires_grad_()}

    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return torch.tanh(X @ params["W"] + params["b"]) @ params["V"]

    return Instance(model, nn.CrossEntropyLoss(), params, real(5, 3), ids(3, 5), forward=lambda X: model(params, X))


@problem("callable-of-params-without-gradients", (4,))
def _() -> Instance:
    params: Params = {"scale": real(), "W": real(2, 3)}

    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return torch.sin(params["scale"] * X @ params["W"])

    return Instance(model, nn.MSELoss(), params, real(4, 2), real(4, 3), forward=lambda X: model(params, X))


@problem("functional-call", (4, 2))
def _() -> Instance:
    model = mlp(3, 3, 2)
    params = named(model)

    def call(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (X,))

    return Instance(call, nn.BCEWithLogitsLoss(), params, real(6, 3), torch.rand(6, 2).double(), forward=model)


class TwoInputs(nn.Module):
    """A network of one tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, X: tuple[Tensor, Tensor]) -> Tensor:
        left, right = X
        return torch.tanh(self.left(left)) * self.right(right)


@problem("tuple-input", (3, 2), "classes")
def _() -> Instance:
    model = TwoInputs().double()
    return Instance(model, nn.CrossEntropyLoss(), listed(model), (real(5, 2), real(5, 4)), ids(3, 5))


class MappingInput(TwoInputs):
    """A network of one mapping whose keys are not arguments of its forward."""

    def forward(self, X: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward((X["left"], X["right"]))


@problem("mapping-input", (3, 2))
def _() -> Instance:
    model = MappingInput().double()
    return Instance(model, nn.MSELoss(), named(model), {"left": real(5, 2), "right": real(5, 4)}, real(5, 3))


class KeywordInput(TwoInputs):
    """A network whose arguments are the keys of the mapping."""

    def forward(self, right: Tensor, left: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward((left, right))


def keywords(one_mapping: bool) -> Instance:
    """Use a mapping as keyword arguments, with the labels inside or beside it."""
    model = KeywordInput().double()
    X = {"left": real(5, 2), "right": real(5, 4)}
    return Instance(
        model,
        nn.CrossEntropyLoss(),
        named(model),
        X,
        ids(3, 5),
        forward=lambda X: model(**X),
        one_mapping=one_mapping,
    )


problem("keyword-input-pairs", (4, 1), "classes")(partial(keywords, False))
problem("keyword-input-one-mapping", (2, 3), "classes")(partial(keywords, True))


# -- mean squared error ------------------------------------------------------------------------------------------------


def squared(reduction: str, *shape: int) -> Instance:
    """Mean squared error with predictions [N, *shape]."""
    model = nn.Sequential(mlp(3, 3, shape[-1] if shape else 1), nn.Flatten(0) if not shape else nn.Identity())
    inputs = (*shape[:-1], 3)
    return Instance(model, nn.MSELoss(reduction=reduction), listed(model), real(5, *inputs), real(5, *shape))


problem("mse-one-channel-mean", (3, 2), "core")(partial(squared, "mean"))
problem("mse-channels-sum", (3, 2))(partial(squared, "sum", 2))
problem("mse-positions-mean", (3, 2), "sequence")(partial(squared, "mean", 2, 3))
problem("mse-positions-sum", (1, 4), "sequence")(partial(squared, "sum", 3, 2))
problem("mse-image-mean", (1, 4), "sequence")(partial(squared, "mean", 2, 2, 2))


# -- cross-entropy -----------------------------------------------------------------------------------------------------


class ChannelsFirst(nn.Module):
    """A small smooth network applied to each position, with the classes on axis 1 as cross-entropy wants them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.network = mlp(inputs, 3, outputs)

    def forward(self, X: Tensor) -> Tensor:
        return self.network(X).movedim(-1, 1)


def entropy(
    shape: tuple[int, ...] = (),
    soft: bool = False,
    ignore: int | None = None,
    weighted: bool = False,
    zero_weight: bool = False,
    unnormalised: bool = False,
    **options: Any,
) -> Instance:
    """Cross-entropy with predictions [N, C, *shape] and 3 classes; the first two data are ignored as a whole."""
    N, C = 6, 3
    model = ChannelsFirst(2, C).double()
    y = ids(C, N, *shape)
    if soft:
        y = torch.rand(N, C, *shape, dtype=torch.float64)
        y = 2 * y if unnormalised else y / y.sum(1, keepdim=True)
    if ignore is not None:
        y[:2] = ignore
        y.view(N, -1)[3, -1] = ignore
        options["ignore_index"] = ignore
    if weighted:
        options["weight"] = positive(C)
    if zero_weight:
        options["weight"][1] = 0.0
        y[:2], y[2:4] = 1, 2
    return Instance(model, nn.CrossEntropyLoss(**options), named(model), real(N, *shape, 2), y)


for _reduction in ("mean", "sum"):
    _table: dict[str, dict[str, Any]] = {
        "plain": {},
        "weight": {"weighted": True},
        "ignore": {"ignore": -100},
        "smoothing": {"label_smoothing": 0.2},
        "all": {"weighted": True, "ignore": 1, "label_smoothing": 0.2},
        "soft": {"soft": True},
        "soft-all": {"soft": True, "weighted": True, "label_smoothing": 0.1, "unnormalised": True},
        "zero-weight": {"weighted": True, "zero_weight": True},
        "zero-weight-smoothing": {"weighted": True, "zero_weight": True, "label_smoothing": 0.3},
        "positions": {"shape": (2,)},
        "positions-all": {"shape": (2,), "weighted": True, "ignore": -100, "label_smoothing": 0.1},
        "positions-soft": {"shape": (2,), "soft": True, "weighted": True, "label_smoothing": 0.1},
        "grid-ignore": {"shape": (2, 2), "ignore": 2, "weighted": True},
    }
    for _name, _options in _table.items():
        _tags = ["classes"] + (["sequence"] if "shape" in _options else [])
        _tags += ["core"] if (_name, _reduction) == ("positions-all", "mean") else []
        _build = partial(entropy, reduction=_reduction, **_options)
        problem(f"ce-{_name}-{_reduction}", (2, 1, 3), *_tags)(_build)


# -- binary cross-entropy ----------------------------------------------------------------------------------------------


def binary(
    shape: tuple[int, ...], weight: Sequence[int] | None, pos_weight: Sequence[int] | None, soft: bool, reduction: str
) -> Instance:
    """Binary cross-entropy with predictions [N, *shape] and weights of the given shapes."""
    model = nn.Sequential(mlp(3, 3, shape[-1] if shape else 1), nn.Flatten(0) if not shape else nn.Identity())
    loss = nn.BCEWithLogitsLoss(
        weight=None if weight is None else positive(*weight),
        pos_weight=None if pos_weight is None else positive(*pos_weight),
        reduction=reduction,
    )
    y = torch.rand((5, *shape), dtype=torch.float64)
    return Instance(model, loss, named(model), real(5, *shape[:-1], 3), y if soft else y.round())


problem("bce-one-channel-mean", (3, 2))(partial(binary, (), None, (), True, "mean"))
problem("bce-one-channel-weights-sum", (3, 2))(partial(binary, (), (1,), (1,), False, "sum"))
problem("bce-channels-weights-mean", (3, 2))(partial(binary, (2,), (2,), (2,), True, "mean"))
problem("bce-channels-weights-sum", (1, 4))(partial(binary, (2,), (2,), (2,), True, "sum"))
problem("bce-positions-weights-mean", (3, 2), "sequence")(partial(binary, (2, 3), (3,), (3,), True, "mean"))
problem("bce-positions-own-weights-sum", (1, 4), "sequence")(partial(binary, (2, 3), (2, 3), (2, 1), True, "sum"))


# -- other losses, example weights, ridge ------------------------------------------------------------------------------


def exponential_loss(prediction: Tensor, y: Tensor) -> Tensor:
    """Exponential loss, a mean over data of a sum over channels; a plain function."""
    return (-y * prediction).exp().sum(1).mean()


class CoupledLoss(nn.Module):
    """A sum over data that couples the channels of a datum."""

    reduction = "sum"

    def forward(self, prediction: Tensor, y: Tensor) -> Tensor:
        return ((prediction - y).sum(1) ** 4 + (prediction * prediction.roll(1, 1)).sin().sum(1)).sum()


def other_loss(loss: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Instance:
    """Use a loss that the package does not know."""
    model = mlp(3, 3, 2)
    return Instance(model, loss, named(model), real(5, 3), real(5, 2), options=options)


problem("generic-function", (2, 3), "no_fisher", "generic")(partial(other_loss, exponential_loss))
problem("generic-num-data", (2, 3), "no_fisher", "generic")(partial(other_loss, exponential_loss, num_data=5))
problem("generic-sum", (2, 3), "no_fisher", "generic")(partial(other_loss, CoupledLoss()))
problem("generic-huber-mean", (4, 1), "no_fisher", "generic")(partial(other_loss, nn.HuberLoss(delta=0.7)))
problem("generic-huber-sum", (4, 1), "no_fisher", "generic")(partial(other_loss, nn.HuberLoss("sum", delta=0.7)))


def example_weights(X: Tensor, y: Tensor) -> Tensor:
    """Weigh a datum by its input; some weights are exactly zero."""
    weights = X.reshape(len(X), -1)[:, 0].abs()
    return torch.where(weights < 0.4, torch.zeros_like(weights), weights)


def weighted(instance: Instance) -> Instance:
    """Add example weights to a risk."""
    instance.weight_fn = example_weights
    return instance


def ridge(instance: Instance) -> Instance:
    """Add a ridge term to a risk."""
    instance.l2 = 0.07
    return instance


problem("weights-mse", (3, 2), "core")(lambda: weighted(squared("mean", 2)))
problem("weights-mse-positions-sum", (3, 2), "sequence")(lambda: weighted(squared("sum", 2, 2)))
problem("weights-ce-all", (2, 1, 3), "classes", "sequence")(
    lambda: weighted(entropy((2,), ignore=1, weighted=True, label_smoothing=0.2))
)
problem("weights-ce-soft", (2, 4), "classes")(lambda: weighted(entropy(soft=True, weighted=True)))
problem("weights-bce", (3, 2))(lambda: weighted(binary((2,), (2,), (2,), True, "mean")))
problem("ridge-ce", (2, 1, 3), "classes")(lambda: ridge(entropy(ignore=1, weighted=True)))
problem("ridge-mse-sum", (3, 2))(lambda: ridge(squared("sum", 2)))
problem("ridge-generic", (3, 2), "no_fisher", "generic")(lambda: ridge(other_loss(exponential_loss)))
