"""What a solve did, per column, and the warning of one that did not get there."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor


class ConvergenceWarning(UserWarning):
    """A solver ended before its tolerance was reached."""


def warn_of_convergence(message: str) -> None:
    """Warn from the line that called the package."""
    package = __name__.partition(".")[0]
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ConvergenceWarning, stacklevel=level)


@dataclass(frozen=True, eq=False)
class SolveInfo:
    """What a solve did, per column.

    Attributes:
        num_iterations: Iterations ``[K]``.
        residual_norm: ‖b - A x‖ / ‖b‖, recomputed from the solution ``[K]``; by the recurrence where a solve was
            interrupted.
        converged: Whether that is at most the tolerance asked for, with a margin for rounding ``[K]``.
        breakdown: Whether a direction of negative curvature ended the column ``[K]``.
        attainable: About the smallest residual that the precision allows, ε ‖A‖ ‖x‖ / ‖b‖ ``[K]``.
        num_matvecs: Products with A, each column counted, those that verify included.
        seconds: Wall-clock time.
        ended_by: The bound that ended the solve, ``"max_matvecs"``, ``"max_seconds"`` or ``"interrupt"``, if one did.
        history: Relative residuals by the recurrence ``[iterations + 1, K]``; those of a column that is done stay.
        solution: The best iterate ``[D, K]`` of a solve that was interrupted; else ``None``.
    """

    num_iterations: Tensor
    residual_norm: Tensor
    converged: Tensor
    breakdown: Tensor
    attainable: Tensor
    num_matvecs: int
    seconds: float
    ended_by: str | None
    history: Tensor
    solution: Tensor | None = None

    def __repr__(self) -> str:
        """What matters, in one line."""
        return _summary(self, ("num_iterations", "residual_norm", "converged", "attainable"))


@dataclass(frozen=True, eq=False)
class LeastSquaresInfo:
    """What a least-squares solve did, per column; with damping, what speaks of Aᵀ speaks of the damped problem.

    Attributes:
        num_iterations: Iterations ``[K]``.
        residual_norm: ‖b - A x‖ / ‖b‖, recomputed from the solution ``[K]``.
        normal_residual: ‖Aᵀ(b - A x)‖ / (‖A‖ ‖b - A x‖), recomputed ``[K]``; zero at a minimum, NaN where it is not
            known.
        converged: Whether one of the two is as small as asked for ``[K]``.
        condition: A lower bound of the condition of A ``[K]``.
        num_matvecs: Products with A and with its adjoint, each column counted.
        seconds: Wall-clock time.
        ended_by: The bound that ended the solve, if one did; ``"interrupt"`` after Ctrl-C.
        history: ‖Aᵀ(b - A x)‖ by the recurrence, relative to that of the first iterate ``[iterations + 1, K]``.
        solution: The best iterate ``[D, K]`` of a solve that was interrupted; else ``None``.
    """

    num_iterations: Tensor
    residual_norm: Tensor
    normal_residual: Tensor
    converged: Tensor
    condition: Tensor
    num_matvecs: int
    seconds: float
    ended_by: str | None
    history: Tensor
    solution: Tensor | None = None

    def __repr__(self) -> str:
        """What matters, in one line."""
        return _summary(self, ("num_iterations", "residual_norm", "normal_residual", "converged"))


def _summary(info: SolveInfo | LeastSquaresInfo, names: tuple[str, ...]) -> str:
    shown = []
    for name in names:
        values = getattr(info, name).tolist()
        words = [f"{value:.2g}" if isinstance(value, float) else str(value) for value in values[:8]]
        shown.append(f"{name}=[{', '.join(words)}{', ...' if len(values) > 8 else ''}]")
    ended = f", ended_by={info.ended_by!r}" if info.ended_by else ""
    return f"{type(info).__name__}({', '.join(shown)}, num_matvecs={info.num_matvecs}{ended})"


def relative(R: Tensor, scale: Tensor) -> Tensor:
    """Norms of the rows of R relative to a scale; absolute ones where it is zero."""
    norms = R.norm(dim=1)
    return torch.where(scale > 0, norms / torch.where(scale > 0, scale, 1.0), norms)
