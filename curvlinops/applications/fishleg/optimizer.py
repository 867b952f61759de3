"""FishLeg: natural gradients with an inverse Fisher matrix that is learned beside the network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from curvlinops.applications.checked_numbers import checked_count, checked_number
from curvlinops.applications.fishleg.learner import InverseLearner
from curvlinops.applications.fishleg.likelihoods import Likelihood
from curvlinops.applications.fishleg.problem import BatchLoss, Draw, InverseSettings, Problem, all_finite, gradients_of
from curvlinops.applications.fishleg.schedule import AuxiliarySchedule
from curvlinops.applications.fishleg.selection import Selection, patterns_of
from curvlinops.applications.learned_inverse.operator import LearnedInverseLinearOperator


class FishLeg(Optimizer):
    r"""Natural gradient descent :math:`\theta \leftarrow \theta - \eta (m + w \theta)` with a learned inverse Fisher Q.

    The momentum is :math:`m \leftarrow \beta m + (1 - \beta) Q g`, and Q ≈ (F + γI)⁻¹ a
    :class:`LearnedInverseLinearOperator`. Every few steps an auxiliary step of Adam moves Q towards the minimum of
    :math:`\tfrac12 v^\top (F + \gamma I) v - u^\top v` at v = Qu, for the gradient u of that step and the Fisher
    matrix F of the next auxiliary batch, a mean over its data whatever their number. The product with F is exact: with
    a ``likelihood`` that of the generalised Gauss-Newton matrix; without, that of the Hessian B of the ``nll`` of
    labels that were drawn, whose expectation is F. A step on which vᵀBv < 0 is skipped and counted.

    :meth:`step` changes the parameters of model and likelihood, and nothing else of the user's, but that a likelihood's
    own generator moves on with its draws. ``draw``, ``nll``,
    ``warmup_loss`` and the loaders run under random states of the optimiser's own; buffers are put back after them. The
    mode of the model is left as it is: with batch normalisation in training mode F is that of the network as it trains.

    **Cost** of a step: a product with Q, O(out² in + out in²) a layer, which does not depend on the batch: small beside
    the gradient of a large one, several times that of a small one. Of an auxiliary step: a forward for the draw, a
    product with F (5/3 gradients, with the Hessian 3), two products with Q and a backward through it.

    **Reference**: Garcia et al. (2023), Fisher-Legendre (FishLeg) optimization of deep neural networks, ICLR 2023,
    https://openreview.net/forum?id=c9lAOPvQHS.

    Args:
        model: The network; all its parameters that require gradients are optimised.
        draw: ``draw(model, data_x) -> (data_x, data_y)`` draws labels from the model's predictions at inputs.
        nll: ``nll(model, (data_x, data_y))`` is the negative log-likelihood, a mean over data.
        aux_dataloader: Batches of inputs, or pairs of inputs and labels, to estimate F on; read endlessly.
        likelihood: Density of labels given predictions; its learnable parameters are optimised too, along with a
            diagonal Q of their own and without weight decay.
        fish_lr: Learning rate η, the ``lr`` of the one parameter group.
        damping: Damping γ.
        weight_decay: Weight decay w.
        beta: Momentum β.
        update_aux_every: Steps from one auxiliary step to the next, beginning with the first; -n for n in each step; 0
            for none.
        aux_lr: Learning rate of the auxiliary steps.
        aux_betas: Adam's betas in the auxiliary steps.
        aux_eps: Adam's eps in the auxiliary steps.
        num_steps: Steps in which ``aux_lr`` falls to zero along half a cosine; afterwards Q stays. By default it is
            constant.
        normalization: Whether u is scaled to length one.
        fine_tune: Whether weight decay pulls towards the parameters at construction in place of zero.
        module_names: Names of modules whose inverse is learned, with shell wildcards; all modules inside of them count,
            none for all. For other parameters Q stays ``scale`` · I.
        skip_names: Names of modules whose inverse is not learned.
        scale: Q starts as ``scale`` · I.
        warmup: Auxiliary steps before the first step, see :meth:`warmup_aux`.
        warmup_data: Batches whose gradients are the directions then; by default ``aux_dataloader``.
        warmup_loss: ``warmup_loss(model, batch)``, the loss with these gradients; by default ``nll``.
        structure: Structure of Q, or of the layers by name: see :class:`LearnedInverseLinearOperator`.
        precondition: Whether the gradient of the auxiliary objective is preconditioned with Q.
        seed: Seed of everything random.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range, a name matches nothing, or nothing requires gradients.

    >>> from curvlinops import FixedGaussianLikelihood
    >>> model, likelihood = nn.Linear(2, 1), FixedGaussianLikelihood(1.0)
    >>> data = [(torch.eye(2), torch.ones(2, 1))]
    >>> def nll(model, batch):
    ...     return likelihood.nll(model(batch[0]), batch[1])
    >>> def draw(model, X):
    ...     return X, likelihood.draw(model(X))
    >>> optimizer = FishLeg(model, draw, nll, data, likelihood, update_aux_every=1)
    >>> for _ in range(200):
    ...     optimizer.zero_grad()
    ...     nll(model, data[0]).backward()
    ...     _ = optimizer.step()
    >>> bool((model(torch.eye(2)) - 1).abs().max() < 0.1)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        draw: Draw,
        nll: BatchLoss,
        aux_dataloader: Iterable[Any],
        likelihood: Likelihood | None = None,
        fish_lr: float = 0.05,
        damping: float = 0.5,
        weight_decay: float = 1e-5,
        beta: float = 0.9,
        update_aux_every: int = 10,
        aux_lr: float = 1e-4,
        aux_betas: tuple[float, float] = (0.9, 0.999),
        aux_eps: float = 1e-8,
        num_steps: int | None = None,
        normalization: bool = False,
        fine_tune: bool = False,
        module_names: Sequence[str] = (),
        skip_names: Sequence[str] = (),
        scale: float = 1.0,
        warmup: int = 0,
        warmup_data: Iterable[Any] | None = None,
        warmup_loss: BatchLoss | None = None,
        *,
        structure: str | Mapping[str, str] = "auto",
        precondition: bool = True,
        seed: int = 2147483647,
    ) -> None:
        fish_lr, weight_decay = checked_number(fish_lr, "fish_lr"), checked_number(weight_decay, "weight_decay")
        checked_count(warmup, "warmup", least=0)
        if not 0 <= beta < 1:
            raise ValueError(f"beta: expected a number from 0 up to but less than 1, got {beta!r}.")
        self._schedule = AuxiliarySchedule(update_aux_every, aux_lr, num_steps)
        self._problem = Problem(model, draw, nll, aux_dataloader, likelihood)
        self._learner = InverseLearner(
            self._problem,
            InverseSettings(damping, scale, structure, aux_lr, aux_betas, aux_eps, normalization, precondition, seed),
            Selection(patterns_of(module_names), patterns_of(skip_names)),
        )
        self._warmup = warmup
        self._warmup_data = aux_dataloader if warmup_data is None else warmup_data
        self._warmup_loss = nll if warmup_loss is None else warmup_loss
        self._num_steps_taken, self._is_warm = 0, warmup == 0
        self._named = self._problem.params
        super().__init__(list(self._named.values()), {"lr": fish_lr, "weight_decay": weight_decay, "beta": beta})
        self._has_anchors = fine_tune
        for p in self._problem.of_model.values() if fine_tune else ():
            self.state[p]["anchor"] = p.detach().clone()

    @property
    def Q(self) -> LearnedInverseLinearOperator:
        """The learned inverse of the damped Fisher matrix, over the model's parameters; it changes as it learns."""
        return self._learner.Q

    @property
    def likelihood_Q(self) -> LearnedInverseLinearOperator | None:
        """That of the likelihood's learnable parameters, a diagonal; ``None`` where there are none."""
        return self._learner.likelihood_Q

    @property
    def num_skipped(self) -> int:
        """The number of auxiliary steps that were skipped, since the curvature along them was negative."""
        return self._learner.num_skipped

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: Q is one operator over the parameters of the model, which are in one group.

        Args:
            param_group: The group that is not added.

        Raises:
            NotImplementedError: In any case, once the optimiser is built.
        """
        if self.param_groups:
            raise NotImplementedError(
                "FishLeg has one parameter group: the inverse that it learns is one operator over all parameters of "
                "its model. Build another FishLeg for another model, or choose with module_names and skip_names."
            )
        super().add_param_group(param_group)

    # ----------------------------------------------------------------------- steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters, after auxiliary steps where these are due. Parameters without gradient keep still.

        Args:
            closure: Computes the gradients anew and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            FloatingPointError: If a gradient is not finite; nothing has changed then.
            NotImplementedError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = gradients_of(self._named)
        if not self._is_warm:
            self.warmup_aux()
        for _ in range(self._schedule.num_due(self._num_steps_taken) if gradients else 0):
            self.update_aux()
        self._move(gradients)
        self._num_steps_taken += 1
        return loss

    def _move(self, gradients: dict[str, Tensor]) -> None:
        """θ ← θ − lr (m + wd θ) with m ← βm + (1−β)Qg."""
        (group,) = self.param_groups
        natural = self._learner.natural(gradients) if gradients else {}
        if not all_finite(natural.values()):
            raise FloatingPointError("FishLeg: Q times the gradients is not finite: Q has diverged. Lower aux_lr.")
        for name in gradients:
            p, state = self._named[name], self.state[self._named[name]]
            work = natural[name].to(torch.promote_types(p.dtype, torch.float32))
            m = state.get("momentum", torch.zeros_like(work))
            state["momentum"] = (group["beta"] * m).add_(work, alpha=1 - group["beta"])
            step = state["momentum"]
            if group["weight_decay"] != 0 and name in self._problem.of_model:
                pull = p - state["anchor"] if "anchor" in state else p
                step = torch.add(step, pull, alpha=group["weight_decay"])
            p.add_(step, alpha=-group["lr"])

    # ------------------------------------------------------------- auxiliary steps

    def update_aux(self) -> float | None:
        """One auxiliary step along the gradients as they are, on the next auxiliary batch.

        Returns:
            The value of the auxiliary objective before it; ``None`` if it was skipped, since the curvature was negative
            or the learning rate has come to zero.

        Raises:
            RuntimeError: If there are no gradients.
            FloatingPointError: If a gradient or the curvature is not finite; Q has not changed then.
        """
        gradients = gradients_of(self._named)
        if not gradients:
            raise RuntimeError("FishLeg: no parameter has a gradient. Call backward() before step() and update_aux().")
        lr = self._schedule.lr_at(self._num_steps_taken)
        return None if lr == 0 else self._learner.update(gradients, lr)

    def warmup_aux(self) -> list[float | None]:
        """Make ``warmup`` auxiliary steps along gradients of ``warmup_loss``; the first step calls it if nobody has.

        Returns:
            The values of the objective, see :meth:`pretrain_fish`.
        """
        values = self.pretrain_fish(self._warmup_data, self._warmup_loss, self._warmup)
        self._is_warm = True
        return values

    def pretrain_fish(
        self, dataloader: Iterable[Any], loss: BatchLoss, iterations: int, *, aux_lr: float | None = None
    ) -> list[float | None]:
        """Learn Q while the model stays: the directions are gradients of batches, the curvature is of auxiliary ones.

        Args:
            dataloader: Batches for the gradients, read again where they end.
            loss: ``loss(model, batch)``, a tensor without axes.
            iterations: Number of auxiliary steps.
            aux_lr: Learning rate of these steps; by default that of the optimiser, at its start.

        Returns:
            The value of the auxiliary objective before each step; ``None`` for those that were skipped.

        Raises:
            FloatingPointError: If a gradient or the curvature is not finite.
        """
        checked_count(iterations, "iterations", least=0)
        batches = self._learner.walk_over(dataloader)
        lr = self._schedule.lr if aux_lr is None else aux_lr
        return [self._learner.update(self._learner.gradients(loss, batches.next()), lr) for _ in range(iterations)]

    # ----------------------------------------------------------------------- state

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "FishLeg reads loaders and calls functions of yours, so it is not copied or pickled as a whole: save its "
            "state_dict(), and load it into a FishLeg that is built in the same way."
        )

    def state_dict(self) -> dict[str, Any]:
        """Copies of momentum, Q, the auxiliary optimiser, random state and counters, but not of model or likelihood."""
        state = copy.deepcopy(super().state_dict())
        counters = {"num_steps_taken": self._num_steps_taken, "is_warm": self._is_warm}
        return state | {"fishleg": self._learner.state_dict() | counters}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state; with the same model and auxiliary batches, as if nothing had been in between.

        The auxiliary batches that were read in the current pass are read again. The parameter group, and betas and eps
        of the auxiliary steps, come from the state; all other settings are those of this optimiser.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If it is of another optimiser, or of another model; then nothing has changed.
        """
        if "fishleg" not in state_dict:
            raise ValueError("FishLeg: the state has no entry 'fishleg', so it is of another optimiser.")
        state = copy.deepcopy(dict(state_dict))
        own = state.pop("fishleg")
        self._learner.check_state(own)
        if self._has_anchors != any("anchor" in kept for kept in state["state"].values()):
            raise ValueError("FishLeg: the state and this optimiser differ in fine_tune.")
        super().load_state_dict(state)
        # The base class casts to the dtype of the parameters, which is too coarse for sums in half precision.
        for index, p in enumerate(self._named.values()):
            for key, value in state["state"].get(index, {}).items():
                self.state[p][key] = value.to(p.device)
        self._learner.load_state_dict(own)
        self._num_steps_taken, self._is_warm = own["num_steps_taken"], own["is_warm"]
