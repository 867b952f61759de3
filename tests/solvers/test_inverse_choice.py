"""The inverse that chooses its method: which one, equal to the dense inverse, verified, and what it refuses."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from curvlinops import (
    BlockDiagonal,
    ConvergenceWarning,
    Diagonal,
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    InverseLinearOperator,
    LinearOperator,
    LowRankLinearOperator,
    TensorLinearOperator,
)
from tests.solvers.spd_problems import CountingMatrix, noise, relative_residual, spd_matrix, with_eigenvalues

pytestmark = pytest.mark.filterwarnings("error::curvlinops.ConvergenceWarning")

NAN = float("nan")
CLOSED, BLOCKS, CG, MINRES = "closed form", "block by block", "conjugate gradients", "MINRES"


def network() -> tuple[Any, ...]:
    """Model, loss, parameters and data."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(noise(*p.shape, seed=number))
    data = [(noise(6, 3, seed=7), noise(6, 2, seed=8)), (noise(4, 3, seed=9), noise(4, 2, seed=10))]
    return model, nn.MSELoss(), dict(model.named_parameters()), data


def on_network(kind: type[LinearOperator], **options: Any) -> Any:
    return kind(*network(), check_deterministic=False, **options)


def low_rank(c: float) -> LowRankLinearOperator:
    return LowRankLinearOperator(TensorLinearOperator(noise(7, 3, seed=1)), c=c)


def dense(size: int = 5, seed: int = 0) -> TensorLinearOperator:
    return TensorLinearOperator(spd_matrix(size, 10.0, seed))


def indefinite() -> CountingMatrix:
    return CountingMatrix(with_eigenvalues(torch.tensor([-2.0, -1.0, 1.0, 2.0, 3.0]).double()))


CASES: dict[str, tuple[Any, str]] = {
    "diagonal": (lambda: Diagonal(torch.tensor([1.0, -2.0, 4.0]).double()), CLOSED),
    "identity": (lambda: 3 * IdentityLinearOperator([(2, 2)], "cpu", torch.float64), CLOSED),
    "dense": (dense, CLOSED),
    "dense indefinite": (lambda: TensorLinearOperator(indefinite().matrix), CLOSED),
    "dense damped": (lambda: dense().damped(0.5), CLOSED),
    "dense scaled": (lambda: -3 * dense(), CLOSED),
    "dense summed": (lambda: dense() + dense(seed=1), CLOSED),
    "low rank": (lambda: low_rank(0.5), CLOSED),
    "low rank damped": (lambda: 2 * low_rank(0.0).damped(0.1), CLOSED),
    "blocks": (lambda: BlockDiagonal([dense(), Diagonal(torch.full((2,), 3.0).double())]), CLOSED),
    "blocks of blocks": (lambda: BlockDiagonal([BlockDiagonal([dense(), dense(3)]), dense(2)]), CLOSED),
    "blocks with an open one": (lambda: BlockDiagonal([dense(), indefinite()]), BLOCKS),
    "blocks of definite curvature": (
        lambda: BlockDiagonal([on_network(GGNLinearOperator).damped(0.1), on_network(GGNLinearOperator).damped(1.0)]),
        BLOCKS,
    ),
    "matrix without a closed form": (indefinite, MINRES),
    "scaled": (lambda: -2 * indefinite(), MINRES),
    "summed": (lambda: indefinite() + dense(), MINRES),
    "GGN damped": (lambda: on_network(GGNLinearOperator).damped(0.1), CG),
    "GGN with ridge": (lambda: on_network(GGNLinearOperator, l2=0.1), CG),
    "GGN scaled and damped": (lambda: (3 * on_network(GGNLinearOperator)).damped(0.1), CG),
    "GGN damped and scaled": (lambda: 3 * on_network(GGNLinearOperator).damped(0.1), CG),
    "GGN damped twice": (lambda: on_network(GGNLinearOperator).damped(0.1).damped(0.2), CG),
    "GGN damped, made negative": (lambda: -1 * on_network(GGNLinearOperator).damped(0.1), MINRES),
    "GGN damped by a negative number": (lambda: on_network(GGNLinearOperator).damped(-0.01), MINRES),
    "sum of a GGN and a Fisher, damped": (
        lambda: on_network(GGNLinearOperator) + on_network(FisherMCLinearOperator).damped(0.1),
        CG,
    ),
    "empirical Fisher damped": (lambda: on_network(EFLinearOperator).damped(0.1), CG),
    "block of a damped GGN": (lambda: on_network(GGNLinearOperator).damped(0.1).block("0.*"), CG),
    "Hessian": (lambda: on_network(HessianLinearOperator), MINRES),
    "Hessian damped": (lambda: on_network(HessianLinearOperator).damped(0.1), MINRES),
    "block of a Hessian": (lambda: on_network(HessianLinearOperator).damped(0.3).block("2.*"), MINRES),
}


@pytest.mark.parametrize("name", CASES)
def test_method_and_equality_with_the_dense_inverse(name: str) -> None:
    build, method = CASES[name]
    A = build()
    inverse = InverseLinearOperator(A, max_iter=4000)
    assert inverse.method == method and method in repr(inverse)
    M = A.to_dense()
    B = noise(len(M), 3, seed=5)
    X = inverse @ B
    info = inverse.info
    assert info is not None and info.converged.all()
    torch.testing.assert_close(M @ X, B, rtol=1e-6, atol=1e-6)
    condition = torch.linalg.cond(M).item()
    truth = torch.linalg.solve(M, B)
    assert (X - truth).norm() <= 2e-8 * condition * truth.norm()
    torch.testing.assert_close(info.residual_norm, relative_residual(M, X, B), rtol=1e-2, atol=1e-12 * condition)
    assert (info.num_iterations == 0).all() == (method == CLOSED)
    assert inverse.SELF_ADJOINT and inverse.H is inverse and inverse.POSITIVE_SEMIDEFINITE == A.POSITIVE_SEMIDEFINITE


def test_undamped_ggn_is_solved_as_far_as_it_goes() -> None:
    """It may be singular, and here it is: what lies in its range is solved, the rest warns."""
    G = on_network(GGNLinearOperator)
    inverse = InverseLinearOperator(G)
    assert inverse.method == MINRES
    M = G.to_dense()
    b = M @ noise(len(M), seed=1)
    loose = InverseLinearOperator(G, rtol=1e-5)
    assert relative_residual(M, (loose @ b)[:, None], b[:, None]).item() <= 1e-5
    with pytest.warns(ConvergenceWarning, match="singular"):
        inverse @ noise(len(M), seed=1)
    assert inverse.info is not None and not inverse.info.converged.any()


def test_ridge_of_zero_promises_nothing() -> None:
    assert InverseLinearOperator(on_network(GGNLinearOperator, l2=0.0)).method == MINRES
    assert InverseLinearOperator(on_network(GGNLinearOperator).damped(0.0)).method == MINRES


# -- closed forms ------------------------------------------------------------------------------------------------------


def test_closed_forms_are_verified() -> None:
    inverse = InverseLinearOperator(dense(6))
    B = noise(6, 2)
    X = inverse @ B
    info = inverse.info
    assert info is not None and info.num_matvecs == 2 and info.history.shape == (1, 2)
    torch.testing.assert_close(info.residual_norm, relative_residual(dense(6).to_dense(), X, B), rtol=0.5, atol=1e-15)
    zero = InverseLinearOperator(dense(6)) @ torch.zeros(6, 1).double()
    assert zero.abs().max() == 0


@pytest.mark.parametrize("kind", ["low rank", "dense"])
def test_bad_residual_of_a_closed_form_warns(kind: str) -> None:
    """In float32 not every residual is within reach, and a closed form does not know."""
    A: LinearOperator
    if kind == "low rank":
        A = LowRankLinearOperator(TensorLinearOperator(noise(30, 3, seed=1, dtype=torch.float32)), c=1e-5)
    else:
        A = TensorLinearOperator(spd_matrix(30, 1e6, 1, torch.float32))
    b = noise(30, seed=2, dtype=torch.float32)
    inverse = InverseLinearOperator(A)
    with pytest.warns(ConvergenceWarning, match=r"closed form.*float32.*1e-05") as caught:
        x = inverse @ b
    assert len(caught) == 1 and inverse.info is not None and not inverse.info.converged.any()
    true = relative_residual(A.to_dense(), x[:, None], b[:, None])
    assert 0.2 <= (inverse.info.residual_norm.double() / true).item() <= 5, "rounding is all there is to measure"
    InverseLinearOperator(A, rtol=0.9) @ b


@pytest.mark.parametrize("kind", ["diagonal", "dense", "low rank", "blocks"])
def test_singular_closed_forms_raise(kind: str) -> None:
    singular = torch.tensor([1.0, 0.0]).double()
    A: LinearOperator = {
        "diagonal": Diagonal(singular),
        "dense": TensorLinearOperator(torch.diag(singular)),
        "low rank": LowRankLinearOperator(TensorLinearOperator(torch.ones(2, 1).double())),
        "blocks": BlockDiagonal([Diagonal(singular), dense(2)]),
    }[kind]
    with pytest.raises((ValueError, torch.linalg.LinAlgError), match=r"singular|inverse does not exist|no inverse"):
        InverseLinearOperator(A) @ torch.ones(A.shape[0]).double()


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_closed_form_of_what_is_not_finite_is_never_converged(value: float) -> None:
    inverse = InverseLinearOperator(Diagonal(torch.tensor([1.0, value])))
    with pytest.warns(ConvergenceWarning):
        inverse @ torch.ones(2)
    assert inverse.info is not None and not inverse.info.converged.any()
    good = InverseLinearOperator(Diagonal(torch.tensor([1.0, 2.0])))
    with pytest.warns(ConvergenceWarning):
        good @ torch.tensor([1.0, value])
    assert good.info is not None and not good.info.converged.any()


def test_closed_form_follows_the_entries_it_was_given() -> None:
    entries = torch.tensor([1.0, 2.0])
    inverse = InverseLinearOperator(Diagonal(entries))
    frozen = inverse.frozen()
    assert (inverse @ torch.ones(2)).tolist() == [1.0, 0.5]
    entries.mul_(2)
    assert (inverse @ torch.ones(2)).tolist() == [0.5, 0.25]
    assert (frozen @ torch.ones(2)).tolist() == [1.0, 0.5] and frozen.frozen() is frozen


def test_closed_form_that_nobody_else_holds_is_computed_once() -> None:
    calls = 0

    class Counted(TensorLinearOperator):
        def inverse(self, damping: float = 0.0) -> TensorLinearOperator:
            nonlocal calls
            calls += 1
            return super().inverse(damping)

    A = Counted(spd_matrix(4, 10.0))
    A._owns_matrix = True
    inverse = InverseLinearOperator(A)
    inverse @ noise(4)
    inverse @ noise(4, 2)
    assert calls == 1


# -- options -----------------------------------------------------------------------------------------------------------


def test_options_reach_the_method() -> None:
    M = indefinite().matrix
    A, seen = CountingMatrix(M), []
    P = Diagonal(torch.full((5,), 2.0).double())
    b = noise(5, seed=1)
    x0 = torch.linalg.solve(M, b) + 1e-3 * noise(5, seed=2)
    inverse = InverseLinearOperator(A, 1e-3, 3, P, x0, callback=seen.append, max_matvecs=50, max_seconds=1e3)
    x = inverse @ b
    assert relative_residual(M, x[:, None], b[:, None]).item() <= 1e-3
    assert inverse.info is not None and len(seen) == inverse.info.num_iterations.item() <= 3
    limited = InverseLinearOperator(CountingMatrix(M), max_iter=2)
    with pytest.warns(ConvergenceWarning):
        limited @ b
    warm = InverseLinearOperator(CountingMatrix(M), warm_start=True)
    warm @ b
    warm @ b
    assert warm.info is not None and warm.info.num_iterations.item() == 0


@pytest.mark.parametrize("A", [Diagonal(torch.ones(4)), CountingMatrix(torch.eye(4))])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, "rtol"),
        ({"rtol": NAN}, "rtol"),
        ({"max_iter": 0}, "max_iter"),
        ({"max_matvecs": 0}, "max_matvecs"),
        ({"preconditioner": TensorLinearOperator(torch.eye(3))}, "preconditioner"),
    ],
)
def test_options_out_of_range_are_refused(A: LinearOperator, options: dict[str, Any], message: str) -> None:
    """Also where a closed form has no use for them."""
    with pytest.raises(ValueError, match=message):
        InverseLinearOperator(A, **options)


def test_what_is_not_symmetric_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"self-adjoint.*A\.H @ A.*LSMRInverseLinearOperator"):
        InverseLinearOperator(TensorLinearOperator(noise(3, 3)))
    with pytest.raises(ValueError, match="square"):
        InverseLinearOperator(TensorLinearOperator(noise(3, 4)))
    with pytest.raises(TypeError, match="linear operator, got Tensor"):
        InverseLinearOperator(torch.eye(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Did you mean 'rtol'"):
        InverseLinearOperator(Diagonal(torch.ones(2)), rtoll=1e-3)  # type: ignore[call-arg]


# -- as an operator ----------------------------------------------------------------------------------------------------


def test_formats_scipy_and_pickles() -> None:
    w, b = torch.tensor([[1.0, 2.0]]), torch.tensor([4.0])
    for A in (Diagonal({"w": w, "b": b}), CountingMatrix(torch.diag(torch.cat([w.flatten(), b])))):
        inverse = InverseLinearOperator(A)
        assert (inverse @ torch.ones(3)).tolist() == pytest.approx([1.0, 0.5, 0.25])
        assert (inverse @ torch.zeros(3, 0)).shape == (3, 0)
        assert (torch.ones(2, 3) @ inverse).shape == (2, 3)
        np.testing.assert_allclose(inverse.to_scipy().matvec(np.ones(3, np.float32)), [1.0, 0.5, 0.25], rtol=1e-5)
        copy = pickle.loads(pickle.dumps(inverse))
        assert torch.equal(copy @ torch.ones(3), inverse @ torch.ones(3)) and copy.method == inverse.method
    answer = InverseLinearOperator(Diagonal({"w": w, "b": b})) @ {"w": torch.ones(1, 2), "b": torch.ones(1)}
    assert answer["w"].tolist() == [[1.0, 0.5]] and answer["b"].tolist() == [0.25]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    M = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=dtype))
    for A in (TensorLinearOperator(M), CountingMatrix(M)):
        X: Tensor = InverseLinearOperator(A, rtol=0.05) @ torch.ones(3, 2, dtype=dtype)
        assert X.dtype == dtype and (X[:, 0].float() - torch.tensor([1.0, 0.5, 0.25])).abs().max() <= 0.02


def test_live_operators_follow_their_parameters() -> None:
    model, loss, params, data = network()
    G = GGNLinearOperator(model, loss, params, data, check_deterministic=False)
    inverse, b = InverseLinearOperator(G.damped(0.1)), noise(G.shape[0], seed=9)
    frozen, first = inverse.frozen(), inverse @ b
    with torch.no_grad():
        for p in params.values():
            p.mul_(1.5)
    second = inverse @ b
    assert relative_residual(G.damped(0.1).to_dense(), second[:, None], b[:, None]).item() <= 1.1e-8
    assert (second - first).norm() > 0.1 * first.norm()
    assert torch.equal(frozen @ b, first) or (frozen @ b - first).norm() <= 1e-7 * first.norm()
    assert frozen.method == inverse.method == CG
