"""The inverses of several Kronecker products, whose factors of one size are decomposed together."""

from __future__ import annotations

from collections.abc import Sequence

from curvlinops.operators.damping import DampedFactors, InverseOptions, checked_damping, damped_factors
from curvlinops.operators.eigen_decomposed import EigenDecomposed
from curvlinops.operators.factor_sets import eigendecompositions, inverses
from curvlinops.operators.factors import DenseFactor, Factor
from curvlinops.operators.kronecker import Kronecker
from curvlinops.operators.solved_factor import solved_factors


def kronecker_inverses(
    blocks: Sequence[Kronecker], dampings: Sequence[float], options: InverseOptions
) -> list[Kronecker | EigenDecomposed]:
    """The inverses of several Kronecker products, whose factors of one size are decomposed together.

    Args:
        blocks: The products.
        dampings: A damping for each.
        options: How they are damped; see :meth:`Kronecker.inverse`.
    """
    numbers = [checked_damping(damping) for damping in dampings]
    retry = options.retry_double_precision
    results: dict[int, Kronecker | EigenDecomposed] = {}
    factored: dict[int, tuple[Factor, Factor]] = {}
    exact: dict[int, Kronecker] = {}
    damped = DampedFactors()
    for index, (block, damping) in enumerate(zip(blocks, numbers, strict=True)):
        if block.right.is_one and (block.POSITIVE_SEMIDEFINITE or not block.shift):
            factored[index] = damped.of(block.left, block.shift + damping), block.right
        elif block.shift and options.use_heuristic_damping:
            raise ValueError(
                f"use_heuristic_damping: {block!r} has a multiple of the identity, which the factors cannot take up. "
                "Damp exactly, or damp the matrix without its shift."
            )
        elif block.shift or (options.use_exact_damping and damping):
            exact[index] = block.frozen()
        else:
            factored[index] = damped_factors(block.left, block.right, damping, options, damped)
    eigendecompositions([factor for block in exact.values() for factor in (block.left, block.right)], retry)
    for i, block in exact.items():
        results[i] = block._exact_inverse(numbers[i])
    for i, (left, right) in zip(factored, _inverted(list(factored.values()), retry), strict=True):
        results[i] = blocks[i]._like(left, right, 0.0, blocks[i].POSITIVE_SEMIDEFINITE)
    return [results[i] for i in range(len(blocks))]


def _inverted(pairs: Sequence[tuple[Factor, Factor]], retry: bool) -> list[tuple[Factor, Factor]]:
    """The inverses of both factors of each pair."""
    needed = {id(factor) for left, right in pairs if not right.is_one for factor in (left, right)}
    alone = {id(left): left for left, right in pairs if right.is_one and _is_positive_dense(left)}
    lone = [factor for key, factor in alone.items() if key not in needed]
    known = dict(zip(map(id, lone), solved_factors(lone, retry), strict=True))
    others = [factor for pair in pairs for factor in pair if id(factor) not in known]
    known.update(zip(map(id, others), inverses(others, retry), strict=True))
    return [(known[id(left)], known[id(right)]) for left, right in pairs]


def _is_positive_dense(factor: Factor) -> bool:
    return isinstance(factor, DenseFactor) and bool((factor.trace() > 0).all())
