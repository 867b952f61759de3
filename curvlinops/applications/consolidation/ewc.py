"""Elastic weight consolidation: training on a task while a quadratic penalty keeps what earlier tasks need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops import Diagonal, LinearOperator, exact_diagonal
from curvlinops.applications.checked_numbers import checked_number
from curvlinops.applications.consolidation.half_quadratic import half_quadratic
from curvlinops.applications.consolidation.named_vectors import NamedVectors
from curvlinops.applications.consolidation.stored_operators import from_state, to_state
from curvlinops.applications.named_tensors import check_diagonal


@dataclass(frozen=True, eq=False)
class _Parabola:
    """What is kept of a task: ½ (θ - anchor)ᵀ F (θ - anchor).

    Attributes:
        fisher: F, which nothing that others hold can change.
        anchor: A flat vector.
    """

    fisher: LinearOperator
    anchor: Tensor

    def at(self, theta: Tensor) -> Tensor:
        """Its value at a flat vector, differentiable; in the dtype of the vector."""
        return half_quadratic(theta - self.anchor, self.fisher)


class EWC:
    r"""The penalty of elastic weight consolidation: what earlier tasks say about the parameters, as a parabola.

    After each task, :meth:`consolidate` takes note of a Fisher matrix :math:`F_t` and of the parameters
    :math:`\theta_t`. While the next one is trained, the penalty beside its loss is

    .. math::
        \frac{s}{2} \Bigl[ \sum_t (\theta - \theta_t)^\top F_t (\theta - \theta_t)
        + \tau \lVert \theta - \mu \rVert^2 \Bigr]

    with the strength s and the precision τ and mean μ of a Gaussian prior. In mode ``"online"`` there is one Fisher
    matrix, :math:`F \leftarrow F_\text{new} + \gamma F`, around the parameters of the latest task.

    With s = 1 and sums over data, in the losses and in F (pass ``num_data`` with a mean), the penalty is what the
    Laplace approximation of the posterior makes of earlier tasks: in mode ``"multi"`` where each :math:`\theta_t` is
    the minimum of its own task's loss, in mode ``"online"`` with γ = 1 and no prior where it is that of loss and
    penalty (Huszár, 2018). A prior that is part of these minima belongs to the first F: ``F.damped(precision)``.

    F may be any symmetric operator. Diagonals are the usual choice (see :func:`diagonal_fisher`); KFAC, EKFAC and KFOC
    are kept as their closed forms without the model, and anything that is known by its products as ``F.frozen()``, with
    a copy of the model. Its data are not copied but read again for each product: leave them as they are.

    **Cost**: a penalty costs a product with F for each task in mode ``"multi"``, and one in mode ``"online"``; its
    gradient costs nothing more. In mode ``"online"`` sums of diagonals, dense matrices and operators with the same
    eigenvectors collapse; those of Kronecker products and low-rank matrices grow with the number of tasks.

    **Reference**: Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks, arXiv:1612.00796;
    Huszár (2018), Note on the quadratic penalties in elastic weight consolidation, arXiv:1712.03847; Schwarz et al.
    (2018), Progress & compress, arXiv:1805.06370; Ritter, Botev, Barber (2018), Online structured
    Laplace approximations for overcoming catastrophic forgetting, arXiv:1805.07810.

    An operator or dict with names may have them in any order, or only some: F is zero elsewhere. Without names, and for
    parameters given as a list, positions count.

    Args:
        params: A module (its parameters that require gradients), a dict name -> parameter, or a list, whose names are
            the positions "0", "1", .... Which they are is settled now: heads that are added later are left out (build
            all beforehand, or pass the shared ones). Their values are read whenever a penalty is asked for.
        strength: s; multiplies everything, the prior included.
        mode: ``"multi"`` or ``"online"``.
        decay: γ in mode ``"online"``.
        decay_in_penalty: Whether the Fisher matrix of mode ``"online"`` enters the penalty as γ F (Schwarz et al.).
        prior_precision: τ. It enters once, whatever ``num_data`` and the decay.
        prior_mean: μ, in any form of ``params``; zero by default.

    Raises:
        TypeError: If parameters are of the wrong kind.
        ValueError: If an option is out of range, or parameters have different dtypes or devices.

    >>> from curvlinops import EWC
    >>> model = nn.Linear(2, 1, bias=False)
    >>> ewc = EWC(model, strength=10.0)
    >>> ewc.consolidate({"weight": torch.tensor([[1.0, 0.0]])}, anchor={"weight": torch.zeros(1, 2)})
    >>> ewc.penalty({"weight": torch.tensor([[2.0, 5.0]])}).item()
    20.0
    """

    def __init__(
        self,
        params: nn.Module | Mapping[str, Tensor] | Sequence[Tensor],
        *,
        strength: float = 1.0,
        mode: str = "multi",
        decay: float = 1.0,
        decay_in_penalty: bool = True,
        prior_precision: float = 0.0,
        prior_mean: nn.Module | Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    ) -> None:
        if mode not in ("multi", "online"):
            raise ValueError(f"mode: expected 'multi' or 'online', got {mode!r}.")
        self._vectors = NamedVectors(params)
        self.strength = strength
        self._mode, self._decay = mode, checked_number(decay, "decay")
        if mode == "multi" and self._decay != 1.0:
            raise ValueError(f"decay: belongs to mode 'online', in which it forgets old tasks; got {decay} in 'multi'.")
        self._decay_in_penalty = bool(decay_in_penalty)
        self._prior_precision = checked_number(prior_precision, "prior_precision")
        self._prior_mean = None if prior_mean is None else self._vectors.copied(prior_mean, "prior_mean")
        self._tasks: list[str | int] = []
        self._parabolas: list[_Parabola] = []

    @property
    def strength(self) -> float:
        """s, which multiplies everything; it may be changed between tasks."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = checked_number(value, "strength")

    @property
    def mode(self) -> str:
        """``"multi"`` or ``"online"``."""
        return self._mode

    @property
    def tasks(self) -> tuple[str | int, ...]:
        """Names of the tasks that were consolidated."""
        return tuple(self._tasks)

    @property
    def num_tasks(self) -> int:
        """Number of tasks that were consolidated, in either mode."""
        return len(self._tasks)

    def consolidate(
        self,
        fisher: LinearOperator | Mapping[str, Tensor] | Sequence[Tensor],
        *,
        anchor: nn.Module | Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        num_data: float | None = None,
        task: str | int | None = None,
    ) -> None:
        """Take note of a task that was learnt: its Fisher matrix, and the parameters around which it holds.

        What is still to be computed of an operator is computed now; later training does not change it.

        Args:
            fisher: Symmetric operator on the parameters, or its diagonal as a dict or list of tensors. One that names
                some of the parameters is zero on the others.
            anchor: The parameters of the task; by default a copy of them as they are now.
            num_data: Number that the Fisher matrix is multiplied by: that of the data, where it is a mean over them.
            task: Name of the task; by default a number.

        Raises:
            TypeError: If the Fisher matrix is neither.
            ValueError: If it, or the anchor, does not fit the parameters, or there is a task of this name.
            NotImplementedError: If it is known by products with a callable that closes over its parameters, which
                cannot be frozen.
        """
        if task is None:
            task = next(number for number in range(self.num_tasks + 1) if number not in self._tasks)
        if task in self._tasks:
            raise ValueError(
                f"task: {task!r} was consolidated before. Choose another name; the tasks are {self.tasks}."
            )
        scale = 1.0 if num_data is None else checked_number(num_data, "num_data", is_positive=True)
        operator = self._vectors.operator(fisher, "fisher")
        # The multiple of an operator that has a closed form is that closed form, without the model.
        kept = (scale * operator).frozen()
        if isinstance(kept, Diagonal):
            check_diagonal(kept.diagonal(), kept.shape[:1], "fisher")
        parabola = _Parabola(kept, self._vectors.copied(anchor, "anchor"))
        if self._mode == "online" and self._parabolas and self._decay > 0:
            old = self._parabolas[0].fisher
            parabola = _Parabola(parabola.fisher + self._decay * old, parabola.anchor)
        self._parabolas = [parabola] if self._mode == "online" else [*self._parabolas, parabola]
        self._tasks.append(task)

    def penalty(self, params: nn.Module | Mapping[str, Tensor] | Sequence[Tensor] | None = None) -> Tensor:
        """The penalty at the parameters, or at tensors in their place, differentiable (twice, too).

        Nothing is changed by it. With neither a task nor a prior it is zero.

        Args:
            params: Tensors in place of the parameters, in the same form.

        Returns:
            A tensor without axes, in float32 for parameters of half precision.
        """
        theta = self._vectors.flat(params, "params")
        total = theta[:0].sum()  # a zero that can be differentiated
        for parabola in self._parabolas:
            total = total + parabola.at(theta)
        if self._mode == "online" and self._decay_in_penalty:
            total = self._decay * total
        if self._prior_precision > 0:
            delta = theta if self._prior_mean is None else theta - self._prior_mean
            total = total + 0.5 * self._prior_precision * delta.square().sum()
        return self.strength * total

    def importance(self) -> dict[str, Tensor]:
        """The diagonal of the Fisher matrices' sum as they were consolidated, parameter by parameter.

        Times their ``num_data``, with the decay of mode ``"online"`` between tasks; without strength, prior and the
        decay in the penalty. Zeros without a task.

        **Cost**: nothing to speak of for closed forms; D products for an operator that is known by its products.
        """
        total = torch.zeros(
            self._vectors.space.numel, dtype=self._vectors.space.dtype, device=self._vectors.space.device
        )
        for parabola in self._parabolas:
            total += exact_diagonal(parabola.fisher)
        return self._vectors.by_name(total)

    # --------------------------------------------------------------------- states

    def state_dict(self) -> dict[str, Any]:
        """Settings, anchors and Fisher matrices as nested dicts of plain tensors, numbers and strings.

        Tensors are copies; those of parameters go by the parameters' names. ``torch.load`` reads a saved state with
        ``weights_only=True``.

        Raises:
            NotImplementedError: If a Fisher matrix is known by its products, and so needs a model.
        """
        return {
            "mode": self._mode,
            "strength": self.strength,
            "decay": self._decay,
            "decay_in_penalty": self._decay_in_penalty,
            "prior_precision": self._prior_precision,
            "prior_mean": None if self._prior_mean is None else self._vectors.by_name(self._prior_mean),
            "tasks": list(self._tasks),
            "parabolas": [
                {"anchor": self._vectors.by_name(parabola.anchor), "fisher": to_state(parabola.fisher)}
                for parabola in self._parabolas
            ],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, its settings included. The parameters are not touched.

        Args:
            state_dict: What :meth:`state_dict` gave, of an object of the same mode and for parameters of the same
                names, shapes and dtype; devices and, with names, the order may differ.

        Raises:
            TypeError: If it is no dict.
            ValueError: If it is not the state of such an object, of another mode, or for other parameters.
        """
        _check_state(state_dict, self._mode)
        parabolas = [self._restored(kept) for kept in state_dict["parabolas"]]
        mean = state_dict["prior_mean"]
        mean = None if mean is None else self._vectors.copied(mean, "prior_mean of the state")
        numbers = [checked_number(state_dict[name], name) for name in ("strength", "decay", "prior_precision")]
        self._tasks = list(state_dict["tasks"])
        self._parabolas, self._prior_mean = parabolas, mean
        self._strength, self._decay, self._prior_precision = numbers
        self._decay_in_penalty = bool(state_dict["decay_in_penalty"])

    def _restored(self, kept: Mapping[str, Any]) -> _Parabola:
        """A parabola of a state; a matrix without names is in the order of its anchor."""
        anchor = self._vectors.copied(kept["anchor"], "anchor of the state")
        fisher = from_state(kept["fisher"], self._vectors.space.device)
        operator = self._vectors.operator(fisher, "Fisher matrix of the state", tuple(kept["anchor"]))
        return _Parabola(operator.frozen(), anchor)

    def __repr__(self) -> str:
        size = f"{self.num_tasks} tasks, {self._vectors.space.numel} parameters"
        return f"<EWC of {size}, mode={self._mode!r}, strength={self.strength:g}>"


#: What a state has.
_KEYS = ("mode", "strength", "decay", "decay_in_penalty", "prior_precision", "prior_mean", "tasks", "parabolas")


def _check_state(state: Any, mode: str) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state_dict: expected the dict that EWC.state_dict() gave, got {type(state).__name__}. Read files by "
            "torch.load."
        )
    missing = [key for key in _KEYS if key not in state]
    for kept in state.get("parabolas", []):
        missing += [f"parabolas: {key}" for key in ("anchor", "fisher") if key not in kept]
    if missing:
        raise ValueError(f"state_dict: expected the dict that EWC.state_dict() gave; it has no {missing}.")
    if state["mode"] != mode:
        raise ValueError(f"The state is of mode {state['mode']!r}, and this object of {mode!r}.")
