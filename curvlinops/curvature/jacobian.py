"""The Jacobian of the predictions of all data, and its transpose."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from curvlinops.curvature.base import BatchProduct, CurvatureLinearOperator, RiskOptions
from curvlinops.curvature.cost import Units
from curvlinops.operators.algebra import Adjoint
from curvlinops.operators.space import Space
from curvlinops.risk.columns import Piece, column_by_column, gathered, in_chunks
from curvlinops.risk.empirical_risk import BatchSum, EmpiricalRisk
from curvlinops.risk.model import Parameters
from curvlinops.risk.surroundings import differentiable, preserved_random_state


class JacobianLinearOperator(CurvatureLinearOperator):
    r"""The Jacobian :math:`J = \partial f(X) / \partial\theta` of the stacked predictions of all data.

    The codomain is one tensor ``[N, *out]`` with the name ``prediction``; where the predictions of mini-batches differ
    in their other axes, one tensor a mini-batch (``prediction.0``, ``prediction.1``, ...). Finding its shape takes a
    forward, at first use. ``J @ J.T`` is the empirical neural tangent kernel.

    **Cost**: ``J @ v`` a forward with tangents, ``J.T @ u`` a forward and a backward a column.

    **Reference**: Jacot, Gabriel, Hongler (2018), Neural tangent kernel, arXiv:1806.07572.

    Args:
        model_func: See :class:`CurvatureLinearOperator`, as for all arguments.
        params: The parameters.
        data: The data, in a fixed order; targets are not used.
        progressbar: Whether to show progress.
        check_deterministic: Whether to check that model and data repeat.
        num_data: Number of data.
        batch_size_fn: Number of data in X.
        **options: ``chunk_size``.

    Raises:
        NotImplementedError: With a ``process_group`` or ``weight_fn``.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> data = [(torch.rand(4, 3), None), (torch.rand(1, 3), None)]
    >>> J = JacobianLinearOperator(model, list(model.parameters()), data)
    >>> J.shape, (J @ J.T).shape
    ((10, 8), (10, 10))
    """

    _ORDER_MATTERS = True
    _UNITS = Units(streamed=3, lean=3, kept=2)
    _IS_SUM = False
    _STREAMS_PRODUCTS = False

    def __init__(
        self,
        model_func: Callable[..., Any],
        params: Parameters,
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        **options: Unpack[RiskOptions],
    ) -> None:
        if options.get("weight_fn") is not None:
            raise NotImplementedError(f"{type(self).__name__} has no loss to weigh: weight_fn is not supported.")
        self._output_shapes: list[tuple[int, ...]] | None = None
        self._is_checked = False
        super().__init__(
            model_func,
            None,
            params,
            data,
            progressbar,
            check_deterministic,
            num_data,
            batch_size_fn,
            **options,
        )

    @property
    def codomain(self) -> Space:
        """The space of stacked predictions; the first use runs a forward over the data."""
        shapes = self._shapes_of_batches()
        names = tuple(f"prediction.{b}" for b in range(len(shapes)))
        if len({shape[1:] for shape in shapes}) == 1:
            shapes, names = [(sum(shape[0] for shape in shapes), *shapes[0][1:])], ("prediction",)
        return Space(tuple(shapes), self.dtype, self.device, names)

    def _shapes_of_batches(self) -> list[tuple[int, ...]]:
        if self._output_shapes is None:
            risk = self._risk
            with preserved_random_state(risk.data, risk.device), differentiable(risk.model):
                shapes = [tuple(risk.predict(batch.X).shape) for batch in risk.batches("shapes of predictions")]
            self._output_shapes = shapes
        return self._output_shapes

    def _read_from(self, data: Iterable[Any]) -> None:
        super()._read_from(data)
        self._output_shapes = None

    def _cut(self, U: list[Tensor]) -> list[Tensor]:
        """Columns of the codomain, one tensor a mini-batch."""
        return (
            list(torch.split(U[0], [s[0] for s in self._shapes_of_batches()])) if len(self.codomain.shapes) == 1 else U
        )

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        parts: list[Tensor] = []
        risk = self._risk
        expected = self._shapes_of_batches()
        columns = column_by_column(X)

        def begin() -> BatchSum:
            parts.clear()

            def push(inputs: Any, y: Any) -> list[Piece]:
                product = risk.kept(lambda: BatchJacobian(risk, inputs, checking=not self._is_checked))
                parts.extend(gathered(in_chunks(product, columns, self._chunk_sizes())))
                return []

            return push

        risk.total(begin, [], "product with the Jacobian", self._use(X))
        self._is_checked = True
        if [tuple(p.shape[:-1]) for p in parts] != expected:
            raise ValueError("The predictions changed their shapes between two passes over the data.")
        return [torch.cat(parts)] if len(self.codomain.shapes) == 1 else parts

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        parts = column_by_column(self._cut(X))
        shapes = [(*shape, X[0].shape[-1]) for shape in self.domain.shapes]

        def begin() -> BatchSum:
            remaining = iter(parts)

            def pull(inputs: Any, y: Any) -> Iterator[Piece]:
                self._risk.check_directions(inputs)
                product = self._risk.kept(lambda: BatchJacobian(self._risk, inputs))
                return in_chunks(product.pull, [next(remaining)], self._chunk_sizes())

            return pull

        result = self._risk.total(begin, shapes, "product with the transposed Jacobian", self._use(X))
        return [r.to(self.dtype) for r in result]

    def _linearize_batch(self, X: Any, y: Any) -> BatchProduct:
        return BatchJacobian(self._risk, X)


class BatchJacobian:
    """The Jacobian at one mini-batch: as a call V -> J V, and as `pull`."""

    def __init__(self, risk: EmpiricalRisk, X: Any, checking: bool = False) -> None:
        self._risk: EmpiricalRisk = weakref.proxy(risk)  # which may keep this
        self._X = X
        self._checking = checking
        self._lin = risk.linearize(X)

    def __call__(self, V: list[Tensor]) -> list[Tensor]:
        """J V for columns-last tensors of the parameters."""
        self._lin, JV = self._risk.push(self._lin, self._X, V)
        if self._checking:  # a product needs no pull, so the two are compared in the first pass only
            self._risk.note_products(JV, JV, V, self._lin.pull(JV))
            self._checking = False
        if not JV.isfinite().all():
            raise FloatingPointError("the product with the Jacobian is not finite.")
        return [JV.to(self._risk.model.params[0].dtype)]

    def pull(self, U: list[Tensor]) -> list[Tensor]:
        """Jᵀ U for columns-last predictions."""
        return self._lin.pull(U[0])

    def held(self) -> Iterator[Tensor]:
        """The tensors that are held between products."""
        return self._lin.held()


class TransposedJacobianLinearOperator(Adjoint):
    r"""The transposed Jacobian :math:`J^\top` of the stacked predictions.

    Takes the arguments of :class:`JacobianLinearOperator`, and costs what that operator's transpose costs.

    Args:
        model_func: See :class:`JacobianLinearOperator`, as for all arguments.
        params: The parameters.
        data: The data, in a fixed order; targets are not used.
        progressbar: Whether to show progress.
        check_deterministic: Whether to check that model and data repeat.
        num_data: Number of data.
        batch_size_fn: Number of data in X.
        weight_fn: Refused, as in :class:`JacobianLinearOperator`.
        process_group: Refused likewise.
        chunk_size: Columns that go through the network together, or ``"auto"``.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> JT = TransposedJacobianLinearOperator(model, list(model.parameters()), [(torch.rand(4, 3), None)])
    >>> JT.shape
    (8, 8)
    """

    def __init__(
        self,
        model_func: Callable[..., Any],
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
        jacobian = JacobianLinearOperator(
            model_func,
            params,
            data,
            progressbar,
            check_deterministic,
            num_data,
            batch_size_fn,
            weight_fn=weight_fn,
            process_group=process_group,
            chunk_size=chunk_size,
        )
        super().__init__(jacobian)
        self._model_func = model_func
        self._loss_func = None

    @property
    def _params(self) -> list[Tensor]:
        assert isinstance(self.operator, JacobianLinearOperator)
        return self.operator._params
