"""When auxiliary steps are due, and at which learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

from curvlinops.applications.checked_numbers import checked_count, checked_number


@dataclass(frozen=True)
class AuxiliarySchedule:
    """Auxiliary steps as a function of the steps that the optimiser has taken.

    Args:
        every: Steps from one auxiliary step to the next; -n for n in each step; 0 for none.
        lr: Learning rate at the start.
        num_steps: Steps in which it falls to zero along half a cosine; ``None`` for constant.
    """

    every: int
    lr: float
    num_steps: int | None

    def __post_init__(self) -> None:
        if not isinstance(self.every, int):
            raise ValueError(f"update_aux_every: expected a whole number, got {self.every!r}.")
        checked_number(self.lr, "aux_lr")
        if self.num_steps is not None:
            checked_count(self.num_steps, "num_steps")

    def num_due(self, step: int) -> int:
        """The number of auxiliary steps in step number ``step``, counted from 0."""
        return -self.every if self.every <= 0 else int(step % self.every == 0)

    def lr_at(self, step: int) -> float:
        """The learning rate in that step."""
        if self.num_steps is None:
            return self.lr
        return 0.0 if step >= self.num_steps else self.lr * 0.5 * (1 + cos(pi * step / self.num_steps))
