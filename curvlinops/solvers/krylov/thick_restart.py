"""Extremal eigenpairs by the Lanczos process with thick restarts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlinops.solvers.columns import Product
from curvlinops.solvers.watch import Watch

#: Puts Ritz values into order, the wanted ones first: values ``[m]`` -> indices ``[m]``.
Order = Callable[[Tensor], Tensor]


class ThickRestart:
    r"""A Krylov basis of bounded size, which is compressed to its best Ritz vectors whenever it is full.

    The basis V stays orthonormal, by orthogonalising each new block against all of it, twice; T = VᵀAV is computed from
    the same inner products, and the part of A V outside of the basis is Q R eᵀ with the next block Q. So a Ritz vector
    V s has the residual ‖R s_last‖, where s_last are its entries for the last block.

    **Reference**: Wu, Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems,
    doi:10.1137/S0895479898334605.

    Args:
        product: X -> A X, counted by the watch.
        start: The first block ``[D, b]``, of full rank.
        num_wanted: Number of eigenpairs.
        capacity: Vectors that the basis may have.
        generator: For directions where the Krylov space ends.

    Attributes:
        values: Ritz values, in order, wanted ones first ``[m]``, in float64 on the CPU.
        residuals: Their residuals by the recurrence ``[m]``.
        scale: The largest absolute value of a Ritz value seen, a lower bound of ‖A‖.
    """

    def __init__(
        self, product: Product, start: Tensor, num_wanted: int, capacity: int, generator: torch.Generator
    ) -> None:
        self._product, self._generator, self._num_wanted = product, generator, num_wanted
        self._has_ended, self._num_unexplored = False, 0
        numel, self._block = start.shape
        self._capacity = min(capacity, numel)
        self._V = start.new_zeros(self._capacity + self._block, numel)
        self._T = torch.zeros(self._capacity, self._capacity, dtype=torch.float64)
        self._size = 0
        Q, self._R = _orthonormal(start.T, torch.finfo(start.dtype).eps * float(_norms(start.T).max()), self._block)
        if len(Q) < self._block:
            raise ValueError("v0: the columns are linearly dependent; pass others, or fewer by block_size.")
        self._V[: self._block] = Q
        self._next = self._block  # rows of the block after the basis
        self._S = torch.zeros(0, 0, dtype=torch.float64)
        self.values = self.residuals = torch.zeros(0, dtype=torch.float64)
        self.scale = 0.0

    def iterate(self, order: Order, tol: float, watch: Watch) -> None:
        """Extend and compress the basis until the wanted pairs have converged or the watch says that it is time."""
        num_wanted = self._num_wanted
        floor = 10 * torch.finfo(self._V.dtype).eps
        period = max(1, self._capacity // 40)
        while watch.allows(self._next + num_wanted):
            if self._size + self._next > self._capacity:
                self._compress()
            self._extend()
            known = self.residuals[:num_wanted] if len(self.residuals) else torch.ones(1)
            watch.tick(known / (self.scale or 1.0))
            is_full = self._next == 0 or self._size + self._next > self._capacity
            if self._size >= num_wanted and (is_full or watch.num_iterations % period == 0):
                self._project(order)
                wanted = self.values[:num_wanted].abs()
                bound = torch.maximum(tol * wanted, torch.tensor(floor * self.scale))
                has_converged = self._num_unexplored <= 0 and bool((self.residuals[:num_wanted] <= bound).all())
                if self._next == 0 or has_converged:
                    return
        self._project(order)

    @property
    def device(self) -> torch.device:
        """Where the basis lives."""
        return self._V.device

    def vectors(self, count: int) -> Tensor:
        """The Ritz vectors of the first values ``[D, count]``."""
        S = self._S[:, :count].to(self._V)
        return (S.T @ self._V[: self._size]).T

    def _extend(self) -> None:
        """Multiply the next block, and split the product into what lies in the basis and what does not."""
        old, size = self._size, self._size + self._next
        Q = self._V[old:size]
        W = self._product(Q.T).T
        if not bool(W.isfinite().all()):
            raise FloatingPointError("A product with the operator is not finite: look at the parameters and the data.")
        norms = _norms(W)
        W, H = self._orthogonalised(W)
        self._T[:size, old:size] = H
        self._T[old:size, :size] = H.T
        self._size = size
        self._next_block(W, norms)

    def _orthogonalised(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """What of a product lies outside of the basis, and its coefficients inside.

        Nearly all of the inside belongs to the last two blocks. With that taken off, one pass over the basis is as
        good as two, unless it takes much off again.
        """
        size, first = self._size + self._next, max(0, self._size - self._block)
        H = torch.zeros(size, len(W), dtype=torch.float64)
        W, H[first:] = _without(W, self._V[first:size])
        is_done = False
        while not is_done:
            before = _norms(W)
            W, h = _without(W, self._V[:size])
            H += h
            is_done = bool((_norms(W) >= 0.7 * before).all()) or float(before.max()) == 0
        return W, H

    def _next_block(self, W: Tensor, norms: Tensor) -> None:
        """The next block Q and its coupling R; where the Krylov space ends, directions without coupling go on."""
        room = min(self._block, self._V.shape[1] - self._size)
        rounding = 10 * torch.finfo(W.dtype).eps * max(float(norms.max()), self.scale)
        Q, self._R = _orthonormal(W, rounding, room)
        self._num_unexplored -= 1
        if len(Q) < room and not self._has_ended:
            # An invariant subspace says nothing about the rest: look there before anything counts as converged.
            self._has_ended, self._num_unexplored = True, self._num_wanted + 10
        while len(Q) < room:
            Q = torch.cat([Q, self._fresh_direction(Q)])
        self._V[self._size : self._size + room] = Q
        self._next = room

    def _fresh_direction(self, others: Tensor) -> Tensor:
        known = torch.cat([self._V[: self._size], others])
        row = torch.randn(known.shape[1], dtype=known.dtype, device=known.device, generator=self._generator)
        for _ in range(3):
            row = row - (known @ row) @ known
            row = row / row.norm()
        return row.unsqueeze(0)

    def _project(self, order: Order) -> None:
        """The eigenvalues and vectors of T, in order."""
        values, S = torch.linalg.eigh(self._T[: self._size, : self._size])
        chosen = order(values)
        self.values, self._S = values[chosen], S[:, chosen]
        self.scale = max(self.scale, float(values.abs().max()))
        last = self._S[self._size - self._R.shape[1] :]
        self.residuals = (self._R @ last).norm(dim=0)

    def _compress(self) -> None:
        """Keep the best Ritz vectors, and the next block after them."""
        kept = self._num_wanted + (self._capacity - self._block - self._num_wanted) // 2
        following = self._V[self._size : self._size + self._next].clone()
        self._V[:kept] = self.vectors(kept).T
        self._V[kept : kept + self._next] = following
        self._T.zero_()
        self._T[:kept, :kept] = torch.diag(self.values[:kept])
        self._size = kept


def _norms(W: Tensor) -> Tensor:
    """Norms of rows in float64: squares of small numbers vanish in float32."""
    norms: Tensor = torch.linalg.vector_norm(W, dim=-1, dtype=torch.float64)
    return norms


def _without(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of W without their parts along orthonormal rows V, and these, in float64 on the CPU."""
    h = V @ W.T
    return W - h.T @ V, h.double().cpu()


def _orthonormal(W: Tensor, rounding: float, room: int) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q and a matrix R with W = Rᵀ Q up to rounding; directions at rounding level are left out."""
    Q = W.new_zeros(0, W.shape[1])
    R = torch.zeros(len(W), len(W), dtype=torch.float64)
    for i, row in enumerate(W):
        for _ in range(2):
            c = Q @ row
            row = row - c @ Q
            R[: len(Q), i] += c.double().cpu()
        length = _norms(row)
        if float(length) > rounding and len(Q) < room:
            R[len(Q), i] = float(length)
            Q = torch.cat([Q, (row / length.to(row.dtype)).unsqueeze(0)])
    return Q, R[: len(Q)]
