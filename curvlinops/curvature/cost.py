"""What a product costs, in time and memory, before anybody waits for it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from curvlinops.memory import num_bytes, total_memory
from curvlinops.risk.batches import Batch
from curvlinops.risk.graph import saved_tensors
from curvlinops.risk.keeping import Keeper
from curvlinops.risk.linearization import Use
from curvlinops.risk.surroundings import differentiable, preserved_random_state

if TYPE_CHECKING:
    from curvlinops.curvature.base import CurvatureLinearOperator


@dataclass(frozen=True)
class Way:
    """One way to multiply.

    Attributes:
        units: Forward-units of a product with one column, a gradient being 3.
        preparation: Forward-units that the first product takes in addition.
        num_bytes: Bytes held, besides parameters, vectors and data: by a kept way for all mini-batches between
            products, by a streamed way for the first mini-batch while it is processed.
    """

    units: float
    preparation: float
    num_bytes: int


@dataclass(frozen=True)
class Cost:
    """What products with a curvature matrix cost.

    Units are counted for networks in which linear layers and convolutions take nearly all the time. Bytes are measured
    at the first mini-batch; those of kept ways are multiplied by the number of data.

    Attributes:
        num_batches: Number of mini-batches.
        num_data: Number of data.
        ways: The ways to multiply: ``"streamed"``, ``"lean"`` (streamed with ``linearize(max_memory=0)``),
            ``"tangents"`` and ``"factors"`` (both kept by ``linearize()``).
        chosen: The way that the operator takes.
    """

    num_batches: int
    num_data: int
    ways: dict[str, Way]
    chosen: str

    def __str__(self) -> str:
        """A small table; a star marks the way that the operator takes."""
        rows = [
            f"{self.num_data} data in {self.num_batches} mini-batches; a gradient is 3 forward-units",
            f"{'':<12}{'units':>8}{'preparation':>13}{'held':>14}",
        ]
        for name, way in self.ways.items():
            label, size = name + " *" * (name == self.chosen), f"{way.num_bytes / 2**20:.1f} MiB"
            rows.append(f"{label:<12}{way.units:>8.3g}{way.preparation:>13.3g}{size:>14}")
        return "\n".join(rows)


@dataclass(frozen=True)
class Units:
    """Forward-units of a product with one column."""

    streamed: float
    lean: float
    kept: float


def cost_of(operator: CurvatureLinearOperator, units: Units) -> Cost:
    """What products with an operator cost; see :meth:`CurvatureLinearOperator.cost`."""
    risk = copy.copy(operator._risk)
    risk.keeper = None
    with preserved_random_state(risk.data, risk.device), differentiable(risk.model):
        batches = risk.batches("cost")
        first = next(batches)
        sizes = [len(risk.predict(first.X)), *(risk.batch_size(batch.X, batch.y) for batch in batches)]
        num_columns = operator._factor_columns(first.X, first.y)
        graph = num_bytes(saved_tensors(risk.linearize(first.X, Use()).prediction), apart_from=operator._params)
    share = sum(sizes) / sizes[0]
    # Besides the graph, a fused forward holds the tangents of a layer or two.
    ways = {
        "streamed": Way(units.streamed, 0.0, 2 * graph),
        "lean": Way(units.lean, 0.0, graph),
        "tangents": Way(
            units.kept, units.streamed - units.kept, int(share * _kept(operator, first, "tangents").num_bytes)
        ),
    }
    if num_columns is not None:
        keeper = _kept(operator, first, "factors")
        through_rest = 0.0 if all(not factor.uncovered for factor in keeper.products()) else units.kept
        ways["factors"] = Way(2 + through_rest, 2.0 + num_columns, int(share * keeper.num_bytes))
    chosen = operator._way or _kept(operator, first, operator._engine).engine
    return Cost(len(sizes), sum(sizes), ways, chosen or "tangents")


def _kept(operator: CurvatureLinearOperator, batch: Batch, engine: str) -> Keeper:
    """What a linearised product keeps of one mini-batch: found by making it."""
    alone = operator._copied()
    alone._read_from([(batch.X, batch.y)])
    kept = alone.linearize(total_memory(operator.device), engine=engine)
    kept @ torch.ones(operator.shape[1], dtype=operator.dtype, device=operator.device)
    assert kept._risk.keeper is not None
    return kept._risk.keeper
