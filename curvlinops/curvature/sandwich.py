"""Jᵀ S Sᵀ J: the product that GGN, Monte-Carlo Fisher and empirical Fisher share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from curvlinops.curvature.base import BatchProduct, CurvatureLinearOperator
from curvlinops.curvature.cost import Units
from curvlinops.curvature.factor_operator import BatchFactor, FactorLinearOperator
from curvlinops.memory import checked_budget, num_bytes
from curvlinops.operators.low_rank import LowRankLinearOperator
from curvlinops.risk.batches import copied
from curvlinops.risk.columns import Piece
from curvlinops.risk.empirical_risk import BatchSum, EmpiricalRisk
from curvlinops.risk.keeping import Keeper
from curvlinops.risk.losses import Terms
from curvlinops.risk.losses.factors import HessianFactor, LossFactor, sampled_factor

#: Columns of a datum up to which factors are cheaper than tangents by the third product: each takes a backward to
#: prepare, 1 unit, and each product by factors saves 2 units and more.
FEW_COLUMNS = 4
#: Columns of a datum from which on factors are not thought of.
MANY_COLUMNS = 64


class SandwichLinearOperator(CurvatureLinearOperator):
    """A matrix c Σ_n J_nᵀ S_n S_nᵀ J_n; a subclass says what the loss factor S is."""

    SELF_ADJOINT = True
    POSITIVE_SEMIDEFINITE = True
    _UNITS = Units(streamed=5, lean=6, kept=4)

    def _loss_factor(self, terms: Terms) -> LossFactor:
        """The factor S of a mini-batch."""
        raise NotImplementedError

    def _columns_a_datum(self, y: Any) -> int | None:
        """Columns that S has for each datum, where that can be told from the targets."""
        return None

    def _factor_columns(self, X: Any, y: Any) -> int | None:
        if self._risk.loss is None or not self._risk.loss.is_known or self._risk.model.is_closure:
            return None
        self._begin_pass()
        num_columns = self._loss_factor(self._risk.terms(self._risk.predict(X), X, y)).num_columns
        return num_columns if num_columns <= MANY_COLUMNS else None

    def _linearize_batch(self, X: Any, y: Any) -> BatchProduct:
        keeper = self._risk.keeper
        if keeper is None or self._engine == "tangents" or (keeper.max_bytes == 0 and self._engine == "auto"):
            if keeper is not None:
                keeper.engine = "tangents"
            return SandwichProduct(self._risk, X, y, self._loss_factor)
        if self._engine == "factors":
            keeper.engine = "factors"
            return BatchFactor(self._risk, X, y, self._loss_factor)
        return self._cheaper_product(keeper, X, y)

    def _cheaper_product(self, keeper: Keeper, X: Any, y: Any) -> BatchProduct:
        """By factors, if there are few columns and layer notes cover all parameters; else by tangents."""
        is_known = self._risk.loss is not None and self._risk.loss.is_known
        num_columns = self._columns_a_datum(y) if is_known and keeper.engine != "tangents" else None
        if num_columns is not None and num_columns <= FEW_COLUMNS:
            factor = BatchFactor.of_covered(self._risk, X, y, self._loss_factor)
            if factor is not None:
                keeper.engine = "factors"
                return factor
        keeper.engine = "tangents"
        return SandwichProduct(self._risk, X, y, self._loss_factor)

    def _check_engine(self, engine: str) -> None:
        if engine == "factors" and self._risk.loss is not None:
            self._risk.loss.require_known(f"engine='factors' of {type(self).__name__}")

    def to_low_rank(self, max_memory: int | None = None) -> LowRankLinearOperator:
        r"""The same matrix as :math:`F F^\top`, exactly, with a column for each datum and column of S.

        It has exact inverses, log-determinants, eigenvalues, roots and samples, by the Gram matrix of its R columns;
        see :class:`LowRankLinearOperator`. It keeps the values that it was computed with.

        **Cost**: a forward and a backward for each column of a datum; kept are inputs and output gradients of the
        layers. What follows costs O(R²) inner products of layers and O(R³).

        Args:
            max_memory: Bytes that may be kept, by default a quarter of the device's memory.

        Raises:
            MemoryError: If the columns take more.
            NotImplementedError: If the loss is not known, the model closes over its parameters, or there is a
                ``process_group``.
        """
        if self._risk.loss is not None:
            self._risk.loss.require_known(f"to_low_rank() of {type(self).__name__}")
        if self._risk.process_group is not None:
            raise NotImplementedError(
                "to_low_rank holds the columns of all data in one process: process_group is not supported."
            )
        budget = checked_budget(max_memory, self.device)
        frozen = self.frozen()
        factor = _factor_of(frozen, budget)
        return LowRankLinearOperator(factor, c=getattr(self, "_l2", 0.0))


def _factor_of(operator: SandwichLinearOperator, budget: int) -> FactorLinearOperator:
    """The columns of a frozen matrix, in one pass over the data."""
    batches: list[BatchFactor] = []
    held = 0

    def begin() -> BatchSum:
        nonlocal held
        batches.clear()
        held = 0
        operator._begin_pass()
        return collect

    def collect(X: Any, y: Any) -> list[Piece]:
        nonlocal held
        # Copies, since a loader may fill the same memory anew.
        batches.append(BatchFactor(operator._risk, copied(X), copied(y), operator._loss_factor))
        held += num_bytes(batches[-1].held(), apart_from=operator._params)
        if held > budget:
            raise MemoryError(
                f"The columns of the first {len(batches)} mini-batches take {held / 2**20:.3g} MiB, more than "
                f"max_memory, {budget / 2**20:.3g} MiB. Use fewer data, or FisherMCLinearOperator, which has "
                "one column for each datum and sample."
            )
        return [(None, [torch.tensor(1.0 if len(batches) == 1 else 0.0)])]

    with torch.inference_mode(False):
        (scale,) = operator._risk.total(begin, [()], "columns")  # 1 with the scale of a total
    return FactorLinearOperator(batches, float(scale) ** 0.5, operator.domain)


class SandwichProduct:
    """The map V -> Jᵀ S Sᵀ J V of one mini-batch."""

    def __init__(self, risk: EmpiricalRisk, X: Any, y: Any, loss_factor: Callable[[Terms], LossFactor]) -> None:
        # What is kept must not keep alive what keeps it, lest its memory waits for the collector of cycles.
        self._risk: EmpiricalRisk = weakref.proxy(risk)
        self._X, self._y = X, y
        self._make_factor: Callable[[Terms], LossFactor] | None = loss_factor
        self._lin = risk.linearize(X)
        self._factor: LossFactor | None = None

    def __call__(self, V: list[Tensor]) -> list[Tensor]:
        """Multiply columns-last tensors."""
        self._lin, JV = self._risk.push(self._lin, self._X, V)
        if self._make_factor is not None:  # one draw a mini-batch, after the forward that the first push runs
            self._factor = self._make_factor(self._risk.terms(self._lin.output, self._X, self._y))
            self._make_factor = None
        assert self._factor is not None
        U = self._factor.gram(JV)
        R = self._lin.pull(U)
        self._risk.note_products(U, JV, V, R)
        return R

    def held(self) -> Iterator[Tensor]:
        """The tensors that are held between products."""
        yield from self._lin.held()
        if self._factor is not None:
            yield from self._factor.held()


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

    def _columns_a_datum(self, y: Any) -> int | None:
        if self._sampling.num_samples or self._risk.loss is None:
            return self._sampling.num_samples or None
        positions, channels = self._risk.loss.num_positions(y), self._risk.loss.num_channels(y)
        return None if positions is None or channels is None else positions * channels

    def _begin_pass(self) -> None:
        self._sampling.restart(self._risk.device, self._risk.rank)

    def _loss_factor(self, terms: Terms) -> LossFactor:
        if self._sampling.num_samples == 0:
            return HessianFactor(terms)
        generator = self._sampling.generator(self._risk.device, self._risk.rank)
        self._risk.rewind(generator)
        return sampled_factor(terms, self._sampling.num_samples, generator)
