"""The Hessian of a function of the prediction at one mini-batch, by double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from curvlinops.risk.graph import saved_tensors
from curvlinops.risk.linearization import Columns, Engine, backward, checked
from curvlinops.risk.model import FunctionalModel
from curvlinops.risk.second_order_rules import SecondOrderRules, are_differentiated


class SecondOrder:
    """The Hessian of a function of the prediction at one mini-batch, by differentiating its gradient.

    Args:
        model: The model.
        X: Inputs of the mini-batch.
        engine: What is known about the model.
        objective: Maps the prediction, with its graph, to a scalar.
        is_reused: Whether there is more than one product.
    """

    def __init__(
        self,
        model: FunctionalModel,
        X: Any,
        engine: Engine,
        objective: Callable[[Tensor], Tensor],
        is_reused: bool = False,
    ) -> None:
        self._model = model
        self._engine = engine
        self.values = model.leaves()
        self.prediction = checked(self._predicted(X, is_reused), engine, twice=True)
        engine.learn_chunk_size(self.prediction)
        value = objective(self.prediction)
        self._gradients = gradients_of(model, value, self.values, create_graph=True)

    def _predicted(self, X: Any, is_reused: bool) -> Tensor:
        if is_reused:
            with SecondOrderRules():
                prediction = self._model(self.values, X)
            if not are_differentiated(prediction):
                return prediction
        return self._model(self.values, X)

    @property
    def gradient(self) -> list[Tensor]:
        """The gradient, without its graph."""
        return [g.detach() for g in filled(self._gradients, self.values)]

    def held(self) -> Iterator[Tensor]:
        """The tensors that are held between products."""
        return saved_tensors(*(gradient for gradient in self._gradients if gradient is not None))

    def __call__(self, V: Columns) -> list[Tensor]:
        """The Hessian times columns-last tensors ``[*shape, K]``."""
        curved = [(g, v) for g, v in zip(self._gradients, V, strict=True) if g is not None and g.requires_grad]
        if not curved:
            return [torch.zeros_like(v) for v in V]
        outputs, columns = zip(*curved, strict=True)
        return self._model.holding(self.values, lambda: backward(outputs, self.values, columns, self._engine))


def gradients_of(
    model: FunctionalModel, value: Tensor, values: Sequence[Tensor], create_graph: bool = False
) -> Sequence[Tensor | None]:
    """The gradients of a scalar at parameter values, ``None`` where it does not depend on them."""
    if not value.requires_grad:
        return [None] * len(values)
    return model.holding(values, lambda: grad(value, values, create_graph=create_graph, allow_unused=True))


def filled(gradients: Sequence[Tensor | None], values: Sequence[Tensor]) -> list[Tensor]:
    """Gradients with zeros for those that are missing."""
    return [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, values, strict=True)]
