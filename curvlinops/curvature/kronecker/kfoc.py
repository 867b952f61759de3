"""The Kronecker products that are closest to the blocks they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from curvlinops.curvature.base import RiskOptions
from curvlinops.curvature.kronecker.accumulation import Accumulation
from curvlinops.curvature.kronecker.base import KroneckerFactoredLinearOperator
from curvlinops.curvature.kronecker.blocks import Block, Columns, Scaling
from curvlinops.curvature.kronecker.factored_blocks import FactoredBlock
from curvlinops.curvature.kronecker.types import FisherType, KFACType
from curvlinops.risk.model import Parameters

_SIDES = ("gradient_covariance", "input_covariance")


class KFOCLinearOperator(KroneckerFactoredLinearOperator):
    r"""Kronecker-factored optimal curvature: the Kronecker product closest to a weight's block in Frobenius norm.

    With the columns :math:`G_{nm} = \sum_t g_{nmt} a_{nt}^\top` as matrices, the block is
    :math:`c \sum_{nm} \operatorname{vec} G_{nm} \operatorname{vec} G_{nm}^\top`, and the factors of
    :math:`B \otimes A` are found by alternating between the best one for the other,

    .. math::
        B = \frac{c \sum_{nm} G_{nm} A G_{nm}^\top}{\|A\|^2}, \qquad
        A = \frac{c \sum_{nm} G_{nm}^\top B G_{nm}}{\|B\|^2},

    which is the power iteration on the rearranged block. It begins with KFAC's factors, so that the error is never
    above KFAC's. A keeps KFAC's trace. For an embedding, A is the best diagonal. Parameters that have no Kronecker
    product have the same blocks as in :class:`KFACLinearOperator`.

    **Cost**: a pass of :class:`KFACLinearOperator`, and further passes of about the same cost, one for each factor in
    turn, until none turns by more than ``rtol``; afterwards as there.

    **Reference**: Schnaus, Lee, Triebel (2021), Kronecker-factored optimal curvature, Bayesian Deep Learning workshop
    at NeurIPS; Van Loan, Pitsianis (1993), Approximation with Kronecker products, doi:10.1007/978-94-015-8196-7_17.

    Args:
        model_func: See :class:`KFACLinearOperator`, as for all other arguments; ``"forward-only"`` has no columns to be
            close to, and is refused.
        loss_func: Cross-entropy, squared error or binary cross-entropy.
        params: The parameters.
        data: The data, in a fixed order.
        progressbar: Whether to show progress.
        check_deterministic: Whether to check that model and data repeat.
        seed: Seed of the samples.
        fisher_type: Which matrix is approximated.
        mc_samples: Number of samples a datum, for ``"mc"``.
        separate_weight_and_bias: Whether a bias has a block of its own.
        num_data: Number of data.
        batch_size_fn: Number of data in X.
        terms: ``"position"`` or ``"datum"``, for ``"empirical"``.
        unsupported: ``"diagonal"`` or ``"error"``, for parameters whose use is not known.
        rtol: Relative change of a factor, apart from its scale, at which the iteration ends.
        max_iter: Pairs of passes after KFAC's at most.
        **options: ``weight_fn``, ``process_group``, ``chunk_size``.

    Raises:
        NotImplementedError: If the loss is not one of the three, or a parameter is not supported.
        ValueError: If an option is not understood.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> data = [(torch.rand(5, 3), torch.tensor([0, 1, 1, 0, 1]))]
    >>> K = KFOCLinearOperator(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    >>> sorted(K.factors("0.weight"))
    ['gradient_covariance', 'input_covariance']
    """

    _KIND = 2
    _keeps_columns = True

    def __init__(
        self,
        model_func: Callable[..., Any],
        loss_func: Callable[[Tensor, Any], Tensor],
        params: Parameters,
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = 2147483647,
        fisher_type: FisherType | str = FisherType.MC,
        mc_samples: int = 1,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        *,
        terms: str = "position",
        unsupported: str = "diagonal",
        rtol: float = 1e-3,
        max_iter: int = 20,
        **options: Unpack[RiskOptions],
    ) -> None:
        if fisher_type == FisherType.FORWARD_ONLY:
            raise NotImplementedError(
                "fisher_type='forward-only' has no columns that a Kronecker product could be close to: use "
                "KFACLinearOperator, whose product is exact then."
            )
        if not rtol > 0 or max_iter < 1:
            raise ValueError(f"Expected rtol > 0 and max_iter >= 1, got {rtol} and {max_iter}.")
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar,
            check_deterministic,
            seed,
            fisher_type,
            mc_samples,
            KFACType.EXPAND,
            None,
            separate_weight_and_bias,
            num_data,
            batch_size_fn,
            terms,
            unsupported,
            **options,
        )
        self._rtol, self._max_passes = rtol, 1 + 2 * max_iter

    @property
    def _step(self) -> str:
        return "factors" if self._state.num_passes == 0 else f"alternation {self._state.num_passes}"

    @property
    def _turns_inputs(self) -> bool:
        """Whether the current pass improves the factor of inputs; gradients come first."""
        return self._state.num_passes % 2 == 0

    def _sums(self, number: int, block: Block, columns: Columns, is_first: bool) -> list[Tensor]:
        if self._state.num_passes == 0:
            return super()._sums(number, block, columns, is_first)
        if not isinstance(block, FactoredBlock):
            return []
        return [block.contraction(columns, self._state.kept[number], self._turns_inputs)]

    def _finish(self, state: Accumulation, sums: Sequence[Tensor], scaling: Scaling) -> None:
        if state.num_passes == 0:
            super()._finish(state, sums, scaling)
            state.is_done = not any(isinstance(block, FactoredBlock) for block in state.blocks or [])
            return
        of_inputs = self._turns_inputs
        blocks = zip(state.blocks or [], state.kept, strict=True)
        factored = [kept for block, kept in blocks if isinstance(block, FactoredBlock)]
        pairs = zip(factored, sums, strict=True)
        changes = [_improve(kept, scaling.times(total), of_inputs) for kept, total in pairs]
        state.num_passes += 1
        # The factor of gradients turns first; it is new when the iteration ends, so that both fit together.
        is_turned = state.num_passes > 2 and max(changes) <= self._rtol
        state.is_done = (is_turned or state.num_passes >= self._max_passes) and not of_inputs

    def _settings(self) -> dict[str, float]:
        """What the matrix depends on, as numbers."""
        return super()._settings() | {"max_passes": self._max_passes, "rtol": self._rtol}


def _improve(kept: dict[str, Tensor], total: Tensor, of_inputs: bool) -> float:
    """Put the best factor for the other one in its place; how much it turned."""
    other, name = _SIDES if of_inputs else _SIDES[::-1]
    tiny = torch.finfo(total.dtype).tiny
    old, new = kept[name], total / _squared_norm(kept[other]).clamp_min(tiny)
    num_groups = len(new) if new.ndim == 3 else 1
    turned = (_normalised(new) - _normalised(old)).norm() / num_groups**0.5
    if of_inputs:  # A keeps its trace; B, found anew in the next pass, takes the scale
        new = new * (_trace(old) / _trace(new).clamp_min(tiny))
    kept[name] = new
    return float(turned)


def _squared_norm(factor: Tensor) -> Tensor:
    """Of each group ``[G, 1, 1]``, or of a diagonal or an ungrouped matrix."""
    return factor.square().sum((1, 2), keepdim=True) if factor.ndim == 3 else factor.square().sum()


def _normalised(factor: Tensor) -> Tensor:
    return factor / _squared_norm(factor).sqrt().clamp_min(torch.finfo(factor.dtype).tiny)


def _trace(factor: Tensor) -> Tensor:
    if factor.ndim == 3:
        return factor.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return factor.sum() if factor.ndim == 1 else factor.trace()
