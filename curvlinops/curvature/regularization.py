"""The ½·l2·‖θ‖² of a training loss."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.curvature.base import CurvatureLinearOperator


class L2Regularized(CurvatureLinearOperator):
    """Adds l2 · I to a curvature matrix, and the matching parts to gradient and loss."""

    _l2 = 0.0

    def _set_l2(self, l2: float) -> None:
        self._l2 = float(l2)
        if self._l2 < 0:
            self.POSITIVE_SEMIDEFINITE = False

    @property
    def _is_definite(self) -> bool:
        return self.POSITIVE_SEMIDEFINITE and self._l2 > 0

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        result = super()._matmat(X)
        return [r.add(x, alpha=self._l2) for r, x in zip(result, X, strict=True)] if self._l2 else result

    def gradient_and_loss(self) -> tuple[list[Tensor], Tensor]:
        """The gradient and the value of the loss, regularisation included.

        Returns:
            List of tensors in the shapes of the parameters, and a tensor without axes.
        """
        gradients, loss = super().gradient_and_loss()
        if not self._l2:
            return gradients, loss
        params = [p.detach() for p in self._params]
        squares = torch.stack([p.square().sum() for p in params]).sum()
        return [g.add(p, alpha=self._l2) for g, p in zip(gradients, params, strict=True)], (
            loss + 0.5 * self._l2 * squares
        )
