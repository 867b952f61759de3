"""F = Jᵀ S, the factor of a curvature matrix C = F Fᵀ, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curvlinops.memory import total_memory
from curvlinops.operators.base import LinearOperator, unit_columns
from curvlinops.operators.space import Space
from curvlinops.risk.empirical_risk import EmpiricalRisk
from curvlinops.risk.graph import are_used
from curvlinops.risk.layers.factors import LayerNotes
from curvlinops.risk.layers.parts import CHUNK_NUMEL, slices
from curvlinops.risk.linearization import Engine, Linearization, Use, is_out_of_memory
from curvlinops.risk.losses import Terms
from curvlinops.risk.losses.base import at_least_float32
from curvlinops.risk.losses.factors import LossFactor
from curvlinops.risk.surroundings import differentiable, preserved_random_state


class BatchFactor:
    r"""The columns of :math:`F = J^\top S` of one mini-batch: those of noted layers in structured form.

    Parameters that no note covers go through the network: their part is :math:`J_\text{rest}^\top S`, with a
    linearisation of the model in these parameters alone.

    **Cost**: a forward and a backward for each column of a datum, and at shapes not met before one more backward. A
    product with F or Fᵀ costs one forward-unit each (a gradient is three), however many columns a datum has; with
    parameters that no note covers, two more.

    Args:
        risk: The risk.
        X: Inputs.
        y: Targets.
        loss_factor: Gives S.

    Raises:
        MemoryError: If the columns of one mini-batch would take half of all memory.

    Attributes:
        uncovered: Positions of the parameters that the prediction depends on and that no note covers.
    """

    def __init__(self, risk: EmpiricalRisk, X: Any, y: Any, loss_factor: Callable[[Terms], LossFactor]) -> None:
        self._collect(risk, X, y, loss_factor, *risk.noted(X))

    @classmethod
    def of_covered(
        cls, risk: EmpiricalRisk, X: Any, y: Any, loss_factor: Callable[[Terms], LossFactor]
    ) -> BatchFactor | None:
        """The same where layer notes cover all parameters, and ``None`` where they do not."""
        linearization, notes = risk.noted(X)
        if len(notes.complete) < len(risk.model.params):
            return None
        factor = cls.__new__(cls)
        factor._collect(risk, X, y, loss_factor, linearization, notes)
        return None if factor.uncovered else factor

    def _collect(
        self,
        risk: EmpiricalRisk,
        X: Any,
        y: Any,
        loss_factor: Callable[[Terms], LossFactor],
        linearization: Linearization,
        notes: LayerNotes,
    ) -> None:
        self._model = risk.model
        self._device = risk.device
        S = loss_factor(risk.terms(linearization.output, X, y))
        _check_size(S.num_columns, notes, risk.model.params[0])
        self._columns = torch.stack(list(S.columns()))
        self._layers = risk.model.holding(linearization.values, lambda: notes.factors(self._columns))
        covered = set(self._layers.positions)
        used = are_used(linearization.prediction, linearization.values)
        self.uncovered = [i for i, is_used in enumerate(used) if is_used and i not in covered]
        self._rest = _Rest(risk, X, self.uncovered) if self.uncovered else None

    @property
    def numel(self) -> int:
        """How many columns there are: data times columns of a datum."""
        return self._layers.num_data * self._layers.num_columns

    def __call__(self, V: list[Tensor]) -> list[Tensor]:
        """F Fᵀ V for columns-last tensors."""
        return self.matmat(self.rmatmat(V))

    def rmatmat(self, V: Sequence[Tensor]) -> Tensor:
        """Fᵀ V ``[R, K]``, the datum counting slower."""
        Z = None
        if self._layers.positions:
            Z = self._layers.rmatmat({i: V[i] for i in self._layers.positions})
        if self._rest is not None:
            with self._surroundings():
                JV = self._rest.push([V[i] for i in self.uncovered])
            S = at_least_float32(self._columns).flatten(2).movedim(0, 1)
            through_rest = (S @ at_least_float32(JV).flatten(1, -2)).to(V[0].dtype)
            Z = through_rest if Z is None else Z + through_rest
        if Z is None:  # no parameter is used
            return V[0].new_zeros(self.numel, V[0].shape[-1])
        return Z.flatten(0, 1)

    def matmat(self, Z: Tensor) -> list[Tensor]:
        """F Z as a tensor ``[*shape, K]`` for each parameter, with Z ``[R, K]``."""
        Z = Z.reshape(self._layers.num_data, self._layers.num_columns, Z.shape[1])
        found = self._layers.matmat(Z) if self._layers.positions else {}
        if self._rest is not None:
            U = torch.einsum("mn...,nmk->n...k", self._columns, Z.to(self._columns.dtype))
            with self._surroundings():
                found.update(zip(self.uncovered, self._rest.pull(U), strict=True))
        num_columns = Z.shape[-1]
        return [found[i] if i in found else _zeros(p, num_columns) for i, p in enumerate(self._model.params)]

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        with preserved_random_state(None, self._device), differentiable(self._model):
            yield

    def gram(self, other: BatchFactor) -> Tensor:
        """Fᵀ F' ``[R, R']`` with another mini-batch, or the same mini-batch of another task."""
        dtype, device = at_least_float32(self._columns).dtype, self._columns.device
        total = torch.zeros(self.numel, other.numel, dtype=dtype, device=device)
        if not total.numel():
            return total
        here, there = set(self._layers.positions), set(other._layers.positions)
        both = sorted(here & there)
        left = sorted((here | there | {*self.uncovered, *other.uncovered}) - {*both})
        if both:
            total = self._layers.gram(other._layers, both)
        return total + self._gram_by_products(other, left) if left else total

    def _gram_by_products(self, other: BatchFactor, positions: list[int]) -> Tensor:
        """The share of some parameters in the Gram matrix, by products with unit vectors."""
        params, chosen = self._model.params, set(positions)
        flat = Space.flat(other.numel, params[0].dtype, params[0].device)
        size = max(1, CHUNK_NUMEL // sum(p.numel() for p in params))
        found = []
        for units in unit_columns(flat, size):
            columns = other.matmat(units)
            found.append(self.rmatmat([c if i in chosen else torch.zeros_like(c) for i, c in enumerate(columns)]))
        return at_least_float32(torch.cat(found, 1))

    def weighted_squares(self, weights: Tensor) -> list[Tensor] | None:
        """Σ_r w_r f_r² for each parameter, with weights ``[R]``; ``None`` where parameters are not covered."""
        if self._rest is not None:
            return None
        weights = weights.reshape(self._layers.num_data, self._layers.num_columns)
        if bool((weights == weights.flatten()[0]).all()):
            found = {i: weights.flatten()[0] * square for i, square in self._layers.squares().items()}
            return [found[i] if i in found else _zeros(p) for i, p in enumerate(self._model.params)]
        totals = [at_least_float32(_zeros(p)) for p in self._model.params]
        step = max(1, CHUNK_NUMEL // (self._layers.num_columns * sum(p.numel() for p in totals)))
        for data in slices(self._layers.num_data, step):
            for i, g in self._layers.gradients(data).items():
                totals[i] += torch.einsum("nm,nm...->...", weights[data].to(g.dtype), g.square())
        return totals

    def held(self) -> Iterator[Tensor]:
        """The tensors that are held between products."""
        yield from self._layers.tensors()
        yield self._columns
        if self._rest is not None:
            yield from self._rest.held()


def _check_size(num_columns: int, notes: LayerNotes, like: Tensor) -> None:
    needed = like.element_size() * num_columns * notes.numel
    if needed > total_memory(like.device) // 2:
        raise MemoryError(
            f"A datum of this mini-batch has {num_columns} columns, whose output gradients take {needed / 2**30:.3g} "
            "GiB: use engine='tangents', smaller mini-batches, or FisherMCLinearOperator with one column a sample."
        )


def _zeros(param: Tensor, *columns: int) -> Tensor:
    return torch.zeros(*param.shape, *columns, dtype=param.dtype, device=param.device)


class _Rest:
    """Push and pull through the network for some of the parameters."""

    def __init__(self, risk: EmpiricalRisk, X: Any, positions: list[int]) -> None:
        self._risk = copy.copy(risk)
        self._risk.keeper, self._risk._pass = None, None
        self._risk.model = risk.model.restricted(positions)
        self._risk.engine = Engine(forward_mode=risk.engine.forward_mode)
        self._X = X
        self._linearization: Linearization = self._risk.linearize(X, Use(is_reused=True))
        try:
            self._check()
        except RuntimeError as error:
            if is_out_of_memory(error) or isinstance(error, NotImplementedError):
                raise
            raise NotImplementedError(
                "The parameters that no layer note covers need a pass of their own, in which the others are constants, "
                f"and the model does not allow that: {error} Use engine='tangents'."
            ) from error

    def _check(self) -> None:
        """Compare the two directions of what is kept, since the products that follow compare nothing."""
        self._linearization, disagrees = self._risk.compared(self._linearization, self._X)
        if disagrees:
            self._risk.engine = Engine(forward_mode=False)
            anew = self._risk.linearize(self._X, Use(is_reused=True))
            self._linearization, _ = self._risk.compared(anew, self._X)  # whose push is checked by a difference

    def push(self, V: list[Tensor]) -> Tensor:
        self._linearization, JV = self._risk.push(self._linearization, self._X, V)
        return JV

    def pull(self, U: Tensor) -> list[Tensor]:
        return self._linearization.pull(U)

    def held(self) -> Iterator[Tensor]:
        return self._linearization.held()


class FactorLinearOperator(LinearOperator):
    r"""The factor :math:`F` of a curvature matrix :math:`C = F F^\top`, with a column for each datum and sample.

    Its columns are held layer by layer, as inputs and output gradients, and never as vectors of all parameters.
    Their Gram matrix :math:`F^\top F` comes layer by layer too.

    Args:
        batches: The columns of each mini-batch.
        scale: Multiplies all of them.
        codomain: The space of parameters.
    """

    def __init__(self, batches: Sequence[BatchFactor], scale: float, codomain: Space) -> None:
        sizes = [batch.numel for batch in batches]
        super().__init__(Space.flat(sum(sizes), codomain.dtype, codomain.device), codomain)
        self._batches = list(batches)
        self._sizes = sizes
        self._scale = scale

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        parts = (self._scale * X[0]).split(self._sizes)
        total: list[Tensor] = []
        for batch, part in zip(self._batches, parts, strict=True):
            found = [f.detach() for f in batch.matmat(part)]
            total = found if not total else [t + f for t, f in zip(total, found, strict=True)]
        return total

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        found = [batch.rmatmat(X).detach() for batch in self._batches]
        return [self._scale * torch.cat(found)]

    def _gram(self) -> Tensor:
        return self._cross_gram(self)  # type: ignore[return-value]

    def _cross_gram(self, other: LinearOperator) -> Tensor | None:
        """Fᵀ F' layer by layer, where the other is such a factor of a model with the same parameters."""
        if not isinstance(other, FactorLinearOperator) or other.codomain.shapes != self.codomain.shapes:
            return None
        rows = []
        for i, batch in enumerate(self._batches):
            # A Gram matrix with itself is symmetric.
            start = i if other is self else 0
            rows.append([batch.gram(others).detach() for others in other._batches[start:]])
        if other is self:
            rows = [[rows[j][i - j].T for j in range(i)] + row for i, row in enumerate(rows)]
        return self._scale * other._scale * torch.cat([torch.cat(row, 1) for row in rows])

    def _row_squares(self, weights: Tensor) -> list[Tensor] | None:
        """diag(F diag(w) Fᵀ) in the shapes of the parameters, from per-example gradients of one layer at a time."""
        if weights.ndim != 1:
            return None
        parts = weights.split(self._sizes)
        found = [batch.weighted_squares(part) for batch, part in zip(self._batches, parts, strict=True)]
        if any(squares is None for squares in found):
            return None
        return [self._scale**2 * torch.stack(same).sum(0) for same in zip(*found, strict=True)]

    def _repr_extra(self) -> str:
        return f", frozen, {len(self._batches)} mini-batches"
