"""Preconditioners: operators close to an inverse that cost less than it."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from curvlinops.operators.algebra import adopt
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.dense import _owning
from curvlinops.operators.low_rank import LowRankLinearOperator
from curvlinops.operators.space import Space
from curvlinops.operators.structured import Diagonal
from curvlinops.solvers.checks import check_self_adjoint, checked_count, checked_number
from curvlinops.solvers.columns import flat_product, prepared, working_dtype
from curvlinops.solvers.random_vectors import DEFAULT_SEED


class NystromPreconditioner(LinearOperator):
    r"""About the inverse of A + μ I, from a randomised low-rank approximation of A.

    With the approximation :math:`A \approx U \operatorname{diag}(\lambda) U^\top` of rank r it is
    :math:`U \operatorname{diag}(1 / (\lambda + \mu)) U^\top + (I - U U^\top) / (\lambda_r + \mu)`: the largest
    eigenvalues are taken out, the others are left as they are. It pays where few eigenvalues lie above the damping.

    The approximation is computed at first use, and is frozen from then on.

    **Cost**: r products with A, once, all columns together; O(D r) a product, D r numbers.

    **Reference**: Frangella, Tropp, Udell (2023), Randomized Nyström preconditioning, doi:10.1137/21M1466244.

    Args:
        A: A positive semi-definite operator, undamped.
        rank: The rank r.
        damping: The number μ that will be added to A.
        seed: Seed of the random directions.

    Raises:
        ValueError: If A is not square or not self-adjoint, or rank or damping are out of range.
        RuntimeError: At first use, if A is not positive semi-definite.

    >>> from curvlinops import CGInverseLinearOperator, TensorLinearOperator
    >>> A = TensorLinearOperator(torch.diag(torch.tensor([1e3, 1e2, 1e1, 0.0, 0.0]).double()))
    >>> P = NystromPreconditioner(A, rank=3, damping=0.1)
    >>> inverse = CGInverseLinearOperator(A.damped(0.1), preconditioner=P)
    >>> x = inverse @ torch.ones(5).double()
    >>> inverse.info.num_iterations.item() <= 2
    True
    """

    SELF_ADJOINT = True
    POSITIVE_SEMIDEFINITE = True

    def __init__(self, A: LinearOperator, rank: int, damping: float, seed: int = DEFAULT_SEED) -> None:
        check_self_adjoint(A, "NystromPreconditioner")
        rank = checked_count(rank, 1, "rank", at_most=A.shape[0])
        if checked_number(damping, 0, inf, "damping") == 0:
            raise ValueError("damping: expected a positive number, got 0.")
        super().__init__(A.codomain, A.domain)
        self._A = A
        self._rank, self._damping = rank, float(damping)
        self._seed = checked_count(seed, 0, "seed")
        self._kept: tuple[LowRankLinearOperator, Tensor] | None = None
        self._inverted: LowRankLinearOperator | None = None

    @property
    def approximation(self) -> LowRankLinearOperator:
        """The approximation U diag(λ) Uᵀ of A, with inverses, determinants and samples of its own."""
        return self._approximated()[0]

    def eigenvalues(self) -> Tensor:
        """The eigenvalues λ of the approximation ``[rank]``, descending; estimates of the largest of A, from below."""
        return self._approximated()[1].to(self.dtype)

    def with_damping(self, damping: float) -> NystromPreconditioner:
        """The preconditioner for another damping, from the same approximation."""
        result = NystromPreconditioner(self._A, self._rank, damping, self._seed)
        result._kept = self._approximated()
        return result

    def _approximated(self) -> tuple[LowRankLinearOperator, Tensor]:
        if self._kept is None:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = self._sketched()
        return self._kept

    def _sketched(self) -> tuple[LowRankLinearOperator, Tensor]:
        work = working_dtype(self.dtype)
        generator = torch.Generator(self.device).manual_seed(self._seed)
        start = torch.randn(self.shape[0], self._rank, dtype=work, device=self.device, generator=generator)
        Q = torch.linalg.qr(start)[0]
        Y = flat_product(prepared(self._A), self.dtype)(Q)
        B, shift = _core_root(Q, Y, torch.finfo(self.dtype).eps)
        U, sizes, _ = torch.linalg.svd(B, full_matrices=False)
        values = (sizes.double().square() - shift).clamp(min=0.0)
        columns = adopt(_owning(U.to(self.dtype)), Space.flat(self._rank, self.dtype, self.device), self.domain)
        return LowRankLinearOperator(columns, values), values

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        if self._inverted is None:
            approximation, values = self._approximated()
            c = 1.0 / (float(values[-1]) + self._damping)
            self._inverted = LowRankLinearOperator(approximation.U, 1.0 / (values + self._damping) - c, c)
        return self._inverted._matmat(X)

    @property
    def _holds_values(self) -> bool:
        return self._kept is not None or self._A._holds_values

    def frozen(self) -> NystromPreconditioner:
        """The preconditioner of the frozen operator; itself once it is computed."""
        if self._holds_values:
            return self
        return NystromPreconditioner(self._A.frozen(), self._rank, self._damping, self._seed)

    def _agreed(self, flag: bool) -> bool:
        return self._A._agreed(flag)

    def _repr_extra(self) -> str:
        return f", rank {self._rank}, damping {self._damping:g}, of {type(self._A).__name__}"


def _core_root(Q: Tensor, Y: Tensor, eps: float) -> tuple[Tensor, float]:
    """B and ν with B Bᵀ = Y_ν (Qᵀ Y_ν)⁻¹ Y_νᵀ for Y_ν = Y + ν Q.

    The shift ν keeps the small matrix positive definite in spite of rounding, and is taken off the eigenvalues later.
    """
    norm = float(Y.double().norm())
    for shift in (eps * norm, 30 * eps * norm, 1000 * eps * norm):
        core = (Q.T @ Y).double()
        core = (core + core.T) / 2
        core.diagonal().add_(shift)
        L, failed = torch.linalg.cholesky_ex(core)
        if not failed and norm > 0:
            return torch.linalg.solve_triangular(L.to(Y.dtype), (Y + shift * Q).T, upper=False).T, shift
    if norm == 0:
        return Y, 0.0
    raise RuntimeError(
        "NystromPreconditioner needs a positive semi-definite operator, but this one has a negative eigenvalue (or a "
        "product is not finite): use a GGN or a Fisher matrix in place of a Hessian."
    )


def jacobi_preconditioner(diagonal: LinearOperator | Tensor | Any, damping: float = 0.0) -> Diagonal:
    """The inverse of a diagonal plus damping, as a preconditioner.

    **Cost**: that of the diagonal, once; O(D) a product.

    **Reference**: Saad (2003), Iterative methods for sparse linear systems, chapter 10, doi:10.1137/1.9780898718003.

    Args:
        diagonal: An operator that knows its diagonal, such as ``GGNDiagonalLinearOperator``; or the entries, as a flat
            tensor, or as a list or dict of tensors.
        damping: Number that will be added to the matrix.

    Returns:
        The operator with entries 1 / (d + damping), positive definite.

    Raises:
        TypeError: If an operator does not know its diagonal.
        ValueError: If an entry with damping is not positive.

    >>> jacobi_preconditioner(torch.tensor([1.0, 3.0]), damping=1.0).diagonal().tolist()
    [0.5, 0.25]
    """
    if isinstance(diagonal, LinearOperator):
        if not hasattr(diagonal, "diagonal"):
            raise TypeError(
                f"{type(diagonal).__name__} does not know its diagonal: pass a diagonal operator, or the entries, for "
                "instance from exact_diagonal, hutchinson_diag or xdiag."
            )
        space, flat = diagonal.domain, diagonal.diagonal()
        entries = Diagonal([part.squeeze(-1) for part in space.split(flat.unsqueeze(-1))])
        entries._domain = entries._codomain = space
    else:
        entries = Diagonal(diagonal)
    damped = entries.diagonal() + checked_number(damping, -inf, inf, "damping")
    good = (damped > 0) & damped.isfinite() & (1.0 / damped).isfinite()
    if not bool(good.all()):
        raise ValueError(
            f"{int((~good).sum())} of {len(damped)} entries have no finite, positive inverse with damping={damping}: "
            "the preconditioner would not be positive definite. Pass a larger damping."
        )
    result = entries.inverse(damping)
    result.POSITIVE_SEMIDEFINITE = True
    return result
