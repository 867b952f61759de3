"""What KFAC, EKFAC and KFOC share: passes over the data, the blocks they make, and closed forms of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, Unpack

from torch import Tensor

from curvlinops.curvature.base import RiskOptions
from curvlinops.curvature.gradient_moments import require_terms
from curvlinops.curvature.kronecker.accumulation import Accumulation, from_tensors, to_tensors
from curvlinops.curvature.kronecker.closed_forms import ClosedForms
from curvlinops.curvature.kronecker.settings import Settings
from curvlinops.curvature.kronecker.streaming import StreamedBlocks
from curvlinops.curvature.kronecker.table import BlockTable
from curvlinops.curvature.kronecker.types import FisherType
from curvlinops.curvature.sandwich import Sampling
from curvlinops.operators.block_diagonal import BlockDiagonal
from curvlinops.risk.collective import size_of
from curvlinops.risk.model import Parameters


class KroneckerFactoredLinearOperator(ClosedForms, StreamedBlocks):
    """A block-diagonal approximation whose blocks are Kronecker products where a weight meets inputs.

    Computed once, at first use, and frozen from then on.
    """

    SELF_ADJOINT = True
    POSITIVE_SEMIDEFINITE = True
    #: Tells the kinds apart in saved states.
    _KIND: int

    def __init__(
        self,
        model_func: Callable[..., Any],
        loss_func: Callable[[Tensor, Any], Tensor],
        params: Parameters,
        data: Iterable[Any],
        progressbar: bool,
        check_deterministic: bool,
        num_data: int | None,
        batch_size_fn: Callable[[Any], int] | None,
        settings: Settings,
        **options: Unpack[RiskOptions],
    ) -> None:
        self._fisher_type = settings.fisher_type
        self._sampling = Sampling(settings.mc_samples, settings.seed)
        self._ORDER_MATTERS = self._fisher_type == FisherType.MC
        self._num_positions = settings.num_positions
        self._options = settings.of_blocks
        self._terms = settings.terms
        self._state = Accumulation()
        self._uncovered: set[int] = set()
        self._structure: BlockDiagonal | None = None
        super().__init__(
            model_func, loss_func, params, data, progressbar, check_deterministic, num_data, batch_size_fn, **options
        )
        if self._fisher_type != FisherType.FORWARD_ONLY:
            require_terms(self, settings.terms)

    @property
    def blocks(self) -> BlockTable:
        """What each parameter got: a table, printed line by line, and a sequence of rows.

        Computes the matrix if that is still to be done.
        """
        self.compute()
        return BlockTable.of(self._state.blocks or [], self.domain, self._state.kept)

    def factors(self, name: str | int) -> dict[str, Tensor]:
        """Copies of what the block of a parameter is made of.

        Args:
            name: Name of the parameter, or its position in ``params``.

        Returns:
            For a Kronecker product ``gradient_covariance`` ``[R, R]`` and ``input_covariance`` ``[S, S]``, with an axis
            of groups in front where there is more than one; for an embedding the latter is the diagonal ``[rows]``;
            ``matrix`` or ``diagonal`` for other blocks. The rows of the former belong to outputs, those of the latter
            to inputs, a joined bias being the last.

        Raises:
            KeyError: If there is no such parameter.
        """
        position = self._position(name)
        self.compute()
        number = next(k for k, block in enumerate(self._state.blocks or []) if position in block.positions)
        kept = self._state.kept[number]
        return {
            what: (tensor.squeeze(0) if tensor.ndim == 3 else tensor).to(self.dtype).clone()
            for what, tensor in kept.items()
        }

    def _position(self, name: str | int) -> int:
        names = self.domain.names
        if isinstance(name, str) and names is not None and name in names:
            return names.index(name)
        if isinstance(name, int) and 0 <= name < len(self._params):
            return name
        known = list(range(len(self._params))) if names is None else list(names)
        raise KeyError(f"There is no parameter {name!r}; the parameters are {known}.")

    @property
    def _computed(self) -> BlockDiagonal:
        return self._built()

    def linearize(self, max_memory: int | None = None, *, engine: str = "auto") -> Self:
        """Itself, computed."""
        return self.compute()

    def frozen(self) -> Self:
        """Itself, once computed; otherwise the matrix at copies of parameters and buffers."""
        return self if self._holds_values else super().frozen()

    def _copied(self) -> Self:
        result = super()._copied()
        result._state, result._structure = Accumulation(), None
        result._uncovered = set(self._uncovered)
        return result

    @property
    def _holds_values(self) -> bool:
        return self._state.is_done or self._is_frozen

    def _repr_extra(self) -> str:
        computed = ", frozen at the parameters it was computed at" if self._state.is_done else ""
        return f", {self._fisher_type}{computed or super()._repr_extra()}"

    def _settings(self) -> dict[str, float]:
        """What the matrix depends on, as numbers."""
        return {
            "kind": self._KIND,
            "is_mean": int(self._risk.is_mean),
            "fisher_type": list(FisherType).index(self._fisher_type),
            "mc_samples": self._sampling.num_samples,
            "seed": self._sampling.seed if self._fisher_type == FisherType.MC else 0,
            "reduces": int(self._options.reduces),
            "joins_biases": int(self._options.joins_biases),
            "sums_terms": int(self._fisher_type == FisherType.EMPIRICAL and self._terms == "datum"),
        }

    def _ranks(self) -> dict[str, float]:
        """Whose share of the data an unfinished state has."""
        return {"rank": self._risk.rank, "num_ranks": size_of(self._risk.process_group)}

    def state_dict(self) -> dict[str, Tensor]:
        """What was computed so far, as a flat dict of plain tensors, as safetensors store them.

        Taken after some mini-batches (see :meth:`compute`), it lets another operator of the same model and data go on
        with the next one, with the same result to the bit. Under a process group, each rank saves its own.
        """
        return to_tensors(self._state, self._settings(), self._ranks())

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from a saved state. Model, parameters and data are not touched.

        Args:
            state_dict: What :meth:`state_dict` gave, of an operator that was built with the same arguments.

        Raises:
            ValueError: If it was saved with other arguments, or for other parameters.
        """
        self._state = from_tensors(state_dict, self._settings(), self._ranks(), self._params)
        self._structure = None
