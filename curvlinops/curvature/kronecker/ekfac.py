"""Kronecker-factored curvature with corrected eigenvalues."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

from torch import Tensor

from curvlinops.curvature.base import RiskOptions
from curvlinops.curvature.kronecker.accumulation import Accumulation
from curvlinops.curvature.kronecker.base import KroneckerFactoredLinearOperator
from curvlinops.curvature.kronecker.blocks import Block, Columns, FactorPool, Scaling
from curvlinops.curvature.kronecker.decomposition import shared_bases
from curvlinops.curvature.kronecker.factored_blocks import FactoredBlock
from curvlinops.curvature.kronecker.settings import Settings
from curvlinops.curvature.kronecker.types import FisherType, KFACType
from curvlinops.memory import default_budget, num_bytes
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.eigen_decomposed import decomposed
from curvlinops.risk.model import Parameters


class EKFACLinearOperator(KroneckerFactoredLinearOperator):
    r"""Eigenvalue-corrected KFAC: the best diagonal in the eigenbasis of KFAC's factors.

    With the eigenvectors :math:`Q_B` and :math:`Q_A` of :class:`KFACLinearOperator`'s factors and the columns
    :math:`G_{nm} = \sum_t g_{nmt} a_{nt}^\top` as matrices, a weight's block is

    .. math::
        (Q_B \otimes Q_A) \operatorname{diag}(\lambda) (Q_B \otimes Q_A)^\top, \qquad
        \lambda_{ij} = c \sum_{nm} (Q_B^\top G_{nm} Q_A)_{ij}^2,

    with the same draws in both passes. No other diagonal in this basis is closer to the matrix that is approximated,
    KFAC's included. Parameters that have no Kronecker product have the same blocks as there.

    **Cost**: that of :class:`KFACLinearOperator`, an eigendecomposition of each factor, and the rotation of inputs and
    output gradients or of the columns, whichever is cheaper. Columns are kept between the two passes if they take no
    more memory than a gradient; else the second takes a forward and backwards as the first. A product costs four
    products of matrices. An inverse costs O(D).

    **Reference**: George, Laurent, Bouthillier, Ballas, Vincent (2018), Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis, arXiv:1806.03884.

    Args:
        model_func: See :class:`KFACLinearOperator`, as for all other arguments; ``"forward-only"`` has no gradients to
            correct with, and is refused.
        loss_func: Cross-entropy, squared error or binary cross-entropy.
        params: The parameters.
        data: The data, in a fixed order.
        progressbar: Whether to show progress.
        check_deterministic: Whether to check that model and data repeat.
        seed: Seed of the samples.
        fisher_type: Which matrix is approximated.
        mc_samples: Number of samples a datum, for ``"mc"``.
        kfac_approx: How positions are treated in the factors; the columns are summed over positions in any case.
        num_per_example_loss_terms: Loss terms a datum has; seen by itself, and a mismatch is an error.
        separate_weight_and_bias: Whether a bias has a block of its own.
        num_data: Number of data.
        batch_size_fn: Number of data in X.
        terms: ``"position"`` or ``"datum"``, for ``"empirical"``.
        unsupported: ``"diagonal"`` or ``"error"``, for parameters whose use is not known.
        **options: ``weight_fn``, ``process_group``, ``chunk_size``.

    Raises:
        NotImplementedError: If the loss is not one of the three, or a parameter is not supported.
        ValueError: If an option is not understood.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> data = [(torch.rand(5, 3), torch.tensor([0, 1, 1, 0, 1]))]
    >>> E = EKFACLinearOperator(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    >>> bool((E.inverse(damping=1e-2) @ torch.ones(26)).isfinite().all())
    True
    """

    _KIND = 1
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
        kfac_approx: KFACType | str = KFACType.EXPAND,
        num_per_example_loss_terms: int | None = None,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        *,
        terms: str = "position",
        unsupported: str = "diagonal",
        **options: Unpack[RiskOptions],
    ) -> None:
        if fisher_type == FisherType.FORWARD_ONLY:
            raise NotImplementedError(
                "fisher_type='forward-only' has no gradients, so there are no eigenvalues to correct: use "
                "KFACLinearOperator."
            )
        settings = Settings.checked(
            fisher_type,
            mc_samples,
            seed,
            kfac_approx,
            num_per_example_loss_terms,
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

    @property
    def _max_kept_bytes(self) -> int:
        # Beyond the size of a gradient, the second pass costs less than memory does.
        return min(num_bytes(self._params), default_budget(self.device))

    @property
    def _step(self) -> str:
        return "factors" if self._state.num_passes == 0 else "eigenvalues"

    def _sums(self, number: int, block: Block, columns: Columns, is_first: bool) -> list[Tensor]:
        if self._state.num_passes == 0:
            return super()._sums(number, block, columns, is_first)
        return [block.correction(columns, self._state.kept[number])] if isinstance(block, FactoredBlock) else []

    def _finish(self, state: Accumulation, sums: Sequence[Tensor], scaling: Scaling) -> None:
        factored = [i for i, block in enumerate(state.blocks or []) if isinstance(block, FactoredBlock)]
        if state.num_passes == 0:
            super()._finish(state, sums, scaling)
            rotated = self._rotated([state.kept[i] for i in factored])
            for i, kept in zip(factored, rotated, strict=True):
                state.kept[i] = kept
            state.is_done = not factored
            return
        for i, eigenvalues in zip(factored, sums, strict=True):
            state.kept[i]["eigenvalues"] = scaling.times(eigenvalues)
        state.num_passes += 1
        state.is_done = True

    def _rotated(self, kept: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Eigenbases in the place of the factors; a diagonal one's are the unit vectors."""
        sides = [(k, side) for k in range(len(kept)) for side in ("gradient", "input")]
        dense = [(k, side) for k, side in sides if kept[k][f"{side}_covariance"].ndim > 1]
        matrices = [kept[k][f"{side}_covariance"] for k, side in dense]
        pool = FactorPool()  # layers that share an input share its factor
        factors = [pool.dense(matrix if matrix.ndim == 3 else matrix.unsqueeze(0)) for matrix in matrices]
        distinct = list({id(factor): factor for factor in factors}.values())
        found_bases = shared_bases([factor.to_dense() for factor in distinct], self._risk.process_group)
        # In order in memory, as after being saved, so that both give the same bits.
        bases = {id(f): basis.contiguous() for f, basis in zip(distinct, found_bases, strict=True)}
        found: list[dict[str, Tensor]] = [{} for _ in kept]
        for (k, side), matrix, factor in zip(dense, matrices, factors, strict=True):
            found[k][f"{side}_basis"] = bases[id(factor)].reshape(matrix.shape)
        return found

    def _block_operator(self, number: int, block: Block, pool: FactorPool) -> LinearOperator:
        kept = self._state.kept[number]
        if not isinstance(block, FactoredBlock):
            return super()._block_operator(number, block, pool)
        left, right = block.bases(kept)
        space = self.domain.select(block.positions)
        return decomposed(kept["eigenvalues"], left, right, block.arrangement, space, is_owned=True)

    def factors(self, name: str | int) -> dict[str, Tensor]:
        """Copies of what the block of a parameter is made of.

        Args:
            name: Name of the parameter, or its position in ``params``.

        Returns:
            For a weight ``gradient_basis`` ``[R, R]``, ``input_basis`` ``[S, S]`` (none for an embedding, whose rows
            keep the unit vectors) and ``eigenvalues`` ``[R, S]``, with an axis of groups in front where there is more
            than one; otherwise as for :class:`KFACLinearOperator`.

        Raises:
            KeyError: If there is no such parameter.
        """
        return super().factors(name)
