"""The linear system of a merge about its anchor: (Σ w_t F_t + λI) x = Σ w_t F_t (θ_t - a)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from curvlinops import LinearOperator, Space
from curvlinops.applications.merging.fishers import Fisher
from curvlinops.applications.merging.models import Models
from curvlinops.applications.merging.solve import Solution, Solver, solve, solve_by

#: The value of a parameter by its name.
Point = Callable[[str], Tensor]

#: By how much a Fisher matrix may fail to be positive: δᵀFδ relative to ‖δ‖ ‖Fδ‖.
_NEGATIVE = 1e-3


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
        self.right = torch.zeros_like(self.anchor)
        terms = []
        for t in used:
            term = (models.weights[t] * fishers[t].operator).embedded(self.space, fishers[t].names)
            self.right += self._product(term, self._difference(models, t, set(fishers[t].names)), t)
            terms.append(term)
        total = functools.reduce(operator.add, terms)
        self.matrix: LinearOperator = total.damped(damping) if damping else total
        # What iterations can reach depends on the coarsest of the products.
        eps = max(torch.finfo(fishers[t].operator.dtype).eps for t in used)
        self._rtol = max(1e-5, 4 * eps) if eps > torch.finfo(self.space.dtype).eps else None

    def flat(self, point: Point) -> Tensor:
        """The values of the covered parameters as one vector ``[D]``."""
        return torch.cat([point(name).flatten() for name in self.names])

    def _shaped(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts of a vector ``[D]`` by name."""
        parts = zip(vector.split(self.space.sizes), self.space.shapes, strict=True)
        return dict(zip(self.names, (part.reshape(shape) for part, shape in parts), strict=True))

    def _difference(self, models: Models, number: int, names: Collection[str]) -> Tensor:
        """θ_t - a of the parameters that the model's Fisher matrix covers, zero elsewhere ``[D]``."""
        anchor, own = self._shaped(self.anchor), models.tensors[number]
        return self.flat(lambda name: (models.moved(own[name]) if name in names else anchor[name]) - anchor[name])

    def _product(self, term: LinearOperator, difference: Tensor, number: int) -> Tensor:
        """w_t F_t (θ_t - a)."""
        product: Tensor = term @ difference
        if not bool(product.isfinite().all()):
            raise ValueError(f"fishers[{number}]: a product with it has entries that are not finite.")
        form = float(difference.double() @ product.double())
        if form < -_NEGATIVE * float(difference.norm() * product.norm()):
            raise ValueError(
                f"fishers[{number}]: expected a positive semi-definite matrix F, but dᵀFd = {form:.3g} for the "
                "difference d between its model and the anchor. A generalised Gauss-Newton matrix is one, a Hessian "
                "need not be."
            )
        return product

    def solve(self, start: Point | None, solver: Solver | None) -> tuple[Mapping[str, Tensor], Solution]:
        """θ = a + x by name, and the solution x.

        Args:
            start: Where iterations begin; None for the anchor.
            solver: The user's solver.
        """
        x0 = torch.zeros_like(self.anchor) if start is None else self.flat(start) - self.anchor
        if solver is not None:
            found = solve_by(solver, self.matrix, self.right, x0)
        else:
            found = solve(self.matrix, self.right, x0, self.damping > 0, self._rtol)
        return self._shaped(self.anchor + found.x), found

    def residual(self, x: Tensor) -> float:
        """‖b - A x‖ / ‖b‖; ‖A x‖ where b is zero."""
        scale = float(self.right.norm())
        return float((self.right - self.matrix @ x).norm()) / (scale or 1.0)
