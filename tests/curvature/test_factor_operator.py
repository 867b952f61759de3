"""F with C = F Fᵀ, layer by layer: low-rank matrices of Fishers and of the GGN, with exact inverses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvlinops import EFLinearOperator, GGNLinearOperator, LowRankLinearOperator
from curvlinops.curvature.factor_operator import FactorLinearOperator
from tests.oracles import Oracle
from tests.risk.small import (
    build,
    classes,
    cut,
    differences,
    inputs,
    labels,
    mlp,
    normal,
    numbers,
    relative_error,
    snapshot,
    vector,
)

RAGGED = (3, 1, 2, 4)
FISHERS = ["GGN", "MC", "EF"]


def weight_fn(X: Tensor, y: Tensor) -> Tensor:
    """A weight of each datum, some of them zero."""
    return (X[:, 0].abs() * 2).clamp(max=1.5) * (X[:, 1] > -1)


class Sequences(nn.Module):
    """Positions with a class each, ``[N, C, T]``, from layers of several kinds."""

    def __init__(self, covered: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv1d(2, 4, 3, padding=1)
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 3)
            self.shift = nn.Parameter(torch.full((3,), 0.3))
        self.covered = covered
        self.double()

    def forward(self, X: Tensor) -> Tensor:
        """A convolution, a norm and a head; a shift that notes may cover or not."""
        hidden = self.norm(self.conv(X).tanh().mT)
        f = self.head(hidden).tanh()
        return (f + self.shift if self.covered else f - 2 * self.shift.sin()).mT


def sequences(sizes: tuple[int, ...] = RAGGED) -> list[tuple[Tensor, Tensor]]:
    """Sequences of length five, with a class that is ignored."""
    y = torch.arange(5 * sum(sizes)).reshape(-1, 5) * 2 % 3
    y[1, 2] = -100
    return cut(normal(sum(sizes), 2, 5, seed=1), y, sizes)


def oracle(model: nn.Module, data: Any, loss: Any, weights: Any = None, l2: float = 0.0) -> Oracle:
    """The dense truth, on a copy of the model."""
    twin = copy.deepcopy(model)
    return Oracle(twin, loss, list(twin.parameters()), data, weights, l2)


def check(low: LowRankLinearOperator, expected: Tensor, damping: float = 0.3) -> None:
    """Products, closed forms and the exact inverse."""
    D = len(expected)
    assert relative_error(low.to_dense(), expected) < 1e-10
    assert relative_error(low @ normal(D, seed=4), expected @ normal(D, seed=4)) < 1e-10
    assert relative_error(low.diagonal(), expected.diagonal()) < 1e-10
    assert relative_error(low.trace(), expected.trace()) < 1e-10
    dense = expected + damping * torch.eye(D, dtype=expected.dtype)
    damped = low.damped(damping)
    assert relative_error(damped.inverse().to_dense(), torch.linalg.inv(dense)) < 1e-9
    assert relative_error(damped.logdet(), torch.logdet(dense)) < 1e-10
    values = low.eigenvalues()
    top = torch.linalg.eigvalsh(expected)[-len(values) :]
    assert (values - top).abs().max() < 1e-9 * top.abs().max()


# -- each kind against the dense truth ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", [None, weight_fn])
@pytest.mark.parametrize("sizes", [(10,), RAGGED])
@pytest.mark.parametrize("kind", [*FISHERS, "GGN of samples"])
def test_low_rank(kind: str, sizes: tuple[int, ...], weights: Any, reduction: str) -> None:
    loss, data, model = nn.CrossEntropyLoss(reduction=reduction), classes(sizes), mlp()
    options = {"mc_samples": 3, "seed": 5} if kind in ("GGN of samples", "MC") else {}
    A = build(kind.split()[0], model, data, loss, weight_fn=weights, **options)
    truth = oracle(model, data, loss, weights)
    expected = {
        "GGN": lambda: truth.ggn,
        "EF": lambda: truth.empirical_fisher(),
        "MC": lambda: truth.monte_carlo_fisher(3, 5),
        "GGN of samples": lambda: truth.monte_carlo_fisher(3, 5),
    }[kind]()
    low = A.to_low_rank()
    assert isinstance(low.U, FactorLinearOperator)
    assert low.U.shape[1] == 10 * {"EF": 1}.get(kind, 3)
    check(low, expected)
    assert relative_error(A @ vector(A, 2), low @ vector(A, 2)) < 1e-12


@pytest.mark.parametrize("l2", [0.0, 0.7])
def test_l2_is_the_multiple_of_the_identity(l2: float) -> None:
    model, data = mlp(), classes(RAGGED)
    low = build("GGN", model, data, l2=l2).to_low_rank()
    assert low.c == l2
    check(low, oracle(model, data, nn.CrossEntropyLoss(), l2=l2).ggn)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.MSELoss(reduction="sum"), nn.BCEWithLogitsLoss()])
@pytest.mark.parametrize("kind", ["GGN", "EF"])
def test_other_losses(kind: str, loss: Any) -> None:
    data = [(X, (y > 0).double() if isinstance(loss, nn.BCEWithLogitsLoss) else y) for X, y in numbers(RAGGED)]
    truth = oracle(mlp(), data, loss)
    check(build(kind, mlp(), data, loss).to_low_rank(), truth.ggn if kind == "GGN" else truth.empirical_fisher())


@pytest.mark.parametrize("covered", [True, False])
@pytest.mark.parametrize("kind", ["GGN", "MC", "EF", "EF of data"])
def test_positions_and_engines_that_mix(kind: str, covered: bool) -> None:
    """Columns of positions or of data, by notes of layers alone, and together with the network for one parameter."""
    model, data, loss = Sequences(covered), sequences(), nn.CrossEntropyLoss()
    truth = oracle(model, data, loss)
    terms = "datum" if kind == "EF of data" else "position"
    expected = {"GGN": lambda: truth.ggn, "MC": lambda: truth.monte_carlo_fisher(2, 5)}.get(
        kind, lambda: truth.empirical_fisher(terms)
    )()
    options: dict[str, Any] = {"mc_samples": 2, "seed": 5} if kind == "MC" else {"terms": terms} if "EF" in kind else {}
    A = build(kind.split()[0], model, data, loss, **options)
    low = A.to_low_rank()
    assert isinstance(low.U, FactorLinearOperator)
    uncovered = {i for batch in low.U._batches for i in batch.uncovered}
    names = [n for n, _ in model.named_parameters()]
    assert {names[i] for i in uncovered} == (set() if covered else {"shift"})
    check(low, expected)
    for engine in ("factors", "tangents"):
        kept = A.linearize(engine=engine)
        for columns in ((), (1,), (9,), (2,)):
            V = vector(A, *columns)
            assert relative_error(kept @ V, expected @ V) < 1e-10


def test_no_parameter_is_covered() -> None:
    """Then all columns go through the network."""

    class Sines(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(normal(3, 3, seed=2))

        def forward(self, X: Tensor) -> Tensor:
            return X @ self.W.sin()

    model, data = Sines(), classes(RAGGED)
    truth = oracle(model, data, nn.CrossEntropyLoss())
    A = build("EF", model, data)
    check(A.to_low_rank(), truth.empirical_fisher())
    check(build("GGN", model, data).to_low_rank(), truth.ggn)
    assert relative_error(A.linearize(engine="factors") @ vector(A, 2), A @ vector(A, 2)) < 1e-12


# -- F itself ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", ["position", "datum"])
@pytest.mark.parametrize("covered", [True, False])
def test_columns_are_gradients_in_order(covered: bool, terms: str) -> None:
    """Column by column, the gradients of the terms."""
    model, data = Sequences(covered), sequences()
    F = oracle(model, data, nn.CrossEntropyLoss()).empirical_factor(terms)
    low = build("EF", model, data, terms=terms).to_low_rank()
    assert relative_error(low.U.to_dense(), F) < 1e-12
    Z = normal(F.shape[0], 3, seed=6)
    assert relative_error(low.U.T @ Z, F.T @ Z) < 1e-12
    assert relative_error(low.U._gram(), F.T @ F) < 1e-12  # type: ignore[attr-defined]
    w = normal(F.shape[1], seed=7)
    weighted = LowRankLinearOperator(low.U, w)
    assert relative_error(weighted.diagonal(), (F.square() @ w)) < 1e-11
    assert relative_error(weighted.to_dense(), F * w @ F.T) < 1e-11


@pytest.mark.parametrize("covered", [(True, True), (True, False), (False, False)])
def test_fishers_of_two_tasks(covered: tuple[bool, bool]) -> None:
    """Sums of low-rank matrices of other data, losses and parameter values are exact, too."""
    one, other = Sequences(covered[0]), Sequences(covered[1])
    with torch.no_grad():
        for p in other.parameters():
            p += 0.1 * normal(*p.shape, seed=11)
    tasks = [(one, sequences()), (other, sequences((2, 5)))]
    expected = torch.zeros(1)
    lows = []
    for (model, data), scale, terms in zip(tasks, (1.0, 0.5), ("position", "datum"), strict=True):
        truth = oracle(model, data, nn.CrossEntropyLoss())
        expected = expected + scale * truth.empirical_fisher(terms)
        lows.append(scale * build("EF", model, data, terms=terms).to_low_rank())
    total = lows[0] + lows[1]
    assert isinstance(total, LowRankLinearOperator)
    check(total, expected)
    check(total + 0.2 * lows[0], expected + 0.2 * lows[0].to_dense())
    b = normal(len(expected), seed=3)
    damped = expected + 1e-3 * torch.eye(len(expected), dtype=expected.dtype)
    assert relative_error(total.damped(1e-3).inverse() @ b, torch.linalg.solve(damped, b)) < 1e-8


def test_ggn_plus_fisher_of_dicts() -> None:
    model = mlp()
    params = dict(model.named_parameters())
    A, B = build("GGN", model, classes(RAGGED), params=params), build("EF", model, classes((2, 2)), params=params)
    C = A.to_low_rank() + 2.0 * B.to_low_rank()
    assert C.domain.names == tuple(params)
    V = {n: normal(*p.shape, 2, seed=i) for i, (n, p) in enumerate(params.items())}
    found, expected = C @ V, (A + 2.0 * B) @ V
    assert all(relative_error(found[n], expected[n]) < 1e-11 for n in params)


def test_other_models_cannot_be_added() -> None:
    A = build("EF", mlp(), classes()).to_low_rank()
    B = build("EF", nn.Linear(3, 3).double(), classes()).to_low_rank()
    with pytest.raises(ValueError, match=r"\(31, 31\) and \(12, 12\)"):
        A + B


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FISHERS)
def test_too_little_memory(kind: str) -> None:
    A = build(kind, mlp(), classes(RAGGED))
    with pytest.raises(MemoryError, match=r"first 1 mini-batches.*max_memory, .* MiB.*FisherMCLinearOperator"):
        A.to_low_rank(max_memory=8)
    needed = sum(t.untyped_storage().nbytes() for b in A.to_low_rank().U._batches for t in b.held())
    assert A.to_low_rank(max_memory=needed).shape == A.shape
    with pytest.raises(MemoryError, match=r"first \d mini-batches"):
        A.to_low_rank(max_memory=needed // 4)


@pytest.fixture
def group(tmp_path: Any) -> Iterator[Any]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("kind", FISHERS)
def test_a_process_group_is_refused(kind: str, group: Any) -> None:
    A = build(kind, mlp(), classes(), process_group=group)
    with pytest.raises(NotImplementedError, match="process_group"):
        A.to_low_rank()
    for engine in ("tangents", "factors"):
        kept = A.linearize(engine=engine)
        for _ in range(2):
            assert relative_error(kept @ vector(A, 3), A @ vector(A, 3)) < 1e-12


def test_an_unknown_loss_is_refused() -> None:
    def pinball(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).abs().pow(1.5).mean()

    model = mlp()
    A = GGNLinearOperator(model, pinball, list(model.parameters()), numbers())
    for call in (A.to_low_rank, lambda: A.linearize(engine="factors")):
        with pytest.raises(NotImplementedError, match="pinball"):
            call()
    assert relative_error(A.linearize() @ vector(A, 3), A @ vector(A, 3)) < 1e-12


def test_a_model_that_closes_over_its_parameters_is_refused() -> None:
    model = mlp()
    A = build("EF", lambda X: model(X), classes(), params=list(model.parameters()))
    with pytest.raises(NotImplementedError, match="closes over"):
        A.to_low_rank()


# -- state, accuracy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covered", [True, False])
def test_it_keeps_the_values(covered: bool) -> None:
    model, data = Sequences(covered), sequences()
    before = snapshot(model)
    low = build("EF", model, data).to_low_rank()
    assert differences(before, snapshot(model)) == []
    assert "frozen" in repr(low.U) and "4 mini-batches" in repr(low.U)
    expected = oracle(model, data, nn.CrossEntropyLoss()).empirical_fisher()
    with torch.no_grad():
        for p in model.parameters():
            p.data += 1.0
    data.clear()
    check(low, expected)
    assert low.frozen() is low
    assert relative_error(low.linearize() @ vector(low, 2), expected @ vector(low, 2)) < 1e-12


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda A: pickle.loads(pickle.dumps(A))], ids=["copy", "pickle"])
def test_copies(duplicate: Any) -> None:
    low = build("EF", mlp(), classes(RAGGED)).to_low_rank()
    V = vector(low, 2)
    expected, solution = low @ V, low.damped(0.1).inverse() @ V
    other = duplicate(low)
    assert torch.equal(other @ V, expected)
    assert relative_error(other.damped(0.1).inverse() @ V, solution) < 1e-12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", FISHERS)
def test_damped_solutions_in_single_precision(kind: str, seed: int) -> None:
    """The residual of the system for a gradient, with a damping of a hundredth of the largest eigenvalue."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    X, y = normal(60, 20, seed=seed, dtype=torch.float32), torch.arange(60) % 5
    A = build(kind, model, cut(X, y, (32, 28)))
    low = A.to_low_rank()
    damping = 1e-2 * float(low.eigenvalues()[-1])
    gradients, _ = A.gradient_and_loss()
    g = torch.cat([p.flatten() for p in gradients])
    damped = low.damped(damping)
    x = damped.inverse() @ g
    assert x.dtype == torch.float32
    # The system in double precision, with the columns that single precision found.
    F = low.U.to_dense().double()
    residual = F @ (F.T @ x.double()) + damping * x.double() - g.double()
    assert residual.norm() <= 1e-6 * g.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    """Gram matrices and closed forms in half precision are accumulated in single precision."""
    model, data = mlp(dtype), [(X.to(dtype), y) for X, y in classes(RAGGED)]
    exact = build("EF", copy.deepcopy(model).double(), [(X.double(), y) for X, y in data]).to_low_rank()
    low = EFLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data).to_low_rank()
    allowed = 1e-5 if dtype == torch.float32 else 0.05
    V = vector(low, 3)
    assert (low @ V).dtype == dtype
    assert relative_error(low @ V, exact @ V.double()) < allowed
    assert relative_error(low.trace(), exact.trace()) < allowed
    assert relative_error(low.eigenvalues()[-5:], exact.eigenvalues()[-5:]) < allowed


def test_shuffled_draws_belong_together() -> None:
    """All columns come from one pass."""
    X, y = inputs(12), labels(12)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=5, shuffle=True)
    low = build("MC", mlp(), data, check_deterministic=False).to_low_rank()
    D = low.to_dense()
    check(low, D)
    assert float(torch.linalg.eigvalsh(D)[0]) > -1e-12
