"""What bounds a solve and who hears of it: products, time, callbacks, progress bars, errors and Ctrl-C inside."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from curvlinops import (
    CGInverseLinearOperator,
    ConvergenceWarning,
    Diagonal,
    InverseLinearOperator,
    LSMRInverseLinearOperator,
    MINRESInverseLinearOperator,
    NeumannInverseLinearOperator,
    damping_path,
)
from tests.solvers.spd_problems import (
    CountingMatrix,
    noise,
    noting_warnings,
    relative_residual,
    spd_matrix,
    with_eigenvalues,
)

SIZE = 30
DEFINITE = spd_matrix(SIZE, 1e3, 1)
INDEFINITE = with_eigenvalues(torch.linspace(-1, 1, SIZE).double() + 0.013, 2)
TALL = noise(SIZE, 20, seed=3)

#: Each solver with a matrix that suits it.
SOLVERS: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "CG": (lambda A, **options: CGInverseLinearOperator(A, on_breakdown="stop", **options), DEFINITE),
    "MINRES": (MINRESInverseLinearOperator, INDEFINITE),
    "MINRES definite": (MINRESInverseLinearOperator, DEFINITE),
    "automatic": (InverseLinearOperator, INDEFINITE),
    "LSMR": (LSMRInverseLinearOperator, TALL),
    "Neumann": (NeumannInverseLinearOperator, DEFINITE),
}
every_solver = pytest.mark.parametrize("name", SOLVERS)


class InterruptedMatrix(CountingMatrix):
    """A matrix whose product of some number does not return."""

    def __init__(self, matrix: Tensor, number: int, error: BaseException) -> None:
        super().__init__(matrix)
        self.number, self.error, self.calls = number, error, 0

    def _multiplied(self, M: Tensor, X: Tensor) -> list[Tensor]:
        self.calls += 1
        if self.calls == self.number:
            raise self.error
        return super()._multiplied(M, X)


class SlowMatrix(CountingMatrix):
    """A matrix that takes its time."""

    def _multiplied(self, M: Tensor, X: Tensor) -> list[Tensor]:
        time.sleep(0.003)
        return super()._multiplied(M, X)


def check_bounded(inverse: Any, A: CountingMatrix, X: Tensor, max_matvecs: int) -> None:
    assert A.count <= max_matvecs, f"{A.count} products"
    assert inverse.info.num_matvecs == A.count and X.isfinite().all()


# -- products ----------------------------------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("K", [1, 16])
def test_products_are_never_more_than_allowed(name: str, K: int) -> None:
    build, M = SOLVERS[name]
    B = noise(SIZE, K, seed=4)
    ended = set()
    for max_matvecs in [1, 2, 3, 5, 8, 16, 17, 33, 51, 64, 100, 200, 800, 2500]:
        A = CountingMatrix(M)
        inverse = build(A, max_matvecs=max_matvecs)
        with noting_warnings() as messages:
            X = inverse @ B
        check_bounded(inverse, A, X, max_matvecs)
        info = inverse.info
        ended.add(info.ended_by)
        if name != "Neumann":
            assert len(messages) == int(not info.converged.all())
            assert info.converged.all() or info.ended_by == "max_matvecs"
            assert not messages or "max_matvecs" in messages[0]
        if name != "LSMR":
            true = relative_residual(M, X, B)
            torch.testing.assert_close(info.residual_norm, true, rtol=1e-4, atol=1e-9)
            assert (true[info.converged] <= 1e-8).all()
    assert ended == {None, "max_matvecs"}


@every_solver
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("max_matvecs", [1, 2, 5, 20])
def test_products_with_a_first_iterate(name: str, K: int, max_matvecs: int) -> None:
    """Its residual costs a product as well."""
    build, M = SOLVERS[name]
    A = CountingMatrix(M)
    inverse = build(A, max_matvecs=max_matvecs, x0=noise(A.shape[1], seed=5))
    with noting_warnings():
        X = inverse @ noise(SIZE, K, seed=4)
    check_bounded(inverse, A, X, max_matvecs)


@pytest.mark.parametrize("max_matvecs", [51, 52, 101, 152])
@pytest.mark.parametrize("K", [1, 2])
def test_products_of_intermediate_checks_are_counted(max_matvecs: int, K: int) -> None:
    """MINRES looks at true residuals now and then."""
    A = CountingMatrix(spd_matrix(80, 1e6, 1))
    inverse = MINRESInverseLinearOperator(A, max_matvecs=max_matvecs)
    with noting_warnings():
        X = inverse @ noise(80, K, seed=4)
    check_bounded(inverse, A, X, max_matvecs)


def test_closed_forms_keep_to_the_budget() -> None:
    inverse = InverseLinearOperator(Diagonal(torch.ones(4)), max_matvecs=2)
    with noting_warnings():
        inverse @ torch.ones(4, 5)
    assert inverse.info is not None and inverse.info.num_matvecs <= 2


def test_a_solve_that_was_not_begun_is_no_minimum() -> None:
    inverse = LSMRInverseLinearOperator(CountingMatrix(TALL), max_matvecs=1)
    with pytest.warns(ConvergenceWarning, match="max_matvecs"):
        assert (inverse @ noise(SIZE)).abs().max() == 0
    assert inverse.info is not None
    assert inverse.info.normal_residual.item() != 0, "zero would say that this is a minimum"


def test_each_solve_has_the_whole_budget() -> None:
    A = CountingMatrix(DEFINITE)
    inverse = CGInverseLinearOperator(A, rtol=1e-3, max_matvecs=60)
    for number in (1, 2, 3):
        inverse @ noise(SIZE, seed=number)
        assert inverse.info is not None and inverse.info.converged.all()
    assert A.count > 60


# -- time --------------------------------------------------------------------------------------------------------------


@every_solver
def test_time_ends_it(name: str) -> None:
    build, M = SOLVERS[name]
    inverse = build(SlowMatrix(M), max_seconds=0.01)
    with noting_warnings() as messages:
        X = inverse @ noise(SIZE, 3)
    info = inverse.info
    assert info.ended_by == "max_seconds" and not info.converged.any() and X.isfinite().all()
    assert info.seconds > 0.01 and info.num_matvecs < 60
    assert name == "Neumann" or "max_seconds" in messages[0]
    relaxed = build(CountingMatrix(M), max_seconds=1e6)
    with noting_warnings():
        relaxed @ noise(SIZE, 3)
    assert relaxed.info.ended_by is None


@pytest.mark.parametrize("name", ["max_matvecs", "max_seconds"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_bounds_out_of_range_are_refused(name: str, value: float) -> None:
    for build, M in SOLVERS.values():
        with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
            build(CountingMatrix(M), **{name: value})


@pytest.mark.parametrize(("name", "value"), [("max_seconds", "1"), ("max_matvecs", "1"), ("max_matvecs", 2.5)])
def test_bounds_of_a_wrong_kind_are_refused(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
        CGInverseLinearOperator(CountingMatrix(DEFINITE), **{name: value})


def test_integers_of_numpy_are_taken() -> None:
    A = CountingMatrix(DEFINITE)
    inverse = CGInverseLinearOperator(A, max_matvecs=np.int64(9))
    with pytest.warns(ConvergenceWarning, match="max_matvecs"):
        inverse @ noise(SIZE)
    assert A.count == 9


# -- callbacks and progress --------------------------------------------------------------------------------------------


@every_solver
def test_callback_sees_every_iteration(name: str) -> None:
    build, M = SOLVERS[name]
    seen: list[Any] = []
    inverse = build(CountingMatrix(M), callback=seen.append)
    with noting_warnings():
        inverse @ noise(SIZE, 3)
    info = inverse.info
    assert [progress.num_iterations for progress in seen] == list(range(1, len(seen) + 1))
    assert len(seen) >= info.num_iterations.max() > 5
    matvecs = [progress.num_matvecs for progress in seen]
    assert matvecs == sorted(matvecs) and matvecs[0] >= 3 and matvecs[-1] <= info.num_matvecs
    rows = info.history[-len(seen) :]
    for progress, row in zip(seen, rows, strict=True):
        assert torch.equal(progress.residual_norm, row) and row.shape == (3,)


def test_callback_may_write_to_what_it_is_told() -> None:
    def spoil(progress: Any) -> None:
        progress.residual_norm.zero_()

    B = noise(SIZE, 2)
    plain = CGInverseLinearOperator(CountingMatrix(DEFINITE))
    spoilt = CGInverseLinearOperator(CountingMatrix(DEFINITE), callback=spoil)
    assert torch.equal(spoilt @ B, plain @ B)
    assert plain.info is not None and spoilt.info is not None
    assert torch.equal(spoilt.info.history, plain.info.history)


def test_what_is_no_function_is_refused() -> None:
    for build, M in SOLVERS.values():
        with pytest.raises(TypeError, match="callback: expected a function, got int"):
            build(CountingMatrix(M), callback=3)


@every_solver
@pytest.mark.parametrize("where", ["callback", "product", "preconditioner"])
def test_errors_inside_leave_the_operator_usable(name: str, where: str) -> None:
    build, M = SOLVERS[name]
    if where == "preconditioner" and name == "LSMR":
        pytest.skip("LSMR takes no preconditioner")
    calls = 0

    def fail_once(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("from the user")
        return args[0]

    A = InterruptedMatrix(M, 4 if where == "product" else -1, RuntimeError("from the user"))
    inverse = build(A, **({} if where == "product" else {where: fail_once}))
    B = noise(SIZE, 3)
    with pytest.raises(RuntimeError, match="from the user"):
        inverse @ B
    with noting_warnings():
        X = inverse @ B
        again = build(CountingMatrix(M)) @ B
    torch.testing.assert_close(X, again, rtol=1e-6, atol=1e-6)


@every_solver
def test_progress_bar_goes_to_stderr_and_nothing_otherwise(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    build, M = SOLVERS[name]
    with noting_warnings():
        build(CountingMatrix(M)) @ noise(SIZE, 2)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    with noting_warnings():
        build(CountingMatrix(M), progressbar=True) @ noise(SIZE, 2)
    captured = capsys.readouterr()
    described = {"CG": "Conjugate gradients", "LSMR": "LSMR", "Neumann": "Neumann"}.get(name, "MINRES")
    assert captured.out == "" and described in captured.err


def test_progress_bar_of_other_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    with noting_warnings():
        LSMRInverseLinearOperator(CountingMatrix(TALL), show=True) @ noise(SIZE)
    assert "LSMR" in capsys.readouterr().err
    damping_path(CountingMatrix(DEFINITE), noise(SIZE), [0.1, 1.0], progressbar=True)
    assert "Damping path" in capsys.readouterr().err


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("number", [1, 2, 3, 5, 9, 20, 28])
@pytest.mark.parametrize("started", [False, True])
def test_interrupted_solves_keep_what_they_have(name: str, number: int, started: bool) -> None:
    """The iterate has the residuals that are told, and is no worse than where the solve began."""
    build, M = SOLVERS[name]
    A = InterruptedMatrix(M, number, KeyboardInterrupt())
    x0 = 0.1 * noise(A.shape[1], seed=5) if started else torch.zeros(A.shape[1]).double()
    inverse = build(A, x0=x0 if started else None)
    B = noise(SIZE, 3, seed=4)
    with pytest.raises(KeyboardInterrupt), noting_warnings():
        inverse @ B
    info = inverse.info
    assert info is not None and info.solution is not None and info.solution.shape == (A.shape[1], 3)
    assert info.ended_by == "interrupt" and not info.converged.any()
    true = relative_residual(M, info.solution, B)
    if number > 1 or not started:  # else nobody knows the residual of the first iterate
        torch.testing.assert_close(info.residual_norm, true, rtol=1e-6, atol=1e-9)
    first = relative_residual(M, x0[:, None].expand(-1, 3), B)
    if name == "CG":  # it is the energy that falls
        X = info.solution
        energy, before = ((Y * (M @ Y)).sum(0) / 2 - (B * Y).sum(0) for Y in (X, x0[:, None].expand(-1, 3)))
        assert (energy <= before + 1e-12).all()
    else:
        assert (true <= first + 1e-12).all()
    with noting_warnings():
        X = inverse @ B
    assert inverse.info.ended_by is None and inverse.info.solution is None
    if name not in ("LSMR", "Neumann"):
        assert (relative_residual(M, X, B) <= 1e-8).all()


def test_interrupted_least_squares_tell_the_gradient() -> None:
    B = noise(SIZE, 3, seed=4)
    inverse = LSMRInverseLinearOperator(InterruptedMatrix(TALL, 20, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        inverse @ B
    info = inverse.info
    assert info is not None and info.solution is not None
    R = B - TALL @ info.solution
    true = (TALL.T @ R).norm(dim=0) / (torch.linalg.matrix_norm(TALL, 2) * R.norm(dim=0))
    # With an estimate of ‖A‖ from below.
    assert (info.normal_residual >= 0.99 * true).all() and (info.normal_residual <= 3 * true).all()


def test_interrupt_in_a_callback() -> None:
    """As a notebook does: stop when it is good enough."""

    def stop(progress: Any) -> None:
        if progress.residual_norm.max() < 1e-3:
            raise KeyboardInterrupt

    B = noise(SIZE, 2)
    inverse = MINRESInverseLinearOperator(CountingMatrix(INDEFINITE), callback=stop)
    with pytest.raises(KeyboardInterrupt):
        inverse @ B
    assert inverse.info is not None and inverse.info.solution is not None
    assert (relative_residual(INDEFINITE, inverse.info.solution, B) <= 1.001e-3).all()


def test_interrupted_warm_start_begins_where_the_last_solve_ended() -> None:
    A = InterruptedMatrix(DEFINITE, 10**6, KeyboardInterrupt())
    inverse = CGInverseLinearOperator(A, warm_start=True)
    B = noise(SIZE, 2)
    inverse @ B
    A.number = A.calls + 4
    with pytest.raises(KeyboardInterrupt):
        inverse @ noise(SIZE, 2, seed=7)
    inverse @ B
    assert inverse.info is not None and inverse.info.num_iterations.tolist() == [0, 0]
