"""The learned inverse of each layer, in three factors, and those of all layers side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from math import log, sqrt

import torch
from torch import Tensor

from curvlinops import BlockDiagonal, LinearOperator, Space
from curvlinops.applications.learned_inverse.layouts import Layout

#: Which factors each structure learns.
FACTORS = {"kronecker": "DLR", "diagonal": "D", "full": "L", "identity": ""}
#: D, L and R; None for an identity.
_Factors = tuple[Tensor | None, Tensor | None, Tensor | None]


class LearnedBlock:
    r"""The learned inverse of one layer, on matrices M ``[rows, columns]``.

    .. math:: Q(M) = s \, D \circ (L L^\top (D \circ M) R R^\top)

    Triangular factors are stored as a square matrix whose lower triangle they are, but for the diagonal, of which it
    holds the logarithm, as for D: no step can make them singular, and zeros everywhere are s times the identity, to
    the bit where s is 1.

    Args:
        layout: How the layer's parameters form a matrix.
        structure: ``"kronecker"`` (D, L and R), ``"diagonal"`` (D), ``"full"`` (L), or ``"identity"`` (none).
        scale: The number s.
        dtype: Dtype of the factors.
        device: Their device.

    Attributes:
        raw: What is learned, by the factor's letter; the tensors require gradients.
    """

    def __init__(self, layout: Layout, structure: str, scale: float, dtype: torch.dtype, device: torch.device) -> None:
        rows, columns = layout.shape
        shapes = {"D": (rows, columns), "L": (rows, rows), "R": (columns, columns)}
        self.layout, self.structure, self.scale = layout, structure, scale
        self._like = torch.empty(0, dtype=dtype, device=device)
        self.raw = {
            letter: torch.zeros(shapes[letter], dtype=dtype, device=device, requires_grad=True)
            for letter in FACTORS[structure]
        }
        self._kept: tuple[list[int], _Factors] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return self._like.dtype

    def copied(self) -> LearnedBlock:
        """The same inverse with factors of its own, which are not learned any more."""
        result = copy(self)
        with torch.inference_mode(False):  # whose tensors do not tell when they change
            result.raw = {letter: raw.detach().clone() for letter, raw in self.raw.items()}
        result._kept = None
        return result

    def _factors(self) -> _Factors:
        """D, L and R; ``None`` for an identity. Without a graph they are kept until a step changes what they hold."""
        versions = [raw._version for raw in self.raw.values()]
        if self._kept is not None and self._kept[0] == versions and not torch.is_grad_enabled():
            return self._kept[1]
        D, L, R = (self.raw.get(letter) for letter in "DLR")
        factors = D if D is None else D.exp(), _triangular(L), _triangular(R)
        D, L, R = (factor if factor is None else factor.detach() for factor in factors)
        self._kept = versions, (D, L, R)
        return factors

    def product(self, M: Tensor) -> Tensor:
        """Q times matrices ``[K, rows, columns]``; differentiable with respect to what is learned."""
        D, L, R = self._factors()
        M = M if D is None else D * M
        M = M if L is None else L @ (L.mT @ M)
        M = M if R is None else (M @ R) @ R.mT
        return self.scale * (M if D is None else D * M)

    def root(self, Z: Tensor) -> Tensor:
        """S times matrices ``[K, rows, columns]``, with S Sᵀ = Q."""
        D, L, R = self._factors()
        Z = Z if L is None else L @ Z
        Z = Z if R is None else Z @ R.mT
        return sqrt(self.scale) * (Z if D is None else D * Z)

    def diagonal(self) -> Tensor:
        """The diagonal of Q as a matrix ``[1, rows, columns]``."""
        D, L, R = self._factors()
        result = self._like.new_full((1, *self.layout.shape), self.scale)
        for factor in (D, None if L is None else L.norm(dim=1)[:, None], None if R is None else R.norm(dim=1)):
            result = result if factor is None else result * factor.square()
        return result

    def logdet(self) -> Tensor:
        """The logarithm of the determinant of Q, in float64."""
        rows, columns = self.layout.shape
        half = torch.full((), rows * columns * log(self.scale) / 2, dtype=torch.float64, device=self._like.device)
        for letter, copies in (("D", 1), ("L", columns), ("R", rows)):
            if letter in self.raw:
                raw = self.raw[letter]
                logs = raw if letter == "D" else raw.diagonal()
                half = half + copies * logs.sum(dtype=torch.float64)
        return 2 * half


def _triangular(raw: Tensor | None) -> Tensor | None:
    return None if raw is None else raw.tril(-1) + raw.diagonal().exp().diag_embed()


class LayerInverse(LinearOperator):
    """The learned inverse of one layer as an operator on the layer's own tensors.

    Args:
        block: The inverse, which nobody learns any more.
        space: The space of the layer's tensors.
    """

    SELF_ADJOINT = True
    POSITIVE_SEMIDEFINITE = True

    def __init__(self, block: LearnedBlock, space: Space) -> None:
        super().__init__(space, space)
        self._blocks = LearnedBlocks({"": block}, {"": range(len(space.shapes))})

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [part.to(self.dtype) for part in self._blocks.product(X)]

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``, exactly."""
        return self._blocks.diagonal(self.domain)


class LearnedBlocks:
    """The learned inverses of all layers, side by side on the tensors of a space.

    Args:
        blocks: Those of the layers, by name.
        positions: The positions of each layer's tensors; each tensor of the space belongs to one layer.
    """

    def __init__(self, blocks: Mapping[str, LearnedBlock], positions: Mapping[str, Sequence[int]]) -> None:
        self._blocks, self._positions = dict(blocks), dict(positions)

    def copied(self) -> LearnedBlocks:
        """The same with factors of its own, which are not learned any more."""
        return LearnedBlocks({name: block.copied() for name, block in self._blocks.items()}, self._positions)

    @property
    def structure(self) -> dict[str, str]:
        """The structure of each block."""
        return {name: block.structure for name, block in self._blocks.items()}

    @property
    def raw(self) -> dict[str, dict[str, Tensor]]:
        """What is learned, by layer and letter."""
        return {name: block.raw for name, block in self._blocks.items()}

    def load(self, raw: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Overwrite what is learned, which :attr:`raw` holds."""
        for name, factors in self.raw.items():
            for letter, own in factors.items():
                own.copy_(raw[name][letter])

    def product(self, X: Sequence[Tensor]) -> list[Tensor]:
        """Q times columns-last tensors, in the dtype of the factors; differentiable."""
        return self._each(X, LearnedBlock.product)

    def root(self, X: Sequence[Tensor]) -> list[Tensor]:
        """S times columns-last tensors, with S Sᵀ = Q."""
        return self._each(X, LearnedBlock.root)

    def diagonal(self, space: Space) -> Tensor:
        """The diagonal of Q ``[D]`` on the space of its tensors."""
        column = space.split(torch.zeros(space.numel, 1, dtype=space.dtype, device=space.device))
        found = self._each(column, lambda block, _: block.diagonal())
        return Space.merge(found).squeeze(-1).to(space.dtype)

    def operator(self, space: Space) -> BlockDiagonal:
        """Copies of the blocks as operators, side by side on the space of their tensors."""
        blocks = [
            LayerInverse(block.copied(), space.select(self._positions[name])) for name, block in self._blocks.items()
        ]
        return BlockDiagonal(blocks, positions=list(self._positions.values()), space=space)

    def logdet(self) -> Tensor:
        """The logarithm of the determinant of Q, in float64."""
        return torch.stack([block.logdet() for block in self._blocks.values()]).sum()

    def _each(self, X: Sequence[Tensor], apply: Callable[[LearnedBlock, Tensor], Tensor]) -> list[Tensor]:
        """Columns-last tensors from what is done with the matrix of each layer."""
        found: dict[int, Tensor] = {}
        for name, block in self._blocks.items():
            M = block.layout.matrix([X[position].to(block.dtype) for position in self._positions[name]])
            found.update(zip(self._positions[name], block.layout.tensors(apply(block, M)), strict=True))
        return [found[position] for position in range(len(X))]
