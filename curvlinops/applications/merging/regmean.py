"""The option of RegMean: weaker correlations between the inputs of a layer."""

from __future__ import annotations

from typing import Any

import torch

from curvlinops import BlockDiagonal, Diagonal, Kronecker, LinearOperator


def shrink_off_diagonal(fisher: LinearOperator, scale: float) -> LinearOperator:
    r"""Kronecker-factored blocks B ⊗ A with what is off the diagonal of A multiplied by a number.

    .. math::
        A \mapsto s A + (1 - s) \operatorname{diag}(A),

    which is positive semi-definite where A is. RegMean (the forward-only KFAC of linear layers) takes s = 0.9, or 0.1
    for T5. Blocks that are diagonal, and exact blocks, which have no A, stay as they are.

    **Cost**: a copy of each A. Computes a KFAC matrix that is still to be computed.

    **Reference**: Jin, Ren, Preotiuc-Pietro, Cheng (2023), Dataless knowledge fusion by merging weights of language
    models, section 3.2, arXiv:2212.09849.

    Args:
        fisher: A :class:`Kronecker` product, a block-diagonal operator of such, or KFAC. It is not changed.
        scale: s, from 0 (the diagonal) to 1 (A itself). A joined bias is an input like the others.

    Returns:
        The operator, frozen.

    Raises:
        TypeError: If ``fisher`` is no operator, or a block is neither a Kronecker product nor a diagonal.
        ValueError: If ``scale`` is outside of 0 to 1.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> shrink_off_diagonal(Kronecker(torch.ones(1), A), 0.5).to_dense().tolist()
    [[2.0, 0.5], [0.5, 2.0]]
    """
    number = float(scale)
    if not 0 <= number <= 1:
        raise ValueError(f"scale: expected a number from 0 to 1, got {scale}.")
    if not isinstance(fisher, LinearOperator):
        raise TypeError(f"fisher: expected an operator, got {type(fisher).__name__}.")
    return _shrunk(fisher.to_block_diagonal() if hasattr(fisher, "to_block_diagonal") else fisher, number)


def _shrunk(operator: Any, scale: float) -> LinearOperator:
    if isinstance(operator, BlockDiagonal):
        blocks = [_shrunk(block, scale) for block in operator.blocks]
        return BlockDiagonal(blocks, positions=operator.positions, space=operator.domain)
    if isinstance(operator, Diagonal):
        return operator.frozen()
    if not isinstance(operator, Kronecker):
        raise TypeError(
            f"shrink_off_diagonal: expected Kronecker products B ⊗ A, got a {type(operator).__name__}. Pass a KFAC "
            "matrix, for RegMean with fisher_type='forward-only'."
        )
    inputs = scale * operator.right.to_dense() + (1 - scale) * torch.diag_embed(operator.right.diagonal())
    return Kronecker(
        operator.left.frozen(),
        inputs,
        arrangement=operator.arrangement,
        space=operator.domain,
        shift=operator.shift,
        is_positive=operator.POSITIVE_SEMIDEFINITE,
    ).frozen()
