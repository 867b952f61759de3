"""Bounds of a spectrum from Ritz values and their residuals."""

from __future__ import annotations

from math import isfinite
from typing import Any

from curvlinops.solvers.info import warn_of_convergence
from curvlinops.solvers.krylov.runs import LanczosRuns, Ritz
from curvlinops.solvers.watch import Watch

Boundaries = tuple[float | None, float | None]

#: Steps at most to resolve the ends of a spectrum, and the smallest absolute value of a definite one.
_MAX_STEPS, _MAX_STEPS_SMALLEST = 300, 60
#: Residual of the smallest absolute value, relative to itself: on a logarithmic axis, a factor of two is little.
_TOLERANCE_SMALLEST = 0.5


def checked_boundaries(boundaries: Any, is_log: bool) -> Boundaries:
    """A pair of numbers or ``None``.

    Raises:
        ValueError: If the boundaries are anything else, are not ascending or, for absolute values, negative.
    """
    pair = (None, None) if boundaries is None else boundaries
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"boundaries: expected (lower, upper), where either may be None, got {boundaries!r}.")
    low, high = (None if b is None else float(b) for b in pair)
    for b in (low, high):
        if b is not None and not isfinite(b):
            raise ValueError(f"boundaries: expected finite numbers, got {boundaries!r}.")
        if b is not None and b < 0 and is_log:
            raise ValueError(f"boundaries: they are absolute values of eigenvalues here, got {boundaries!r}.")
    if low is not None and high is not None and not low < high:
        raise ValueError(f"boundaries: expected lower < upper, got {boundaries!r}.")
    return low, high


def find_boundaries(
    runs: LanczosRuns, given: Boundaries, is_log: bool, tolerance: float, watch: Watch
) -> tuple[float, float] | None:
    """The boundaries that were not given, from the first run; ``None`` if the watch's bounds ended it.

    An eigenvalue lies within the residual of each Ritz value. The ends are those of the outermost such intervals, once
    the residuals are below the tolerance times the spread of the Ritz values. The least absolute value is that of the
    innermost interval, zero included; for a definite matrix the run goes on for a while until it is resolved to
    within a factor of two, for an indefinite one, where that is an interior eigenvalue, it does not.

    Raises:
        ValueError: If what was found does not fit to what was given.
    """
    low, high = given
    if low is None or high is None:
        needed = (low is None, high is None)
        ritz = runs.ritz(lambda r: _is_enough(r, needed, is_log, tolerance), _MAX_STEPS, watch)
        if ritz is None:
            return None
        if not _ends_resolved(ritz, needed, is_log, tolerance):
            warn_of_convergence(
                f"The ends of the spectrum are not resolved to {tolerance:.2g} of its width after {len(ritz.values)} "
                "Lanczos steps; the boundaries are widened by what is uncertain. Pass boundaries, or raise "
                "boundaries_tol."
            )
        found = _absolute_ends(ritz) if is_log else _ends(ritz)
        low, high = (f if g is None else g for f, g in zip(found, given, strict=True))
        if low > high:
            raise ValueError(f"boundaries: {given} were given, but the spectrum was found to range over {found}.")
    return low, high


def _ends(ritz: Ritz) -> tuple[float, float]:
    return float(ritz.values[0] - ritz.residuals[0]), float(ritz.values[-1] + ritz.residuals[-1])


def _absolute_ends(ritz: Ritz) -> tuple[float, float]:
    nearest = float((ritz.values.abs() - ritz.residuals).clamp(min=0.0).min())
    return nearest, max(map(abs, _ends(ritz)))


def _ends_resolved(ritz: Ritz, needed: tuple[bool, bool], is_log: bool, tolerance: float) -> bool:
    """Whether the ends that are needed are known to the tolerance; both decide on the largest absolute value."""
    values, residuals = ritz.values[[0, -1]], ritz.residuals[[0, -1]]
    if is_log:
        return not needed[1] or bool((residuals <= tolerance * values.abs().max()).all())
    small = residuals <= tolerance * (values[1] - values[0])
    return all(bool(ok) for ok, is_needed in zip(small, needed, strict=True) if is_needed)


def _is_enough(ritz: Ritz, needed: tuple[bool, bool], is_log: bool, tolerance: float) -> bool:
    if not _ends_resolved(ritz, needed, is_log, tolerance):
        return False
    values, residuals = ritz
    if not is_log or not needed[0] or len(values) >= _MAX_STEPS_SMALLEST:
        return True
    is_indefinite = values[0] < -residuals[0] and values[-1] > residuals[-1]
    inner = values.abs().argmin()
    return bool(is_indefinite | (residuals[inner] <= _TOLERANCE_SMALLEST * values[inner].abs()))
