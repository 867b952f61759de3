"""What FishLeg learns beside the network: inverse Fisher matrices, by steps on auxiliary batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from torch import Generator

from curvlinops.applications.fishleg.curvature import (
    BatchCurvature,
    DrawnHessian,
    GaussNewton,
    Product,
    Tensors,
    scalar_of,
)
from curvlinops.applications.fishleg.problem import BatchLoss, InverseSettings, Problem
from curvlinops.applications.fishleg.selection import Selection
from curvlinops.applications.fishleg.surroundings import EndlessBatches, drawn_seed, kept_buffers, own_randomness
from curvlinops.applications.learned_inverse.checks import checked_state
from curvlinops.applications.learned_inverse.layers import NamedLayer, named_layers
from curvlinops.applications.learned_inverse.operator import LearnedInverseLinearOperator


class NegativeCurvatureError(ArithmeticError):
    """The curvature of a batch along a direction is negative."""


class InverseLearner:
    """The learned inverses of the Fisher matrices of a network and of its likelihood's parameters.

    Args:
        problem: What the Fisher matrices are of.
        settings: How they are learned.
        selection: Where they are learned.
    """

    def __init__(self, problem: Problem, settings: InverseSettings, selection: Selection) -> None:
        self._problem, self._settings = problem, settings
        layers = named_layers(problem.model)
        learned = selection.of(layers)
        self.Q = settings.inverse(problem.model, _structures(layers, learned, settings.structure))
        self.likelihood_Q: LearnedInverseLinearOperator | None = None
        if problem.of_likelihood:
            self.likelihood_Q = settings.inverse(problem.of_likelihood, "diagonal")
        names = [name for key in learned for name in layers[key].parameters]
        self._learned = {name: p for name, p in problem.of_model.items() if name in names}
        self._curvature = self._curvature_of_batches()
        self.device = next(iter(problem.of_model.values())).device
        self._generator = Generator().manual_seed(settings.seed)
        self._batches = self.walk_over(problem.aux_dataloader)
        self.num_skipped = 0

    def _curvature_of_batches(self) -> BatchCurvature:
        if self._problem.likelihood is None:
            return DrawnHessian(self._problem.model, self._problem.nll, self._learned)
        return GaussNewton(self._problem.model, self._problem.likelihood, self._learned)

    def walk_over(self, data: Iterable[Any]) -> EndlessBatches:
        """The batches of a loader, endlessly, on the device of the model."""
        return EndlessBatches(data, self._generator, self.device)

    def natural(self, gradients: Tensors) -> Tensors:
        """Q times the gradients; those that there are not count as zero."""
        gradients = self._whole(gradients)
        with self._full_precision():
            result: Tensors = self.Q @ {name: gradients[name] for name in self._problem.of_model}
            if self.likelihood_Q is not None:
                result |= self.likelihood_Q @ {name: gradients[name] for name in self._problem.of_likelihood}
        return result

    def gradients(self, loss: BatchLoss, batch: Any) -> Tensors:
        """The gradients of a loss of a batch; nothing of the user's is touched."""
        params = {name: p for name, p in self._problem.params.items() if p.requires_grad}
        with self._undisturbed(), torch.enable_grad():
            value = scalar_of(loss(self._problem.model, batch), "loss")
            if value.requires_grad:
                found = torch.autograd.grad(value, list(params.values()), materialize_grads=True, allow_unused=True)
                return dict(zip(params, found, strict=True))
        raise ValueError("loss: it does not depend on parameters that require gradients.")

    def update(self, u: Tensors, lr: float) -> float | None:
        """One auxiliary step along u on the next batch.

        Args:
            u: The direction, with zeros for the parameters that it leaves out.
            lr: Learning rate.

        Returns:
            The value of the objective before it; ``None`` where it was skipped.
        """
        u, batch = self._whole(u), self._batches.next()
        with self._undisturbed():
            X, y = self._problem.drawn(batch)
            product = self._curvature.on(X, y, drawn_seed(self._generator))
            try:
                value = self._step(self.Q, self._of_model(product), {name: u[name] for name in self._learned}, lr)
            except NegativeCurvatureError:
                self.num_skipped += 1
                return None
            if self.likelihood_Q is not None:
                of_likelihood = {name: u[name] for name in self._problem.of_likelihood}
                value += self._step(self.likelihood_Q, self._of_likelihood(y), of_likelihood, lr)
        return value

    def _step(self, Q: LearnedInverseLinearOperator, matvec: Product, u: Tensors, lr: float) -> float:
        """One step of Q along u, with zeros where nothing is learned, so that nothing mixes with those entries."""
        if set(Q.structure.values()) == {"identity"}:
            return 0.0
        if self._settings.normalization:
            length = sqrt(inner(u, u)) or 1.0
            u = {name: entry / length for name, entry in u.items()}
        names, shapes = Q.domain.names or (), Q.domain.shapes
        whole = {
            name: u[name].to(Q.dtype) if name in u else torch.zeros(shape, dtype=Q.dtype, device=Q.device)
            for name, shape in zip(names, shapes, strict=True)
        }
        Q.learning_rate = lr
        return Q.update(matvec, whole, precondition=self._settings.precondition)

    def _of_model(self, product: Product) -> Product:
        """The product over the learned parameters as one over all."""

        def matvec(v: Tensors) -> Tensors:
            inside = product({name: v[name] for name in self._learned})
            if not self._curvature.is_positive and inner(v, inside) < 0:
                raise NegativeCurvatureError("The curvature of the auxiliary batch along v is negative.")
            return {name: inside[name] if name in inside else torch.zeros_like(entry) for name, entry in v.items()}

        return matvec

    def _of_likelihood(self, y: Any) -> Product:
        """The product with the Fisher matrix of the likelihood's parameters."""
        assert self._problem.likelihood is not None
        likelihood = self._problem.likelihood
        known = {id(p): d for p, d in zip(likelihood.get_parameters(), likelihood.fisher_diagonal(y), strict=True)}
        # Those that were frozen meanwhile have no Fisher information any more.
        diagonal = {name: known.get(id(p), 0.0) for name, p in self._problem.of_likelihood.items()}
        return lambda v: {name: diagonal[name] * entry for name, entry in v.items()}

    def _whole(self, gradients: Tensors) -> Tensors:
        params = self._problem.params
        return {name: gradients[name] if name in gradients else torch.zeros_like(p) for name, p in params.items()}

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Random states of its own, from its generator, and buffers as they were."""
        randomness = own_randomness(drawn_seed(self._generator), self.device)
        with randomness, kept_buffers(self._problem.model), self._full_precision():
            yield

    def _full_precision(self) -> torch.autocast:
        """Without autocast, under which training may step: it would round what is to be inverted."""
        return torch.autocast(self.device.type, enabled=False)

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that is learned, and of where it stands."""
        return {
            "Q": self.Q.state_dict(),
            "likelihood_Q": None if self.likelihood_Q is None else self.likelihood_Q.state_dict(),
            "generator": self._generator.get_state(),
            "batches": self._batches.state_dict(),
            "num_skipped": self.num_skipped,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state of another problem or of other settings."""
        if (state["likelihood_Q"] is None) != (self.likelihood_Q is None):
            raise ValueError(
                "The state belongs to an optimiser whose likelihood learns other parameters than this one."
            )
        checked_state(state["Q"], self.Q.state_dict())
        if self.likelihood_Q is not None:
            checked_state(state["likelihood_Q"], self.likelihood_Q.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another learner of the same problem stood; see :meth:`check_state`."""
        self.Q.load_state_dict(state["Q"])
        if self.likelihood_Q is not None:
            self.likelihood_Q.load_state_dict(state["likelihood_Q"])
        self._generator.set_state(state["generator"].cpu())
        self._batches.load_state_dict(state["batches"])
        self.num_skipped = state["num_skipped"]


def inner(v: Tensors, w: Tensors) -> float:
    """The inner product over the entries of w, in float64."""
    return float(sum((v[name].double() * entry.double()).sum() for name, entry in w.items()))


def _structures(
    layers: Mapping[str, NamedLayer], learned: Iterable[str], structure: str | Mapping[str, str]
) -> str | dict[str, str]:
    """The structure of each layer: as asked for, and nothing to learn for the others."""
    learned = set(learned)
    if isinstance(structure, str):
        if len(learned) == len(layers):
            return structure
        if structure == "full":
            raise ValueError("structure: 'full' is one factor for all layers: it takes no module_names or skip_names.")
        is_strict = structure == "kronecker"
        structure = {n: "diagonal" if is_strict and not layers[n].has_matrix else structure for n in learned}
    return dict(structure) | {name: "identity" for name in layers if name not in learned}
