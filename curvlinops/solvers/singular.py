"""The largest singular values and vectors, with residuals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvlinops.operators.algebra import chain
from curvlinops.operators.base import LinearOperator
from curvlinops.solvers.columns import flat_product, prepared, working_dtype
from curvlinops.solvers.eigen import eigsh, written_columns
from curvlinops.solvers.options import default_rtol
from curvlinops.solvers.random_vectors import DEFAULT_SEED
from curvlinops.solvers.watch import Progress


class SingularTriplets(NamedTuple):
    """Singular values and vectors, A ≈ U diag(s) Vᵀ.

    Attributes:
        left: Left singular vectors U as columns, in the format asked for.
        values: Singular values s, descending ``[k]``.
        right: Right singular vectors V as columns.
        residual_norms: The larger of ‖A v - s u‖ and ‖Aᵀu - s v‖, recomputed ``[k]``.
        converged: Whether that is as small as asked for ``[k]``.
        num_matvecs: Products with A and with its adjoint, those that verify included.
        ended_by: The bound that ended the iteration, if one did.
    """

    left: Any
    values: Tensor
    right: Any
    residual_norms: Tensor
    converged: Tensor
    num_matvecs: int
    ended_by: str | None


def svds(
    A: LinearOperator,
    k: int = 6,
    tol: float | None = None,
    max_matvecs: int | None = None,
    seed: int = DEFAULT_SEED,
    *,
    ncv: int | None = None,
    block_size: int = 1,
    format: str = "flat",
    max_seconds: float | None = None,
    progressbar: bool = False,
    callback: Callable[[Progress], Any] | None = None,
) -> SingularTriplets:
    r"""The k largest singular values and vectors of an operator, from the eigenpairs of AᵀA or A Aᵀ.

    The smaller of the two is taken. Singular values below the root of the rounding of A's largest cannot be told from
    zero; their vectors on the other side are zero, and they are not called converged.

    **Cost**: one product with A and one with its adjoint a step, and k of each that verify; ncv vectors of the smaller
    side.

    **Reference**: Golub, Van Loan (2013), Matrix Computations, section 10.4.

    Args:
        A: Any operator, such as a Jacobian.
        k: Number of triplets, at most the smaller dimension.
        tol: A triplet counts as converged where ‖A v - s u‖ and ‖Aᵀu - s v‖ are at most tol s; see :func:`eigsh`.
        max_matvecs: Products at most, those with A and with its adjoint counted.
        seed: Seed of the start vector.
        ncv: Vectors in the basis; see :func:`eigsh`.
        block_size: Columns multiplied together.
        format: Format of the vectors: ``"flat"``, ``"list"`` or ``"dict"``; the last for spaces with names.
        max_seconds: Wall-clock time after which no step begins.
        progressbar: Whether to show a progress bar.
        callback: Called with a ``Progress`` after each step.

    Returns:
        Vectors, values, residuals, and what was done; see :class:`SingularTriplets`.

    Raises:
        TypeError: If A is no operator.
        ValueError: If an option is out of range.
        FloatingPointError: If a product is not finite.

    >>> from curvlinops import TensorLinearOperator
    >>> A = TensorLinearOperator(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
    >>> [round(x, 3) for x in svds(A, k=2).values.tolist()]
    [2.0, 1.0]
    """
    if not isinstance(A, LinearOperator):
        raise TypeError(f"Expected a linear operator, got {type(A).__name__}.")
    A = prepared(A)
    is_wide = A.shape[0] < A.shape[1]
    one = A.H if is_wide else A  # tall
    least = 2 * (min(one.shape[1], 2 * k + block_size) + 2 * k)
    if max_matvecs is not None and max_matvecs < least:
        raise ValueError(f"max_matvecs: {k} triplets take at least {least}, got {max_matvecs}.")
    pairs = eigsh(
        chain(one.H, one),
        k,
        "LA",
        tol,
        None if max_matvecs is None else (max_matvecs - 2 * k) // 2,
        seed,
        ncv=ncv,
        block_size=block_size,
        max_seconds=max_seconds,
        progressbar=progressbar,
        callback=callback,
    )
    with torch.inference_mode(False), torch.no_grad():
        inner = pairs.vectors.flip(1).to(working_dtype(A.dtype))
        values = pairs.values.flip(0).clamp(min=0.0).sqrt()
        outer, residuals = _other_side(one, inner, values)
    tol = default_rtol(A.dtype) if tol is None else tol
    floor = 10 * torch.finfo(inner.dtype).eps * float(values[0])
    converged = (residuals <= torch.clamp(tol * values, min=floor)) & ((outer != 0).any(0) | (values[0] == 0))
    left, right = (inner, outer) if is_wide else (outer, inner)
    return SingularTriplets(
        written_columns(left, A.codomain, A.dtype, format),
        values,
        written_columns(right, A.domain, A.dtype, format),
        residuals,
        converged,
        2 * pairs.num_matvecs + 2 * k,
        pairs.ended_by,
    )


def _other_side(A: LinearOperator, V: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """U = A V / s where s is not at rounding level, and the larger of the residuals."""
    product, adjoint_product = flat_product(A, A.dtype), flat_product(A.H, A.dtype)
    known = values > values[0] * torch.finfo(V.dtype).eps ** 0.5
    AV = product(V)
    U = torch.where(known, AV / torch.where(known, values, 1.0), 0.0)
    U = U / torch.where(known, U.norm(dim=0), 1.0)
    forward = (AV - values * U).norm(dim=0)
    backward = (adjoint_product(U) - values * V).norm(dim=0)
    return U, torch.maximum(forward, backward)
