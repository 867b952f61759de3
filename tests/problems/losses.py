"""Losses and their options, example weights, the ridge term; the models are plain."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.problems.table import Instance, Table, ids, listed, mlp, named, positive, real

TABLE = Table()
problem = TABLE.problem


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
