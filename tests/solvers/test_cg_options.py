"""The options of the inverse by conjugate gradients: spellings, defaults, ranges, and what is refused."""

import inspect
from typing import Any

import pytest
import torch

from curvlinops import CGInverseLinearOperator, ConvergenceWarning, Diagonal, TensorLinearOperator
from tests.solvers.spd_problems import noise, relative_residual, spd_matrix

pytestmark = pytest.mark.filterwarnings("error::curvlinops.ConvergenceWarning")


def test_set_cg_hyperparameters() -> None:
    M, b = spd_matrix(30, 1e3, 1), noise(30, seed=2)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M))
    for name in ("rtol", "tolerance"):
        inverse.set_cg_hyperparameters(**{name: 1e-2})
        residual = relative_residual(M, (inverse @ b)[:, None], b[:, None]).item()
        assert 1e-5 < residual <= 1e-2
        assert torch.equal(inverse @ b, CGInverseLinearOperator(TensorLinearOperator(M), **{name: 1e-2}) @ b)
    inverse.set_cg_hyperparameters(rtol=1e-10)
    assert relative_residual(M, (inverse @ b)[:, None], b[:, None]).item() <= 1e-10
    inverse.set_cg_hyperparameters(max_iter=2)
    with pytest.warns(ConvergenceWarning):
        inverse @ b
    assert inverse.info is not None and inverse.info.num_iterations.item() == 2
    inverse.set_cg_hyperparameters()
    assert relative_residual(M, (inverse @ b)[:, None], b[:, None]).item() <= 1e-8


def test_constructor_and_setter_take_the_same_options() -> None:
    names = list(inspect.signature(CGInverseLinearOperator).parameters)
    assert names[0] == "A"
    setter = list(inspect.signature(CGInverseLinearOperator.set_cg_hyperparameters).parameters)
    assert setter[1:] == names[1:]
    for name in ("rtol", "tolerance", "max_iter", "preconditioner", "x0", "eps", "max_tridiag_iter", "on_breakdown"):
        assert name in names


def test_options_without_effect_are_accepted_and_documented() -> None:
    M, b = spd_matrix(10, 10.0), noise(10)
    A = TensorLinearOperator(M)
    plain = CGInverseLinearOperator(A) @ b
    inverse = CGInverseLinearOperator(A, eps=1e3, max_tridiag_iter=0)
    assert torch.equal(inverse @ b, plain)
    inverse.set_cg_hyperparameters(eps=1e3, max_tridiag_iter=0)
    assert torch.equal(inverse @ b, plain)
    text = inspect.getdoc(CGInverseLinearOperator) or ""
    for name in ("eps", "max_tridiag_iter"):
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{name}:"))
        assert "no effect" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 1e-3, "tolerance": 1e-3}, "rtol.*tolerance"),
        ({"rtol": -1e-3}, "rtol"),
        ({"rtol": float("nan")}, "rtol"),
        ({"rtol": 1.0}, "rtol"),
        ({"max_iter": 0}, "max_iter"),
        ({"on_breakdown": "ignore"}, "on_breakdown.*'ignore'"),
        ({"preconditioner": TensorLinearOperator(torch.eye(3))}, r"preconditioner.*\(4, 4\).*\(3, 3\)"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    A = Diagonal(torch.ones(4))
    with pytest.raises((TypeError, ValueError), match=message):
        CGInverseLinearOperator(A, **options)
    inverse = CGInverseLinearOperator(A)
    with pytest.raises((TypeError, ValueError), match=message):
        inverse.set_cg_hyperparameters(**options)


def test_refused_options_change_nothing() -> None:
    M, b = spd_matrix(30, 1e3, 1), noise(30, seed=2)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M))
    before = inverse @ b
    with pytest.raises(ValueError):
        inverse.set_cg_hyperparameters(rtol=1e-1, max_iter=-1)
    assert torch.equal(inverse @ b, before)


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="operator"):
        CGInverseLinearOperator(torch.eye(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="square"):
        CGInverseLinearOperator(TensorLinearOperator(noise(3, 4)))
    with pytest.raises(ValueError, match="self-adjoint"):
        CGInverseLinearOperator(TensorLinearOperator(noise(3, 3)))
    with pytest.raises(TypeError, match="preconditioner"):
        CGInverseLinearOperator(Diagonal(torch.ones(3)), preconditioner=torch.eye(3))  # type: ignore[arg-type]
    bad = CGInverseLinearOperator(Diagonal(torch.ones(3)), preconditioner=lambda R: R[:2])
    with pytest.raises(ValueError, match=r"preconditioner.*\[3, 1\].*\[2, 1\]"):
        bad @ torch.ones(3)
