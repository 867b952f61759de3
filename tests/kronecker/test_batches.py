"""Mini-batches: how data are cut does not matter, a seed gives one matrix, and nothing of the user's changes."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator
from tests.kronecker.cases import APPROXIMATIONS, build, error, oracle_of, problem_of
from tests.risk.small import CountedData, Failing, classes, differences, inputs, labels, mlp, snapshot

CLASSES: list[Any] = [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator]
KFACS = [KFACLinearOperator, EKFACLinearOperator]

# -- cuts --------------------------------------------------------------------------------------------------------------

CUT = [
    "kf-mlp-mse", "kf-sequence-ce", "kf-sequence-time-first-mse", "kf-conv1d", "kf-conv-transpose2d",
    "kf-used-twice-ce", "kf-embedding-padding", "kf-attention-time-first-eval", "kf-tied", "kf-lstm", "kf-norms",
    "kf-hugging-face", "kf-attention-masked",
    "ce-positions-all-mean", "ce-grid-ignore-sum", "bce-positions-weights-mean", "weights-ce-all",
    "lstm-time-major-input", "flattened-rows-time-first", "time-major-n-equals-t", "positions-flat",
]  # fmt: skip


def cuts(num_data: int) -> list[tuple[int, ...]]:
    """Ways to cut the data: as a whole, ragged, one at a time."""
    return [(num_data,), (1, num_data - 3, 2), (1,) * num_data]


@pytest.mark.parametrize(
    ("fisher", "approx"),
    [("type-2", "expand"), ("type-2", "reduce"), ("empirical", "expand"), ("forward-only", "reduce")],
)
@pytest.mark.parametrize("name", CUT)
def test_cuts_do_not_matter(name: str, fisher: str, approx: str) -> None:
    problem = problem_of(name)
    num_data = len(problem.make().y)
    first, *others = (
        build(KFACLinearOperator, problem.make(sizes), fisher_type=fisher, kfac_approx=approx).to_dense()
        for sizes in cuts(num_data)
    )
    assert first.norm() > 0
    for other in others:
        assert error(other, first) < 1e-11


@pytest.mark.parametrize("cls", [EKFACLinearOperator, KFOCLinearOperator])
@pytest.mark.parametrize("name", ["kf-sequence-ce", "kf-conv1d", "kf-used-twice-ce", "kf-embedding-padding", "kf-tied"])
def test_cuts_do_not_matter_after_correction(name: str, cls: type) -> None:
    """Where bases are determined."""
    assert all(b.left is None or b.separation > 1e-6 for b in oracle_of(name).blocks())
    problem = problem_of(name)
    num_data = len(problem.make().y)
    first, *others = (build(cls, problem.make(s), fisher_type="type-2").to_dense() for s in cuts(num_data))
    for other in others:
        assert error(other, first) < (1e-6 if cls is KFOCLinearOperator else 1e-9)


def test_a_mini_batch_without_weight_is_skipped() -> None:
    """Its share is zero over zero."""
    model, (first, *rest) = mlp(), classes((1, 2, 3))

    def weight(X: Tensor, y: Tensor) -> Tensor:
        return torch.full((len(y),), 0.0 if len(y) == 1 else 1.0, dtype=torch.float64)

    matrices = [
        KFACLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), data,
            fisher_type="type-2", weight_fn=weight, check_deterministic=False,
        ).to_dense()
        for data in ([first, *rest], rest)
    ]  # fmt: skip
    assert error(*matrices) < 1e-12


# -- seeds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", ["kf-linear-ce", "kf-mlp-mse", "kf-mlp-bce-sum", "kf-conv1d", "kf-tied"])
def test_a_seed_gives_one_matrix(name: str, cls: type) -> None:
    """Bit by bit, whatever happened to the global random state; other seeds give others."""
    instance = problem_of(name).make()
    first = build(cls, instance, seed=3, mc_samples=2).to_dense()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        again = build(cls, instance, seed=3, mc_samples=2)
        assert torch.equal(again.to_dense(), first)
        assert torch.equal(again.to_dense(), first)
    assert error(build(cls, instance, seed=4, mc_samples=2).to_dense(), first) > 1e-3


@pytest.mark.parametrize("cls", CLASSES)
def test_kept_matrix_does_not_follow_the_parameters(cls: type) -> None:
    """It is computed at first use, in one reading of the data for KFAC, and frozen from then on."""
    model, data = mlp(), CountedData(classes())
    A = cls(model, nn.CrossEntropyLoss(), list(model.parameters()), data, check_deterministic=False)
    assert data.passes == 0
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    first = A.to_dense()
    fresh = cls(model, nn.CrossEntropyLoss(), list(model.parameters()), data, check_deterministic=False).to_dense()
    assert torch.equal(first, fresh)
    passes = data.passes
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    assert torch.equal(A.to_dense(), first)
    assert data.passes == passes


def test_kfac_reads_the_data_once() -> None:
    for fisher in ("type-2", "mc", "empirical", "forward-only"):
        model, data = mlp(), CountedData(classes())
        A = KFACLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), data, fisher_type=fisher, check_deterministic=False
        )
        A.to_dense()
        A.inverse(0.1).to_dense()
        assert data.passes == 1


# -- what is the user's ------------------------------------------------------------------------------------------------


def trained(training: bool = False) -> nn.Sequential:
    """A model with batch norm, a frozen parameter, gradients, hooks and modes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    model[3].register_forward_hook(lambda module, args, output: output)
    model[3].weight.register_hook(lambda gradient: gradient)
    model.train(training)
    model[2].train(not training)
    return model


@pytest.fixture(autouse=True)
def random_states() -> Iterator[None]:
    """Random states that no reset to a fixed seed would meet by chance."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)
    for draw in (torch.rand, np.random.rand):
        draw(3)
    random.random()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def loader(shuffle: bool = False) -> DataLoader[Any]:
    """A loader with a generator of its own."""
    dataset = TensorDataset(inputs(9), labels(9))
    return DataLoader(dataset, batch_size=4, shuffle=shuffle, generator=torch.Generator().manual_seed(5))


def options(cls: Any, fisher: str) -> list[dict[str, Any]]:
    """Options that go through different code."""
    approximations = [{"kfac_approx": a} for a in APPROXIMATIONS] if cls in KFACS else [{}]
    return [{"fisher_type": fisher, **a, "separate_weight_and_bias": s} for a in approximations for s in (True, False)]


FISHERS_OF = [
    (cls, fisher)
    for cls in CLASSES
    for fisher in ("type-2", "mc", "empirical", "forward-only")
    if fisher != "forward-only" or cls is KFACLinearOperator
]


@pytest.mark.parametrize(("cls", "fisher"), FISHERS_OF)
@pytest.mark.parametrize("check", [True, False])
def test_nothing_changes(cls: Any, fisher: str, check: bool) -> None:
    for keywords in options(cls, fisher):
        model, data = trained(), loader()
        params = [p for p in model.parameters() if p.requires_grad]
        before = snapshot(model, data)
        A = cls(model, nn.CrossEntropyLoss(), params, data, check_deterministic=check, **keywords)
        A.to_dense()
        A @ torch.ones(A.shape[1], dtype=A.dtype)
        A.inverse(0.1).to_dense()
        A.damped(0.1).to_dense()
        A.trace(), A.frobenius_norm(), A.damped(0.1).logdet(), A.sqrt(), A.sample(2)
        assert differences(before, snapshot(model, data)) == []


@pytest.mark.parametrize("error", [RuntimeError("now"), KeyboardInterrupt("now")], ids=repr)
@pytest.mark.parametrize(("cls", "fisher"), FISHERS_OF)
def test_nothing_changes_when_the_model_raises(cls: Any, fisher: str, error: BaseException) -> None:
    """At the second mini-batch, if not before; afterwards the operator can be computed as if nothing had been."""
    model, data = Failing(trained(), error), loader()
    params = [p for p in model.parameters() if p.requires_grad]
    before = snapshot(model, data)
    A = cls(model, nn.CrossEntropyLoss(), params, data, fisher_type=fisher, check_deterministic=False)
    with pytest.raises(type(error), match="now"):
        A.to_dense()
    assert differences(before, snapshot(model, data)) == []
    model.remaining[0] = 10**9
    fresh = cls(model, nn.CrossEntropyLoss(), params, data, fisher_type=fisher, check_deterministic=False)
    assert torch.equal(A.to_dense(), fresh.to_dense())


@pytest.mark.parametrize("cls", CLASSES)
def test_results_are_detached_and_no_gradient_is_left(cls: Any) -> None:
    model = trained()
    params = [p for p in model.parameters() if p.requires_grad]
    A = cls(model, nn.CrossEntropyLoss(), params, loader(), fisher_type="empirical")
    for result in (A.to_dense(), A.diagonal(), A @ torch.ones(A.shape[1], dtype=A.dtype)):
        assert isinstance(result, Tensor)
        assert not result.requires_grad
    with torch.no_grad():
        inside = cls(model, nn.CrossEntropyLoss(), params, loader(), fisher_type="empirical").to_dense()
    assert torch.equal(inside, A.to_dense())


def test_batch_norm_in_training_mode_is_refused() -> None:
    """Its statistics would move, and couple data."""
    model = trained(training=True)
    params = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="BatchNorm1d"):
        KFACLinearOperator(model, nn.CrossEntropyLoss(), params, loader())


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
def test_shuffled_data_are_no_obstacle_to_what_has_no_order(cls: Any) -> None:
    """A seed means nothing when data come in another order each time; other matrices do not mind."""
    model = mlp()
    params = list(model.parameters())
    A = cls(model, nn.CrossEntropyLoss(), params, loader(shuffle=True), fisher_type="type-2")
    B = cls(model, nn.CrossEntropyLoss(), params, loader(), fisher_type="type-2")
    assert error(A.to_dense(), B.to_dense()) < 1e-6
