"""The model at one mini-batch: push(V) = J V and pull(U) = Jᵀ U, by two engines, in chunks of columns.

*Forward mode* pushes with dual numbers. A single column is pushed in the same forward that records the graph for
`pull` (5 units for a whole product, a gradient being 3); several columns are pushed at once under `vmap`.
*Double backward* pushes by differentiating `pull` (the R-operator); it serves models that forward mode cannot
follow, and callables that close over their parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from backpack.hessianfree.rop import R_op
from torch import Tensor
from torch.autograd import forward_ad, grad

from curvlinops.risk.graph import named, refuse_by_name
from curvlinops.risk.model import FunctionalModel
from curvlinops.risk.tangents import TangentRules

#: Columns that go through the network together when the user does not say.
DEFAULT_CHUNK_SIZE = 8
Columns = Sequence[Tensor]


class Engine:
    """What was learnt about how a model can be differentiated; shared by all mini-batches of an operator.

    Attributes:
        forward_mode: Whether to push by forward mode; otherwise by double backward.
        vmap: Whether several columns may go through the network at once.
        fused: Whether the forward that pushes a single column may also record the graph.
        verified: Names of the checks that are done; each is made once.
        proved_layers: Parameters of the linear layers whose notes can be relied on, once that is known.
    """

    def __init__(self, forward_mode: bool = True) -> None:
        self.forward_mode = forward_mode
        self.vmap = True
        self.fused = True
        self.verified: set[str] = set()
        self.proved_layers: set[tuple[int, ...]] | None = None

    def give_up_vmap(self, error: Exception) -> None:
        """Go column by column from now on, unless memory was the trouble, which smaller chunks mend."""
        if is_out_of_memory(error):
            raise error
        self.vmap = False


class NoPushError(NotImplementedError):
    """A model that no engine can push through; pulling may still work."""


class Linearization(ABC):
    """The Jacobian of the model at one mini-batch, as two products.

    Columns come last: V is a list of ``[*shape, K]``, U is ``[*out, K]``.
    """

    def __init__(self, model: FunctionalModel, X: Any, engine: Engine) -> None:
        self._model = model
        self._X = X
        self._engine = engine
        self.values = model.leaves()
        self._prediction: Tensor | None = None

    @property
    def prediction(self) -> Tensor:
        """The prediction with its graph; the first use runs the forward."""
        if self._prediction is None:
            prediction = self._model(self.values, self._X)
            self._prediction = checked(prediction, self._engine, twice=not self._engine.forward_mode)
        return self._prediction

    @property
    def output(self) -> Tensor:
        """The prediction without its graph."""
        return self.prediction.detach()

    @abstractmethod
    def push(self, V: Columns) -> Tensor:
        """J V."""

    def pull(self, U: Tensor) -> list[Tensor]:
        """Jᵀ U, by one backward a column."""
        prediction = self.prediction
        return self._model.holding(
            self.values, lambda: backward([prediction], self.values, [U.to(prediction.dtype)], self._engine)
        )


class ForwardMode(Linearization):
    """Pushes by dual numbers."""

    _has_tangents = False

    def push(self, V: Columns) -> Tensor:
        """J V: one column in the forward that records the graph, several under vmap or one after the other."""
        if V[0].shape[-1] == 1:
            record = self._engine.fused and self._prediction is None
            return self._push_one([v.squeeze(-1) for v in V], record).unsqueeze(-1)
        # The graph comes first, so that a model that cannot be differentiated says so here.
        _ = self.prediction
        if self._engine.vmap:
            try:
                return self._push_all([v.movedim(-1, 0) for v in V]).movedim(0, -1)
            except (RuntimeError, ValueError, TypeError) as error:
                self._engine.give_up_vmap(error)
        columns = [[v[..., k] for v in V] for k in range(V[0].shape[-1])]
        return torch.stack([self._push_one(column, record=False) for column in columns], -1)

    def pull(self, U: Tensor) -> list[Tensor]:
        """Jᵀ U; a forward that runs again in the backward (checkpointing) needs a graph without tangents."""
        try:
            return super().pull(U)
        except RuntimeError as error:
            if is_out_of_memory(error) or not self._has_tangents:
                raise
        self._engine.fused, self._has_tangents, self._prediction = False, False, None
        return super().pull(U)

    def _push_one(self, v: Columns, record: bool) -> Tensor:
        values = self.values if record else [value.detach() for value in self.values]
        with torch.set_grad_enabled(record), forward_ad.dual_level(), TangentRules():
            duals = [forward_ad.make_dual(value, column.contiguous()) for value, column in zip(values, v, strict=True)]
            primal, tangent = forward_ad.unpack_dual(self._model(duals, self._X))
        if record:
            self._prediction = checked(primal, self._engine, twice=False)
            self._has_tangents = True
        return torch.zeros_like(primal).detach() if tangent is None else tangent.detach()

    def _push_all(self, V: Columns) -> Tensor:
        values = tuple(value.detach() for value in self.values)

        def push(*v: Tensor) -> Tensor:
            tangent: Tensor = torch.func.jvp(lambda *p: self._model(p, self._X), values, v)[1]
            return tangent

        with torch.no_grad(), TangentRules(under_vmap=True):
            return torch.func.vmap(push)(*V)


class DoubleBackward(Linearization):
    """Pushes by differentiating `pull`, which is linear: the R-operator."""

    def push(self, V: Columns) -> Tensor:
        """J V, by one backward through a backward for each column."""
        prediction = self.prediction

        def push_one(column: Columns) -> Tensor:
            try:
                return R_op(prediction, self.values, column)[0]  # type: ignore[no-any-return]
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise NoPushError(
                    f"The model has neither forward mode nor a backward that can be differentiated{named(prediction)}: "
                    f"{error}"
                ) from error

        columns = [[v[..., k] for v in V] for k in range(V[0].shape[-1])]
        pushed = [self._model.holding(self.values, lambda c=column: push_one(c)) for column in columns]  # type: ignore[misc]
        return torch.stack(pushed, -1)


class SecondOrder:
    """The Hessian of a function of the prediction at one mini-batch, by differentiating its gradient.

    Args:
        model: The model.
        X: Inputs of the mini-batch.
        engine: What is known about the model.
        objective: Maps the prediction, with its graph, to a scalar.
    """

    def __init__(self, model: FunctionalModel, X: Any, engine: Engine, objective: Callable[[Tensor], Tensor]) -> None:
        self._model = model
        self._engine = engine
        self.values = model.leaves()
        self.prediction = checked(model(self.values, X), engine, twice=True)
        value = objective(self.prediction)
        self._gradients = gradients_of(model, value, self.values, create_graph=True)

    @property
    def gradient(self) -> list[Tensor]:
        """The gradient, without its graph."""
        return [g.detach() for g in filled(self._gradients, self.values)]

    def matmat(self, V: Columns) -> list[Tensor]:
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


def checked(prediction: Tensor, engine: Engine, twice: bool) -> Tensor:
    """The prediction, refused if its graph cannot give what is asked."""
    if not prediction.requires_grad:
        raise ValueError(
            "The prediction does not depend on any of params in a way that autograd can follow: are they used by the "
            "model, outside of no_grad() and detach()?"
        )
    check = "twice differentiable" if twice else "differentiable"
    if check not in engine.verified:
        refuse_by_name(prediction, twice)
        engine.verified.add(check)
    return prediction


def linearize(model: FunctionalModel, X: Any, engine: Engine) -> Linearization:
    """The model at one mini-batch, by the engine that fits it."""
    return (ForwardMode if engine.forward_mode else DoubleBackward)(model, X, engine)


def backward(outputs: Sequence[Tensor], values: Sequence[Tensor], U: Sequence[Tensor], engine: Engine) -> list[Tensor]:
    """Pull columns-last tensors ``[*out, K]`` back to the values, at once under vmap where the model allows it."""
    if U[0].shape[-1] > 1 and engine.vmap:
        try:
            return _pull(outputs, values, [u.movedim(-1, 0).contiguous() for u in U], batched=True)
        except RuntimeError as error:
            engine.give_up_vmap(error)
    columns = [_pull(outputs, values, [u[..., k] for u in U], batched=False) for k in range(U[0].shape[-1])]
    return [torch.cat(parts, -1) for parts in zip(*columns, strict=True)] if len(columns) > 1 else columns[0]


def _pull(outputs: Sequence[Tensor], values: Sequence[Tensor], U: Sequence[Tensor], batched: bool) -> list[Tensor]:
    gradients = grad(outputs, values, U, retain_graph=True, allow_unused=True, is_grads_batched=batched)
    num_columns = U[0].shape[0] if batched else 1
    return [
        v.new_zeros(*v.shape, num_columns) if g is None else (g.movedim(0, -1) if batched else g.unsqueeze(-1))
        for v, g in zip(values, gradients, strict=True)
    ]


def in_chunks(product: Callable[[list[Tensor]], list[Tensor]], M: list[Tensor], chunk_size: int | None) -> list[Tensor]:
    """Apply a product to a few columns at a time, fewer when memory runs out.

    Args:
        product: The product of columns-last tensors.
        M: Columns-last tensors ``[*shape, K]``.
        chunk_size: Columns at a time, ``None`` for the default.
    """
    num_columns = M[0].shape[-1]
    size = min(chunk_size or DEFAULT_CHUNK_SIZE, num_columns)
    result: list[Tensor] = []
    start = 0
    while start < num_columns:
        try:
            part = product([_column_by_column(m[..., start : start + size]) for m in M])
        except RuntimeError as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            size //= 2
            continue
        if size == num_columns:
            return part
        if not result:
            result = [p.new_empty(*p.shape[:-1], num_columns) for p in part]
        for r, p in zip(result, part, strict=True):
            r[..., start : start + size] = p
        start += size
    return result if result else product(M)


def _column_by_column(columns: Tensor) -> Tensor:
    """The same tensor ``[*shape, K]``, laid out in memory as the network wants it: one column after the other."""
    return columns.movedim(-1, 0).contiguous().movedim(0, -1) if columns.shape[-1] > 1 else columns


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the GPU or the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
