"""Pruning: the constrained minimum in NumPy, least squares fitted anew, forms, refusals and what stays as it was."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from curvlinops import (
    BlockDiagonal,
    ConvergenceWarning,
    Diagonal,
    EKFACLinearOperator,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    IdentityLinearOperator,
    InverseLinearOperator,
    KFACLinearOperator,
    Kronecker,
    LinearOperator,
    LowRankLinearOperator,
    Space,
    TensorLinearOperator,
)
from curvlinops.applications.learned_inverse.operator import LearnedInverseLinearOperator
from curvlinops.applications.pruning import compensation
from curvlinops.applications.pruning.surgeon import obs_saliency, prune

F64, CPU = torch.float64, torch.device("cpu")
SHAPES = {"w": (4, 3), "b": (4,), "v": (2, 4)}
D = 24


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def definite(size: int, seed: int) -> Tensor:
    M = noise(size, size, seed=seed)
    return M @ M.T + 0.3 * torch.eye(size, dtype=F64)


def weights(dtype: torch.dtype = F64) -> dict[str, Tensor]:
    return {name: noise(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(SHAPES.items())}


def flat(tensors: Any) -> np.ndarray:
    parts = tensors.values() if isinstance(tensors, dict) else tensors
    return torch.cat([tensor.detach().flatten() for tensor in parts]).numpy()


class KnownByProducts(LinearOperator):
    """A dense matrix of which the diagonal and products are known, but no inverse."""

    SELF_ADJOINT = True

    def __init__(self, matrix: Tensor, space: Space | None = None) -> None:
        space = Space(tuple(SHAPES.values()), matrix.dtype, CPU, tuple(SHAPES)) if space is None else space
        super().__init__(space, space)
        self.matrix = matrix

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self.domain.split(self.matrix @ Space.merge(X))

    def diagonal(self) -> Tensor:
        return torch.diagonal(self.matrix)


def pairs() -> dict[str, tuple[LinearOperator, Tensor]]:
    """Operators, and the matrices that they stand for, made by plain arithmetic."""
    space = Space(tuple(SHAPES.values()), F64, CPU, tuple(SHAPES))
    M, L, R, U, d = definite(D, 1), definite(2, 2), definite(4, 3), noise(D, 6, seed=4), noise(16, seed=5).abs() + 0.1
    blocks = [Kronecker(L, R), Diagonal(d)]  # v by a Kronecker product, w and b by a diagonal
    parts = BlockDiagonal(blocks, positions=[[2], [0, 1]], space=space)
    low_rank = LowRankLinearOperator(KnownColumns(U, space), c=0.2).inverse()
    return {
        "dense": (TensorLinearOperator(M), M),
        "products": (KnownByProducts(M), M),
        "blocks": (parts, torch.block_diag(torch.diag(d), torch.kron(L, R))),
        "low rank": (low_rank, torch.linalg.inv(U @ U.T + 0.2 * torch.eye(D, dtype=F64))),
    }


class KnownColumns(LinearOperator):
    """Columns in the shapes of the parameters."""

    def __init__(self, matrix: Tensor, space: Space) -> None:
        super().__init__(Space.flat(matrix.shape[1], matrix.dtype, CPU), space)
        self.matrix = matrix

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self.codomain.split(self.matrix @ X[0])

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self.matrix.T @ Space.merge(X)]


# -- the truth ---------------------------------------------------------------------------------------------------------


def constrained_minimum(H: np.ndarray, theta: np.ndarray, pruned: np.ndarray) -> tuple[np.ndarray, float]:
    """θ + δ for the δ of least ½ δᵀHδ with (θ + δ)_S = 0, by the KKT system, and that least value."""
    size, S = len(theta), np.flatnonzero(pruned)
    E = np.eye(size)[S]
    system = np.block([[H, E.T], [E, np.zeros((len(S), len(S)))]])
    delta = np.linalg.solve(system, np.concatenate([np.zeros(size), -theta[S]]))[:size]
    return theta + delta, 0.5 * delta @ H @ delta


def ranked(theta: np.ndarray, Q: np.ndarray, count: int) -> np.ndarray:
    pruned = np.zeros(len(theta), dtype=bool)
    pruned[np.argsort(theta**2 / (2 * np.diag(Q)), kind="stable")[:count]] = True
    return pruned


def truth(theta: np.ndarray, Q: np.ndarray, sparsity: float, steps: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Ranked and moved step by step, each from where the last one ended; what the steps cost adds up."""
    H, total = np.linalg.inv(Q), 0.0
    for step in range(1, steps + 1):
        pruned = ranked(theta, Q, round(len(theta) * (1 - (1 - sparsity) ** (step / steps))))
        theta, cost = constrained_minimum(H, theta, pruned)
        theta[pruned], total = 0.0, total + cost
    return theta, pruned, total


def check(Q: LinearOperator, M: Tensor, sparsity: float, steps: int, allowed: float = 1e-8) -> None:
    params = weights()
    expected, pruned, cost = truth(flat(params), M.numpy(), sparsity, steps)
    masks, info = prune(params, Q, sparsity, steps=steps, rtol=1e-13, return_info=True)
    assert (flat(masks) == ~pruned).all()
    assert (flat(params)[pruned] == 0).all()
    np.testing.assert_allclose(flat(params), expected, rtol=0, atol=allowed * np.abs(expected).max())
    assert info.predicted_rise == pytest.approx(cost, rel=allowed)
    assert info.sparsity == pruned.mean() and info.residual < 1e-8
    assert [mask.shape for mask in masks.values()] == list(SHAPES.values())  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:Conjugate gradients did not reach")
@pytest.mark.parametrize("dense_size", [0, 1024])
@pytest.mark.parametrize("kind", ["dense", "products", "blocks", "low rank"])
def test_is_the_constrained_minimum(kind: str, dense_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Cholesky, and by conjugate gradients on what is kept or what goes."""
    monkeypatch.setattr(compensation, "DENSE_SIZE", dense_size)
    Q, M = pairs()[kind]
    torch.testing.assert_close(Q.to_dense(), M)
    for sparsity, steps in [(0.3, 1), (0.8, 1), (0.7, 3)]:
        check(Q, M, sparsity, steps)


def test_steps_rank_anew() -> None:
    """They find another set than one step, and in this case a cheaper one."""
    infos = {}
    for steps in (1, 6):
        params = weights()
        masks, info = prune(params, pairs()["dense"][0], 0.7, steps=steps, return_info=True)
        infos[steps] = flat(masks), info.predicted_rise
    assert (infos[1][0] != infos[6][0]).any() and infos[1][0].sum() == infos[6][0].sum()
    assert infos[6][1] < infos[1][1]


def test_saliency_is_the_cost_of_one_weight() -> None:
    Q, M = pairs()["dense"]
    theta, H = flat(weights()), np.linalg.inv(M.numpy())
    expected = [constrained_minimum(H, theta, np.arange(D) == q)[1] for q in range(D)]
    found = obs_saliency(weights(), Q)
    assert list(found) == list(SHAPES)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-9)
    as_list = obs_saliency(list(weights().values()), Q)
    assert isinstance(as_list, list) and (flat(as_list) == flat(found)).all()


def test_least_squares_fitted_anew() -> None:
    """For a linear model and its exact inverse Hessian, the kept weights are those of a fit without the others."""
    X, y = noise(60, 10, seed=1) @ definite(10, 2), noise(60, seed=3)
    fit = np.linalg.lstsq(X.numpy(), y.numpy(), rcond=None)[0]
    params = [torch.tensor(fit, requires_grad=True)]
    Q = TensorLinearOperator(torch.linalg.inv(X.T @ X))
    masks, info = prune(params, Q, 0.4, return_info=True)
    kept = masks[0].numpy()  # type: ignore[index]
    assert kept.sum() == 6
    again = np.linalg.lstsq(X.numpy()[:, kept], y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(params[0].detach().numpy()[kept], again, rtol=1e-8)
    risk = [0.5 * np.square(X.numpy() @ w - y.numpy()).sum() for w in (fit, params[0].detach().numpy())]
    assert info.predicted_rise == pytest.approx(risk[1] - risk[0], rel=1e-8)


# -- inverse curvatures of a network -----------------------------------------------------------------------------------


def network() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    labels = torch.randint(3, (12,), generator=torch.Generator().manual_seed(0))
    return model.eval(), [(noise(12, 1, 4, 4, seed=1), labels)]


def kronecker_inverse(cls: Any) -> Callable[..., LinearOperator]:
    return lambda *problem: cls(*problem, fisher_type="type-2").inverse(1e-2)


def learned(*problem: Any) -> LinearOperator:
    Q = LearnedInverseLinearOperator(problem[2], damping=0.1, lr=1e-2)
    Q.fit(FisherMCLinearOperator(*problem), 5)
    return Q


INVERSES: dict[str, Callable[..., LinearOperator]] = {
    "KFAC": kronecker_inverse(KFACLinearOperator),
    "EKFAC": kronecker_inverse(EKFACLinearOperator),
    "low rank": lambda *problem: FisherMCLinearOperator(*problem).to_low_rank().damped(1e-2).inverse(),
    "diagonal": lambda *problem: GGNDiagonalLinearOperator(*problem).inverse(1e-2),
    "learned": learned,
}


@pytest.mark.filterwarnings("ignore:Conjugate gradients did not reach")
@pytest.mark.parametrize("kind", list(INVERSES))
def test_inverse_curvatures(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the parameters of Q are touched; buffers, mode, gradients and the random state are as before."""
    monkeypatch.setattr(compensation, "DENSE_SIZE", 10)  # some blocks by Cholesky, some not
    model, data = network()
    params = {name: p for name, p in model.named_parameters() if not name.startswith("3.")}
    Q = INVERSES[kind](model, nn.CrossEntropyLoss(), params, data)
    theta, dense = flat(params), Q.to_dense().numpy()
    model[4].weight.grad = torch.ones_like(model[4].weight)  # type: ignore[index]
    before, state = copy.deepcopy(model), torch.get_rng_state()
    masks = prune(model, Q, 0.6, rtol=1e-13)
    expected, pruned, _ = truth(theta, dense, 0.6, 1)
    assert isinstance(masks, dict) and list(masks) == list(params)
    assert (flat(masks) == ~pruned).all()
    np.testing.assert_allclose(flat(params), expected, atol=1e-7 * np.abs(expected).max())
    for name, p in model.named_parameters():
        assert p.requires_grad and p.is_leaf
        assert torch.equal(p, before.get_parameter(name)) or not name.startswith("3.")
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), before.buffers(), strict=True))
    assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight))  # type: ignore[index]
    assert not model.training and torch.equal(torch.get_rng_state(), state)


# -- what is pruned ----------------------------------------------------------------------------------------------------


def test_zeros_stay_and_come_first() -> None:
    Q, _ = pairs()["products"]
    params = weights()
    first = prune(params, Q, 0.5)
    pruned = copy.deepcopy(params)
    for sparsity in (0.5, 0.2, 0.0):  # fewer zeros cannot be asked for
        masks = prune(params, Q, sparsity)
        assert (flat(masks) == flat(first)).all() and (flat(params) == flat(pruned)).all()
    more = flat(prune(params, Q, 0.75, steps=2))
    assert more.sum() == D // 4 and not (more & ~flat(first)).any()
    # The second call's constraints include the first's, so that it ends where the whole set at once would.
    expected, _ = constrained_minimum(np.linalg.inv(pairs()["products"][1].numpy()), flat(weights()), ~more)
    np.testing.assert_allclose(flat(params)[more], expected[more], rtol=1e-6)


def test_ties_whole_blocks_and_uncompensated() -> None:
    identity = IdentityLinearOperator([(3,), (2,)], dtype=F64)
    params = [torch.ones(3, dtype=F64), torch.tensor([-1.0, 0.5], dtype=F64)]
    masks = prune(params, identity, 0.6)
    assert isinstance(masks, list) and [mask.tolist() for mask in masks] == [[False, False, True], [True, False]]
    # One block goes as a whole, by each of the three ways, and the others do not move.
    for size, inverse in [(0, True), (0, False), (1024, True)]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compensation, "DENSE_SIZE", size)
            space = Space(((4,),), F64, CPU)
            M = definite(4, 1)
            block = TensorLinearOperator(M) if inverse else KnownByProducts(M, space)
            small, large = 1e-9 * torch.ones(4, dtype=F64), torch.ones(4, dtype=F64)
            prune([small, large], BlockDiagonal([block, block]), 0.5)
            assert not small.any() and bool((large == 1).all())
    params, before = weights(), flat(weights())
    masks, info = prune(params, pairs()["dense"][0], 0.5, compensate=False, steps=2, return_info=True)
    assert (flat(params) == before * flat(masks)).all() and info.predicted_rise is None
    assert (flat(masks) == ~ranked(before, pairs()["dense"][1].numpy(), D // 2)).all()


def test_scores_beyond_the_range_are_ranked_last() -> None:
    """Not among what may not go at all."""
    params = {"b": torch.tensor([1.0, 5.0]), "a": torch.tensor([1e25, 1.0, 2.0, 1e26])}
    Q = Diagonal({"b": torch.ones(2), "a": torch.tensor([1e-40, 1.0, 1.0, 1e-40])})
    prune(params, Q, 0.99, prunable=["a"])
    assert params["b"].tolist() == [1, 5] and not params["a"].any()


def test_prunable() -> None:
    """What may not go moves all the same; the share is of what may."""
    Q, M = pairs()["dense"]
    params, theta = weights(), flat(weights())
    masks = prune(params, Q, 0.5, prunable=["w", "v*"])
    assert isinstance(masks, dict) and bool(masks["b"].all())
    assert int(masks["w"].sum() + masks["v"].sum()) == 10
    expected, _ = constrained_minimum(np.linalg.inv(M.numpy()), theta, ~flat(masks))
    np.testing.assert_allclose(flat(params), expected, atol=1e-9)
    assert not np.allclose(flat({"b": params["b"]}), theta[12:16])
    listed = list(weights().values())
    assert bool(prune(listed, Q, 0.5, prunable=["0", "2"])[1].all())  # type: ignore[index]


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("params_dtype", "dtype", "allowed"), [
    (torch.bfloat16, torch.float32, 1e-2), (torch.float16, torch.float32, 2e-3),
    (F64, torch.float32, 1e-4), (torch.float32, torch.float32, 1e-4), (torch.bfloat16, torch.bfloat16, 0.2),
])  # fmt: skip
def test_precisions(params_dtype: torch.dtype, dtype: torch.dtype, allowed: float) -> None:
    """Parameters may have another precision than Q; their own is kept, and so are their exact values for ranking."""
    M = definite(D, 1) + 5 * torch.eye(D, dtype=F64)
    params = weights(params_dtype)
    theta = flat({name: p.double() for name, p in params.items()})
    saliency = obs_saliency(params, TensorLinearOperator(M.to(dtype)))
    assert saliency["w"].dtype == (F64 if params_dtype == F64 else torch.float32)  # type: ignore[call-overload]
    masks = prune(params, TensorLinearOperator(M.to(dtype)), 0.5)
    expected, _ = constrained_minimum(np.linalg.inv(M.numpy()), theta, ~flat(masks))
    assert all(p.dtype == params_dtype for p in params.values())
    found = flat({name: p.double() for name, p in params.items()})
    np.testing.assert_allclose(found, expected, atol=allowed * np.abs(expected).max())
    assert ((found == 0) == ~flat(masks)).all()


# -- refusals ----------------------------------------------------------------------------------------------------------


def spoilt(name: str, value: float) -> dict[str, Tensor]:
    params = weights()
    params[name].view(-1)[1] = value
    return params


def indefinite() -> Tensor:
    M = torch.ones(D, D, dtype=F64)
    return M + torch.diag(torch.full((D,), -0.5, dtype=F64))


def of_curvature() -> tuple[dict[str, Tensor], LinearOperator]:
    model, data = network()
    params: dict[str, Tensor] = dict(model.named_parameters())
    return params, KFACLinearOperator(model, nn.CrossEntropyLoss(), params, data, fisher_type="type-2")


def of_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.ones(4, dtype=F64)


def separate(*tensors: Tensor) -> tuple[list[Tensor], LinearOperator, float]:
    """Tensors of which the first could be written."""
    params = [noise(4).clone(), *tensors]
    return params, IdentityLinearOperator([tuple(t.shape) for t in params], dtype=F64), 0.5


SHARED = noise(4, 3)
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "sparsity of 1": (ValueError, "below 1, got 1", lambda: (weights(), pairs()["dense"][0], 1.0)),
    "sparsity below 0": (ValueError, "below 1, got -0.1", lambda: (weights(), pairs()["dense"][0], -0.1)),
    "sparsity not a number": (ValueError, "got nan", lambda: (weights(), pairs()["dense"][0], math.nan)),
    "the curvature": (TypeError, "is the curvature; pass its inverse", lambda: (*of_curvature(), 0.5)),
    "no operator": (TypeError, "expected a linear operator, got Tensor", lambda: (weights(), torch.ones(D), 0.5)),
    "not symmetric": (ValueError, "symmetric", lambda: (weights(), TensorLinearOperator(noise(D, D)), 0.5)),
    "no diagonal": (
        TypeError, "no diagonal.*to_low_rank", lambda: (weights(), InverseLinearOperator(pairs()["products"][0]), 0.5)
    ),
    "a diagonal entry of zero": (ValueError, "1 of its 24 entries", lambda: (weights(), Diagonal(ones_but(0.0)), 0.5)),
    "an infinite diagonal entry": (ValueError, "1 of its 24", lambda: (weights(), Diagonal(ones_but(math.inf)), 0.5)),
    "an indefinite Q": (
        ValueError, "positive definite", lambda: (weights(), TensorLinearOperator(indefinite()), 0.5)
    ),
    "a parameter that is NaN": (ValueError, "1 of 24", lambda: (spoilt("w", math.nan), pairs()["dense"][0], 0.5)),
    "too few parameters": (
        ValueError, r"Q acts on \['v'\]", lambda: ({n: weights()[n] for n in "wb"}, pairs()["products"][0], 0.5)
    ),
    "another shape": (
        ValueError, "spaces differ", lambda: ({**weights(), "w": noise(3, 4)}, pairs()["products"][0], 0.5)
    ),
    "another size": (ValueError, "spaces differ", lambda: ([noise(5)], pairs()["dense"][0], 0.5)),
    "integers": (ValueError, "int64", lambda: ({**weights(), "b": torch.ones(4).long()}, pairs()["dense"][0], 0.5)),
    "no parameters": (TypeError, "expected a module", lambda: (3, pairs()["dense"][0], 0.5)),
    "tied": (
        ValueError, "several names", lambda: ({"a": SHARED, "b": SHARED}, IdentityLinearOperator([(4, 3)] * 2), 0.5)
    ),
    "views of one memory": (ValueError, r"\['1', '2'\] share memory", lambda: separate(SHARED[1:], SHARED.T[:2])),
    "expanded": (ValueError, r"\['1'\] share memory", lambda: separate(torch.ones(1, dtype=F64).expand(4))),
    "of inference mode": (ValueError, "'1' is a tensor of inference mode", lambda: separate(of_inference_mode())),
    "beyond half precision": (
        ValueError, "'1' are beyond", lambda: ([torch.ones(1).half(), torch.full((1,), 6e4).half()], far(), 0.5)
    ),
}  # fmt: skip
OPTIONS = {
    "steps": (0, "steps: expected"), "max_iter": (1.5, "max_iter: expected"), "rtol": (-1.0, "rtol: expected"),
    "prunable": (["x"], r"nothing matches \['x'\]"),
}  # fmt: skip


def ones_but(value: float) -> Tensor:
    entries = torch.ones(D, dtype=F64)
    entries[3] = value
    return entries


def far() -> LinearOperator:
    """To make up for the first entry, the second moves by ten thousand times as much."""
    return TensorLinearOperator(torch.tensor([[1e4, -1e8], [-1e8, 2e12]], dtype=F64))


@pytest.mark.parametrize("case", list(REFUSED))
def test_refusals_change_nothing(case: str) -> None:
    error, message, make = REFUSED[case]
    params, Q, sparsity = make()
    before = copy.deepcopy(params)
    with pytest.raises(error, match=message):
        prune(params, Q, sparsity)
    if params != 3:
        np.testing.assert_array_equal(flat(params), flat(before))


@pytest.mark.parametrize("option", list(OPTIONS))
def test_options_out_of_range(option: str) -> None:
    value, message = OPTIONS[option]
    params: Any = weights()
    with pytest.raises(ValueError, match=message):
        prune(params, pairs()["dense"][0], 0.5, **{option: value})
    assert (flat(params) == flat(weights())).all()


@pytest.mark.parametrize("matrix", [indefinite(), torch.ones(D, D, dtype=F64), noise(D, D, seed=9)])
def test_large_indefinite_blocks_are_told(matrix: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the inverse is at hand, singular or not."""
    monkeypatch.setattr(compensation, "DENSE_SIZE", 0)
    params, symmetric = weights(), matrix + matrix.T
    symmetric.diagonal().abs_()
    with pytest.raises(ValueError, match="Q: expected a positive definite matrix, but in a block of 24 it is not"):
        prune(params, TensorLinearOperator(symmetric), 0.5)
    assert (flat(params) == flat(weights())).all()


def test_disjoint_views_of_one_memory() -> None:
    memory = noise(12)
    grid, rest = memory[:8].view(4, 2), memory[8:]
    views, apart = [grid[:, 0], grid[:, 1], rest], [grid[:, 0].clone(), grid[:, 1].clone(), rest.clone()]
    for params in (views, apart):
        prune(params, TensorLinearOperator(definite(12, 1)), 0.5)
    assert (flat(views) == flat(apart)).all() and int((memory == 0).sum()) == 6


def fails(Q: LinearOperator, iterations: int) -> bool:
    with pytest.warns(ConvergenceWarning):
        try:
            prune(weights(), Q, 0.5, max_iter=iterations)
        except RuntimeError:
            return True
    return False


@pytest.mark.parametrize("kind", ["dense", "products"])
def test_unsolved_systems_are_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A little short is a warning, far off an error that leaves the parameters as they were."""
    monkeypatch.setattr(compensation, "DENSE_SIZE", 0)
    Q, params = pairs()[kind][0], weights()
    with pytest.warns(ConvergenceWarning), pytest.raises(RuntimeError, match="no parameter was changed"):
        prune(params, Q, 0.5, max_iter=1)
    assert (flat(params) == flat(weights())).all()
    iterations = next(n for n in range(2, 40) if not fails(Q, n))
    with pytest.warns(ConvergenceWarning):
        _, info = prune(params, Q, 0.5, max_iter=iterations, return_info=True)
    assert 1e-7 < info.residual <= 0.1


def test_ill_conditioned_in_float32_is_told() -> None:
    """Cholesky in float64 cannot know what Q's own products do not."""
    basis = torch.linalg.qr(noise(D, D, seed=1)).Q
    told = {7: pytest.warns(ConvergenceWarning), 9: pytest.raises(RuntimeError), 10: pytest.raises(ValueError)}
    for power, context in told.items():
        M = basis * torch.logspace(0, power, D, dtype=F64) @ basis.T
        with context:
            prune(weights(torch.float32), TensorLinearOperator(((M + M.T) / 2).float()), 0.9)
