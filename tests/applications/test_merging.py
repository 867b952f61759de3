"""Merging: against the dense linear system solved by NumPy, direct formulas, and plain averages."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from curvlinops import (
    BlockDiagonal,
    CGInverseLinearOperator,
    ConvergenceWarning,
    Diagonal,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    Kronecker,
    LinearOperator,
    LowRankLinearOperator,
    Space,
    TensorLinearOperator,
    merge,
    shrink_off_diagonal,
)

SHAPES = {"w": (2, 3), "b": (2,)}
DOUBLE = torch.float64


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def positive(size: int, rank: int, seed: int) -> Tensor:
    N = noise(size, rank, seed=seed)
    return N @ N.T


def tensors(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    return {name: noise(*shape, seed=10 * seed + i) for i, (name, shape) in enumerate(shapes.items())}


def flat(named: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([tensor.detach().double().flatten() for tensor in named.values()])


def truth(
    matrices: list[Tensor], points: list[np.ndarray], anchor: np.ndarray, damping: float, weights: list[float]
) -> np.ndarray:
    """a + (Σ w F + λI)⁺ Σ w F (θ - a)."""
    H = sum(w * np.asarray(F) for w, F in zip(weights, matrices)) + damping * np.eye(len(anchor))
    b = sum(w * np.asarray(F) @ (p - anchor) for w, F, p in zip(weights, matrices, points))
    return anchor + np.linalg.lstsq(H, b, rcond=1e-12)[0]


class Products(LinearOperator):
    """A positive matrix that is known by its products only, as a streamed one is."""

    SELF_ADJOINT = POSITIVE_SEMIDEFINITE = True

    def __init__(self, matrix: Tensor, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        space = Space(tuple(shapes.values()), matrix.dtype, matrix.device, tuple(shapes))
        super().__init__(space, space)
        self.matrix = matrix

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self.domain.split(self.matrix @ Space.merge(X))


# -- the formula, for each kind of matrix ------------------------------------------------------------------------------


def diagonals(seed: int) -> tuple[Any, Tensor]:
    entries = {name: tensor.square() for name, tensor in tensors(seed).items()}
    entries["w"][0] = 0  # of every task
    return entries, torch.diag(torch.tensor(flat(entries)))


def dense(seed: int) -> tuple[Any, Tensor]:
    return TensorLinearOperator(positive(8, 2, seed)), positive(8, 2, seed)


def low_rank(seed: int) -> tuple[Any, Tensor]:
    return LowRankLinearOperator(TensorLinearOperator(noise(8, 2, seed=seed))), positive(8, 2, seed)


def blocks(left: Tensor, right: Tensor, bias: Tensor) -> tuple[BlockDiagonal, Tensor]:
    w = Space((SHAPES["w"],), DOUBLE, left.device, ("w",))
    parts = [Kronecker(left, right, space=w, is_positive=True), Diagonal({"b": bias})]
    matrix = torch.block_diag(torch.kron(left if left.ndim == 2 else torch.diag(left), right), torch.diag(bias))
    return BlockDiagonal(parts), matrix


def shared_factor(seed: int) -> tuple[Any, Tensor]:
    return blocks(torch.ones(2, dtype=DOUBLE), positive(3, 1, seed), torch.tensor([seed, 0.0], dtype=DOUBLE))


def own_factors(seed: int) -> tuple[Any, Tensor]:
    return blocks(positive(2, 1, seed), positive(3, 1, seed + 5), torch.tensor([0.0, seed], dtype=DOUBLE))


def by_products(seed: int) -> tuple[Any, Tensor]:
    return Products(positive(8, 2, seed)), positive(8, 2, seed)


METHODS: dict[Callable[[int], tuple[Any, Tensor]], tuple[str, str]] = {
    diagonals: ("closed form", "closed form"),
    dense: ("closed form", "closed form"),
    low_rank: ("closed form", "closed form"),
    shared_factor: ("closed form", "closed form"),
    own_factors: ("block by block", "block by block"),
    by_products: ("MINRES", "conjugate gradients"),
}


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_formula(kind: Callable[[int], tuple[Any, Tensor]]) -> None:
    """Singular sums and damped ones, each anchor, weights, and what is told of them."""
    models, weights = [tensors(1), tensors(2), tensors(3)], [1.0, 0.5, 2.0]
    pairs = [kind(seed) for seed in (1, 2, 3)]
    fishers, matrices, points = [F for F, _ in pairs], [M for _, M in pairs], [flat(model) for model in models]
    mean = sum(w * p for w, p in zip(weights, points)) / sum(weights)
    other = tensors(9)
    anchors: dict[str, tuple[Any, np.ndarray]] = {
        "zero": ("zero", 0 * mean),
        "mean": ("mean", mean),
        "tensors": (other, flat(other)),
    }
    for what, (anchor, a) in anchors.items():
        for damping in (0.0, 0.3):
            a_here = mean if what == "zero" and damping == 0 else a
            expected = truth(matrices, points, a_here, damping, weights)
            found, info = merge(models, fishers, weights=weights, damping=damping, anchor=anchor, return_info=True)
            np.testing.assert_allclose(flat(found), expected, rtol=1e-6, atol=1e-6, err_msg=f"{what}, {damping}")
            assert list(found) == list(SHAPES) and info.method == METHODS[kind][damping > 0]
            forms = [(expected - p) @ M.numpy() @ (expected - p) for p, M in zip(points, matrices)]
            np.testing.assert_allclose(info.quadratic_forms, forms, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(info.predicted_rise, 0.5 * np.dot(weights, forms), rtol=1e-5, atol=1e-7)
            assert info.residual < 1e-7 and (info.iterations > 0) == (info.method not in ("closed form",))


def test_where_iterations_begin() -> None:
    """Damped, it does not matter to the solution; else tensors stay where no matrix sees them."""
    models, matrices = [tensors(1), tensors(2)], [positive(8, 2, seed) for seed in (1, 2)]
    fishers, points = [Products(M) for M in matrices], [flat(model) for model in models]
    start, mean = tensors(7), (points[0] + points[1]) / 2
    expected = truth(matrices, points, 0 * mean, 0.2, [1, 1])
    for x0 in ("mean", "anchor", start):
        np.testing.assert_allclose(flat(merge(models, fishers, damping=0.2, x0=x0)), expected, atol=1e-6)
    seen = truth(matrices, points, flat(start), 0.0, [1, 1])
    np.testing.assert_allclose(flat(merge(models, fishers, x0=start)), seen, atol=1e-6)
    at_solution = merge(models, fishers, x0=merge(models, fishers), return_info=True)[1]
    assert at_solution.iterations == 0, "warm start"
    asked = []

    def solver(A: LinearOperator) -> LinearOperator:
        asked.append(A)
        return CGInverseLinearOperator(A, rtol=1e-10)

    found, info = merge(models, fishers, damping=0.2, solver=solver, return_info=True)
    np.testing.assert_allclose(flat(found), expected, atol=1e-8)
    assert len(asked) == 1 and info.method == "CGInverseLinearOperator" and info.iterations > 0


def test_averages() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(3)]
    names = list(dict(models[0].named_parameters()))
    stacked = {name: torch.stack([model.get_parameter(name).detach() for model in models]) for name in names}
    for weights in (None, [2.0, 0.0, 1.0]):
        w = torch.tensor(weights or [1.0, 1.0, 1.0])
        found = merge(models, weights=weights)
        for name in names:
            expected = torch.tensordot(w / w.sum(), stacked[name], 1)
            torch.testing.assert_close(found[name], expected)
            assert not found[name].requires_grad
    (info,) = [merge(models, return_info=True)[1]]
    assert info.method == "closed form" and info.iterations == 0
    # λ and an anchor pull the average, as ridge regression does.
    pulled = merge(models, damping=1.0, anchor="zero")
    torch.testing.assert_close(pulled["0.bias"], stacked["0.bias"].sum(0) / 4)


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_one_model_and_equal_models_return_themselves(kind: Callable[[int], tuple[Any, Tensor]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for models, fishers in (([tensors(1)], [kind(1)[0]]), ([tensors(1)] * 2, [kind(1)[0], kind(2)[0]])):
            for damping in (0.0, 0.1):
                found, info = merge(models, fishers, damping=damping, anchor="mean", return_info=True)
                np.testing.assert_allclose(flat(found), flat(models[0]), rtol=1e-12, atol=1e-12)
                assert abs(info.predicted_rise) < 1e-12
                assert found["w"].data_ptr() != models[0]["w"].data_ptr(), "a tensor of its own"


# -- matrices of networks ----------------------------------------------------------------------------------------------


def network(seed: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    for i, p in enumerate(model.parameters()):
        p.data = noise(*p.shape, seed=20 * seed + i)
    return model


def gauss_newton(model: nn.Sequential, X: Tensor) -> Tensor:
    """(2 / (N C)) JᵀJ, the Gauss-Newton matrix of the mean squared error, by plain autograd."""
    outputs = model(X).flatten()
    rows = [torch.autograd.grad(f, list(model.parameters()), retain_graph=True) for f in outputs]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return 2 / len(J) * J.T @ J


def test_gauss_newton_and_kfac_of_networks() -> None:
    models = [network(seed) for seed in (1, 2)]
    data = [[(noise(6, 4, seed=seed), noise(6, 2, seed=seed + 1))] for seed in (31, 32)]
    points = [flat(dict(model.named_parameters())) for model in models]
    matrices = [gauss_newton(model, batches[0][0]) for model, batches in zip(models, data)]
    heads = [(m, nn.MSELoss(), dict(m.named_parameters()), d) for m, d in zip(models, data)]
    full = merge(models, [GGNLinearOperator(*head) for head in heads], damping=1e-2)
    np.testing.assert_allclose(flat(full), truth(matrices, points, 0 * points[0], 1e-2, [1, 1]), rtol=1e-5, atol=1e-6)
    diagonal = merge(models, [GGNDiagonalLinearOperator(*head) for head in heads])
    diagonal_matrices = [torch.diag(M.diagonal()) for M in matrices]
    mean = (points[0] + points[1]) / 2
    np.testing.assert_allclose(flat(diagonal), truth(diagonal_matrices, points, mean, 0.0, [1, 1]), rtol=1e-9)

    # KFAC's own matrix, from its factors; there is one system a block, solved on its own.
    kfacs = [KFACLinearOperator(*head, fisher_type="type-2") for head in heads]
    found, info = merge(models, kfacs, damping=1e-2, return_info=True)
    kfac_matrices = [
        torch.block_diag(
            *(
                torch.kron(f["gradient_covariance"], f["input_covariance"]) if "input_covariance" in f else f["matrix"]
                for f in map(K.factors, full)
            )
        )
        for K in kfacs
    ]
    expected = truth(kfac_matrices, points, 0 * mean, 1e-2, [1, 1])
    np.testing.assert_allclose(flat(found), expected, rtol=1e-5, atol=1e-6)
    assert info.method == "block by block" and 0 < info.iterations <= 24
    # A parameter that has changed meanwhile does not change what was computed.
    low = merge(models, [GGNLinearOperator(*head).to_low_rank() for head in heads], damping=1e-2, return_info=True)
    np.testing.assert_allclose(flat(low[0]), flat(full), rtol=1e-5, atol=1e-6)
    assert low[1].method == "closed form"


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_regmean(scale: float) -> None:
    """W = (Σ W_t A_t) (Σ A_t)⁻¹ for the inputs' Gram matrices A_t, and biases averaged (Jin et al., 2023)."""
    layers = [nn.Linear(5, 3).double() for _ in range(2)]
    inputs = [noise(7, 5, seed=1), noise(9, 5, seed=2)]
    weights = [1.0, 3.0]
    grams = [w * X.T @ X / len(X) for w, X in zip(weights, inputs)]
    grams = [scale * A + (1 - scale) * torch.diag(A.diagonal()) for A in grams]
    expected = sum(layer.weight @ A for layer, A in zip(layers, grams)) @ torch.linalg.inv(sum(grams))
    average = (layers[0].bias + 3 * layers[1].bias) / 4

    def regmean(names: list[str]) -> Any:
        kfacs = [
            KFACLinearOperator(
                layer,
                nn.MSELoss(),
                {name: layer.get_parameter(name) for name in names},
                [(X, X[:, :3])],
                fisher_type="forward-only",
            )
            for layer, X in zip(layers, inputs)
        ]
        before = kfacs[0].to_dense()
        shrunk = [shrink_off_diagonal(K, scale) for K in kfacs]
        torch.testing.assert_close(kfacs[0].to_dense(), before, rtol=0, atol=0)
        return merge(layers, shrunk, weights=weights, return_info=True)

    for names in (["weight"], ["weight", "bias"]):
        found, info = regmean(names)
        torch.testing.assert_close(found["weight"], expected.detach())
        torch.testing.assert_close(found["bias"], average.detach())
        assert info.method == "closed form", "Σ w_t (I ⊗ A_t) is a Kronecker product"


def test_shrinking_is_for_kronecker_products() -> None:
    K, _ = blocks(positive(2, 2, 1), positive(3, 3, 2), torch.ones(2, dtype=DOUBLE))
    to_diagonal = shrink_off_diagonal(K, 0.0).to_dense()
    A = torch.diag(positive(3, 3, 2).diagonal())
    torch.testing.assert_close(to_diagonal[:6, :6], torch.kron(positive(2, 2, 1), A))
    for given, scale, error, message in (
        (K, 1.5, ValueError, "from 0 to 1"),
        (Products(positive(8, 8, 1)), 0.5, TypeError, "expected Kronecker products"),
        (positive(3, 3, 1), 0.5, TypeError, "expected an operator"),
    ):
        with pytest.raises(error, match=message):
            shrink_off_diagonal(given, scale)  # type: ignore[arg-type]


#: Losses of merged networks on the first mini-batch of each task, rounded.
LOSSES = {"naive": [0.237, 0.216, 0.261], "diag": [0.223, 0.205, 0.275], "full": [0.186, 0.189, 0.215]}


def test_numbers_of_a_script_that_merges_by_hand() -> None:
    """The average, the diagonals and the full matrices of three networks, as scripts have computed them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [
            nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 3)) for _ in range(3)
        ]
        data = [torch.utils.data.TensorDataset(torch.rand(20, 7), torch.rand(20, 3)) for _ in range(3)]
        batches = [[data[t][7 * i : 7 * i + 7] for i in range(3)] for t in range(3)]
        loss = nn.MSELoss()
        for model, loader in zip(models, batches):
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            for _ in range(10):
                for X, y in loader:
                    optimizer.zero_grad()
                    loss(model(X), y).backward()
                    optimizer.step()
    heads = [(m, loss, dict(m.named_parameters()), b) for m, b in zip(models, batches)]
    merged = {
        "naive": merge(models),
        "diag": merge(models, [GGNDiagonalLinearOperator(*head) for head in heads], damping=1e-3),
        "full": merge(models, [GGNLinearOperator(*head) for head in heads], damping=1e-3),
    }
    # The same systems, solved densely in float64.
    points = [flat(dict(m.named_parameters())) for m in models]
    doubles = [copy.deepcopy(m).double() for m in models]
    matrices = [
        sum(len(X) / 20 * gauss_newton(m, X.double()) for X, _ in loader) for m, loader in zip(doubles, batches)
    ]
    expected = {
        "naive": sum(points) / 3,
        "diag": truth([torch.diag(M.diagonal()) for M in matrices], points, 0 * points[0], 1e-3, [1, 1, 1]),
        "full": truth(matrices, points, 0 * points[0], 1e-3, [1, 1, 1]),
    }
    for name, found in merged.items():
        np.testing.assert_allclose(flat(found), expected[name], rtol=1e-3, atol=2e-3, err_msg=name)
        losses = [float(loss(torch.func.functional_call(models[0], found, X), y)) for (X, y), *_ in batches]
        np.testing.assert_allclose(losses, LOSSES[name], atol=2e-3, err_msg=name)


# -- which parameters --------------------------------------------------------------------------------------------------


def test_heads_and_parts_that_no_fisher_covers() -> None:
    """The formula on the union: a missing Fisher is zero, a missing parameter has no say."""
    shapes = {"body": (2, 2), "scale": (3,)}
    first = tensors(1, {**shapes, "head_a": (2,), "extra": (2,)})
    second = tensors(2, {"head_b": (1,), **shapes})
    on_body = {"body": (2, 2), "head_a": (2,)}
    F, D = positive(6, 4, 3), {"scale": noise(3, seed=4).square(), "body": noise(2, 2, seed=5).square()}
    D["scale"][0] = 0
    found, info = merge([first, second], [Products(F, on_body), D], damping=0.1, anchor="zero", return_info=True)
    assert list(found) == ["body", "scale", "head_a", "extra", "head_b"]
    torch.testing.assert_close(found["extra"], first["extra"])
    torch.testing.assert_close(found["head_b"], second["head_b"])
    torch.testing.assert_close(
        found["scale"], D["scale"] * second["scale"] / (D["scale"] + 0.1), msg="first: no Fisher"
    )
    theta = [np.concatenate([first["body"].flatten(), first["head_a"]]), np.append(second["body"].flatten(), [0, 0])]
    on_b = torch.diag(torch.cat([D["body"].flatten(), torch.zeros(2, dtype=DOUBLE)]))
    expected = truth([F, on_b], theta, np.zeros(6), 0.1, [1, 1])
    np.testing.assert_allclose(np.append(found["body"].flatten(), found["head_a"]), expected, atol=1e-6)
    assert info.method == "block by block" and len(info.quadratic_forms) == 2

    undamped = merge([first, second], [Products(F, on_body), D])
    torch.testing.assert_close(undamped["scale"][0], (first["scale"][0] + second["scale"][0]) / 2, msg="no Fisher sees")
    torch.testing.assert_close(undamped["scale"][1:], second["scale"][1:])
    anchor = {**first, **second}
    kept = merge([first, second], [Products(F, on_body), D], anchor=anchor, unmerged="anchor")
    torch.testing.assert_close(kept["extra"], anchor["extra"])
    with pytest.raises(ValueError, match=r"No Fisher matrix covers \['extra', 'head_b'\]"):
        merge([first, second], [Products(F, on_body), D], unmerged="error")
    # A weight of zero: neither the model nor its Fisher matrix has a say where another model does.
    alone = merge([first, second], [Products(F, on_body), D], weights=[0.0, 2.0])
    torch.testing.assert_close(alone["scale"][0], second["scale"][0])
    torch.testing.assert_close(alone["head_a"], first["head_a"])


def test_kronecker_bodies_with_different_heads_stay_closed() -> None:
    """Blocks that one task lacks do not keep the others from being solved by their closed forms."""
    body = [blocks(torch.ones(2, dtype=DOUBLE), positive(3, 3, s), torch.ones(2, dtype=DOUBLE))[0] for s in (1, 2)]
    models, fishers = [], []
    for s, K in enumerate(body):
        models.append({f"head{s}": noise(2, seed=s), **tensors(s + 1)})
        head = TensorLinearOperator(positive(2, 2, s + 7))
        space = Space((*K.domain.shapes, (2,)), DOUBLE, K.device, (*SHAPES, f"head{s}"))
        fishers.append(BlockDiagonal([*K.blocks, head], positions=[[0], [1], [2]], space=space))
    found, info = merge(models, fishers, weights=[1.0, 0.5], return_info=True)
    torch.testing.assert_close(found["head1"], models[1]["head1"])
    A = [positive(3, 3, 1), 0.5 * positive(3, 3, 2)]
    expected = sum(model["w"] @ a for model, a in zip(models, A)) @ torch.linalg.inv(sum(A))
    torch.testing.assert_close(found["w"], expected)
    assert info.method == "closed form"


def test_normalised_and_floored() -> None:
    models = [tensors(1), tensors(2)]
    fishers = [{name: tensor.square() for name, tensor in tensors(seed).items()} for seed in (3, 4)]
    scaled = []
    for scale, F in zip((1.0, 50.0), fishers):
        F = {name: scale * tensor for name, tensor in F.items()}
        norm = np.linalg.norm(flat(F))
        scaled.append({name: (tensor / norm).clamp(min=0.2) for name, tensor in F.items()})
    given = [fishers[0], Diagonal({name: 50.0 * tensor for name, tensor in fishers[1].items()})]
    found = merge(models, given, normalize=True, floor=0.2)
    for name in SHAPES:
        total = sum(F[name] * model[name] for F, model in zip(scaled, models))
        torch.testing.assert_close(found[name], total / sum(F[name] for F in scaled))
    dense_ones = [TensorLinearOperator(scale * positive(8, 8, seed)) for scale, seed in ((1.0, 1), (9.0, 2))]
    matrices = [positive(8, 8, seed) / torch.linalg.matrix_norm(positive(8, 8, seed)) for seed in (1, 2)]
    expected = truth(matrices, [flat(m) for m in models], 0 * flat(models[0]), 0.1, [1, 1])
    np.testing.assert_allclose(flat(merge(models, dense_ones, normalize=True, damping=0.1)), expected, rtol=1e-8)


# -- dtypes, and what is not touched -----------------------------------------------------------------------------------


def test_dtypes() -> None:
    """Solved in the widest dtype; each result has that of the first model which has the parameter."""
    kinds: list[tuple[torch.dtype, torch.dtype, float]] = [
        (torch.float32, torch.float64, 1e-4),
        (torch.bfloat16, torch.bfloat16, 4e-2),
        (torch.float16, torch.float32, 4e-3),
    ]
    for one, two, tol in kinds:
        first = {name: tensor.to(one) for name, tensor in tensors(1).items()}
        second = {name: tensor.to(two) for name, tensor in tensors(2, {**SHAPES, "head": (2,)}).items()}
        matrices = [positive(8, 8, 1).to(one), positive(8, 8, 2).to(two)]
        points = [flat(first), flat({name: second[name] for name in SHAPES})]
        expected = truth([M.double() for M in matrices], points, 0 * points[0], 0.5, [1, 1])
        with_head = torch.block_diag(matrices[1], torch.zeros(2, 2, dtype=two))
        closed = [TensorLinearOperator(matrices[0]), TensorLinearOperator(with_head)]
        for fishers in (closed, [Products(M) for M in matrices]):
            with warnings.catch_warnings():
                warnings.simplefilter("error", ConvergenceWarning)  # no more is asked for than products allow
                found = merge([first, second], fishers, damping=0.5)
            assert {found[name].dtype for name in SHAPES} == {one} and found["head"].dtype == two
            result = flat({name: found[name] for name in SHAPES})
            np.testing.assert_allclose(result, expected, rtol=tol, atol=tol)
    # Counts that are beyond half precision: the sum is made in float32.
    many = [{"w": torch.full((2,), float(i), dtype=torch.bfloat16)} for i in (256, 257, 258, 259)]
    assert merge(many)["w"].tolist() == [258.0, 258.0]
    tiny = [{"w": torch.full((2,), 1e-42)}] * 2
    torch.testing.assert_close(merge([tensors_32(1), tensors_32(3)], tiny)["w"], torch.full((2,), 2.0))


def tensors_32(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((2,), float(value))}


def test_what_the_user_owns_is_not_touched() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2)).double().eval()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    data = [(noise(6, 4, seed=1), noise(6, 2, seed=2))]
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fishers = [GGNLinearOperator(model, nn.MSELoss(), params, data) for _ in range(2)]
    diagonal = {"3.weight": torch.ones(2, 3, dtype=DOUBLE)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, grad = torch.get_rng_state(), model[3].weight.grad
    merge([model, model], fishers, damping=0.1, return_info=True)
    merge([model, model], [diagonal, diagonal], normalize=True, floor=0.1)
    with pytest.raises(ValueError, match="not finite"):
        merge([model, {**dict(model.named_parameters()), "0.bias": torch.full((3,), float("nan"))}], fishers)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and model[3].weight.grad is grad and bool((grad == 1).all())
    assert not model[0].weight.requires_grad and not any(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules()) and bool((diagonal["3.weight"] == 1).all())


# -- rounding, indefinite matrices, autocast ---------------------------------------------------------------------------


def scattered(seed: int) -> Tensor:
    """A matrix of rank 3 and norm 4, with all directions mixed."""
    Q, _ = torch.linalg.qr(noise(12, 12, seed=seed))
    return (Q[:, :3] * torch.tensor([4.0, 1.0, 0.5])) @ Q[:, :3].T


@pytest.mark.parametrize("damping", [1e-6, 1e-8, 1e-12])
def test_closed_forms_that_rounding_spoils(damping: float) -> None:
    """In single precision, a small damping makes the closed form wrong: the iteration is right and takes over."""
    models = [{"w": noise(12, seed=seed).float()} for seed in (1, 2)]
    matrices = [scattered(3), scattered(4)]
    mean = (flat(models[0]) + flat(models[1])) / 2
    expected = truth(matrices, [flat(m) for m in models], mean, damping, [1, 1])
    roots = [torch.linalg.eigh(M) for M in matrices]
    columns = [(V[:, -3:] * e[-3:].sqrt()).float() for e, V in roots]
    for fishers in (
        [TensorLinearOperator(M.float()) for M in matrices],
        [LowRankLinearOperator(TensorLinearOperator(U)) for U in columns],
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            found, info = merge(models, fishers, damping=damping, anchor="mean", return_info=True)
        assert info.residual < 2e-5
        np.testing.assert_allclose(flat(found), expected, atol=2e-3)


def test_blocks_whose_inverse_is_refused_are_solved_by_iteration() -> None:
    """A singular block that its tiny damping does not lift above rounding, next to one with a closed form."""
    models = [{"w": noise(4, seed=s).float(), "b": noise(6, seed=s + 5).float()} for s in (1, 2)]
    blocks_of = [(torch.diag(noise(4, seed=s).square().float()), torch.eye(6) - 1 / 6) for s in (3, 4)]
    space = Space(((4,), (6,)), torch.float32, torch.device("cpu"), ("w", "b"))
    fishers = [
        BlockDiagonal([Diagonal(D.diagonal()), Kronecker(N, torch.ones(1))], positions=[[0], [1]], space=space)
        for D, N in blocks_of
    ]
    found, info = merge(models, fishers, damping=1e-9, anchor="mean", return_info=True)
    matrices = [torch.block_diag(D, N).double() for D, N in blocks_of]
    mean = (flat(models[0]) + flat(models[1])) / 2
    expected = truth(matrices, [flat(m) for m in models], mean, 1e-9, [1, 1])
    np.testing.assert_allclose(flat(found), expected, atol=1e-5)
    assert info.residual < 2e-5


def test_a_system_that_is_not_solved_is_an_error() -> None:
    """Eigenvalues over 12 decades, which a thousand iterations do not resolve; a right-hand side that is rounding."""
    entries = torch.logspace(0, -12, 400, dtype=DOUBLE)
    F = Products(torch.diag(entries), {"w": (400,)})
    with pytest.warns(ConvergenceWarning), pytest.raises(ValueError, match=r"is not solved: a relative residual .* is"):
        merge([{"w": 1 / entries}] * 2, [F, F], anchor={"w": 0 * entries})
    # Models that differ where no matrix looks, but for rounding: nothing is asked of the system.
    Q, _ = torch.linalg.qr(noise(12, 12, seed=1))
    models = [{"w": Q[:, 11].float()}, {"w": -Q[:, 11].float()}]
    with pytest.warns(ConvergenceWarning):
        found = merge(models, [Products(M.float(), {"w": (12,)}) for M in (hidden(Q, 1.0), hidden(Q, 3.0))])
    assert float(found["w"].norm()) < 1e-4


def hidden(Q: Tensor, scale: float) -> Tensor:
    """A matrix that does not see the last column of Q."""
    return (Q[:, :11] * torch.linspace(scale, 0.1, 11)) @ Q[:, :11].T


def test_indefinite_at_the_result() -> None:
    """The differences to the anchor show positive curvature, those to the saddle point do not."""
    A = Products(torch.diag(torch.tensor([2.0, -0.1], dtype=DOUBLE)), {"w": (2,)})
    A.POSITIVE_SEMIDEFINITE = False
    models = [{"w": torch.tensor([1.0, 0.5], dtype=DOUBLE)}, {"w": torch.tensor([1.0, -0.5], dtype=DOUBLE)}]
    anchor = {"w": torch.tensor([0.0, 0.0], dtype=DOUBLE)}
    for options in ({}, {"return_info": True}):
        with pytest.raises(ValueError, match=r"fishers\[0\]: expected a positive .* its model and the result"):
            merge(models, [A, A], damping=0.1, anchor=anchor, **options)


def test_autocast_changes_nothing() -> None:
    models = [{name: tensor.float() for name, tensor in tensors(seed).items()} for seed in (1, 2)]
    pairs = [[F(seed)[1].float() for seed in (1, 2)] for F in (dense, own_factors)]
    for matrices in pairs:
        fishers = [TensorLinearOperator(M) for M in matrices]
        plain = merge(models, fishers, damping=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = merge(models, fishers, damping=0.1)
        assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_quadratic_forms_of_half_precision_matrices() -> None:
    models = [{"w": torch.full((2,), value).half()} for value in (300.0, 0.0)]
    for kind in (Diagonal({"w": torch.full((2,), 6e4).half()}), TensorLinearOperator(6e4 * torch.eye(2).half())):
        F = kind.diagonal()[0].double()
        info = merge(models, [kind, kind], return_info=True)[1]
        np.testing.assert_allclose(info.quadratic_forms, [float(2 * F * 150**2)] * 2, rtol=1e-6)


# -- errors ------------------------------------------------------------------------------------------------------------

TWO = [tensors(1), tensors(2)]
ONES = {name: torch.ones(shape, dtype=DOUBLE) for name, shape in SHAPES.items()}
NAN = {**ONES, "b": torch.tensor([1.0, float("nan")], dtype=DOUBLE)}
REFUSED: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    ([], None, {}, ValueError, "at least one, got none"),
    (tensors(1), None, {}, TypeError, "expected a list of models"),
    (TWO, ONES, {}, TypeError, "fishers: expected a list"),
    (TWO, [ONES], {}, ValueError, "one for each of 2 models, got 1"),
    (TWO, [ONES, None], {}, TypeError, r"fishers\[1\]: expected a Fisher matrix, got None"),
    ([list(ONES.values())] * 2, [Products(torch.eye(8).double())] * 2, {}, ValueError, "as a module or a dict"),
    ([ONES, {f"module.{n}": t for n, t in ONES.items()}], None, {}, ValueError, "'_orig_mod.'"),
    ([ONES, TWO[1], {"head": ONES["b"]}], None, {}, ValueError, r"models\[2\] has no parameter name in common"),
    ([ONES, {**ONES, "b": torch.ones(2, device="meta")}], None, {}, ValueError, "on the meta device"),
    (TWO, None, {"damping": "a"}, ValueError, r"damping: expected a finite number of at least 0, got .a"),
    ([NAN, ONES], None, {}, ValueError, r"models\[0\], 'b': 1 of 2 entries are not finite"),
    (
        [ONES, {**ONES, "w": torch.ones(3, 3)}],
        None,
        {},
        ValueError,
        r"'w' has shape \[3, 3\], but \[2, 3\].*Rename one of them",
    ),
    ([ONES, {"n": torch.tensor(3)}], None, {}, ValueError, "Leave out what is not a parameter"),
    (TWO, [ONES, NAN], {}, ValueError, "not finite"),
    (TWO, [ONES, {**ONES, "b": -ONES["b"]}], {}, ValueError, "no negative diagonal entry"),
    (TWO, [ONES, Diagonal({**ONES, "b": -ONES["b"]})], {}, ValueError, "no negative diagonal entry"),
    (TWO, [ONES, {"c": torch.ones(2)}], {}, ValueError, r"no parameters \['c'\]"),
    (TWO, [ONES, {"b": torch.ones(3)}], {}, ValueError, r"fishers\[1\], 'b': expected the shape of the parameter"),
    (TWO, [ONES, TensorLinearOperator(torch.eye(7).double())], {}, ValueError, "the spaces differ"),
    (TWO, [ONES, TensorLinearOperator(noise(8, 8, seed=1))], {}, ValueError, "symmetric operator"),
    (TWO, [ONES, Products(-torch.eye(8).double())], {"damping": 1e-3}, ValueError, "positive semi-definite"),
    (TWO, [ONES, Products(torch.full((8, 8), float("nan")).double())], {}, ValueError, r"fishers\[1\]: a product"),
    (TWO, None, {"weights": [1.0]}, ValueError, "one for each of 2 models"),
    (TWO, None, {"weights": [1.0, -1.0]}, ValueError, "at least 0"),
    (TWO, None, {"weights": [0.0, 0.0]}, ValueError, "not all of them 0"),
    (TWO, None, {"damping": -1.0}, ValueError, "damping: expected a finite number"),
    (TWO, None, {"anchor": "maen"}, ValueError, "Did you mean 'mean'"),
    (TWO, None, {"x0": "zero"}, ValueError, "x0: expected one of"),
    (TWO, None, {"unmerged": "averge"}, ValueError, "Did you mean 'average'"),
    (TWO, None, {"anchor": {"w": ONES["w"]}}, ValueError, "no tensor for the parameter 'b'"),
    (TWO, None, {"anchor": {**ONES, "b": torch.ones(3)}}, ValueError, r"'b': got \[3\], the models have \[2\]"),
    (TWO, None, {"normalize": True}, ValueError, "there are none: pass weights"),
    (TWO, [ONES, Products(torch.eye(8).double())], {"normalize": True}, ValueError, r"Pass weights=\[...\]"),
    (TWO, [ONES, Products(torch.eye(8).double())], {"floor": 0.1}, ValueError, "no diagonal. Use damping"),
    (TWO, [ONES, ONES], {"floor": -0.1}, ValueError, "floor: expected a finite number"),
    (TWO, [ONES, ONES], {"solver": lambda A: 3}, TypeError, "solver: expected a function of an operator"),
    (
        [{"w": torch.tensor([6e4]).half()}, {"w": torch.tensor([6e4]).half()}],
        None,
        {"anchor": {"w": torch.tensor([1e6])}, "damping": 1.0},
        ValueError,
        "The merged 'w' is not finite in torch.float16",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: re.sub(r"\W+", " ", case[4])[:40])
def test_refused(case: Any) -> None:
    models, fishers, options, error, message = case
    with pytest.raises(error, match=message):
        merge(models, fishers, **options)
