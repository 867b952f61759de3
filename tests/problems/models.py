"""Models that differ in how they are built; the losses are plain."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.problems.table import Instance, Table, ids, listed, mlp, named, positive, real

TABLE = Table()
problem = TABLE.problem


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
