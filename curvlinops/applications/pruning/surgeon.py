"""Optimal brain surgeon: which weights a network can spare, and how the others make up for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from curvlinops import LinearOperator
from curvlinops.applications.checked_numbers import checked_count
from curvlinops.applications.pruning.compensation import Tolerance, compensation
from curvlinops.applications.pruning.covered import CoveredParameters


@dataclass(frozen=True, eq=False)
class PruneInfo:
    """What pruning did.

    Attributes:
        sparsity: Share of the prunable entries that are zero.
        predicted_rise: ½ θ_Sᵀ (Q_SS)⁻¹ θ_S, by which the quadratic model says that the loss rises, for Q the inverse
            of the loss's curvature; ``None`` without compensation.
        residual: The largest relative residual of the systems that were solved for the compensation: Q_SS, or H_KK
            where it is solved by H = Q⁻¹.
    """

    sparsity: float
    predicted_rise: float | None
    residual: float


def obs_saliency(params: Any, Q: LinearOperator) -> dict[str, Tensor] | list[Tensor]:
    r"""How much the loss rises when one weight is set to zero and all others adapt, for each weight.

    .. math::
        \rho_q = \frac{\theta_q^2}{2 Q_{qq}}

    with Q the inverse of the curvature at a minimum of the loss, by its quadratic model.

    **Cost**: the diagonal of Q.

    **Reference**: Hassibi, Stork (1992), Second order derivatives for network pruning: optimal brain surgeon,
    https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html.

    Args:
        params: The parameters: a module, or a dict or list of tensors. Where Q has names, a module or dict may have
            others beside those of Q, which are left out.
        Q: The inverse curvature, a symmetric operator with a method ``diagonal()``.

    Returns:
        The saliencies in the shapes of the parameters, as a dict, or as a list where the parameters are one.

    Raises:
        TypeError: If Q is no operator or has no diagonal, or the parameters are none.
        ValueError: If Q and the parameters do not fit, or a diagonal entry of Q is not positive.

    >>> from curvlinops import Diagonal
    >>> Q = Diagonal({"weight": torch.tensor([1.0, 0.5])})
    >>> obs_saliency({"weight": torch.tensor([2.0, 3.0])}, Q)
    {'weight': tensor([2., 9.])}
    """
    covered = CoveredParameters(params, Q)
    return covered.in_shape(covered.values.square() / (2 * covered.diagonal))


@overload
def prune(
    params: Any,
    Q: LinearOperator,
    sparsity: float,
    *,
    compensate: bool = True,
    steps: int = 1,
    prunable: Sequence[str] | None = None,
    rtol: float | None = None,
    max_iter: int | None = None,
    return_info: Literal[False] = False,
) -> dict[str, Tensor] | list[Tensor]: ...
@overload
def prune(
    params: Any,
    Q: LinearOperator,
    sparsity: float,
    *,
    compensate: bool = True,
    steps: int = 1,
    prunable: Sequence[str] | None = None,
    rtol: float | None = None,
    max_iter: int | None = None,
    return_info: Literal[True],
) -> tuple[dict[str, Tensor] | list[Tensor], PruneInfo]: ...
def prune(
    params: Any,
    Q: LinearOperator,
    sparsity: float,
    *,
    compensate: bool = True,
    steps: int = 1,
    prunable: Sequence[str] | None = None,
    rtol: float | None = None,
    max_iter: int | None = None,
    return_info: bool = False,
) -> dict[str, Tensor] | list[Tensor] | tuple[dict[str, Tensor] | list[Tensor], PruneInfo]:
    r"""Set the weights of the smallest saliency to zero, **in place**, and let the others make up for it.

    The weights are ranked by :func:`obs_saliency` over all parameters of Q together. Those that are zero already come
    first, and of equal ones those that stand first. The others move jointly, for the whole pruned set S,

    .. math::
        \theta \leftarrow \theta - Q_{:S} \, (Q_{SS})^{-1} \, \theta_S ,

    the minimum of :math:`\delta^\top Q^{-1} \delta` under :math:`(\theta + \delta)_S = 0`, and S is set to exact zeros.
    With several steps, the density falls by the same factor in each, and what is left is ranked anew by the weights
    that have moved, with the same Q; S only grows. Nothing is written before all is computed.

    **Cost**: the diagonal of Q, and a step one system for each block of a :class:`BlockDiagonal`, else one for all:
    nothing for diagonals, one Cholesky decomposition for a block of at most 1024 entries, else conjugate gradients with
    one product an iteration. Where Q has an ``inverse()``, called H, they solve :math:`H_{KK} \, \delta_K = H_{KS} \,
    \theta_S` for the kept weights K, which is the same step in fewer iterations where Q is ill-conditioned.

    **Reference**: Hassibi, Stork (1992), Second order derivatives for network pruning: optimal brain surgeon,
    https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html; jointly for
    several weights: Kurtic et al. (2022), arXiv:2203.07259.

    Args:
        params: The parameters, which are **changed**: a module, or a dict or list of tensors. Where Q has names, a
            module or dict may have others beside those of Q, which are left alone. They may be of half precision where
            Q is not.
        Q: The inverse curvature, a symmetric positive definite operator with a method ``diagonal()``.
        sparsity: Share of the prunable weights that are zero afterwards, rounded to a whole number of them; at least 0
            and below 1. Where more of them are zero already, these stay.
        compensate: Whether the other weights move.
        steps: Number of times that the weights are ranked. Without compensation all give the same.
        prunable: Names, with shell wildcards, of the parameters that may be pruned, such as ``["*.weight"]``; those of
            a list are their positions. The others of Q move only, their zeros too. By default all.
        rtol: Relative residual of the systems; by default the root of the precision of Q, 3e-4 in float32.
        max_iter: Iterations at most; by default ten times the dimension, but at most 1000.
        return_info: Whether to return a :class:`PruneInfo`, too.

    Returns:
        Masks in the shapes of the parameters, True for what is kept, as a dict, or as a list where the parameters are
        one. Those that Q does not cover have none.

    Raises:
        TypeError: If Q is no operator or has no diagonal, or the parameters are none.
        ValueError: If Q and the parameters do not fit, parameters share memory or cannot be written, Q is not positive
            definite, or an option is out of range.
        RuntimeError: If a system cannot be solved. A :class:`ConvergenceWarning` tells of one that is solved less well
            than asked for.

    >>> from curvlinops import TensorLinearOperator
    >>> weights = [torch.tensor([1.0, 3.0])]
    >>> prune(weights, TensorLinearOperator(torch.tensor([[2.0, -1.0], [-1.0, 2.0]])), 0.5)
    [tensor([False,  True])]
    >>> weights
    [tensor([0.0000, 3.5000])]
    """
    covered = CoveredParameters(params, Q)
    covered.check_writable()
    candidates = covered.matching(prunable)
    tolerance = _tolerance(Q, rtol, max_iter)
    values, pruned = covered.values, torch.zeros_like(candidates)
    info = PruneInfo(0.0, 0.0 if compensate else None, 0.0)
    for count in _schedule(values[candidates], _checked_sparsity(sparsity), checked_count(steps, "steps")):
        pruned = _lowest(values.abs() / covered.diagonal.sqrt(), candidates, pruned, count)
        share = count / int(candidates.sum())
        values, info = covered.values, PruneInfo(share, None, 0.0)
        if compensate:
            # From the start, for all of S: what the steps one after the other come to.
            found = compensation(Q, values, covered.diagonal, pruned, tolerance)
            values, info = values + found.step, PruneInfo(share, found.cost, found.residual)
        values = values.masked_fill(pruned, 0.0)
    covered.write(values)
    masks = covered.in_shape(~pruned)
    return (masks, info) if return_info else masks


def _lowest(scores: Tensor, candidates: Tensor, pruned: Tensor, count: int) -> Tensor:
    """Mask of what is pruned already and the candidates of the lowest scores; of equal ones those that stand first."""
    places = candidates.nonzero().flatten()
    order = scores.masked_fill(pruned, -1.0)[places].sort(stable=True).indices
    return torch.zeros_like(candidates).index_fill(0, places[order[:count]], True)


def _schedule(values: Tensor, sparsity: float, steps: int) -> Iterator[int]:
    """How many entries are zero after each step: the density falls by the same factor in each."""
    total, num_left = len(values), int(values.count_nonzero())
    ratio = min((1 - sparsity) * total / num_left, 1.0) if num_left else 1.0
    for step in range(1, steps + 1):
        yield max(round(total - num_left * ratio ** (step / steps)), total - num_left)


def _checked_sparsity(sparsity: float) -> float:
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: expected a number of at least 0 and below 1, got {sparsity!r}.")
    return float(sparsity)


def _tolerance(Q: LinearOperator, rtol: float | None, max_iter: int | None) -> Tolerance:
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol: expected a number of at least 0 and below 1, got {rtol}.")
    limit = None if max_iter is None else checked_count(max_iter, "max_iter")
    return Tolerance(torch.finfo(Q.dtype).eps ** 0.5 if rtol is None else float(rtol), limit)
