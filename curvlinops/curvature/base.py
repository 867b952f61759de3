"""The base class of curvature matrices: a sum over mini-batches of a per-batch product."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Self, TypedDict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from curvlinops.curvature.cost import Cost, Units, cost_of
from curvlinops.memory import checked_budget
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space
from curvlinops.risk.collective import agreed, raise_together
from curvlinops.risk.columns import Piece, checked_chunk_size, column_by_column, gathered, in_chunks
from curvlinops.risk.determinism import check_deterministic as run_determinism_check
from curvlinops.risk.empirical_risk import BatchSum, EmpiricalRisk
from curvlinops.risk.keeping import Keeper
from curvlinops.risk.linearization import Use
from curvlinops.risk.losses import as_loss
from curvlinops.risk.model import FunctionalModel, Parameters
from curvlinops.risk.surroundings import RandomStates

#: Maps columns-last tensors to the product with the sum over one mini-batch's data. One with a method ``held()``, which
#: yields the tensors it holds, can be kept by :meth:`CurvatureLinearOperator.linearize`.
BatchProduct = Callable[[list[Tensor]], list[Tensor]]


class RiskOptions(TypedDict, total=False):
    """Keyword-only arguments of every curvature operator; see :class:`CurvatureLinearOperator`."""

    weight_fn: Callable[[Any, Any], Tensor] | None
    process_group: ProcessGroup | None
    chunk_size: int | str


class CurvatureLinearOperator(LinearOperator):
    r"""A curvature matrix of an empirical risk, :math:`C = \sum_b d_b C_b / \sum_b d_b`.

    :math:`C_b` is the curvature of mini-batch b's own reduced loss and :math:`d_b` its denominator under 'mean'; under
    'sum' the :math:`C_b` are added. The matrix is that of the loss of all data at once, however they are cut into
    mini-batches. It is evaluated at the parameters as they are at each product; :meth:`frozen` keeps a copy.

    To make a matrix of your own, subclass and write :meth:`_matmat_batch`.

    Args:
        model_func: Module or callable of X, or callable of (params_dict, X).
        loss_func: ``nn.CrossEntropyLoss``, ``nn.MSELoss``, ``nn.BCEWithLogitsLoss``, or any callable
            (prediction, y) -> scalar.
        params: List of parameters, or dict from names to tensors.
        data: Iterable of mini-batches (X, y), or of mappings with ``labels``; read again at each product.
        progressbar: Whether to show progress over the data.
        check_deterministic: Whether to check once that model and data repeat. Cost: two forwards.
        num_data: Number of data; a mismatch is an error.
        batch_size_fn: Number of data in X, where it cannot be seen.
        weight_fn: Weight of each datum ``[N]`` as a function of (X, y); multiplies the datum's loss and its share
            in the denominator.
        process_group: Ranks that each hold a shard of the data; the result is that of the union.
        chunk_size: Columns that go through the network together, or ``"auto"``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If parameters do not fit the model, or data are empty.
        NotImplementedError: If an option of the loss is not supported.
        DeterminismError: If model or data do not repeat.
    """

    #: Whether the matrix depends on the order of the data.
    _ORDER_MATTERS = False
    #: Whether products are sums of per-batch products.
    _STREAMS_PRODUCTS = True
    #: Whether it is a sum over data, so that shards add up.
    _IS_SUM = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hooks = ("_matmat_batch", "_linearize_batch", "_matmat")
        own = [h for h in hooks if getattr(cls, h) is not getattr(CurvatureLinearOperator, h)]
        if not own:
            raise TypeError(f"{cls.__name__} must implement _matmat_batch(self, X, y, M) to be a curvature operator.")
        if "_matmat_batch" in vars(cls) and not cls._STREAMS_PRODUCTS:
            raise TypeError(
                f"{cls.__name__} implements _matmat_batch, but the products of its base class do not go through it: "
                "derive from CurvatureLinearOperator."
            )

    def __init__(
        self,
        model_func: Callable[..., Any],
        loss_func: Callable[[Tensor, Any], Tensor] | None,
        params: Parameters,
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        *,
        weight_fn: Callable[[Any, Any], Tensor] | None = None,
        process_group: ProcessGroup | None = None,
        chunk_size: int | str = "auto",
    ) -> None:
        self._model_func = model_func
        self._loss_func = loss_func
        self._chunk_size = checked_chunk_size(chunk_size)
        if process_group is not None and not self._IS_SUM:
            raise NotImplementedError(
                f"{type(self).__name__} stacks data instead of summing over them: process_group is not supported."
            )
        if weight_fn is not None and self._is_users_own:
            raise NotImplementedError(
                f"{type(self).__name__} implements _matmat_batch, which does not see example weights: weight_fn is not "
                "supported. Weigh inside of _matmat_batch."
            )
        model = FunctionalModel(model_func, params)
        self._risk = EmpiricalRisk(
            model,
            None if loss_func is None else as_loss(loss_func),
            data,
            name=type(self).__name__,
            progressbar=progressbar,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
            weight_fn=weight_fn,
            process_group=process_group,
        )
        first = model.params[0]
        space = Space(tuple(tuple(p.shape) for p in model.params), first.dtype, first.device, model.names)
        LinearOperator.__init__(self, space, space)
        if check_deterministic:
            self._check_deterministic()

    @property
    def _params(self) -> list[Tensor]:
        """The parameters as a list of tensors; they require gradients while mini-batches are processed."""
        return self._risk.model.params

    @property
    def _is_users_own(self) -> bool:
        return type(self)._matmat_batch is not CurvatureLinearOperator._matmat_batch

    def _check_deterministic(self) -> None:
        error = None
        try:
            with torch.inference_mode(False):
                run_determinism_check(self._risk, self._ORDER_MATTERS)
        except Exception as found:
            error = found
        raise_together(error, self.device, self._risk.process_group)

    # ------------------------------------------------------------ extension points

    def _matmat_batch(self, X: Any, y: Any, M: list[Tensor]) -> list[Tensor]:
        """The mini-batch's own curvature times M: the extension point for users.

        Called with gradients enabled and X and y on the device of the parameters. ``self._model_func`` and
        ``self._loss_func`` are as they were given, ``self._params`` is a list of tensors that require gradients,
        ``self._predict(X)`` the model at those.

        Args:
            X: Inputs of one mini-batch.
            y: Its targets.
            M: Columns-last tensors ``[*shape, K]``.

        Returns:
            The curvature of the mini-batch's own reduced loss times M, as tensors like M.
        """
        product = self._linearize_batch(X, y)
        denominator = self._risk.denominator(X, y).item()
        # A mini-batch in which every target is ignored contributes nothing.
        return [r / (denominator or 1.0) for r in gathered(in_chunks(product, M, self._chunk_sizes()))]

    def _linearize_batch(self, X: Any, y: Any) -> BatchProduct:
        """The curvature summed over the mini-batch's data as a reusable product."""
        raise NotImplementedError

    def _predict(self, X: Any) -> Tensor:
        """The prediction at ``self._params``, whatever form model and parameters came in."""
        return self._risk.model(self._params, X)

    # -------------------------------------------------------------------- products

    def _begin_pass(self) -> None:
        """Called before the first mini-batch of each pass."""

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        columns = column_by_column(X)
        result = self._risk.total(lambda: self._batch_sum(columns), [x.shape for x in X], "product", self._use(X))
        return [r.to(self.dtype) for r in result]

    def _use(self, columns: list[Tensor]) -> Use:
        """What linearisations are for: more columns make them worth more preparation."""
        return replace(self._risk.use, is_reused=True) if columns[0].shape[-1] > 1 else self._risk.use

    def _batch_sum(self, M: list[Tensor]) -> BatchSum:
        self._begin_pass()
        if self._is_users_own:
            return lambda X, y: self._users_sum(X, y, M)
        return lambda X, y: in_chunks(self._risk.kept(lambda: self._linearize_batch(X, y)), M, self._chunk_sizes())

    def _chunk_sizes(self) -> Callable[[], int]:
        """Columns that go through the network together, chunk by chunk: what the user says, or what suits the model.

        The first column goes alone: it prepares the others and teaches their number. It does so in every pass, so
        that the same question gets the same answer to the bit.
        """
        if self._chunk_size is not None:
            return lambda size=self._chunk_size: size  # type: ignore[misc]
        is_first = iter([True])
        return lambda: 1 if next(is_first, False) else self._risk.engine.chunk_size or 1

    def _users_sum(self, X: Any, y: Any, M: list[Tensor]) -> Iterator[Piece]:
        denominator = float(self._risk.denominator(X, y))
        if denominator == 0:
            return
        columns = self._chunk_size or M[0].shape[-1]
        for part, result in in_chunks(lambda m: self._matmat_batch(X, y, m), M, lambda: columns):
            yield part, [denominator * r for r in result]

    def gradient_and_loss(self) -> tuple[list[Tensor], Tensor]:
        """The gradient and the value of the loss over all data, with the matrix's own scale.

        Cost: one forward and one backward.

        Returns:
            List of tensors in the shapes of the parameters, and a tensor without axes.
        """
        if self._risk.loss is None:
            raise NotImplementedError(f"{type(self).__name__} has no loss, so no gradient.")
        with torch.inference_mode(False):
            return self._risk.gradient_and_loss()

    def _copied(self) -> Self:
        result = copy.copy(self)
        result._risk = copy.copy(self._risk)
        return result

    def _read_from(self, data: Iterable[Any]) -> None:
        """Go over to other data; called of a new copy."""
        self._risk.keeper = None
        self._risk.data = data
        self._risk.num_data = None

    def frozen(self) -> Self:
        """The same matrix at copies of the model's parameters and buffers, which later training does not change.

        Raises:
            NotImplementedError: If the model closes over its parameters.
        """
        if self._is_frozen:
            return self
        with torch.inference_mode(False):
            model = self._risk.model.frozen()
        result = self._copied()
        result._risk.model = model
        result._model_func = model.model_func
        result._is_frozen = True
        return result

    _is_frozen = False

    @property
    def _holds_values(self) -> bool:
        return self._is_frozen

    def _agreed(self, flag: bool) -> bool:
        return agreed(flag, self.device, self._risk.process_group)

    def linearize(self, max_memory: int | None = None, *, engine: str = "auto") -> Self:
        """The same matrix, frozen, whose per-batch products are kept so that further ones cost less.

        The first product prepares each mini-batch and keeps what it prepared, as long as it fits; the others are
        streamed. Memory is released when the operator is dropped.

        Args:
            max_memory: Bytes that may be kept, by default a quarter of the device's memory; 0 streams everything and
                holds no more than a gradient does.
            engine: ``"tangents"``, ``"factors"``, or ``"auto"`` for the one that is cheaper and fits.

        Raises:
            NotImplementedError: If the model closes over its parameters, or has no such engine.
            ValueError: If an argument is not understood.
        """
        budget = checked_budget(max_memory, self.device)
        if engine not in ("auto", "tangents", "factors"):
            raise ValueError(f"engine: expected 'auto', 'tangents' or 'factors', got {engine!r}.")
        self._check_engine(engine)
        if self._risk.keeper is not None and max_memory is None and engine in ("auto", self._engine):
            return self
        result = self._copied() if self._is_frozen else self.frozen()
        if result._is_users_own:
            return result
        risk = result._risk
        risk.engine = copy.copy(risk.engine)
        risk.keeper = Keeper(budget, risk.model.params, RandomStates(risk.data, risk.device))
        risk.use = Use(is_lean=budget == 0, max_bytes=budget)
        result._engine = engine
        return result

    def _check_engine(self, engine: str) -> None:
        """Refuse an engine that the matrix does not have."""
        if engine == "factors":
            raise NotImplementedError(
                f"{type(self).__name__} is not of the form Jᵀ S Sᵀ J, so it has no factors: use engine='tangents'."
            )

    def cost(self) -> Cost:
        """What a product costs, in forward-units and bytes: streamed, lean, and kept by :meth:`linearize`.

        Answers "how much memory do I need?". Cost: one pass over the data, and a few products with the first
        mini-batch.

        Raises:
            NotImplementedError: For matrices of users' own, of which nothing is known, and for diagonals.
        """
        if self._is_users_own or self._UNITS is None:
            raise NotImplementedError(f"{type(self).__name__} does not tell what its products cost.")
        with torch.inference_mode(False):
            return cost_of(self, self._UNITS)

    #: Forward-units of its products.
    _UNITS: Units | None = None

    def _factor_columns(self, X: Any, y: Any) -> int | None:
        """Columns of a datum where the engine of factors is worth a thought."""
        return None

    @property
    def _way(self) -> str | None:
        """The way of its products, as in the cost report; ``None`` where the first product will choose."""
        keeper = self._risk.keeper
        if keeper is None:
            return "streamed"
        return "lean" if keeper.max_bytes == 0 else keeper.engine

    #: The engine that :meth:`linearize` was asked for.
    _engine = "auto"

    def _repr_extra(self) -> str:
        frozen = ", frozen" if self._is_frozen else ""
        return frozen if self._risk.keeper is None else f"{frozen}, linearised: {self._risk.keeper.describe()}"
