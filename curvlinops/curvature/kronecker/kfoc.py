"""The Kronecker products that are closest to the blocks they stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from curvlinops.curvature.base import RiskOptions
from curvlinops.curvature.kronecker.accumulation import Accumulation
from curvlinops.curvature.kronecker.base import KroneckerFactoredLinearOperator
from curvlinops.curvature.kronecker.blocks import Block, Columns, Scaling
from curvlinops.curvature.kronecker.factored_blocks import FactoredBlock
from curvlinops.curvature.kronecker.settings import Settings
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

    **Cost**: a pass of :class:`KFACLinearOperator`, and a pass for each factor in turn, until it turns by no more than
    ``rtol``. A pass takes a product of each column ``[R, S]`` with a factor. The columns are kept, in up to a quarter
    of the device's memory, so that no further forward and backward is needed; where they do not fit, each pass takes
    these, too. Afterwards as there.

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
        max_iter: How often A turns at most; B turns before and after, each time in a pass over the data.
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
        settings = Settings.checked(
            fisher_type,
            mc_samples,
            seed,
            KFACType.EXPAND,
            None,
            separate_weight_and_bias,
            terms,
            unsupported,
        )
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar,
            check_deterministic,
            num_data,
            batch_size_fn,
            settings,
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
        if not isinstance(block, FactoredBlock) or self._is_settled(number):
            return []
        return [block.contraction(columns, self._state.kept[number], self._turns_inputs)]

    def _is_settled(self, number: int) -> bool:
        """Whether the factors of a block turned no more when its factor of gradients did last."""
        return float(self._state.kept[number].get("change", torch.inf)) <= self._rtol

    def _finish(self, state: Accumulation, sums: Sequence[Tensor], scaling: Scaling) -> None:
        numbers = [i for i, block in enumerate(state.blocks or []) if isinstance(block, FactoredBlock)]
        if state.num_passes == 0:
            super()._finish(state, sums, scaling)
            state.is_done = not any(isinstance(block, FactoredBlock) for block in state.blocks or [])
            return
        of_inputs, is_new = self._turns_inputs, state.num_passes == 1
        still_open = [i for i in numbers if not self._is_settled(i)]
        for i, total in zip(still_open, sums, strict=True):
            change = _improve(state.kept[i], scaling.times(total), of_inputs)
            # Only where A has turned before does it say something that B turns no more.
            state.kept[i]["change"] = torch.full_like(change, torch.inf) if of_inputs or is_new else change
        state.num_passes += 1
        still_open = [i for i in numbers if not self._is_settled(i)]
        # The factor of gradients turns last, so that both fit together.
        state.is_done = not of_inputs and (not still_open or state.num_passes >= self._max_passes)
        if state.is_done and still_open:
            self._warn(still_open)

    def _warn(self, still_open: Sequence[int]) -> None:
        blocks = self._state.blocks or []
        names = [self.domain.label(blocks[i].positions[0]) for i in still_open]
        warnings.warn(
            f"KFOCLinearOperator: after {self._state.num_passes} passes the factors of {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''} still turn by more than rtol={self._rtol:g}. They are closer than "
            "KFAC's, but not the closest: raise max_iter, or rtol.",
            stacklevel=2,
        )

    def factors(self, name: str | int) -> dict[str, Tensor]:
        """Copies of the factors of a parameter; see :meth:`KFACLinearOperator.factors`.

        Args:
            name: Name of the parameter, or its position in ``params``.

        Raises:
            KeyError: If there is no such parameter.
        """
        return {what: tensor for what, tensor in super().factors(name).items() if what != "change"}

    def _settings(self) -> dict[str, float]:
        """What the matrix depends on, as numbers."""
        return super()._settings() | {"max_passes": self._max_passes, "rtol": self._rtol}


def _improve(kept: dict[str, Tensor], total: Tensor, of_inputs: bool) -> Tensor:
    """Put the best factor for the other one in its place; how much it turned."""
    other, name = _SIDES if of_inputs else _SIDES[::-1]
    tiny = torch.finfo(total.dtype).tiny
    old, new = kept[name], total / _squared_norm(kept[other]).clamp_min(tiny)
    num_groups = len(new) if new.ndim == 3 else 1
    turned: Tensor = (_normalised(new) - _normalised(old)).norm() / num_groups**0.5
    if of_inputs:  # A keeps its trace; B, found anew in the next pass, takes the scale
        new = new * (_trace(old) / _trace(new).clamp_min(tiny))
    kept[name] = new
    return turned


def _squared_norm(factor: Tensor) -> Tensor:
    """Of each group ``[G, 1, 1]``, or of a diagonal or an ungrouped matrix."""
    return factor.square().sum((1, 2), keepdim=True) if factor.ndim == 3 else factor.square().sum()


def _normalised(factor: Tensor) -> Tensor:
    return factor / _squared_norm(factor).sqrt().clamp_min(torch.finfo(factor.dtype).tiny)


def _trace(factor: Tensor) -> Tensor:
    if factor.ndim == 3:
        return factor.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return factor.sum() if factor.ndim == 1 else factor.trace()
