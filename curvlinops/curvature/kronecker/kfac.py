"""Kronecker-factored approximate curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from torch import Tensor

from curvlinops.curvature.base import RiskOptions
from curvlinops.curvature.kronecker.base import KroneckerFactoredLinearOperator
from curvlinops.curvature.kronecker.module_factors import FactorsByModule
from curvlinops.curvature.kronecker.settings import Settings
from curvlinops.curvature.kronecker.types import FisherType, KFACType
from curvlinops.risk.model import Parameters


class KFACLinearOperator(KroneckerFactoredLinearOperator, FactorsByModule):
    r"""Kronecker-factored approximate curvature: a block :math:`B \otimes A` for each weight.

    With inputs :math:`a_{nt}` of datum n at position t and gradients :math:`g_{nmt}` of the loss factor's column m at
    the layer's outputs,

    .. math::
        A = \frac{\sum_n \mu_n \sum_t a_{nt} a_{nt}^\top}{\sum_n \mu_n T_n}, \qquad
        B = c \sum_{nmt} g_{nmt} g_{nmt}^\top,

    where :math:`\mu_n` is the weight that the loss gives to the datum (masks, class weights, ``weight_fn``) and c the
    scale of the loss. ``"reduce"`` takes :math:`\bar a_n = \frac{1}{T_n} \sum_t a_{nt}` and :math:`\sum_t g_{nmt}`
    instead. All parameters get a block: Kronecker products for linear layers, Hugging Face's ``Conv1D``, convolutions
    and transposed ones with groups, projections of self-attention, embeddings (:math:`A` is diagonal); the exact block
    for biases, normalisations and bare parameters of up to 1024 entries, and the exact diagonal beyond and for
    parameters whose use is not known. :attr:`blocks` tells. Without gradients (``"forward-only"``) the block is
    :math:`c \sum_{nt} \mu_n a_{nt} a_{nt}^\top \otimes I`, and the number of positions times c I for parameters without
    an input.

    **Cost**: one forward, a backward for each column of a datum (``"mc"``: ``mc_samples``; ``"type-2"``: entries of its
    prediction), and for a weight ``[R, S]`` :math:`S^2` multiplications a position and :math:`R^2` a position and
    column, of which half are saved by symmetry. Memory: :math:`S^2 + R^2` numbers a weight, beside what a gradient
    takes. A product costs two products of matrices a weight.

    **Reference**: Martens, Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature,
    arXiv:1503.05671; Eschenhagen, Immer, Turner, Schneider, Hennig (2023), Kronecker-factored approximate curvature
    for modern neural network architectures, arXiv:2311.00636.

    Args:
        model_func: See :class:`CurvatureLinearOperator`, as for all arguments but those below.
        loss_func: Cross-entropy, squared error or binary cross-entropy; any for ``"forward-only"``.
        params: The parameters.
        data: The data, for ``"mc"`` in a fixed order.
        progressbar: Whether to show progress.
        check_deterministic: Whether to check that model and data repeat.
        seed: Seed of the samples.
        fisher_type: Which matrix is approximated, a :class:`FisherType` or its string.
        mc_samples: Number of samples a datum, for ``"mc"``.
        kfac_approx: How positions are treated, a :class:`KFACType` or its string; embeddings are always expanded.
        num_per_example_loss_terms: Loss terms a datum has; seen by itself, and a mismatch is an error.
        separate_weight_and_bias: Whether a bias has a block of its own; otherwise it joins the block of its weight.
        num_data: Number of data.
        batch_size_fn: Number of data in X.
        terms: ``"position"`` or ``"datum"``, for ``"empirical"``; see :class:`EFLinearOperator`.
        unsupported: ``"diagonal"`` or ``"error"``, for parameters whose use is not known.
        **options: ``weight_fn``, ``process_group``, ``chunk_size``.

    Raises:
        NotImplementedError: If the loss is not one of the three, or a parameter is not supported.
        ValueError: If an option is not understood.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> data = [(torch.rand(5, 3), torch.tensor([0, 1, 1, 0, 1]))]
    >>> K = KFACLinearOperator(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    >>> K.inverse(damping=1e-2).shape
    (26, 26)
    >>> [row.kind for row in K.blocks]
    ['Kronecker', 'exact', 'Kronecker', 'exact']
    """

    _KIND = 0

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
