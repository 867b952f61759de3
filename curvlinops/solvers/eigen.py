"""Extremal eigenpairs, with residuals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvlinops.memory import default_budget
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Format, Space
from curvlinops.solvers.checks import check_self_adjoint, checked_count, checked_number
from curvlinops.solvers.columns import flat_product, prepared, working_dtype
from curvlinops.solvers.info import warn_of_convergence
from curvlinops.solvers.krylov.thick_restart import Order, ThickRestart
from curvlinops.solvers.options import default_rtol
from curvlinops.solvers.random_vectors import DEFAULT_SEED
from curvlinops.solvers.watch import Limits, Progress, Watch


class Eigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors.

    Attributes:
        values: The eigenvalues, ascending ``[k]``.
        vectors: Their vectors of unit norm as columns, in the format asked for.
        residual_norms: ‖A v - λ v‖ ``[k]``, by the recurrence where a product confirmed it, else recomputed. Each λ
            lies within its residual of a true eigenvalue.
        converged: Whether that is as small as asked for ``[k]``.
        num_matvecs: Products with A, those that verify included.
        ended_by: The bound that ended the iteration, ``"max_matvecs"`` or ``"max_seconds"``, if one did.
    """

    values: Tensor
    vectors: Any
    residual_norms: Tensor
    converged: Tensor
    num_matvecs: int
    ended_by: str | None


def _by_size(values: Tensor) -> Tensor:
    return values.abs().argsort(descending=True)


def _largest_first(values: Tensor) -> Tensor:
    return values.argsort(descending=True)


def _smallest_first(values: Tensor) -> Tensor:
    return values.argsort()


def _from_both_ends(values: Tensor) -> Tensor:
    """Largest, smallest, second largest, ..."""
    down, half = values.argsort(descending=True), (len(values) + 1) // 2
    both = torch.stack([down[:half], down.flip(0)[:half]], dim=1)
    return both.flatten()[: len(values)]


ORDERS: dict[str, Order] = {
    "LM": _by_size,
    "LA": _largest_first,
    "SA": _smallest_first,
    "BE": _from_both_ends,
}


def eigsh(
    A: LinearOperator,
    k: int = 6,
    which: str = "LM",
    tol: float | None = None,
    max_matvecs: int | None = None,
    seed: int = DEFAULT_SEED,
    *,
    ncv: int | None = None,
    block_size: int = 1,
    v0: Any = None,
    format: str = "flat",
    max_seconds: float | None = None,
    progressbar: bool = False,
    callback: Callable[[Progress], Any] | None = None,
) -> Eigenpairs:
    r"""The k extremal eigenpairs of a self-adjoint operator, by Lanczos with thick restarts.

    The basis is kept orthogonal in full, so no value comes twice that is not there twice. An eigenvalue of higher
    multiplicity may be found fewer times than it is there; ``block_size`` of at least its multiplicity finds all.

    **Cost**: one product with A a step, and one that verifies (k more where it does not agree); ncv vectors, and
    O(ncv D) operations a step beside the product.

    **Reference**: Wu, Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems,
    doi:10.1137/S0895479898334605.

    Args:
        A: A self-adjoint operator.
        k: Number of eigenpairs; all of them if it is the dimension.
        which: ``"LM"`` for the largest in size, ``"LA"`` for the largest, ``"SA"`` for the smallest, ``"BE"`` for k / 2
            from each end, one more from the high end where k is odd.
        tol: An eigenpair counts as converged where ‖A v - λ v‖ ≤ tol \|λ\|, or at the rounding of ‖A‖; by default 1e-5
            in float32 and below, 1e-8 in float64.
        max_matvecs: Products at most, those that verify included; by default 1000, or 20 k if that is more.
        seed: Seed of the start vector.
        ncv: Vectors in the basis; by default 2 k + 30, or as many as take a quarter of the memory. Ranks that differ in
            memory must be given it.
        block_size: Columns multiplied together.
        v0: A start vector in any format, in place of a random one; with ``block_size`` as many columns.
        format: Format of the vectors: ``"flat"`` for ``[D, k]``, ``"list"`` or ``"dict"`` for the shapes of the space.
        max_seconds: Wall-clock time after which no step begins.
        progressbar: Whether to show a progress bar.
        callback: Called with a ``Progress`` after each step; its residuals are relative to ‖A‖.

    Returns:
        Values, vectors, residuals, and what was done; see :class:`Eigenpairs`.

    Raises:
        TypeError: If A is no operator.
        ValueError: If A is not self-adjoint, or an option is out of range.
        FloatingPointError: If a product is not finite.

    >>> from curvlinops import TensorLinearOperator
    >>> A = TensorLinearOperator(torch.diag(torch.tensor([1.0, -2.0, 3.0])))
    >>> [round(x, 3) for x in eigsh(A, k=2).values.tolist()]
    [-2.0, 3.0]
    """
    check_self_adjoint(A, "eigsh")
    numel = A.shape[0]
    tol = default_rtol(A.dtype) if tol is None else tol
    _check_options(numel, k, which, tol, block_size, format, A.domain)
    capacity = _capacity(A, k, block_size, ncv)
    most = max(1000, 20 * k) if max_matvecs is None else max_matvecs
    if most < min(numel, 2 * k + block_size) + k:
        raise ValueError(f"max_matvecs: {k} eigenpairs take at least {min(numel, 2 * k + block_size) + k}, got {most}.")
    limits = Limits(most, max_seconds, progressbar, callback)
    with torch.inference_mode(False), torch.no_grad(), Watch(limits, A, "eigsh") as watch:
        A = prepared(A)
        product = watch.counted(flat_product(A, A.dtype))
        generator = torch.Generator(A.device).manual_seed(seed)
        process = ThickRestart(product, _start(A, v0, block_size, generator), k, capacity, generator)
        process.iterate(ORDERS[which], tol, watch)
        values, vectors, residuals, converged = _verified(process, product, k, tol, generator)
    if not bool(converged.all()):
        ended = f", ended by {watch.ended_by}" if watch.ended_by else ""
        warn_of_convergence(
            f"{int((~converged).sum())} of {k} eigenpairs did not converge to tol={tol:.2g} in {watch.num_matvecs} "
            f"products{ended}: the largest residual is {float(residuals.max()):.2g}, with a norm of A of "
            f"{process.scale:.2g}. Raise max_matvecs or ncv, or tol."
        )
    return Eigenpairs(
        values,
        written_columns(vectors, A.domain, A.dtype, format),
        residuals,
        converged,
        watch.num_matvecs,
        watch.ended_by,
    )


def _check_options(numel: int, k: int, which: str, tol: float, block_size: int, format: str, space: Space) -> None:
    checked_count(k, 1, "k", at_most=numel)
    if which not in ORDERS:
        raise ValueError(f"which: expected one of {', '.join(ORDERS)}, got {which!r}.")
    checked_number(tol, 0, 1, "tol")
    checked_count(block_size, 1, "block_size", at_most=numel)
    if format not in ("flat", "list", "dict"):
        raise ValueError(f"format: expected 'flat', 'list' or 'dict', got {format!r}.")
    if format == "dict" and space.names is None:
        raise ValueError("format='dict' needs parameters with names: pass params as a dict.")


def _capacity(A: LinearOperator, k: int, block_size: int, ncv: int | None) -> int:
    """Vectors in the basis."""
    least = min(A.shape[0], k + 2 * block_size + 1)
    if ncv is not None:
        return checked_count(ncv, least, "ncv")
    size = A.shape[0] * torch.finfo(working_dtype(A.dtype)).bits // 8
    affordable = default_budget(A.device) // max(size, 1)
    return max(least, min(2 * k + 30 * block_size, affordable))


def _start(A: LinearOperator, v0: Any, block_size: int, generator: torch.Generator) -> Tensor:
    work = working_dtype(A.dtype)
    if v0 is None:
        return torch.randn(block_size, A.shape[0], dtype=work, device=A.device, generator=generator).T
    V = Space.merge(A.domain.read(v0)[0]).to(work)
    if V.shape[1] != block_size:
        raise ValueError(f"v0: expected {block_size} columns, as many as block_size, got {V.shape[1]}.")
    if not bool((V.isfinite().all(0) & (V != 0).any(0)).all()):
        raise ValueError("v0: expected finite vectors other than zero.")
    return V / V.abs().amax(0)


def _verified(
    process: ThickRestart, product: Callable[[Tensor], Tensor], k: int, tol: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs in ascending order, with residuals that a product confirmed.

    The residual of a combination of the vectors with random signs has the root of the sum of squares of theirs as its
    norm, in the mean. Where it is larger than the recurrence says, all of them are recomputed.
    """
    order = process.values[:k].argsort()
    V = process.vectors(k)[:, order.to(process.device)]
    V = V / V.norm(dim=0)
    values, residuals = process.values[:k][order].to(V), process.residuals[:k][order].to(V)
    signs = torch.randint(2, (k, 1), generator=generator, device=V.device).to(V) * 2 - 1
    mixed = (product(V @ signs) - V @ (values.unsqueeze(1) * signs)).norm()
    floor = 10 * torch.finfo(V.dtype).eps * process.scale
    if not mixed <= 2 * residuals.norm() + k**0.5 * floor:
        residuals = (product(V) - values * V).norm(dim=0)
    return values, V, residuals, residuals <= torch.clamp(tol * values.abs(), min=floor)


def written_columns(columns: Tensor, space: Space, dtype: torch.dtype, format: str) -> Any:
    """Columns ``[D, k]`` in the format asked for; ``"dict"`` only where the space has names."""
    kind = "list" if format == "dict" and space.names is None else format
    return Format(kind, False, False).write(space.split(columns.to(dtype)), space)
