"""The empirical Fisher matrix: the uncentred second moment of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from torch import Tensor

from curvlinops.curvature.base import CurvatureLinearOperator, RiskOptions
from curvlinops.curvature.sandwich import SandwichLinearOperator
from curvlinops.risk.losses import Terms
from curvlinops.risk.losses.factors import LossFactor, gradient_factor
from curvlinops.risk.model import Parameters


def require_terms(operator: CurvatureLinearOperator, terms: str) -> str:
    """Check that the loss has terms, and the argument that says which of them go together."""
    if terms not in ("position", "datum"):
        raise ValueError(f"terms: expected 'position' or 'datum', got {terms!r}.")
    if operator._risk.loss is not None:
        operator._risk.loss.require_known(type(operator).__name__)
    return terms


class EFLinearOperator(SandwichLinearOperator):
    r"""The empirical Fisher :math:`E = c \sum_n (J_n^\top \nabla_f \ell_n) (J_n^\top \nabla_f \ell_n)^\top`.

    The gradients are the actual ones, so that an example weight or class weight enters squared. With
    ``terms="position"`` each position of a datum (a token, a pixel) is a term of its own; with ``terms="datum"`` the
    terms of a datum are summed before the outer product.

    **Cost**: as :class:`GGNLinearOperator`.

    **Reference**: Kunstner, Balles, Hennig (2019), Limitations of the empirical Fisher approximation for natural
    gradient descent, arXiv:1905.12558.

    Args:
        model_func: See :class:`CurvatureLinearOperator`, as for all arguments but those below.
        loss_func: Cross-entropy, squared error or binary cross-entropy.
        params: The parameters.
        data: The data.
        progressbar: Whether to show progress.
        check_deterministic: Whether to check that model and data repeat.
        num_data: Number of data.
        batch_size_fn: Number of data in X.
        terms: ``"position"`` or ``"datum"``.
        **options: ``weight_fn``, ``process_group``, ``chunk_size``.

    Raises:
        NotImplementedError: If the loss is not one of the three.
        ValueError: If ``terms`` is unknown.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> data = [(torch.rand(5, 3), torch.rand(5, 2))]
    >>> E = EFLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
    >>> sorted(E @ {"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    ['bias', 'weight']
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
        *,
        terms: str = "position",
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
        self._terms = require_terms(self, terms)

    def _columns_a_datum(self, y: Any) -> int | None:
        loss = self._risk.loss
        return 1 if self._terms == "datum" or loss is None else loss.num_positions(y)

    def _loss_factor(self, terms: Terms) -> LossFactor:
        return gradient_factor(terms, self._terms)
