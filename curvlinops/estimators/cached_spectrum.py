"""Spectral densities whose Lanczos runs are kept: more repeats, other widths, saving and resuming."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from curvlinops.estimators.boundaries import Boundaries, checked_boundaries, find_boundaries
from curvlinops.estimators.density import Grid, make_grid
from curvlinops.operators.base import LinearOperator
from curvlinops.solvers.columns import working_dtype
from curvlinops.solvers.info import warn_of_convergence
from curvlinops.solvers.krylov.runs import LanczosRuns
from curvlinops.solvers.random_vectors import DEFAULT_SEED
from curvlinops.solvers.watch import Limits, Watch


class _CachedSpectrum:
    """What the two classes share: Lanczos runs and boundaries, which are kept, and densities made of them."""

    _IS_LOG: ClassVar[bool]

    def __init__(
        self,
        A: LinearOperator,
        ncv: int,
        boundaries: Boundaries | None = None,
        boundaries_tol: float = 1e-2,
        *,
        seed: int = DEFAULT_SEED,
        generator: Generator | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if ncv < 2:
            raise ValueError(f"ncv: expected at least 2 Lanczos steps, got {ncv}.")
        if not 0 < boundaries_tol < 1:
            raise ValueError(f"boundaries_tol: expected a number in (0, 1), got {boundaries_tol}.")
        self._runs = LanczosRuns(A, ncv, distribution="sphere", seed=seed, generator=generator, chunk_size=chunk_size)
        self._A, self._ncv, self._tolerance = A, ncv, float(boundaries_tol)
        self._given = checked_boundaries(boundaries, self._IS_LOG)
        self._boundaries: tuple[float, float] | None = None

    def _run(self, num_repeats: int, least: int, limits: Limits) -> int:
        """Make the runs and find the boundaries; how many runs there are to be used, maybe fewer than asked for."""
        with Watch(limits, self._A, "spectrum", num_repeats * self._ncv) as watch, torch.no_grad():
            self._runs.extend(num_repeats, watch)
            num_ended = min(num_repeats, self._runs.num_ended)
            if self._boundaries is None and num_ended > 0:
                found = find_boundaries(self._runs, self._given, self._IS_LOG, self._tolerance, watch)
                self._boundaries = found
        if self._boundaries is None or num_ended < least:
            raise RuntimeError(
                f"{watch.ended_by} ended the computation after {watch.num_matvecs} products and {num_ended} of "
                f"{num_repeats} repeats{'' if num_ended < least else ', before the boundaries were found'}: raise it. "
                f"An object of {self._name()} goes on from there when it is asked again."
            )
        if num_ended < num_repeats:
            warn_of_convergence(
                f"{watch.ended_by} ended the computation: the density is the average of {num_ended} repeats instead "
                f"of {num_repeats}."
            )
        return num_ended

    def _name(self) -> str:
        return "LanczosApproximateLogSpectrumCached" if self._IS_LOG else "LanczosApproximateSpectrumCached"

    def _spectrum(
        self,
        num_repeats: int,
        num_points: int,
        kappa: float,
        margin: float,
        epsilon: float | None,
        limits: Limits,
        return_stderr: bool,
        split_signs: bool = False,
    ) -> tuple[Tensor, ...]:
        least = 2 if return_stderr else 1
        _check_at_least("num_repeats", num_repeats, least, " for a standard error" if return_stderr else "")
        _check_at_least("num_points", num_points, 2)
        _check_above("kappa", kappa, 1.0)
        if not (isfinite(margin) and margin >= 0):
            raise ValueError(f"margin: expected a finite number that is not negative, got {margin}.")
        if epsilon is not None:
            _check_above("epsilon", epsilon, 0.0)
        num_ended = self._run(num_repeats, least, limits)
        assert self._boundaries is not None
        is_given = (self._given[0] is not None, self._given[1] is not None)
        dtype, options = working_dtype(self._A.dtype), (num_points, self._ncv, kappa, margin, self._tolerance)
        grid = make_grid(self._boundaries, is_given, *options, dtype, self._A.device, epsilon)
        densities = torch.stack(
            [_density(grid, *run, split_signs) for run in zip(*self._runs.quadrature(num_ended), strict=True)]
        )
        results = [grid.points, densities.mean(0)]
        if return_stderr:
            results.append(densities.std(0) / num_ended**0.5)
        return tuple(result.to(dtype) for result in results)

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that was computed, for :meth:`load_state_dict`; ``torch.save`` can write it.

        It may be asked for at any time: also after an interrupt or a spent budget, in the middle of a run. A run under
        way takes (steps + 1) · D numbers, one that has ended 2 · ncv.
        """
        return {
            "kind": self._name(),
            "boundaries": list(self._given),
            "boundaries_tol": self._tolerance,
            "found": None if self._boundaries is None else list(self._boundaries),
            "runs": self._runs.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with the same bits as if there had been no break, given the same chunks of repeats.

        Args:
            state: What :meth:`state_dict` gave, for the same operator at the same parameters, which is not checked.

        Raises:
            ValueError: If the state is of an operator of another shape or dtype, or of another ncv, seed or boundaries.
        """
        own = {"kind": self._name(), "boundaries": list(self._given), "boundaries_tol": self._tolerance}
        for name, value in own.items():
            if state.get(name) != value:
                raise ValueError(f"The state has {name} {state.get(name)}, but this object has {value}.")
        self._runs.load_state_dict(state["runs"])
        found = state["found"]
        self._boundaries = None if found is None else (found[0], found[1])


class LanczosApproximateSpectrumCached(_CachedSpectrum):
    """Spectral densities of one symmetric operator, whose Lanczos runs are kept.

    Asked again with more repeats, it makes the new ones only; another kappa, margin or number of points costs no
    product. See :func:`lanczos_approximate_spectrum` for what the density is. A curvature matrix is prepared for many
    products by the first run, and thereby frozen at the parameters that it has then, unless its model cannot be
    frozen. Any other operator must not change meanwhile.

    **Cost**: ncv products for each new repeat; none where the boundaries are given or resolved by the first run, else
    one for each step until they are, at most 300.

    **Reference**: see :func:`lanczos_approximate_spectrum`.

    Args:
        A: The operator, self-adjoint.
        ncv: Lanczos steps of each repeat, at least 2.
        boundaries: Least and largest eigenvalue, where they are known; either may be ``None``.
        boundaries_tol: How accurately boundaries are found, relative to the width of the spectrum.
        seed: Seed of the start vectors.
        generator: One number is drawn from it in place of the seed; it must live on the operator's device.
        chunk_size: Repeats that run together; by default as many as keep their bases below 2²⁶ numbers.

    Raises:
        TypeError: If A is no operator.
        ValueError: If A is not self-adjoint, or an option is out of range.

    >>> from curvlinops import Diagonal
    >>> spectrum = LanczosApproximateSpectrumCached(Diagonal(torch.arange(10.0)), ncv=10)
    >>> grid, density = spectrum.approximate_spectrum(num_repeats=2)
    >>> round(torch.trapezoid(density, grid).item(), 4)
    1.0
    >>> sharper = spectrum.approximate_spectrum(num_repeats=2, kappa=10.0)  # no product
    """

    _IS_LOG = False

    def approximate_spectrum(
        self,
        num_repeats: int = 1,
        num_points: int = 1024,
        kappa: float = 3.0,
        margin: float = 0.05,
        *,
        progressbar: bool = False,
        return_stderr: bool = False,
        max_matvecs: int | None = None,
        max_seconds: float | None = None,
    ) -> tuple[Tensor, ...]:
        """The density from the first repeats, of which those that are missing are made.

        Args:
            num_repeats: Repeats to average over.
            num_points: Points of the grid, P.
            kappa: Precision of the Gaussians.
            margin: Share of the spectrum's width that the grid extends on either side.
            progressbar: Whether to show a progress bar.
            return_stderr: Whether to return the standard error over repeats, which needs two at least.
            max_matvecs: Products at most in this call, each repeat counted.
            max_seconds: Wall-clock time after which no Lanczos step begins.

        Returns:
            Grid ``[P]`` and density ``[P]``; with ``return_stderr`` also the density's standard error ``[P]``.

        Raises:
            ValueError: If an option is out of range.
            RuntimeError: If a budget is spent before there is a density. Ask again to go on.
        """
        limits = Limits(max_matvecs, max_seconds, progressbar)
        return self._spectrum(num_repeats, num_points, kappa, margin, None, limits, return_stderr)


class LanczosApproximateLogSpectrumCached(_CachedSpectrum):
    """Spectral densities on a logarithmic grid of one symmetric operator, whose Lanczos runs are kept.

    See :func:`lanczos_approximate_log_spectrum` for what the density is, and
    :class:`LanczosApproximateSpectrumCached` for what is kept, the cost and the arguments.

    **Reference**: see :func:`lanczos_approximate_log_spectrum`.

    Args:
        A: The operator, self-adjoint.
        ncv: Lanczos steps of each repeat, at least 2.
        boundaries: Least and largest absolute value of the eigenvalues, where known; either may be ``None``.
        boundaries_tol: How accurately the largest is found, relative to itself.
        seed: Seed of the start vectors.
        generator: One number is drawn from it in place of the seed; it must live on the operator's device.
        chunk_size: Repeats that run together; by default as many as keep their bases below 2²⁶ numbers.

    Raises:
        TypeError: If A is no operator.
        ValueError: If A is not self-adjoint, or an option is out of range.

    >>> from curvlinops import Diagonal
    >>> spectrum = LanczosApproximateLogSpectrumCached(Diagonal(torch.logspace(-3, 1, 10)), ncv=10)
    >>> grid, density = spectrum.approximate_log_spectrum(num_repeats=2)
    >>> round(torch.trapezoid(density, grid).item(), 4)
    1.0
    """

    _IS_LOG = True

    def approximate_log_spectrum(
        self,
        num_repeats: int = 1,
        num_points: int = 1024,
        kappa: float = 1.04,
        margin: float = 0.05,
        epsilon: float = 1e-5,
        *,
        split_signs: bool = False,
        progressbar: bool = False,
        return_stderr: bool = False,
        max_matvecs: int | None = None,
        max_seconds: float | None = None,
    ) -> tuple[Tensor, ...]:
        """The density from the first repeats, of which those that are missing are made.

        Args:
            num_repeats: Repeats to average over.
            num_points: Points of the grid, P.
            kappa: Precision of the Gaussians.
            margin: Share of the logarithmic width that the grid extends on either side.
            epsilon: Added to absolute values.
            split_signs: Whether to return the densities of negative and of other eigenvalues, which add up to that of
                all, as ``[2, P]``.
            progressbar: Whether to show a progress bar.
            return_stderr: Whether to return the standard error over repeats, which needs two at least.
            max_matvecs: Products at most in this call, each repeat counted.
            max_seconds: Wall-clock time after which no Lanczos step begins.

        Returns:
            Grid ``[P]`` and density ``[P]`` or ``[2, P]``; with ``return_stderr`` also the density's standard error.

        Raises:
            ValueError: If an option is out of range.
            RuntimeError: If a budget is spent before there is a density. Ask again to go on.
        """
        limits = Limits(max_matvecs, max_seconds, progressbar)
        return self._spectrum(num_repeats, num_points, kappa, margin, epsilon, limits, return_stderr, split_signs)


def _density(grid: Grid, nodes: Tensor, weights: Tensor, split_signs: bool) -> Tensor:
    """The density from one repeat ``[P]``, or those of negative and of other eigenvalues ``[2, P]``."""
    if not split_signs:
        return grid.density(nodes, weights)
    is_negative = nodes < 0
    return grid.density(nodes, torch.stack([weights * is_negative, weights * ~is_negative]))


def _check_at_least(name: str, value: int, least: int, why: str = "") -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}{why}, got {value}.")


def _check_above(name: str, value: float, bound: float) -> None:
    if not (isfinite(value) and value > bound):
        raise ValueError(f"{name}: expected a finite number above {bound:g}, got {value}.")
