"""The linear system of a merge about its anchor: (Σ w_t F_t + λI) x = Σ w_t F_t (θ_t - a)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from curvlinops import LinearOperator, Space
from curvlinops.applications.merging.fishers import Fisher, checked_form
from curvlinops.applications.merging.models import Models
from curvlinops.applications.merging.solve import Solution, Solver, relative_residual, solve, solve_by

#: The value of a parameter by its name.
Point = Callable[[str], Tensor]

#: The relative residual beyond which a solution is none.
_FAILED = 0.1


class System:
    """The linear system on the parameters that a Fisher matrix of positive weight covers.

    Args:
        models: The models.
        fishers: Their Fisher matrices.
        anchor: a.
        damping: λ.

    Attributes:
        names: The parameters that are covered, in the order of the models' space.
        space: Their space.
        anchor: a, as one vector ``[D]``.
        matrix: Σ w_t F_t + λI.
        right: Σ w_t F_t (θ_t - a) ``[D]``.
        energy: Σ w_t (θ_t - a)ᵀF_t(θ_t - a).

    Raises:
        ValueError: If a product is not finite, or a matrix turns out not to be positive semi-definite.
    """

    def __init__(self, models: Models, fishers: Sequence[Fisher], anchor: Point, damping: float) -> None:
        used = [t for t, weight in enumerate(models.weights) if weight > 0]
        covered = {name for t in used for name in fishers[t].names}
        chosen = [i for i, name in enumerate(models.first) if name in covered]
        self.names = [name for name in models.first if name in covered]
        self.space: Space = models.space.select(chosen)
        self.damping = damping
        self.anchor = self.flat(anchor)
        self.right, self.energy = torch.zeros_like(self.anchor), 0.0
        self._reach = float(self.anchor.norm())
        terms = []
        for t in used:
            term = (models.weights[t] * fishers[t].operator).embedded(self.space, fishers[t].names)
            self._add(term, self._difference(models, t, set(fishers[t].names)), f"fishers[{t}]")
            terms.append(term)
        total = functools.reduce(operator.add, terms)
        self.matrix: LinearOperator = total.damped(damping) if damping else total
        # What iterations can reach depends on the coarsest of the products.
        own_eps = torch.finfo(self.space.dtype).eps
        self._eps = max(own_eps, *(torch.finfo(fishers[t].operator.dtype).eps for t in used))
        self._rtol = max(1e-5, 4 * self._eps) if self._eps > own_eps else None

    def flat(self, point: Point) -> Tensor:
        """The values of the covered parameters as one vector ``[D]``."""
        return torch.cat([point(name).flatten() for name in self.names])

    def _shaped(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts of a vector ``[D]`` by name."""
        return dict(zip(self.names, self.space.shaped(vector), strict=True))

    def _difference(self, models: Models, number: int, names: Collection[str]) -> Tensor:
        """θ_t - a of the parameters that the model's Fisher matrix covers, zero elsewhere ``[D]``."""
        anchor, own = self._shaped(self.anchor), models.tensors[number]
        return self.flat(lambda name: (models.moved(own[name]) if name in names else anchor[name]) - anchor[name])

    def _add(self, term: LinearOperator, difference: Tensor, what: str) -> None:
        """Add w_t F_t (θ_t - a) to the right-hand side."""
        product: Tensor = term @ difference
        if not bool(product.isfinite().all()):
            raise ValueError(f"{what}: a product with it has entries that are not finite.")
        self.energy += max(0.0, checked_form(difference, product, what, "the anchor"))
        self._reach = max(self._reach, float(difference.norm()))
        self.right += product

    def solve(self, start: Point | None, solver: Solver | None) -> tuple[Mapping[str, Tensor], Solution, float]:
        """θ = a + x by name, the solution x, and its relative residual, recomputed.

        Args:
            start: Where iterations begin; None for the anchor.
            solver: The user's solver.

        Raises:
            ValueError: If x is no solution; what the user's solver makes is not judged.
        """
        x0 = torch.zeros_like(self.anchor) if start is None else self.flat(start) - self.anchor
        if solver is not None:
            found = solve_by(solver, self.matrix, self.right, x0)
        else:
            found = solve(self.matrix, self.right, x0, self.damping, self._rtol)
        residual = relative_residual(self.matrix, found.x, self.right)
        if solver is None and not residual <= _FAILED and not self._is_rounding():
            raise ValueError(
                f"The linear system of the merge is not solved: a relative residual of {residual:.2g} is left in "
                f"{self.space.dtype} ({found.method}). Pass a larger damping, float64 models and Fisher matrices, or a "
                "solver."
            )
        return self._shaped(self.anchor + found.x), found, residual

    def _is_rounding(self) -> bool:
        """Whether b is of the size of its own rounding errors, ε ‖A‖ ‖θ‖: then there need not be a solution."""
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(len(self.right), generator=generator).to(self.right)
        return float(self.right.norm()) <= 10 * self._eps * self._reach * float((self.matrix @ z).norm())
