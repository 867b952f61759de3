"""The Lanczos process for many start vectors at once, which can be stopped after any step and resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvlinops.solvers.columns import Product

#: Marks a run that has not ended.
_OPEN = -1


class _Progress(NamedTuple):
    """What a step changes at its end, in one assignment: an interrupt finds the old or the new."""

    num_steps: int
    ends: Tensor


class Lanczos:
    r"""K Lanczos runs side by side, :math:`A Q = Q T + \beta q e_m^\top` for each start vector.

    The basis is orthogonalised in full, twice, so that T has no copies of Ritz values. A run ends on its own where its
    basis spans an invariant subspace: when the remainder is at the level of rounding, or all dimensions are used up.
    Runs that have ended take part in no product.

    **Cost**: one product with a column for each open run a step, and 8 m D K operations for the m-th step. The basis
    takes K · (m + 1) · D numbers, and is allocated as it grows unless a capacity is given.

    **Reference**: Golub, Van Loan (2013), Matrix Computations, section 10.3; Giraud, Langou, Rozložník (2005),
    doi:10.1016/j.camwa.2005.08.009, why twice is enough.

    Args:
        product: X -> A X for columns ``[D, K]``, with A symmetric.
        V: The start vectors ``[D, K]``, of any length. A zero vector is a run of no steps.
        eps: Relative rounding of the products; by default that of V's dtype.
        capacity: Steps for which the basis is allocated at once.

    Attributes:
        norms: Lengths of the start vectors ``[K]``, in float64.

    >>> run = Lanczos(lambda X: torch.tensor([[2.0], [1.0]]) * X, torch.ones(2, 1))
    >>> run.step(), run.step()
    (True, False)
    >>> [round(x, 4) for x in torch.linalg.eigvalsh(run.tridiagonal()[0]).tolist()]
    [1.0, 2.0]
    """

    def __init__(self, product: Product, V: Tensor, *, eps: float | None = None, capacity: int = 0) -> None:
        self._product = product
        self._eps = torch.finfo(V.dtype).eps if eps is None else eps
        D, K = V.shape
        unit: Tensor = V.abs().amax(0) if D else V.new_ones(K)
        _check_finite(unit, "The start vectors")
        unit = torch.where(unit > 0, unit, 1.0)
        Q = (V / unit).T.contiguous()
        norms: Tensor = Q.double().norm(dim=1)
        Q /= torch.where(norms > 0, norms, 1.0).to(V.dtype).unsqueeze(1)
        self.norms: Tensor = norms * unit.double()
        self._basis: Tensor = V.new_zeros(K, min(capacity or _grown(0), D) + 1, D)
        self._basis[:, 0] = Q
        self._alphas: Tensor = norms.new_zeros(K, self._capacity)
        self._betas: Tensor = norms.new_zeros(K, self._capacity)
        self._progress = _Progress(0, torch.where(norms > 0, _OPEN, 0))

    @property
    def _capacity(self) -> int:
        return self._basis.shape[1] - 1

    @property
    def num_steps(self) -> int:
        """Steps so far, m."""
        return self._progress.num_steps

    @property
    def num_columns(self) -> int:
        """Number of runs, K."""
        return self._basis.shape[0]

    @property
    def alphas(self) -> Tensor:
        """Diagonals of T ``[K, m]``, in float64."""
        return self._alphas.narrow(1, 0, self.num_steps)

    @property
    def betas(self) -> Tensor:
        """Norms of the remainders ``[K, m]``, in float64: off-diagonals of T, then the last; zero beyond an end."""
        return self._betas.narrow(1, 0, self.num_steps)

    @property
    def basis(self) -> Tensor:
        """Orthonormal vectors ``[K, m + 1, D]``; zero beyond the end of a run."""
        return self._basis[:, : self.num_steps + 1]

    @property
    def is_open(self) -> Tensor:
        """Which runs have not ended ``[K]``."""
        return self._progress.ends == _OPEN

    @property
    def lengths(self) -> Tensor:
        """Steps that each run has made ``[K]``: the size of its T."""
        return torch.where(self.is_open, self.num_steps, self._progress.ends)

    @property
    def is_invariant(self) -> Tensor:
        """Which runs span an invariant subspace, so that their Ritz values are eigenvalues ``[K]``."""
        if self.num_steps == 0:
            return ~self.is_open
        last: Tensor = self._betas.gather(1, (self.lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        return (last == 0) | (self.lengths == 0)

    def end(self, chosen: Tensor) -> None:
        """End some runs ``[K]`` where they are: they take part in no further product."""
        ends = torch.where(chosen & self.is_open, self.num_steps, self._progress.ends)
        self._progress = _Progress(self.num_steps, ends)

    def step(self) -> bool:
        """Make one step of all open runs, and tell whether any is still open.

        Raises:
            ValueError: If a product is not finite.
        """
        m, ends = self._progress
        is_open = ends == _OPEN
        if not bool(is_open.any()):
            return False
        if m == self._capacity:
            self._grow()
        W = self._multiply(self._basis[:, m], is_open)
        size = W.norm(dim=1, dtype=torch.float64)
        _check_finite(size, "The product with A")
        Q = self._basis[:, : m + 1]
        alpha = torch.zeros_like(size)
        for _ in range(2):
            coefficients = torch.bmm(Q, W.unsqueeze(2))
            alpha += coefficients[:, m, 0].double()
            W = torch.baddbmm(W.unsqueeze(1), coefficients.transpose(1, 2), Q, alpha=-1).squeeze(1)
        beta = W.norm(dim=1, dtype=torch.float64)
        self._alphas[:, m] = alpha
        largest = torch.maximum(size, (self._alphas[:, : m + 1].abs() + self._betas[:, : m + 1]).amax(1))
        goes_on = is_open & (beta > 10 * self._eps * largest) & (m + 1 < self._basis.shape[2])
        self._betas[:, m] = torch.where(goes_on, beta, 0.0)
        scaled = W / torch.where(goes_on, beta, 1.0).to(W.dtype).unsqueeze(1)
        self._basis[:, m + 1] = torch.where(goes_on.unsqueeze(1), scaled, 0.0)
        self._progress = _Progress(m + 1, torch.where(is_open & ~goes_on, m + 1, ends))
        return bool(goes_on.any())

    def _multiply(self, Q: Tensor, is_open: Tensor) -> Tensor:
        """A Q for the open runs, each vector in one piece ``[K, D]``; zero for the others."""
        if bool(is_open.all()):
            return self._product(Q.T).T.contiguous()
        W = torch.zeros_like(Q)
        W[is_open] = self._product(Q[is_open].T).T
        return W

    def _grow(self) -> None:
        size = min(_grown(self._capacity), self._basis.shape[2])
        basis = self._basis.new_zeros(self.num_columns, size + 1, self._basis.shape[2])
        basis[:, : self._basis.shape[1]] = self._basis
        more = self._alphas.new_zeros(self.num_columns, size - self._capacity)
        alphas, betas = torch.cat([self._alphas, more], 1), torch.cat([self._betas, more], 1)
        # The basis comes last: its size is the capacity, and an interrupt before it only repeats this.
        self._alphas, self._betas = alphas, betas
        self._basis = basis

    def tridiagonal(self, num_steps: int | None = None) -> Tensor:
        """The matrices T after some of the steps ``[K, m, m]``, in float64.

        Where a run is shorter, its T is padded on the diagonal with its own first entry, which is a Rayleigh quotient
        of A: this block is not coupled with the others, and no eigenvalue of it lies outside of A's spectrum.
        """
        m = self.num_steps if num_steps is None else min(num_steps, self.num_steps)
        return tridiagonal(self._alphas[:, :m], self._betas[:, :m], self.lengths)

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that is needed to resume, on the device where they are."""
        m, ends = self._progress
        return {
            "num_steps": m,
            "ends": ends.clone(),
            "norms": self.norms.clone(),
            "alphas": self._alphas[:, :m].clone(),
            "betas": self._betas[:, :m].clone(),
            "basis": self._basis[:, : m + 1].clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the runs of :meth:`state_dict`, of the same operator and of as many columns.

        Raises:
            ValueError: If the state is one of other shapes or of another dtype.
        """
        m, basis = int(state["num_steps"]), state["basis"]
        K, _, D = self._basis.shape
        if list(basis.shape) != [K, m + 1, D] or basis.dtype != self._basis.dtype:
            raise ValueError(
                f"Expected a state of {K} runs in {D} dimensions in {self._basis.dtype}, got a basis "
                f"{list(basis.shape)} in {basis.dtype} after {m} steps."
            )
        while self._capacity < m:
            self._grow()
        self.norms = state["norms"].to(self.norms)
        self._alphas[:, :m], self._betas[:, :m] = state["alphas"].to(self.norms), state["betas"].to(self.norms)
        self._basis[:, : m + 1] = basis
        self._progress = _Progress(m, state["ends"].to(self._progress.ends))


def tridiagonal(alphas: Tensor, betas: Tensor, lengths: Tensor) -> Tensor:
    """The matrices T ``[K, m, m]`` of coefficients ``[K, m]``, padded beyond their lengths ``[K]`` (see `Lanczos`)."""
    m = alphas.shape[1]
    inside = torch.arange(m, device=alphas.device) < lengths.unsqueeze(1)
    T = torch.diag_embed(torch.where(inside, alphas, alphas[:, :1]))
    if m > 1:
        off = torch.where(inside[:, 1:], betas[:, : m - 1], 0.0)
        T += torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    return T


def _grown(capacity: int) -> int:
    """The next size of a basis, which depends on nothing else: a resumed run lies in memory as one that went on."""
    return 16 if capacity < 16 else 2 * capacity


def _check_finite(values: Tensor, what: str) -> None:
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{what}: {len(bad)} of {len(values)} columns are not finite, the first is column {bad[0]}.")
