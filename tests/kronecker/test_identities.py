"""What theory promises of the Kronecker family: where it is exact, what is nearer, how samples and inverses behave."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlinops import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator
from tests.kronecker.cases import (
    APPROXIMATIONS,
    TABLE,
    build,
    error,
    keywords_of,
    made,
    options_of,
    oracle_of,
    problem_of,
)  # fmt: skip
from tests.kronecker.oracle import KroneckerOracle, kron
from tests.problems import Instance
from tests.problems.table import ids, listed, named, real

EXACT = 1e-9

Build = Callable[[], Instance]


def per_parameter(matrix: Tensor, sizes: list[int]) -> Tensor:
    """Keep the blocks of groups of consecutive parameters."""
    mask = torch.block_diag(*[torch.ones(n, n, dtype=matrix.dtype) for n in sizes])
    return matrix * mask


def sizes_of(instance: Instance, separate: bool) -> list[int]:
    """Return the sizes of the blocks: each parameter alone, or each layer's weight with its bias."""
    if separate:
        return [p.numel() for p in instance.tensors]
    model = instance.forward or instance.model
    layers = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    return [n for n in layers if n]


def check_exact(cls: type, make: Build, sizes: tuple[int, ...] | None, separate: bool, **options: Any) -> None:
    """Compare an operator with the blocks of the dense GGN."""
    instance = made(make, sizes)
    truth = per_parameter(made(make, sizes).oracle().ggn, sizes_of(instance, separate))
    K = build(cls, instance, fisher_type="type-2", separate_weight_and_bias=separate, **options)
    assert error(K.to_dense(), truth) < EXACT


# -- where the factors are exact ---------------------------------------------------------------------------------------


def one_datum(loss: nn.Module) -> Instance:
    """One linear layer and one datum."""
    model = nn.Linear(4, 3).double()
    y = ids(3, 1) if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(1, 3).double()
    return Instance(model, loss, named(model), real(1, 4), y)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.MSELoss(),
        nn.BCEWithLogitsLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64), reduction="sum"),
        nn.MSELoss(reduction="sum"),
        nn.BCEWithLogitsLoss(reduction="sum", weight=torch.tensor(0.6, dtype=torch.float64)),
    ],
    ids=str,
)
def test_one_datum_through_one_layer(loss: nn.Module, cls: type, approx: str, separate: bool) -> None:
    check_exact(cls, partial(one_datum, loss), None, separate, kfac_approx=approx)


def deep_linear(reduction: str) -> Instance:
    """Linear layers without anything in between."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)).double()
    return Instance(model, nn.MSELoss(reduction=reduction), listed(model), real(9, 4), real(9, 2))


def regression(outputs: int) -> Instance:
    """A single layer with as many outputs, and data to spare."""
    model = nn.Linear(4, outputs).double()
    return Instance(model, nn.MSELoss(), named(model), real(7, 4), real(7, outputs))


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("sizes", [(9,), (4, 1, 4), (1,) * 9])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_deep_linear_network(reduction: str, sizes: tuple[int, ...], cls: type, approx: str, separate: bool) -> None:
    check_exact(cls, partial(deep_linear, reduction), sizes, separate, kfac_approx=approx)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("outputs", [1, 3])
def test_one_layer_with_squared_error(outputs: int, cls: type, separate: bool) -> None:
    check_exact(cls, partial(regression, outputs), (3, 4), separate)


class Pooled(nn.Module):
    """Linear layers at each position, and their mean."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.pool = pool
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, X: Tensor) -> Tensor:
        h = self.second(self.first(X))
        return h.mean(1) if self.pool else h


def shared(pool: bool) -> Instance:
    """Weight sharing over five positions, with one prediction a position or one for all."""
    model = Pooled(pool).double()
    return Instance(model, nn.MSELoss(), listed(model), real(6, 5, 3), real(6, 2) if pool else real(6, 5, 2))


def convolutional(dim: int, **options: Any) -> Instance:
    """Deep linear convolutions, pooled: what comes back is the same at all positions."""
    kinds, size = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (6, 5, 4)[dim - 1]
    model = nn.Sequential(
        kinds[dim - 1](2, 4, 3 if dim < 3 else 2, **options), kinds[dim - 1](4, 3, 1), PlainAverage(), nn.Linear(3, 2)
    ).double()
    return Instance(model, nn.MSELoss(), listed(model), real(6, 2, *(size,) * dim), real(6, 2))


class PlainAverage(nn.Module):
    """The mean over all positions."""

    def forward(self, X: Tensor) -> Tensor:
        return X.flatten(2).mean(2)


CONVOLUTIONS = [
    (1, {}),
    (1, {"stride": 2, "padding": 1}),
    (2, {"padding": 1, "dilation": 2}),
    (2, {"stride": 2, "groups": 2}),
    (3, {"bias": False}),
]


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("sizes", [(6,), (1, 3, 2)])
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_expand_is_exact_for_a_prediction_at_each_position(cls: type, sizes: tuple[int, ...], separate: bool) -> None:
    check_exact(cls, partial(shared, False), sizes, separate, kfac_approx="expand")


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("sizes", [(6,), (1, 3, 2)])
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_reduce_is_exact_after_pooling(cls: type, sizes: tuple[int, ...], separate: bool) -> None:
    check_exact(cls, partial(shared, True), sizes, separate, kfac_approx="reduce")


@pytest.mark.parametrize(("dim", "options"), CONVOLUTIONS)
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_reduce_is_exact_for_pooled_convolutions(cls: type, dim: int, options: dict[str, Any]) -> None:
    """A weight with groups is one block a group; the GGN between groups is not part of it."""
    instance = made(partial(convolutional, dim, **options), (2, 4))
    groups = instance.model[0].groups
    whole = [p.numel() for p in instance.tensors]
    sizes = [whole[0] // groups] * groups + whole[1:]
    truth = per_parameter(instance.oracle().ggn, sizes)
    K = build(cls, made(partial(convolutional, dim, **options), (2, 4)), fisher_type="type-2", kfac_approx="reduce")
    assert error(K.to_dense(), truth) < EXACT


@pytest.mark.parametrize("dim", [1, 2])
def test_reduce_is_exact_for_pooled_convolutions_with_joint_bias(dim: int) -> None:
    check_exact(KFACLinearOperator, partial(convolutional, dim), (5, 1), False, kfac_approx="reduce")


def test_the_other_approximation_is_not_exact() -> None:
    """The identities above tell the two apart."""
    for pool, approx in ((False, "reduce"), (True, "expand")):
        instance = made(partial(shared, pool))
        truth = per_parameter(made(partial(shared, pool)).oracle().ggn, sizes_of(instance, True))
        K = build(KFACLinearOperator, instance, fisher_type="type-2", kfac_approx=approx)
        assert error(K.to_dense(), truth) > 1e-2


# -- what is nearer to the matrix of the same kind ---------------------------------------------------------------------


@pytest.mark.parametrize(("fisher", "separate"), [("type-2", True), ("mc", False), ("empirical", True)])
@pytest.mark.parametrize("name", list(TABLE))
def test_corrected_and_nearest_never_lose(name: str, fisher: str, separate: bool) -> None:
    """Block by block, with the same draws and gradients; KFOC against both kinds of KFAC."""
    instance, blocks = problem_of(name).make(), oracle_of(name).blocks(**options_of(fisher, "expand", separate))

    def errors(cls: type, approx: str | None) -> list[float]:
        K = build(cls, instance, **keywords_of(fisher, approx, separate)).to_dense()
        at = [(block, places, g) for block in blocks for g, places in enumerate(block.index.flatten(1))]
        return [((K[p[:, None], p] - b.truth[g]).norm() / b.truth[g].norm().clamp_min(1e-12)).item() for b, p, g in at]

    nearest = errors(KFOCLinearOperator, None)
    for approx in APPROXIMATIONS:
        plain, corrected = errors(KFACLinearOperator, approx), errors(EKFACLinearOperator, approx)
        assert all(e <= k + 1e-10 for e, k in zip(corrected, plain, strict=True)), (corrected, plain)
        assert all(o <= k + 1e-10 for o, k in zip(nearest, plain, strict=True)), (nearest, plain)


# -- without gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_forward_only_is_the_gram_matrix_of_model_merging(reduction: str) -> None:
    """RegMean (Jin et al., 2023): X_lᵀ X_l of each layer's inputs for each output, no gradient anywhere."""
    instance = made(partial(deep_linear, reduction), (4, 5))
    X, denominator = instance.X, 9 * 2 if reduction == "mean" else 1
    K = build(KFACLinearOperator, instance, fisher_type="forward-only").to_dense()
    start = 0
    for layer in instance.model:
        R, S = layer.weight.shape
        block = K[start : start + R * S, start : start + R * S]
        assert error(block, kron(torch.eye(R, dtype=torch.float64), X.T @ X / denominator)) < EXACT
        bias = K[start + R * S : start + R * S + R, start + R * S : start + R * S + R]
        assert error(bias, torch.eye(R, dtype=torch.float64) * 9 / denominator) < EXACT
        start, X = start + R * S + R, layer(X).detach()


class TimeFirst(nn.Module):
    """A layer that runs time first, and a head; which rows are whose shows in the gradients only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, X: Tensor) -> Tensor:
        return self.second(self.first(X.transpose(0, 1)).relu()).transpose(0, 1)


def flat_at_first(zero_head: bool) -> Instance:
    """No gradient comes back to the first layer: from the head, or from data for which no unit is active."""
    model = TimeFirst().double()
    X, y = real(8, 3, 2), real(8, 3, 2)
    with torch.no_grad():
        if zero_head:
            model.second.weight.zero_()
        else:
            X[:4, :, 0], X[4:, :, 0] = X[:4, :, 0].abs() * -1 - 0.5, X[4:, :, 0].abs() + 0.5
            model.first.weight[:, 0] = 20.0
    return Instance(model, nn.MSELoss(reduction="sum"), named(model), X, y)


@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize("sizes", [(8,), (4, 4), (3, 1, 4)])
@pytest.mark.parametrize("fisher", ["forward-only", "type-2"])
@pytest.mark.parametrize("zero_head", [True, False])
def test_inputs_count_where_no_gradient_comes_back(
    zero_head: bool, fisher: str, sizes: tuple[int, ...], approx: str
) -> None:
    """Where it cannot be known which rows are whose, an error is right, and another number is not."""
    make = partial(flat_at_first, zero_head)
    expected = KroneckerOracle(made(make)).matrix("kfac", fisher=fisher, approx=approx)
    try:
        K = build(KFACLinearOperator, made(make, sizes), fisher_type=fisher, kfac_approx=approx).to_dense()
    except (NotImplementedError, RuntimeError, ValueError):
        assert fisher == "forward-only" or approx == "reduce"  # else, all positions count alike
        return
    assert error(K, expected) < EXACT


# -- samples -----------------------------------------------------------------------------------------------------------


def sampled(loss: nn.Module) -> Instance:
    """A small network on few data."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    y = ids(3, 4) if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(4, 3).double()
    return Instance(model, loss, named(model), real(4, 3), y)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()], ids=str)
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
def test_samples_converge_at_the_rate_of_monte_carlo(cls: type, loss: nn.Module) -> None:
    """The error falls as 1 / √M, from one sample to a thousand."""
    instance = made(partial(sampled, loss))
    exact = build(cls, instance, fisher_type="type-2").to_dense()
    counts, seeds = (1, 10, 100, 1000), range(2 if cls is KFOCLinearOperator else 4)
    logs = []
    for M in counts:
        runs = [build(cls, instance, fisher_type="mc", mc_samples=M, seed=s).to_dense() for s in seeds]
        logs.append(torch.stack([(K - exact).square().sum() for K in runs]).mean().sqrt().log())
    x, y = torch.tensor(counts, dtype=torch.float64).log(), torch.stack(logs)
    slope = (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
    assert -0.65 < slope < -0.35
    assert logs[-1].exp() < 0.15 * exact.norm()


# -- inverses ----------------------------------------------------------------------------------------------------------

INVERTED = ["kf-linear-ce", "kf-conv2d", "kf-embedding-padding", "kf-attention", "kf-norms", "kf-lstm"]


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("name", INVERTED)
@pytest.mark.parametrize("cls", [KFACLinearOperator, KFOCLinearOperator])
def test_inverse_with_exact_damping(cls: type, name: str, separate: bool) -> None:
    K = build(cls, problem_of(name).make(), fisher_type="empirical", separate_weight_and_bias=separate)
    damped = K.to_dense() + 0.1 * torch.eye(len(K.to_dense()), dtype=torch.float64)
    identity = torch.eye(len(damped), dtype=torch.float64)
    assert error(K.inverse(0.1, use_exact_damping=True).to_dense() @ damped, identity) < EXACT
    assert error(K.damped(0.1).inverse().to_dense() @ damped, identity) < EXACT
    assert error(K.damped(0.1).to_dense(), damped) < EXACT


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("name", INVERTED)
def test_inverse_of_corrected_factors_is_always_exact(name: str, separate: bool) -> None:
    K = build(EKFACLinearOperator, problem_of(name).make(), fisher_type="mc", separate_weight_and_bias=separate)
    damped = K.to_dense() + 0.1 * torch.eye(len(K.to_dense()), dtype=torch.float64)
    identity = torch.eye(len(damped), dtype=torch.float64)
    assert error(K.inverse(0.1).to_dense() @ damped, identity) < EXACT
    assert error(K.damped(0.1).inverse().to_dense() @ damped, identity) < EXACT


@pytest.mark.parametrize("name", ["kf-linear-ce", "kf-norms"])
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
def test_pseudo_inverse(cls: type, name: str) -> None:
    """Of a matrix that is singular: softmax does not see a common shift of its inputs."""
    K = build(cls, problem_of(name).make(), fisher_type="type-2")
    truth = torch.linalg.pinv(K.to_dense(), hermitian=True, rtol=1e-9)
    assert error(K.pinv().to_dense(), truth) < 1e-6
    assert error(K.to_block_diagonal().to_dense(), K.to_dense()) < EXACT


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("heuristic", [False, True])
@pytest.mark.parametrize("name", INVERTED)
def test_inverse_with_damped_factors(name: str, heuristic: bool, separate: bool) -> None:
    """(B + δ)⁻¹ ⊗ (A + δ)⁻¹, or √δ weighed by the factors' average eigenvalues (Martens and Grosse, 2015, 6.3)."""
    oracle, damping = oracle_of(name), 0.05
    options = {"fisher_type": "empirical", "separate_weight_and_bias": separate}
    K = build(KFACLinearOperator, problem_of(name).make(), **options)
    actual = K.inverse(damping, use_heuristic_damping=heuristic).to_dense()
    expected = torch.zeros_like(actual)
    for block in oracle.blocks(fisher="empirical", separate=separate):
        for g, at in enumerate(block.index.flatten(1)):
            if block.left is None or block.right is None:
                exact = block.matrices("kfac")[g]
                expected[at[:, None], at] = (exact + damping * torch.eye(len(at)).to(exact)).inverse()
                continue
            L, R = block.left[g], block.right[g]
            eyes = torch.eye(len(L)).to(L), torch.eye(len(R)).to(R)
            deltas = (damping, damping)
            if heuristic:
                pi = (L.trace() / len(L) / (R.trace() / len(R))).sqrt().item()
                deltas = (pi * damping**0.5, damping**0.5 / pi)
            inverses = [(M + d * eye).inverse() for M, d, eye in zip((L, R), deltas, eyes, strict=True)]
            expected[at[:, None], at] = kron(*inverses)
    assert error(actual, expected) < EXACT


def test_heuristic_damping_has_a_floor() -> None:
    oracle = oracle_of("kf-linear-ce")
    K = build(KFACLinearOperator, problem_of("kf-linear-ce").make(), fisher_type="type-2")
    (weight, bias) = oracle.blocks()
    assert weight.left is not None and weight.right is not None
    eye = torch.eye(3, dtype=torch.float64)
    inverse = K.inverse(1e-12, use_heuristic_damping=True, min_damping=0.3).to_dense()
    expected = kron((weight.left[0] + 0.3 * eye).inverse(), (weight.right[0] + 0.3 * eye).inverse())
    assert error(inverse[:9, :9], expected) < EXACT
    assert bias.left is None


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_singular_without_damping_is_an_error(cls: type) -> None:
    """Softmax curvature sends the constant vector to zero."""
    K = build(cls, problem_of("kf-linear-ce").make(), fisher_type="type-2")
    with pytest.raises(ValueError, match="damping"):
        K.inverse()


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
def test_one_damping_a_block(cls: type) -> None:
    """Exact damping by a number for each block, in the order of the operator's blocks."""
    K = build(cls, made(partial(regression, 3)), fisher_type="type-2")
    exact = {} if cls is EKFACLinearOperator else {"use_exact_damping": True}
    dense = K.to_dense()
    dense[:12, :12] += 0.2 * torch.eye(12, dtype=torch.float64)
    dense[12:, 12:] += 0.7 * torch.eye(3, dtype=torch.float64)
    assert error(K.inverse([0.2, 0.7], **exact).to_dense() @ dense, torch.eye(15, dtype=torch.float64)) < EXACT


# -- roots and samples of the Gaussian ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kf-linear-ce", "kf-conv2d", "kf-embedding", "kf-tied"])
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_root_times_its_adjoint_is_the_matrix(cls: type, name: str) -> None:
    K = build(cls, problem_of(name).make(), fisher_type="empirical")
    root = K.sqrt().to_dense()
    assert error(root @ root.T, K.to_dense()) < EXACT
