"""Lanczos runs from random directions: Gauss quadratures of a matrix's spectral density, kept and resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.sampling import check_generator
from curvlinops.solvers.checks import check_self_adjoint
from curvlinops.solvers.columns import Product, flat_product, prepared, working_dtype
from curvlinops.solvers.krylov.lanczos import Lanczos, tridiagonal
from curvlinops.solvers.random_vectors import DEFAULT_SEED, check_distribution, draw_columns
from curvlinops.solvers.watch import Watch

#: Numbers in the bases of the runs that go together by default.
_BASIS_NUMEL = 2**26


class Coefficients(NamedTuple):
    """What is kept of R runs that have ended, and determines their matrices T.

    Attributes:
        alphas: Diagonals ``[R, m]``, zero beyond the end of a run.
        betas: Off-diagonals and last remainder ``[R, m]``.
        lengths: Steps of each run ``[R]``.
        norms: Lengths of the start vectors ``[R]``.
    """

    alphas: Tensor
    betas: Tensor
    lengths: Tensor
    norms: Tensor


class Ritz(NamedTuple):
    """Approximate eigenvalues from one run, ascending.

    Attributes:
        values: Ritz values ``[m]``.
        residuals: Norms of A u - θ u ``[m]``: an eigenvalue is at most this far from each.
    """

    values: Tensor
    residuals: Tensor


class _State(NamedTuple):
    """Runs that have ended, and those under way: they change in one assignment, so that interrupts find either."""

    ended: Coefficients
    under_way: Lanczos | None


class LanczosRuns:
    """Lanczos runs of a symmetric operator from random directions; more can be added, and it can be resumed.

    The r-th direction depends on the seed and on r alone: not on how many runs go together, nor on interrupts.

    **Cost**: ``num_steps`` products a run. The bases of the runs that go together take
    chunk_size · (num_steps + 1) · D numbers; of those that have ended, 2 · num_steps numbers each are kept.

    Args:
        A: The operator; it is prepared for many products when the first run begins.
        num_steps: Steps of each run.
        distribution: Of the start vectors: independent signs, ``"rademacher"``, independent standard normal numbers,
            ``"normal"``, or ``"sphere"``, those scaled to the length √D.
        seed: Seed of the directions.
        generator: One number is drawn from it in place of the seed; it must live on the operator's device.
        chunk_size: Runs that go together; by default as many as keep their bases below 2²⁶ numbers.

    Raises:
        TypeError: If A is no operator.
        ValueError: If A is not self-adjoint, or an option is out of range.
    """

    def __init__(
        self,
        A: LinearOperator,
        num_steps: int,
        *,
        distribution: str = "rademacher",
        seed: int = DEFAULT_SEED,
        generator: Generator | None = None,
        chunk_size: int | None = None,
    ) -> None:
        check_self_adjoint(A, "The Lanczos method")
        check_distribution(distribution)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}.")
        if generator is not None:
            check_generator(generator, A.device)
        self._A, self._generator = A, generator
        self.num_steps, self._distribution = num_steps, distribution
        self._seed = None if generator is not None else int(seed)
        self._chunk_size = chunk_size or runs_together(A.shape[0], num_steps)
        self._kept_product: Product | None = None
        empty = torch.zeros(0, num_steps, dtype=torch.float64, device=A.device)
        none = torch.zeros(0, dtype=torch.long, device=A.device)
        self._state = _State(Coefficients(empty, empty, none, none.double()), None)
        self._longer: Lanczos | None = None

    @property
    def num_ended(self) -> int:
        """How many runs have made all their steps."""
        return len(self._state.ended.lengths)

    def _product(self, X: Tensor) -> Tensor:
        if self._kept_product is None:
            self._kept_product = flat_product(prepared(self._A), self._A.dtype)
        return self._kept_product(X)

    def _start(self, indices: Iterable[int], capacity: int) -> Lanczos:
        if self._seed is None:
            device = self._A.device
            self._seed = int(torch.randint(2**62, (1,), generator=self._generator, device=device))
        V = _directions(self._A, indices, self._seed, self._distribution)
        return Lanczos(self._product, V, eps=torch.finfo(self._A.dtype).eps, capacity=capacity)

    def extend(self, num_runs: int, watch: Watch) -> bool:
        """Make runs until there are so many; whether that was possible within the watch's bounds."""
        while (missing := num_runs - self.num_ended) > 0:
            ended, under_way = self._state
            if under_way is None:
                first = self.num_ended
                under_way = self._start(range(first, first + min(missing, self._chunk_size)), self.num_steps)
                self._state = _State(ended, under_way)
            while under_way.num_steps < self.num_steps and bool(under_way.is_open.any()):
                if not _step(under_way, watch):
                    return False
            self._state = _State(_joined(ended, under_way), None)
        return True

    def quadrature(self, num_runs: int | None = None, num_steps: int | None = None) -> tuple[Tensor, Tensor]:
        """Nodes and weights ``[R, m]`` of the first runs, cut after some steps; the weights of a run add up to 1."""
        ended, m = self._state.ended, self.num_steps if num_steps is None else num_steps
        alphas, betas, lengths, _ = (part[:num_runs] for part in ended)
        values, vectors = torch.linalg.eigh(tridiagonal(alphas[:, :m], betas[:, :m], lengths))
        return values, vectors[:, 0].square()

    def squared_norms(self) -> Tensor:
        """Squared lengths of the start vectors ``[R]``, D on average, which turn shares into traces."""
        norms = self._state.ended.norms
        return norms.square() if self._distribution == "normal" else torch.full_like(norms, self._A.shape[0])

    def is_invariant(self, num_runs: int | None = None) -> Tensor:
        """Which of the first runs ended with an invariant subspace, so that their quadrature is exact ``[R]``."""
        _, betas, lengths, _ = (part[:num_runs] for part in self._state.ended)
        return betas.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1) == 0

    def ritz(self, is_enough: Callable[[Ritz], bool], max_steps: int, watch: Watch) -> Ritz | None:
        """The Ritz values of the first run, taken further until they are good enough; ``None`` if a bound ended it.

        The basis of the first run is not kept. Where it must be taken further, it is made again.
        """
        ended = self._state.ended
        found = _ritz(*(part[:1] for part in ended[:3]))
        if is_enough(found) or bool(self.is_invariant(1)) or max_steps <= self.num_steps:
            return found
        if self._longer is None:
            self._longer = self._start([0], 0)
        run = self._longer
        while bool(run.is_open.any()) and run.num_steps < max_steps:
            if run.num_steps > self.num_steps and is_enough(_ritz(run.alphas, run.betas, run.lengths)):
                break
            if not _step(run, watch):
                return None
        self._longer = None
        return _ritz(run.alphas, run.betas, run.lengths)

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that is needed to resume, runs under way included."""
        ended, under_way = self._state
        return {
            **self._identity(),
            **{name: part.clone() for name, part in zip(Coefficients._fields, ended, strict=True)},
            "under_way": None if under_way is None else under_way.state_dict(),
            "longer": None if self._longer is None else self._longer.state_dict(),
        }

    def _identity(self) -> dict[str, Any]:
        """What a state must have in common with the object that resumes from it."""
        return {
            "shape": list(self._A.shape),
            "dtype": str(self._A.dtype),
            "num_steps": self.num_steps,
            "distribution": self._distribution,
            "seed": self._seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the runs of :meth:`state_dict`.

        Raises:
            ValueError: If the state is of an operator of another shape or dtype, or of other options, or of another
                matrix, which one product tells.
        """
        for name, own in self._identity().items():
            if name not in state:
                raise ValueError(f"The state has no '{name}': expected what state_dict() gave.")
            if state[name] != own and not (name == "seed" and self._generator is not None):
                raise ValueError(f"The state has {name} {state[name]}, but this object has {own}: they must agree.")
        self._seed = state["seed"]
        device = self._A.device
        ended = Coefficients(*(state[name].to(device, copy=True) for name in Coefficients._fields))
        under_way = state["under_way"] and self._resumed(state["under_way"], self.num_steps)
        self._check_matrix(ended, under_way)
        self._longer = state["longer"] and self._resumed(state["longer"], 0)
        self._state = _State(ended, under_way)

    def _check_matrix(self, ended: Coefficients, under_way: Lanczos | None) -> None:
        """Make the first step of the first run again: its product tells the matrix."""
        known = ended if len(ended.lengths) else under_way
        if known is None or int(known.lengths[0]) == 0:
            return
        run = self._start([0], 1)
        run.step()
        size = torch.hypot(known.alphas[0, 0], known.betas[0, 0])
        if not (run.alphas[0, 0] - known.alphas[0, 0]).abs() <= torch.finfo(self._A.dtype).eps ** 0.5 * size:
            raise ValueError(
                "The state is of another matrix: of another operator, or of the same one at other parameters or data."
            )

    def _resumed(self, state: Mapping[str, Any], capacity: int) -> Lanczos:
        K = state["basis"].shape[0]
        V = torch.zeros(self._A.shape[0], K, dtype=working_dtype(self._A.dtype), device=self._A.device)
        run = Lanczos(self._product, V, eps=torch.finfo(self._A.dtype).eps, capacity=capacity)
        run.load_state_dict(state)
        return run


def runs_together(size: int, num_steps: int) -> int:
    """How many runs of so many steps in so many dimensions have bases within the default bound; at least one."""
    return max(1, _BASIS_NUMEL // max(size * (min(num_steps, size) + 1), 1))


def _directions(A: LinearOperator, indices: Iterable[int], seed: int, distribution: str) -> Tensor:
    """Random vectors as columns ``[D, K]``, each drawn from a seed of its own."""
    chosen = list(indices)
    parent = torch.Generator().manual_seed(seed)
    seeds = [int(torch.randint(2**62, (1,), generator=parent)) for _ in range(max(chosen) + 1)]
    generators = (torch.Generator(A.device).manual_seed(seeds[index]) for index in chosen)
    return draw_columns(A.shape[0], distribution, generators, A.dtype)


def _step(run: Lanczos, watch: Watch) -> bool:
    """One step of the open runs, if the bounds allow it."""
    num_open = int(run.is_open.sum())
    if not watch.allows(num_open):
        return False
    watch.num_matvecs += num_open
    run.step()
    watch.tick(run.betas[:, -1])
    return True


def _joined(ended: Coefficients, run: Lanczos) -> Coefficients:
    """The coefficients with those of another chunk of runs, which may have ended early."""
    missing = ended.alphas.shape[1] - run.num_steps
    alphas, betas = (torch.nn.functional.pad(part, (0, missing)) for part in (run.alphas, run.betas))
    return Coefficients(*map(torch.cat, zip(ended, (alphas, betas, run.lengths, run.norms), strict=True)))


def _ritz(alphas: Tensor, betas: Tensor, lengths: Tensor) -> Ritz:
    """Ritz values and residual norms of one run."""
    m = int(lengths[0])
    values, vectors = torch.linalg.eigh(tridiagonal(alphas[:, :m], betas[:, :m], lengths)[0])
    return Ritz(values, betas[0, m - 1] * vectors[-1].abs())
