"""The generalised Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from torch import Tensor

from curvlinops.curvature.base import RiskOptions
from curvlinops.curvature.regularization import L2Regularized
from curvlinops.curvature.sandwich import GaussNewtonFactor, Sampling, SandwichLinearOperator
from curvlinops.risk.model import Parameters


class GGNLinearOperator(GaussNewtonFactor, L2Regularized, SandwichLinearOperator):
    r"""The generalised Gauss-Newton matrix :math:`G = c \sum_n J_n^\top \nabla^2_f \ell_n J_n`.

    :math:`J_n` is the Jacobian of datum n's prediction, :math:`\ell_n` its loss term, c is 1 under 'sum' and one over
    the denominator of the whole data set under 'mean'. With ``mc_samples`` M > 0 the loss Hessian is replaced by M
    samples of would-be gradients, see :class:`FisherMCLinearOperator`.

    **Cost** of a product with one column: a forward with tangents and a backward, about 5/3 gradients; models without
    forward mode: about 7/3. Memory: two to three times the activations, not growing with the number of columns.

    **Reference**: Schraudolph (2002), Fast curvature matrix-vector products, doi:10.1162/08997660260028683; Martens
    (2020), New insights and perspectives on the natural gradient method, arXiv:1412.1193.

    Args:
        model_func: See :class:`CurvatureLinearOperator`, as for all arguments but those below.
        loss_func: The loss; any callable (prediction, y) -> scalar.
        params: The parameters.
        data: The data.
        progressbar: Whether to show progress.
        check_deterministic: Whether to check that model and data repeat.
        num_data: Number of data.
        batch_size_fn: Number of data in X.
        mc_samples: Number of samples, 0 for the exact matrix.
        seed: Seed of the samples.
        l2: Adds l2 · I, the curvature of ½·l2·‖θ‖².
        **options: ``weight_fn``, ``process_group``, ``chunk_size``.

    Raises:
        ValueError: If ``mc_samples`` is negative.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> data = [(torch.rand(5, 3), torch.tensor([0, 1, 1, 0, 1]))]
    >>> G = GGNLinearOperator(model, torch.nn.CrossEntropyLoss(), list(model.parameters()), data)
    >>> (G @ torch.ones(8)).shape
    torch.Size([8])
    """

    def __init__(
        self,
        model_func: Callable[..., Any],
        loss_func: Callable[[Tensor, Any], Tensor],
        params: Parameters,
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        mc_samples: int = 0,
        seed: int = 2147483647,
        *,
        l2: float = 0.0,
        **options: Unpack[RiskOptions],
    ) -> None:
        self._sampling = Sampling(mc_samples, seed)
        self._ORDER_MATTERS = mc_samples > 0
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar,
            check_deterministic,
            num_data,
            batch_size_fn,
            **options,
        )
        loss = self._risk.loss
        if loss is not None and not loss.is_known:
            self.POSITIVE_SEMIDEFINITE = False
            if mc_samples:
                loss.require_known("Monte-Carlo sampling")
        self._set_l2(l2)
