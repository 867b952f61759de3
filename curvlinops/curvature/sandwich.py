"""Jᵀ S Sᵀ J: the product that GGN, Monte-Carlo Fisher and empirical Fisher share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
        return SandwichProduct(self._risk, X, y, self._loss_factor)


class SandwichProduct:
    """The map V -> Jᵀ S Sᵀ J V of one mini-batch."""

    def __init__(self, risk: EmpiricalRisk, X: Any, y: Any, loss_factor: Callable[[Terms], LossFactor]) -> None:
        self._risk = risk
        self._X, self._y = X, y
        self._make_factor = loss_factor
        self._lin = risk.linearize(X)
        self._factor: LossFactor | None = None

    def __call__(self, V: list[Tensor]) -> list[Tensor]:
        """Multiply columns-last tensors."""
        self._lin, JV = self._risk.push(self._lin, self._X, V)
        is_first = self._factor is None
        if self._factor is None:  # one draw a mini-batch, after the forward that the first push runs
            self._factor = self._make_factor(self._risk.terms(self._lin.output, self._X, self._y))
        U = self._factor.gram(JV)
        R = self._lin.pull(U)
        if is_first:
            self._risk.note_products(U, JV, V, R)
        return R

    def held(self) -> Iterator[Tensor]:
        """The tensors that are held between products."""
        return self._lin.held()


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
        self._risk.rewind(generator)
        return sampled_factor(terms, self._sampling.num_samples, generator)
