"""Jᵀ S Sᵀ J: the product that GGN, Monte-Carlo Fisher and empirical Fisher share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlinops.curvature.base import BatchProduct, CurvatureLinearOperator
from curvlinops.risk.empirical_risk import EmpiricalRisk
from curvlinops.risk.losses import Terms
from curvlinops.risk.losses.factors import HessianFactor, LossFactor, sampled_factor


class SandwichLinearOperator(CurvatureLinearOperator):
    """A matrix c Σ_n J_nᵀ S_n S_nᵀ J_n; a subclass says what the loss factor S is."""

    SELF_ADJOINT = True
    POSITIVE_SEMIDEFINITE = True

    def _loss_factor(self, terms: Terms) -> LossFactor:
        """The factor S of a mini-batch."""
        raise NotImplementedError

    def _linearize_batch(self, X: Any, y: Any) -> BatchProduct:
        return sandwich_product(self._risk, X, y, self._loss_factor)


def sandwich_product(risk: EmpiricalRisk, X: Any, y: Any, loss_factor: Callable[[Terms], LossFactor]) -> BatchProduct:
    """The map V -> Jᵀ S Sᵀ J V of one mini-batch."""
    lin = risk.linearize(X)
    factors: list[LossFactor] = []

    def product(V: list[Tensor]) -> list[Tensor]:
        nonlocal lin
        lin, JV = risk.push(lin, X, V)
        if not factors:  # one draw a mini-batch, after the forward that the first push runs
            factors.append(loss_factor(risk.terms(lin.output, X, y)))
        U = factors[0].gram(JV)
        R = lin.pull(U)
        risk.note_products(U, JV, V, R)
        return R

    return product


class Sampling:
    """Random numbers of a Monte-Carlo matrix: one generator, seeded at the start of each pass."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 0:
            raise ValueError(f"mc_samples: expected a number of samples, got {num_samples!r}.")
        self.num_samples = num_samples
        self.seed = int(seed)
        self._generator: torch.Generator | None = None

    def restart(self, device: torch.device, rank: int) -> None:
        """Begin a pass: the same numbers come again."""
        self._generator = torch.Generator(device).manual_seed(self.seed + rank)

    def generator(self, device: torch.device, rank: int) -> torch.Generator:
        """The generator of the running pass."""
        if self._generator is None:
            self.restart(device, rank)
        assert self._generator is not None
        return self._generator

    def __getstate__(self) -> dict[str, Any]:
        """Without the generator, which each pass seeds anew and which cannot be pickled."""
        return {**self.__dict__, "_generator": None}


class GaussNewtonFactor:
    """The loss factor that the GGN and its diagonal share: the exact one, or one of samples."""

    _risk: EmpiricalRisk
    _sampling: Sampling

    def _begin_pass(self) -> None:
        self._sampling.restart(self._risk.device, self._risk.rank)

    def _loss_factor(self, terms: Terms) -> LossFactor:
        if self._sampling.num_samples == 0:
            return HessianFactor(terms)
        generator = self._sampling.generator(self._risk.device, self._risk.rank)
        return sampled_factor(terms, self._sampling.num_samples, generator)
