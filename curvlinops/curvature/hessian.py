"""The Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from torch import Tensor

from curvlinops.curvature.base import BatchProduct, RiskOptions
from curvlinops.curvature.cost import Units
from curvlinops.curvature.regularization import L2Regularized
from curvlinops.risk.model import Parameters


class HessianLinearOperator(L2Regularized):
    r"""The Hessian :math:`H = c \sum_n \nabla^2_\theta \ell_n` of the loss of all data.

    **Cost** of a product: a forward, a backward that records its graph, and for each column a backward through both,
    about 3 gradients for one column and 2 for each further one.

    **Reference**: Pearlmutter (1994), Fast exact multiplication by the Hessian, doi:10.1162/neco.1994.6.1.147.

    Args:
        model_func: See :class:`CurvatureLinearOperator`, as for all arguments but those below.
        loss_func: The loss; any callable (prediction, y) -> scalar.
        params: The parameters.
        data: The data.
        progressbar: Whether to show progress.
        check_deterministic: Whether to check that model and data repeat.
        num_data: Number of data.
        batch_size_fn: Number of data in X.
        l2: Adds l2 · I, the Hessian of ½·l2·‖θ‖².
        **options: ``weight_fn``, ``process_group``, ``chunk_size``.

    Raises:
        NotImplementedError: If the model cannot be differentiated twice.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = [(torch.eye(2), torch.zeros(2, 1))]
    >>> H = HessianLinearOperator(model, torch.nn.MSELoss(reduction="sum"), list(model.parameters()), data)
    >>> (H @ torch.eye(2)).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """

    SELF_ADJOINT = True
    _UNITS = Units(streamed=9, lean=9, kept=6)

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
        *,
        l2: float = 0.0,
        **options: Unpack[RiskOptions],
    ) -> None:
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
        self._set_l2(l2)

    def _linearize_batch(self, X: Any, y: Any) -> BatchProduct:
        return self._risk.second_order(X, y)
