"""The Monte-Carlo Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from torch import Tensor

from curvlinops.curvature.base import RiskOptions
from curvlinops.curvature.ggn import GGNLinearOperator
from curvlinops.risk.model import Parameters


class FisherMCLinearOperator(GGNLinearOperator):
    r"""The Monte-Carlo Fisher :math:`F = c \sum_n \frac{1}{M} \sum_m J_n^\top s_{nm} s_{nm}^\top J_n`.

    :math:`s_{nm}` is the gradient of the loss at a target drawn from the model's own prediction:
    :math:`\sqrt{m_n} (p - e_{\hat y})` with :math:`\hat y \sim \mathrm{softmax}(f)` for cross-entropy,
    :math:`\sqrt{m_n} (\sigma(f) - \hat y)` with :math:`\hat y \sim \mathrm{Bernoulli}` for binary cross-entropy,
    :math:`2 (f - \hat y)` with :math:`\hat y \sim N(f, 1/2)` for squared error. The mass :math:`m_n` is what the true
    target, its class weight and smoothing put on the term. One draw covers all positions of a datum. The expectation
    over seeds is the GGN. One operator is one matrix: each product draws the same numbers.

    **Cost**: as :class:`GGNLinearOperator`.

    **Reference**: Kunstner, Balles, Hennig (2019), Limitations of the empirical Fisher approximation for natural
    gradient descent, arXiv:1905.12558.

    Args:
        model_func: See :class:`CurvatureLinearOperator`, as for all arguments but those below.
        loss_func: Cross-entropy, squared error or binary cross-entropy.
        params: The parameters.
        data: The data, in a fixed order.
        progressbar: Whether to show progress.
        check_deterministic: Whether to check that model and data repeat.
        seed: Seed of the samples.
        mc_samples: Number of samples M a datum.
        num_data: Number of data.
        batch_size_fn: Number of data in X.
        **options: ``weight_fn``, ``process_group``, ``chunk_size``.

    Raises:
        NotImplementedError: If the loss is not one of the three.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> data = [(torch.rand(5, 3), torch.tensor([0, 1, 1, 0, 1]))]
    >>> F = FisherMCLinearOperator(model, torch.nn.CrossEntropyLoss(), list(model.parameters()), data, mc_samples=2)
    >>> bool((F @ torch.eye(8)).trace() > 0)
    True
    """

    def __init__(
        self,
        model_func: Callable[..., Any],
        loss_func: Callable[[Tensor, Any], Tensor],
        params: Parameters,
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = 2147483647,
        mc_samples: int = 1,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        **options: Unpack[RiskOptions],
    ) -> None:
        if mc_samples == 0:
            raise ValueError("mc_samples: expected at least one sample; GGNLinearOperator is the exact matrix.")
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar,
            check_deterministic,
            num_data,
            batch_size_fn,
            mc_samples=mc_samples,
            seed=seed,
            **options,
        )
