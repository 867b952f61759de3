"""Smoothed spectral densities on a grid, from the nodes and weights of quadratures."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi, sqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Points at which a density is given, and the Gaussians that stand for eigenvalues on it.

    A position is an eigenvalue λ itself, or log(|λ| + ε) on a logarithmic grid, whose points are |λ| + ε.

    Attributes:
        points: The grid ``[P]``, in float64.
        positions: Where Gaussians see them ``[P]``, equidistant.
        sigma: Standard deviation of the Gaussians, in positions.
        epsilon: The number added to absolute values; ``None`` for a linear grid.
        inner: The range of positions that the boundaries allow, without the margin.
        is_given: Which of its ends are to be believed. A node beyond an end that was estimated is moved to it.
    """

    points: Tensor
    positions: Tensor
    sigma: float
    epsilon: float | None
    inner: tuple[float, float]
    is_given: tuple[bool, bool]

    def position(self, values: Tensor) -> Tensor:
        """Where eigenvalues lie, those beyond an estimated boundary at that boundary."""
        where = values if self.epsilon is None else (values.abs() + self.epsilon).log()
        low, high = self.inner
        where = where if self.is_given[0] else where.clamp(min=low)
        return where if self.is_given[1] else where.clamp(max=high)

    def density(self, nodes: Tensor, weights: Tensor) -> Tensor:
        """The sum of Gaussians at the nodes ``[m]``, weighted ``[m]``, as a density over the points ``[P]``.

        A Gaussian on the grid is normalised on the grid, by the trapezoid rule: neither its tails beyond the ends nor
        one that is narrower than the distance of two points are lost. Of one beyond the grid, only a tail is seen.
        """
        where = self.position(nodes).unsqueeze(1)
        profile = -0.5 * ((self.positions - where) / self.sigma).square()
        if self.epsilon is not None:
            profile = profile - self.positions
        is_on_grid = (where >= self.positions[0]) & (where <= self.positions[-1])
        measure = trapezoid_weights(self.points)
        inside = torch.softmax(profile + measure.log(), 1) / measure
        outside = profile.exp() / (self.sigma * sqrt(2 * pi))
        return weights @ torch.where(is_on_grid, inside, outside)


def trapezoid_weights(points: Tensor) -> Tensor:
    """The weights ``[P]`` of the trapezoid rule on ascending points."""
    half = points.diff() / 2
    zero = half.new_zeros(1)
    return torch.cat([half, zero]) + torch.cat([zero, half])


def make_grid(
    boundaries: tuple[float, float],
    is_given: tuple[bool, bool],
    num_points: int,
    ncv: int,
    kappa: float,
    margin: float,
    tolerance: float,
    dtype: torch.dtype,
    device: torch.device,
    epsilon: float | None = None,
) -> Grid:
    """The grid between boundaries, which are widened by a margin on either side.

    Args:
        boundaries: Least and largest eigenvalue; with epsilon, least and largest absolute value.
        is_given: Which of the two were not estimated.
        num_points: Number of points, P.
        ncv: Lanczos steps, which set the width of the Gaussians together with kappa.
        kappa: Precision of the Gaussians.
        margin: Share of the width that is added on each side.
        tolerance: Half the width, relative to the value, of boundaries that are equal.
        dtype: In which the points are given out, and whose rounding makes boundaries equal.
        device: Where the points live.
        epsilon: What makes the grid logarithmic, see :class:`Grid`.
    """
    low, high = boundaries if epsilon is None else (log(b + epsilon) for b in boundaries)
    if high - low <= 1000 * torch.finfo(dtype).eps * max(abs(low), abs(high)):
        half = tolerance * (max(abs(low), abs(high)) or 1.0) if epsilon is None else tolerance
        low, high = low - half, high + half
    wide = margin * (high - low)
    begin, end = low - wide, high + wide
    sigma = (end - begin) / ((ncv - 1) * sqrt(8 * log(kappa)))
    positions = torch.linspace(begin, end, num_points, dtype=torch.float64, device=device)
    points = positions if epsilon is None else positions.exp()
    # The integral over the points that are given out is to be one.
    rounded = points.to(dtype).double()
    points = rounded if bool((rounded.diff() > 0).all()) else points
    return Grid(points, positions, sigma, epsilon, (low, high), is_given)
