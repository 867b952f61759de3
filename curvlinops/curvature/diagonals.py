"""Diagonals of the generalised Gauss-Newton and the empirical Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, Unpack

import torch
from torch import Tensor

from curvlinops.curvature.base import BatchProduct, CurvatureLinearOperator, RiskOptions
from curvlinops.curvature.gradient_moments import require_terms
from curvlinops.curvature.sandwich import GaussNewtonFactor, Sampling, SandwichProduct
from curvlinops.operators.base import unit_columns
from curvlinops.operators.space import Space
from curvlinops.operators.structured import Diagonal
from curvlinops.risk.empirical_risk import BatchSum
from curvlinops.risk.linearization import DEFAULT_CHUNK_SIZE
from curvlinops.risk.losses import Terms
from curvlinops.risk.losses.factors import LossFactor, gradient_factor
from curvlinops.risk.model import Parameters
from curvlinops.risk.per_datum import squares_datum_by_datum, squares_from_notes


class CurvatureDiagonal(Diagonal, CurvatureLinearOperator):
    """The diagonal of c Σ_n J_nᵀ S_n S_nᵀ J_n: computed once, at first use, and frozen from then on."""

    POSITIVE_SEMIDEFINITE = True
    _STREAMS_PRODUCTS = False

    def __init__(self, *args: Any, **options: Any) -> None:
        CurvatureLinearOperator.__init__(self, *args, **options)
        self._kept_entries = None

    def _loss_factor(self, terms: Terms) -> LossFactor:
        raise NotImplementedError

    @property
    def _entries(self) -> list[Tensor]:
        if self._kept_entries is None:
            with torch.inference_mode(False):
                shapes = [p.shape for p in self._params]
                found = self._risk.total(self._diagonal_sum, shapes, "diagonal")
            self._kept_entries = [entry.to(self.dtype) for entry in found]
        return self._kept_entries

    def _diagonal_sum(self) -> BatchSum:
        self._begin_pass()
        return lambda X, y: [(None, self._diagonal_batch(X, y))]

    def _diagonal_batch(self, X: Any, y: Any) -> Sequence[Tensor]:
        """The diagonal summed over a mini-batch's data."""
        if self._risk.loss is not None and not self._risk.loss.is_known:
            return self._diagonal_by_products(X, y)
        model = self._risk.model
        lin, notes = self._risk.noted(X)
        factor = self._loss_factor(self._risk.terms(lin.output, X, y))
        squares = model.holding(lin.values, lambda: squares_from_notes(notes, factor.columns))
        rest = [i for i in range(len(lin.values)) if i not in squares]
        if rest:
            # The notes are read off the backward itself; what is differentiated in other ways must agree with it.
            self._risk.check_directions(X)
            found = model.holding(lin.values, lambda: squares_datum_by_datum(model, X, lin, rest, factor.columns))
            squares.update(zip(rest, found, strict=True))
        return [squares[i] for i in range(len(lin.values))]

    def _diagonal_by_products(self, X: Any, y: Any) -> list[Tensor]:
        """The diagonal from products with all unit vectors: all that is left where the loss has no terms."""
        product = SandwichProduct(self._risk, X, y, self._loss_factor)
        parts = []
        for units in unit_columns(self.domain, self._chunk_size or DEFAULT_CHUNK_SIZE):
            parts.append((units * Space.merge(product(self.domain.split(units)))).sum(0))
        return self.domain.shaped(torch.cat(parts))

    def _linearize_batch(self, X: Any, y: Any) -> BatchProduct:
        diagonal = self._diagonal_batch(X, y)
        return lambda M: [d.unsqueeze(-1) * m for d, m in zip(diagonal, M, strict=True)]

    def linearize(self, max_memory: int | None = None, *, engine: str = "auto") -> Self:
        """Itself, computed."""
        _ = self._entries
        return self

    def frozen(self) -> Self:
        """Itself, once computed; otherwise the diagonal at copies of parameters and buffers."""
        return self if self._holds_values else CurvatureLinearOperator.frozen(self)

    @property
    def _holds_values(self) -> bool:
        return self._kept_entries is not None or self._is_frozen

    def _repr_extra(self) -> str:
        computed = ", frozen at the parameters it was computed at" if self._kept_entries is not None else ""
        return computed or CurvatureLinearOperator._repr_extra(self)


class GGNDiagonalLinearOperator(GaussNewtonFactor, CurvatureDiagonal):
    r"""The diagonal of :class:`GGNLinearOperator`, with the same scale and the same samples.

    **Cost**: with C prediction entries a datum, a backward for each of C columns (for ``mc_samples`` each sample) for
    the parameters of the usual layers (linear, convolution, embedding, normalisation, attention, bare parameters that
    are added or multiplied), and one more at the first mini-batch; for others the gradients of every datum for each
    column, held for a few data at a time. Afterwards O(D) a product.

    **Reference**: Dangel, Kunstner, Hennig (2020), BackPACK: packing more into backprop, arXiv:1912.10985.

    Args:
        model_func: See :class:`CurvatureLinearOperator`, as for all arguments but those below.
        loss_func: The loss; one that is not cross-entropy, squared error or binary cross-entropy costs D products
            and has no samples.
        params: The parameters.
        data: The data.
        progressbar: Whether to show progress.
        check_deterministic: Whether to check that model and data repeat.
        num_data: Number of data.
        batch_size_fn: Number of data in X.
        mc_samples: Number of samples, 0 for the exact diagonal.
        seed: Seed of the samples.
        **options: ``weight_fn``, ``process_group``, ``chunk_size``.

    Raises:
        NotImplementedError: If there are samples to draw, and the loss is not one of the three.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> data = [(torch.rand(5, 3), torch.tensor([0, 1, 1, 0, 1]))]
    >>> D = GGNDiagonalLinearOperator(model, torch.nn.CrossEntropyLoss(), list(model.parameters()), data)
    >>> (D + D).inverse(damping=1e-3).shape
    (8, 8)
    """

    def __init__(
        self,
        model_func: Callable[..., Any],
        loss_func: Callable[[Tensor, Any], Tensor],
        params: Parameters,
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        mc_samples: int = 0,
        seed: int = 2147483647,
        **options: Unpack[RiskOptions],
    ) -> None:
        self._sampling = Sampling(mc_samples, seed)
        self._ORDER_MATTERS = mc_samples > 0
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar,
            check_deterministic,
            num_data,
            batch_size_fn,
            **options,
        )
        if mc_samples > 0:
            require_terms(self, "position")
        loss = self._risk.loss
        self.POSITIVE_SEMIDEFINITE = loss is not None and loss.is_convex


class EFDiagonalLinearOperator(CurvatureDiagonal):
    r"""The diagonal of :class:`EFLinearOperator`, with the same scale and the same ``terms``.

    **Cost**: a backward for each term of a datum for the parameters of the usual layers, as for
    :class:`GGNDiagonalLinearOperator`; for others the gradients of every datum for each of its terms, held for a few
    data at a time. Afterwards O(D) a product.

    **Reference**: Dangel, Kunstner, Hennig (2020), BackPACK: packing more into backprop, arXiv:1912.10985.

    Args:
        model_func: See :class:`CurvatureLinearOperator`, as for all arguments but those below.
        loss_func: Cross-entropy, squared error or binary cross-entropy.
        params: The parameters.
        data: The data.
        progressbar: Whether to show progress.
        check_deterministic: Whether to check that model and data repeat.
        num_data: Number of data.
        batch_size_fn: Number of data in X.
        terms: ``"position"`` or ``"datum"``.
        **options: ``weight_fn``, ``process_group``, ``chunk_size``.

    Raises:
        NotImplementedError: If the loss is not one of the three.
        ValueError: If ``terms`` is unknown.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> data = [(torch.rand(5, 3), torch.rand(5, 2))]
    >>> D = EFDiagonalLinearOperator(model, torch.nn.MSELoss(), list(model.parameters()), data)
    >>> D.diagonal().shape
    torch.Size([8])
    """

    def __init__(
        self,
        model_func: Callable[..., Any],
        loss_func: Callable[[Tensor, Any], Tensor],
        params: Parameters,
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        *,
        terms: str = "position",
        **options: Unpack[RiskOptions],
    ) -> None:
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar,
            check_deterministic,
            num_data,
            batch_size_fn,
            **options,
        )
        self._terms = require_terms(self, terms)

    def _loss_factor(self, terms: Terms) -> LossFactor:
        return gradient_factor(terms, self._terms)
