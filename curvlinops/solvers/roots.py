"""Square roots of positive operators and of their inverses, times vectors, by the Lanczos method."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, pi
from typing import Any

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space
from curvlinops.solvers.checks import check_self_adjoint
from curvlinops.solvers.closed_roots import ClosedRoot, has_closed_root
from curvlinops.solvers.columns import Product, flat_product, prepared, working_dtype
from curvlinops.solvers.functions import check_positive
from curvlinops.solvers.info import warn_of_convergence
from curvlinops.solvers.krylov.lanczos import Lanczos
from curvlinops.solvers.krylov.runs import runs_together
from curvlinops.solvers.options import default_rtol
from curvlinops.solvers.watch import Limits, Watch

#: Steps for which the bases of columns that go together are counted.
_EXPECTED_STEPS = 100
#: Step and reach of the integrals over shifts, in the logarithm of the shift's root.
_LOG_STEP, _LOG_REACH = 0.25, 15.0


@dataclass(frozen=True, eq=False)
class RootInfo:
    """What the computation of a root times B did, per column.

    Attributes:
        num_steps: Lanczos steps ``[K]``, which are products with A.
        error_estimate: Estimated error of the answer, relative to its norm ``[K]``.
        rounding: The part of it that more steps cannot remove: what a change of A by its rounding, ε ‖A‖, does to the
            answer ``[K]``. It is all there is of a closed form.
        converged: Whether the estimate is at most the tolerance asked for ``[K]``.
    """

    num_steps: Tensor
    error_estimate: Tensor
    rounding: Tensor
    converged: Tensor


def sqrt_matvec(
    A: LinearOperator,
    B: Any,
    *,
    rtol: float | None = None,
    max_steps: int | None = None,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    progressbar: bool = False,
    return_info: bool = False,
) -> Any:
    r"""The product :math:`A^{1/2} B` with the square root of a positive semi-definite operator.

    Each column b is approximated by :math:`\|b\| Q \, T^{1/2} e_1` in its own Krylov space; all columns go together.
    They take steps until an upper bound of the error is at most ``rtol``: with the residual
    :math:`r_m(t) = \|b\| \prod_j \beta_j / \prod_i (\theta_i + t^2)` of the system with the shift t²,

    .. math::
        \| A^{1/2} b - y_m \| \leq \frac{2}{\pi} \int_0^\infty r_m(t) \, dt

    The estimate in ``info`` adds what rounding does to the answer, which is most where A has eigenvalues near zero.
    There, the steps that it takes grow like those of conjugate gradients as well: add damping.

    **Cost**: a product for each column and step. The basis takes (steps + 1) · D numbers a column; columns go in
    chunks for which this is below 2²⁶ numbers at 100 steps. Operators with a method ``sqrt`` use it instead, without
    steps, so that the estimate is that of rounding alone; a dense matrix is decomposed in float64, at O(D³).

    **Reference**: Ilić, Turner, Simpson (2010), A restarted Lanczos approximation to functions of a symmetric matrix,
    doi:10.1093/imanum/drp003.

    Args:
        A: The operator, positive semi-definite.
        B: Vector or matrix, in any format.
        rtol: Estimated relative error at which a column stops; by default 1e-5 in float32 and below, 1e-8 in float64.
        max_steps: Lanczos steps at most; by default the dimension, but at most 1000.
        max_matvecs: Products at most, each column counted.
        max_seconds: Wall-clock time after which no step begins.
        progressbar: Whether to show a progress bar.
        return_info: Whether to return a :class:`RootInfo` as well.

    Returns:
        The product, in the format of B; with ``return_info`` also what was done, a :class:`RootInfo`.

    Raises:
        TypeError: If A is no operator.
        ValueError: If A is not self-adjoint, has a negative eigenvalue or Ritz value, or an option is out of range.

    >>> from curvlinops import TensorLinearOperator
    >>> A = TensorLinearOperator(torch.tensor([[5.0, 4.0], [4.0, 5.0]]))
    >>> [round(x, 4) for x in sqrt_matvec(A, torch.tensor([1.0, 0.0])).tolist()]
    [2.0, 1.0]
    """
    check_self_adjoint(A, "sqrt_matvec")
    limits = Limits(max_matvecs, max_seconds, progressbar)
    return _Root(A, False, rtol, max_steps, limits).apply(B, return_info)


def inverse_sqrt_matvec(
    A: LinearOperator,
    B: Any,
    *,
    rtol: float | None = None,
    max_steps: int | None = None,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    progressbar: bool = False,
    return_info: bool = False,
) -> Any:
    r"""The product :math:`A^{-1/2} B` with the inverse square root of a positive definite operator.

    With B standard normal, the columns are samples of the normal distribution with covariance :math:`A^{-1}`. The
    method is that of :func:`sqrt_matvec`, closed forms included, with the bound
    :math:`\frac{2}{\pi} \int_0^\infty \frac{r_m(t)}{\lambda_{\min} + t^2} \, dt`, where the smallest Ritz value stands
    for the smallest eigenvalue. The number of steps grows with the root of the condition number.

    **Cost**: as :func:`sqrt_matvec`.

    **Reference**: Ilić, Turner, Simpson (2010), doi:10.1093/imanum/drp003.

    Args:
        A: The operator, positive definite. Add damping first: ``A.damped(1e-3)``.
        B: Vector or matrix, in any format.
        rtol: Estimated relative error at which a column stops; by default 1e-5 in float32 and below, 1e-8 in float64.
        max_steps: Lanczos steps at most; by default the dimension, but at most 1000.
        max_matvecs: Products at most, each column counted.
        max_seconds: Wall-clock time after which no step begins.
        progressbar: Whether to show a progress bar.
        return_info: Whether to return a :class:`RootInfo` as well.

    Returns:
        The product, in the format of B; with ``return_info`` also what was done, a :class:`RootInfo`.

    Raises:
        TypeError: If A is no operator.
        ValueError: If A is not self-adjoint, has an eigenvalue or Ritz value that is not positive, or an option is out
            of range.

    >>> from curvlinops import TensorLinearOperator
    >>> A = TensorLinearOperator(torch.tensor([[5.0, 4.0], [4.0, 5.0]]))
    >>> [round(x, 4) for x in inverse_sqrt_matvec(A, torch.tensor([3.0, 0.0])).tolist()]
    [2.0, -1.0]
    """
    check_self_adjoint(A, "inverse_sqrt_matvec")
    limits = Limits(max_matvecs, max_seconds, progressbar)
    return _Root(A, True, rtol, max_steps, limits).apply(B, return_info)


class _Root:
    """One call: checks, then a closed form, or chunks of columns and steps until the estimates are small enough."""

    def __init__(
        self, A: LinearOperator, is_inverse: bool, rtol: float | None, max_steps: int | None, limits: Limits
    ) -> None:
        self._A, self._is_inverse, self._limits = A, is_inverse, limits
        self._name = "inverse_sqrt_matvec" if is_inverse else "sqrt_matvec"
        self._rtol = default_rtol(A.dtype) if rtol is None else float(rtol)
        if not 0 < self._rtol < 1:
            raise ValueError(f"rtol: expected a number in (0, 1), got {rtol}.")
        self._max_steps = min(A.shape[0], 1000) if max_steps is None else int(max_steps)
        if self._max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, got {max_steps}.")
        self._eps = torch.finfo(A.dtype).eps

    def apply(self, B: Any, return_info: bool) -> Any:
        A = self._A
        with torch.inference_mode(False), torch.no_grad():
            columns, form = A.domain.read(B)
            form.check(A.codomain)
            X, info = (self._closed if has_closed_root(A, self._is_inverse) else self._solve)(columns)
            result = form.write(X, A.codomain)
        self._report(info)
        return (result, info) if return_info else result

    def _closed(self, columns: list[Tensor]) -> tuple[list[Tensor], RootInfo]:
        X, rounding = ClosedRoot(self._is_inverse, self._name).apply(self._A, columns)
        return X, RootInfo(torch.zeros_like(rounding, dtype=torch.long), rounding, rounding, rounding <= self._rtol)

    def _solve(self, columns: list[Tensor]) -> tuple[list[Tensor], RootInfo]:
        B = Space.merge(columns).to(working_dtype(self._A.dtype))
        together = runs_together(B.shape[0], min(self._max_steps, _EXPECTED_STEPS))
        parts, others = [], []
        with Watch(self._limits, self._A, self._name) as watch:
            product = watch.counted(flat_product(prepared(self._A), self._A.dtype))
            for chunk in B.split(together, dim=1):
                run, bound = self._run(product, chunk, watch)
                X, rounding = self._combine(run)
                parts.append(X)
                others.append((run.lengths, bound + rounding, rounding))
        steps, error, rounding = map(torch.cat, zip(*others, strict=True))
        X = torch.cat(parts).T.to(self._A.dtype)
        return self._A.codomain.split(X), RootInfo(steps, error, rounding, error <= self._rtol)

    def _run(self, product: Product, B: Tensor, watch: Watch) -> tuple[Lanczos, Tensor]:
        """The runs of some columns, and bounds of the errors relative to the answers."""
        run = Lanczos(product, B, eps=self._eps)
        error = torch.full_like(run.norms, inf)
        due = 1
        while bool(run.is_open.any()) and run.num_steps < self._max_steps:
            if not watch.allows(int(run.is_open.sum())):
                break
            run.step()
            # Estimates cost m³, so they become rarer as m grows.
            if run.num_steps >= due or run.num_steps == self._max_steps or not bool(run.is_open.any()):
                error = self._bound(run, error)
                # Half is left for rounding.
                run.end(error <= 0.5 * self._rtol)
                due = run.num_steps + 1 + run.num_steps // 16
            watch.tick(error)
        return run, self._bound(run, error)

    def _bound(self, run: Lanczos, before: Tensor) -> Tensor:
        """Upper bounds of the relative errors ``[K]``; those of columns that have ended stay."""
        if run.num_steps == 0:
            return torch.where(run.is_open, inf, 0.0)
        after = torch.where(run.is_invariant, 0.0, before)
        if bool(run.is_open.any()):
            T = run.tridiagonal()[run.is_open]
            values, vectors = torch.linalg.eigh(T)
            roots = self._roots(values)
            size = (vectors[:, 0] * roots).norm(dim=1)
            bound = _error_bounds(values, run.betas[run.is_open], self._is_inverse, self._eps)
            after[run.is_open] = torch.where(size > 0, bound / size, inf)
        return after

    def _roots(self, values: Tensor) -> Tensor:
        """The function of the Ritz values, which are checked."""
        if self._is_inverse:
            check_positive(values, self._eps, self._name)
            return values.rsqrt()
        smallest, largest = float(values.min()), float(values.abs().max())
        if smallest < -10 * self._eps * largest:
            raise ValueError(
                f"{self._name} needs a positive semi-definite operator, but it has a Ritz value of {smallest:.3g}, "
                f"where the largest is {largest:.3g}. Add damping: A.damped(1e-3)."
            )
        return values.clamp(min=0.0).sqrt()

    def _combine(self, run: Lanczos) -> tuple[Tensor, Tensor]:
        """‖b‖ Q f(T) e₁ as rows ``[K, D]``, and its relative error by the rounding of A ``[K]``."""
        if run.num_steps == 0:
            return torch.zeros_like(run.basis[:, 0]), torch.zeros_like(run.norms)
        values, vectors = torch.linalg.eigh(run.tridiagonal())
        values = torch.where((run.lengths == 0).unsqueeze(1), 1.0, values)
        roots, first = self._roots(values), vectors[:, 0]
        moved = values.clamp(min=0.0) + self._eps * values[:, -1:].abs()
        change = (moved.rsqrt() if self._is_inverse else moved.sqrt()) - roots
        size = (first * roots).norm(dim=1)
        rounding = torch.where(size > 0, (first * change).norm(dim=1) / torch.where(size > 0, size, 1.0), 0.0)
        y = torch.einsum("kij,kj->ki", vectors, first * roots) * run.norms.unsqueeze(1)
        basis = run.basis[:, :-1]
        return torch.bmm(y.to(basis.dtype).unsqueeze(1), basis).squeeze(1), rounding

    def _report(self, info: RootInfo) -> None:
        failed = ~info.converged
        if bool(failed.any()):
            warn_of_convergence(
                f"{self._name} did not reach the relative error {self._rtol:.2g} in {int(failed.sum())} of "
                f"{len(failed)} columns: the largest estimate is {float(info.error_estimate.max()):.2g} after "
                f"{int(info.num_steps.max())} steps, of which {float(info.rounding.max()):.2g} is rounding. Raise "
                "max_steps if that is less, else rtol; use a wider dtype, or add damping."
            )


def _error_bounds(values: Tensor, betas: Tensor, is_inverse: bool, eps: float) -> Tensor:
    """Bounds of ‖f(A) b - y_m‖ for ‖b‖ = 1, from Ritz values and remainders ``[K, m]`` each."""
    floor = torch.finfo(torch.float64).tiny + eps * values[:, -1:].abs()
    values = torch.maximum(values, floor)
    smallest, largest = values[:, 0], values[:, -1]
    begin = 0.5 * float(smallest.min().log()) - _LOG_REACH
    end = 0.5 * float(largest.max().log()) + _LOG_REACH
    u = torch.arange(begin, end, _LOG_STEP, dtype=torch.float64, device=values.device)
    log_residual = betas.log().sum(1, keepdim=True).expand(-1, len(u)).clone()
    for theta in values.unbind(1):
        log_residual -= torch.logaddexp(theta.log().unsqueeze(1), 2 * u)
    integrand = log_residual + u
    if is_inverse:
        integrand -= torch.logaddexp(smallest.log().unsqueeze(1), 2 * u)
    return integrand.exp().sum(1) * _LOG_STEP * 2 / pi
