"""Inverses as operators: a matrix paired with an algorithm, which keeps what it did in `info`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space
from curvlinops.solvers.krylov import Product, SolveInfo, conjugate_gradients

Preconditioner = LinearOperator | Callable[[Tensor], Tensor]


class ConvergenceWarning(UserWarning):
    """A solve ended before its tolerance was reached."""


class CGInverseLinearOperator(LinearOperator):
    r"""The inverse :math:`A^{-1}` of a symmetric positive definite operator, by conjugate gradients.

    All columns are solved together, each stops on its own. Residuals are recomputed from :math:`b - A x`; a column
    that stops early says so by a warning and in :attr:`info`.

    **Cost**: one product with A an iteration, over the columns that are still open; four vectors a column.

    **Reference**: Hestenes, Stiefel (1952), Methods of conjugate gradients for solving linear systems,
    doi:10.6028/jres.049.044.

    Args:
        A: The operator, self-adjoint. Add damping first: ``A.damped(1e-3)``.
        rtol: Relative residual ‖b - A x‖ / ‖b‖ at which a column stops; by default 1e-5 in float32 and below, 1e-8 in
            float64.
        max_iter: Iterations at most; by default ten times the dimension, but at most 1000.
        preconditioner: Operator, or function of ``[D, K]``, close to the inverse of A.
        x0: First iterate, in any format.
        on_breakdown: ``"raise"`` or ``"stop"`` when a direction of negative curvature is met; by default a single
            right-hand side raises, several stop.
        tolerance: Other spelling of ``rtol``.
        eps: Accepted for scripts that pass it; has no effect.
        max_tridiag_iter: Accepted for scripts that pass it; has no effect.

    Attributes:
        info: Of the last solve: ``num_iterations``, ``residual_norm``, ``converged``, ``breakdown``, each ``[K]``.

    Raises:
        ValueError: If A is not self-adjoint, or an option is out of range.
        RuntimeError: If a direction of negative curvature is met, see ``on_breakdown``.

    >>> from curvlinops import TensorLinearOperator
    >>> A = TensorLinearOperator(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    >>> inverse = CGInverseLinearOperator(A)
    >>> [round(x, 4) for x in (inverse @ torch.ones(2)).tolist()]
    [0.5, 0.25]
    >>> inverse.info.converged.tolist()
    [True]
    """

    SELF_ADJOINT = True

    def __init__(
        self,
        A: LinearOperator,
        rtol: float | None = None,
        max_iter: int | None = None,
        preconditioner: Preconditioner | None = None,
        x0: Any = None,
        *,
        on_breakdown: str | None = None,
        tolerance: float | None = None,
        eps: float | None = None,
        max_tridiag_iter: int | None = None,
    ) -> None:
        if not isinstance(A, LinearOperator):
            raise TypeError(f"Expected a linear operator, got {type(A).__name__}.")
        A._require_square("CGInverseLinearOperator")
        if not A.SELF_ADJOINT:
            raise ValueError("Conjugate gradients need a self-adjoint operator: solve with A.H @ A instead.")
        super().__init__(A.codomain, A.domain)
        self._A = A
        self.info: SolveInfo | None = None
        self.POSITIVE_SEMIDEFINITE = A.POSITIVE_SEMIDEFINITE
        self.set_cg_hyperparameters(
            rtol,
            max_iter,
            preconditioner,
            x0,
            on_breakdown=on_breakdown,
            tolerance=tolerance,
            eps=eps,
            max_tridiag_iter=max_tridiag_iter,
        )

    def set_cg_hyperparameters(
        self,
        rtol: float | None = None,
        max_iter: int | None = None,
        preconditioner: Preconditioner | None = None,
        x0: Any = None,
        *,
        on_breakdown: str | None = None,
        tolerance: float | None = None,
        eps: float | None = None,
        max_tridiag_iter: int | None = None,
    ) -> None:
        """Set all options anew; what is not given takes its default. See the class for their meaning."""
        if rtol is not None and tolerance is not None:
            raise ValueError("rtol and tolerance are two spellings of one option: pass one of them.")
        rtol = tolerance if rtol is None else rtol
        default = 1e-8 if self.dtype == torch.float64 else 1e-5
        rtol = default if rtol is None else float(rtol)
        if not 0 <= rtol < 1:
            raise ValueError(f"rtol: expected a number in [0, 1), got {rtol}.")
        most = min(10 * self.shape[0], 1000) if max_iter is None else int(max_iter)
        if most < 1:
            raise ValueError(f"max_iter: expected at least 1, got {max_iter}.")
        if on_breakdown not in (None, "raise", "stop"):
            raise ValueError(f"on_breakdown: expected 'raise' or 'stop', got {on_breakdown!r}.")
        if (
            preconditioner is not None
            and not callable(preconditioner)
            and not isinstance(preconditioner, LinearOperator)
        ):
            raise TypeError(f"preconditioner: expected an operator or a function, got {type(preconditioner).__name__}.")
        if isinstance(preconditioner, LinearOperator) and preconditioner.shape != self.shape:
            raise ValueError(f"preconditioner: expected shape {self.shape}, got {preconditioner.shape}.")
        self._rtol, self._max_iter = rtol, most
        self._preconditioner = preconditioner
        self._on_breakdown = on_breakdown
        self._x0 = x0

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        B = Space.merge(X)
        # Half precision cannot hold the recurrences; only the products are made in it.
        work = torch.float32 if self.dtype in (torch.bfloat16, torch.float16) else self.dtype
        A = _prepared(self._A)
        solution, self.info = conjugate_gradients(
            self._product("A", A, work),
            B.to(work),
            self._first_iterate(B.shape[1], work),
            self._preconditioning(work),
            self._rtol,
            self._max_iter,
        )
        self._report(self.info)
        return self.codomain.split(solution.to(self.dtype))

    def _preconditioning(self, work: torch.dtype) -> Product | None:
        preconditioner = self._preconditioner
        if isinstance(preconditioner, LinearOperator):
            preconditioner = _prepared(preconditioner)
        return None if preconditioner is None else self._product("preconditioner", preconditioner, work)

    def _product(self, name: str, factor: Preconditioner, work: torch.dtype) -> Product:
        multiply = factor.__matmul__ if isinstance(factor, LinearOperator) else factor

        def product(X: Tensor) -> Tensor:
            result: Tensor = multiply(X.to(self.dtype))
            if not isinstance(result, Tensor) or result.shape != X.shape:
                got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise ValueError(f"{name}: expected a tensor of shape {list(X.shape)}, got {got}.")
            return result.to(work)

        return product

    def _first_iterate(self, num_columns: int, work: torch.dtype) -> Tensor | None:
        if self._x0 is None:
            return None
        X = Space.merge(self.codomain.read(self._x0)[0]).to(work)
        if X.shape[1] not in (1, num_columns):
            raise ValueError(f"x0: expected 1 or {num_columns} columns, got {X.shape[1]}.")
        return X.expand(-1, num_columns)

    def _report(self, info: SolveInfo) -> None:
        broken = info.breakdown.nonzero().flatten().tolist()
        action = self._on_breakdown or ("raise" if len(info.breakdown) == 1 else "stop")
        if broken and action == "raise":
            raise RuntimeError(
                f"Conjugate gradients met a direction of negative curvature in column {broken[0]} (relative residual "
                f"{info.residual_norm[broken[0]]:.2g}): the operator or the preconditioner is not positive definite. "
                "Add damping, or pass on_breakdown='stop'."
            )
        failed = (~info.converged).nonzero().flatten().tolist()
        if failed:
            worst = info.residual_norm[failed].max()
            warnings.warn(
                f"Conjugate gradients did not reach the relative residual {self._rtol:.2g} in {len(failed)} of "
                f"{len(info.converged)} columns: the largest is {worst:.2g} after {int(info.num_iterations.max())} "
                f"iterations{', with negative curvature met' if broken else ''}. Add damping if the operator may be "
                "singular; otherwise raise max_iter, or use a preconditioner.",
                ConvergenceWarning,
                stacklevel=5,
            )

    @property
    def _holds_values(self) -> bool:
        inside = [o for o in (self._A, self._preconditioner) if isinstance(o, LinearOperator)]
        return all(operator._holds_values for operator in inside)

    def frozen(self) -> CGInverseLinearOperator:
        """The inverse of the frozen operator, with the same options."""
        if self._holds_values:
            return self
        preconditioner = self._preconditioner
        if isinstance(preconditioner, LinearOperator):
            preconditioner = preconditioner.frozen()
        options = (self._rtol, self._max_iter, preconditioner, self._x0)
        return CGInverseLinearOperator(self._A.frozen(), *options, on_breakdown=self._on_breakdown)


def _prepared(operator: LinearOperator) -> LinearOperator:
    """The operator ready for many products; itself where its model cannot be frozen (it closes over its parameters)."""
    try:
        return operator.linearize()
    except NotImplementedError:
        return operator
