"""Factors from tensors, and the eigendecompositions and inverses of several factors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvlinops.operators.dense import is_symmetric
from curvlinops.operators.factorisations import inverses_of_positive, symmetric_eigen
from curvlinops.operators.factors import DenseFactor, DiagonalFactor, Eigen, Factor


def as_factor(given: Tensor | Factor, name: str) -> Factor:
    """A factor from a tensor: ``[n]`` a diagonal, ``[n, n]`` or ``[G, n, n]`` dense, which must be symmetric.

    Args:
        given: The tensor; a factor is returned as it is.
        name: How errors call it.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is not symmetric, not real or not finite.

    >>> type(as_factor(torch.ones(3), "left")).__name__
    'DiagonalFactor'
    """
    if isinstance(given, Factor):
        return given
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor or a factor, got {type(given).__name__}.")
    if given.ndim not in (1, 2, 3) or not given.is_floating_point() or 0 in given.shape:
        raise ValueError(
            f"{name}: expected real numbers, [n] for a diagonal, [n, n] or [G, n, n] for symmetric matrices, got "
            f"{list(given.shape)} in {given.dtype}."
        )
    if not bool(given.isfinite().all()):
        raise ValueError(f"{name}: {int((~given.isfinite()).sum())} of {given.numel()} entries are not finite.")
    if given.ndim == 1:
        return DiagonalFactor(given)
    if given.shape[-2] != given.shape[-1] or not is_symmetric(given):
        raise ValueError(
            f"{name}: expected symmetric matrices [n, n] or [G, n, n], got {list(given.shape)}"
            f"{'' if given.shape[-2] != given.shape[-1] else ', which are not symmetric'}. Pass (M + M.mT) / 2."
        )
    return DenseFactor(given)


# -- several at once ---------------------------------------------------------------------------------------------------


def eigendecompositions(factors: Sequence[Factor], retry_double_precision: bool = True) -> list[Eigen]:
    """The eigendecompositions of factors, those of one size together; kept with factors that own their entries."""
    known: dict[int, Eigen] = {}
    for factor in factors:
        if isinstance(factor, DiagonalFactor):
            known[id(factor)] = Eigen(factor.diagonal(), None)
        elif factor._eigen is not None:
            known[id(factor)] = factor._eigen
    open_ones = list({id(factor): factor for factor in factors if id(factor) not in known}.values())
    found = symmetric_eigen([factor._tensor for factor in open_ones], retry_double_precision)
    for factor, (values, basis) in zip(open_ones, found, strict=True):
        known[id(factor)] = Eigen(values, basis)
        if factor.is_owned:
            factor._eigen = known[id(factor)]
    return [known[id(factor)] for factor in factors]


def inverses(factors: Sequence[Factor], retry_double_precision: bool = True) -> list[Factor]:
    """The inverses of definite factors, those of one size together.

    Raises:
        ValueError: If a factor is not definite.
    """
    results: dict[int, Factor] = {}
    dense: list[DenseFactor] = []
    for factor in factors:
        if isinstance(factor, DenseFactor) and factor not in dense:
            dense.append(factor)
        elif isinstance(factor, DiagonalFactor):
            results[id(factor)] = _inverse_of_diagonal(factor)
    signs = [torch.where(factor.trace() < 0, -1.0, 1.0).to(factor.dtype).reshape(-1, 1, 1) for factor in dense]
    positive = [f._tensor if bool((sign > 0).all()) else f._tensor * sign for f, sign in zip(dense, signs, strict=True)]
    found = inverses_of_positive(positive, retry_double_precision)
    for factor, sign, matrix in zip(dense, signs, found, strict=True):
        inverse = DenseFactor(matrix.mul_(sign), True)
        if factor._eigen is not None and bool((factor._eigen.values != 0).all()):
            inverse._eigen = Eigen(1.0 / factor._eigen.values, factor._eigen.basis)
        results[id(factor)] = inverse
    return [results[id(factor)] for factor in factors]


def _inverse_of_diagonal(factor: DiagonalFactor) -> DiagonalFactor:
    entries = factor.diagonal()
    if not bool((entries != 0).all()):
        raise ValueError(
            f"{int((entries == 0).sum())} of {entries.numel()} entries of a diagonal factor are zero: the inverse does "
            "not exist. Pass a positive damping."
        )
    return DiagonalFactor(1.0 / entries, True)
