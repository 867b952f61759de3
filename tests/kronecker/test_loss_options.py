"""Options of losses in the Kronecker family: what they do to the factors, and laws between them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlinops import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator
from tests.kronecker.cases import (
    APPROXIMATIONS,
    FISHERS,
    Mixing,
    build,
    error,
    keywords_of,
    made,
    options_of,
    oracle_of,
    problem_of,
)  # fmt: skip
from tests.problems import PROBLEMS, Instance
from tests.problems.losses import ChannelsFirst
from tests.problems.table import ids, mlp, named, positive, real

NAMES = [n for n in PROBLEMS if n.startswith(("mse-", "ce-", "bce-", "weights-"))]
SEQUENCES = [n for n in NAMES if "sequence" in PROBLEMS[n].tags]
CASES = [(n, "expand") for n in NAMES] + [(n, "reduce") for n in SEQUENCES]
CLASSES = [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator]

Weights = Callable[[Any, Tensor], Tensor]


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize(("name", "approx"), CASES)
def test_kfac(name: str, approx: str, fisher: str) -> None:
    K = build(KFACLinearOperator, problem_of(name).make(), **keywords_of(fisher, approx, True))
    assert error(K.to_dense(), oracle_of(name).matrix("kfac", **options_of(fisher, approx, True))) < 1e-9


@pytest.mark.parametrize("name", SEQUENCES)
def test_joint_kfac_of_own_gradients_of_data(name: str) -> None:
    """With the bias in the block, and a datum's own gradients summed before they are squared."""
    options = options_of("empirical", "reduce", False) | {"terms": "datum"}
    keywords = keywords_of("empirical", "reduce", False)
    K = build(KFACLinearOperator, problem_of(name).make(), terms="datum", **keywords)
    assert error(K.to_dense(), oracle_of(name).matrix("kfac", **options)) < 1e-9


# Each kind of matrix with half of the options: reductions and losses share all code but the columns.
DISTANCES = [(n, f, EKFACLinearOperator) for n in NAMES[::2] for f in ("type-2", "empirical")]
DISTANCES += [(n, f, KFOCLinearOperator) for n in NAMES[1::2] for f in ("type-2", "mc")]


@pytest.mark.parametrize(("name", "fisher", "cls"), DISTANCES)
def test_distances_of_ekfac_and_kfoc(name: str, fisher: str, cls: type) -> None:
    """Distances from the truth are unique where bases are not; KFOC's is the least there is."""
    kind = {EKFACLinearOperator: "ekfac", KFOCLinearOperator: "kfoc"}[cls]
    keywords = keywords_of(fisher, None if kind == "kfoc" else "expand", True)
    keywords |= {"rtol": 1e-9, "max_iter": 300} if kind == "kfoc" else {}
    K = build(cls, problem_of(name).make(), **keywords).to_dense()
    for block in oracle_of(name).blocks(**options_of(fisher, "expand", True)):
        actual = torch.stack([K[at[:, None], at] for at in block.index.flatten(1)])
        size = block.truth.norm()
        if block.left is None:
            assert error(actual, block.truth) < 1e-9
        elif kind == "kfoc":
            assert (actual - block.truth).norm() <= (block.matrices(kind) - block.truth).norm() + 1e-9 * size
        elif block.separation > 1e-6:
            assert error(actual, block.matrices(kind)) < 1e-8
        else:
            assert (actual - block.truth).norm() <= (block.matrices("kfac") - block.truth).norm() + 1e-9 * size


# -- laws --------------------------------------------------------------------------------------------------------------

N = 6
COUNTS = torch.tensor([2, 1, 0, 1, 3, 1])


class Weighing:
    """Example weights that are found by what is in the input: the last entry of a datum's first row is its number."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights.double()

    def __call__(self, X: Any, y: Tensor) -> Tensor:
        numbers = (X.reshape(len(X), -1)[:, 0] * 100).round().long()
        return self.weights[numbers]


def numbered(X: Tensor) -> Tensor:
    """Write the number of each datum into its first entry, in hundredths."""
    X = X.clone()
    X.reshape(len(X), -1)[:, 0] = torch.arange(len(X)) / 100
    return X


LOSSES: dict[str, Callable[[str], nn.Module]] = {
    "mse": lambda reduction: nn.MSELoss(reduction=reduction),
    "ce": lambda reduction: nn.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1),
    "bce": lambda reduction: nn.BCEWithLogitsLoss(
        reduction=reduction, pos_weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    ),
}


def risk(loss: nn.Module, copies: Tensor, weights: Tensor | None) -> Instance:
    """A small network on data of which each is there so many times, or has such a weight."""
    classes = isinstance(loss, nn.CrossEntropyLoss)
    model = Mixing(3, classes=classes).double()
    X, y = numbered(real(N, 2, 2)), ids(3, N, 2) if classes else ids(2, N, 2, 3).double()
    at = torch.arange(N).repeat_interleave(copies)
    instance = Instance(model, loss, named(model), X[at], y[at])
    instance.weight_fn = None if weights is None else Weighing(weights)
    return instance


# An own gradient carries the weight squared, so there the weight is a root; a denominator adds weights, not squares.
COPIES = [
    (f, r) for f in ("type-2", "forward-only", "empirical") for r in ("mean", "sum") if (f, r) != ("empirical", "mean")
]


@pytest.mark.parametrize(("fisher", "reduction"), COPIES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_a_weight_is_a_number_of_copies(approx: str, loss: str, fisher: str, reduction: str) -> None:
    weights = COUNTS.double().sqrt() if fisher == "empirical" else COUNTS.double()
    keywords = {"fisher_type": fisher, "kfac_approx": approx}
    once = partial(risk, LOSSES[loss](reduction), torch.ones_like(COUNTS), weights)
    weighed = build(KFACLinearOperator, made(once), **keywords)
    repeated = build(KFACLinearOperator, made(partial(risk, LOSSES[loss](reduction), COUNTS, None)), **keywords)
    assert error(weighed.to_dense(), repeated.to_dense()) < 1e-12


@pytest.mark.parametrize("cls", [EKFACLinearOperator, KFOCLinearOperator])
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_a_weight_is_a_number_of_copies_after_correction(loss: str, cls: type) -> None:
    """With curvature whose eigenvalues are not repeated."""
    make = LOSSES[loss]
    weighed = build(cls, made(partial(risk, make("mean"), torch.ones_like(COUNTS), COUNTS)), fisher_type="type-2")
    repeated = build(cls, made(partial(risk, make("mean"), COUNTS, None)), fisher_type="type-2")
    assert error(weighed.to_dense(), repeated.to_dense()) < (1e-6 if cls is KFOCLinearOperator else 1e-9)


@pytest.mark.parametrize("factor", [0.3, 5.0])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("fisher", ["type-2", "mc"])
def test_a_common_weight_cancels_in_a_mean(fisher: str, cls: type, factor: float) -> None:
    weights = torch.full((N,), factor)
    weighed = made(partial(risk, nn.CrossEntropyLoss(), torch.ones_like(COUNTS), weights))
    plain = made(partial(risk, nn.CrossEntropyLoss(), torch.ones_like(COUNTS), None))
    matrices = [build(cls, instance, fisher_type=fisher).to_dense() for instance in (weighed, plain)]
    assert error(*matrices) < 1e-9


def masked(loss: nn.Module, ignore: int | None, soft: bool = False) -> Instance:
    """Classify positions; two data are ignored as a whole, or are not there."""
    model = ChannelsFirst(2, 3).double()
    X, y = real(N, 2, 2), ids(3, N, 2)
    out = torch.tensor([1, 4])
    if ignore is None:
        kept = [n for n in range(N) if n not in out]
        X, y = X[kept], y[kept]
    else:
        y[out] = ignore
    if soft:
        y = nn.functional.one_hot(y, 3).movedim(-1, 1).double()
    return Instance(model, loss, named(model), X, y)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_ignored_is_absent(approx: str, fisher: str, reduction: str) -> None:
    """Also where a mini-batch is ignored as a whole."""
    loss = nn.CrossEntropyLoss(reduction=reduction)
    keywords = {"fisher_type": fisher, "kfac_approx": approx}
    there = build(KFACLinearOperator, made(partial(masked, loss, -100), (1, 1, 4)), **keywords)
    absent = build(KFACLinearOperator, made(partial(masked, loss, None)), **keywords)
    assert error(there.to_dense(), absent.to_dense()) < 1e-12


@pytest.mark.parametrize("cls", CLASSES)
def test_soft_labels_of_one_class_are_hard_labels(cls: type) -> None:
    for fisher in ("type-2", "mc", "empirical"):
        hard, soft = (made(partial(masked, nn.CrossEntropyLoss(), None, soft)) for soft in (False, True))
        matrices = [build(cls, instance, fisher_type=fisher).to_dense() for instance in (hard, soft)]
        assert error(*matrices) < 1e-9


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_weights_are_numbers_of_copies(reduction: str) -> None:
    """A class of weight two, and each datum of that class twice."""
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def instance(repeat: bool) -> Instance:
        model = mlp(2, 3, 3)
        X, y = real(N, 2), torch.tensor([0, 1, 2, 2, 1, 0])
        at = torch.arange(N).repeat_interleave(weight[y].long()) if repeat else torch.arange(N)
        loss = nn.CrossEntropyLoss(None if repeat else weight, reduction=reduction)
        return Instance(model, loss, named(model), X[at], y[at])

    for fisher in ("type-2", "forward-only"):
        matrices = [build(KFACLinearOperator, made(partial(instance, r)), fisher_type=fisher) for r in (True, False)]
        assert error(*(K.to_dense() for K in matrices)) < 1e-12


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("loss", [nn.MSELoss, nn.BCEWithLogitsLoss])
def test_mean_is_the_sum_over_its_denominator(loss: type, fisher: str) -> None:
    def instance(reduction: str) -> Instance:
        model = mlp(2, 3, 3)
        return Instance(model, loss(reduction=reduction), named(model), real(N, 2), positive(N, 3) / 2)

    mean, total = (
        build(KFACLinearOperator, made(partial(instance, r), (2, 4)), fisher_type=fisher) for r in ("mean", "sum")
    )
    assert error(3 * N * mean.to_dense(), total.to_dense()) < 1e-12


@pytest.mark.parametrize("cls", CLASSES)
def test_losses_without_terms_are_refused(cls: type) -> None:
    instance = PROBLEMS["generic-function"].make()
    with pytest.raises((NotImplementedError, TypeError, ValueError)):
        build(cls, instance, fisher_type="type-2").to_dense()


@pytest.mark.parametrize("cls", CLASSES)
def test_num_data_is_checked(cls: type) -> None:
    instance = PROBLEMS["mse-channels-sum"].make()
    build(cls, instance, num_data=len(instance.y)).to_dense()
    with pytest.raises(ValueError, match="num_data"):
        build(cls, instance, num_data=len(instance.y) + 1, check_deterministic=True).to_dense()
