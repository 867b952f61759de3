"""What FishLeg is given: a network, its likelihood and data, and how the inverse is to be learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops.applications.fishleg.curvature import Tensors
from curvlinops.applications.fishleg.likelihoods import Likelihood
from curvlinops.applications.learned_inverse.operator import LearnedInverseLinearOperator

#: Draws labels: (model, X) -> (X, y).
Draw = Callable[[nn.Module, Any], tuple[Any, Any]]
#: A loss of a batch: (model, batch) -> tensor without axes.
BatchLoss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """What the Fisher matrix is of; the parameters are those that require gradients when they are first asked for.

    Args:
        model: The network.
        draw: Draws labels.
        nll: The negative log-likelihood of a batch.
        aux_dataloader: Batches.
        likelihood: The likelihood, or ``None``.
    """

    model: nn.Module
    draw: Draw
    nll: BatchLoss
    aux_dataloader: Iterable[Any]
    likelihood: Likelihood | None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model: expected a module, got {type(self.model).__name__}.")
        for name in ("draw", "nll"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name}: expected a function, got {type(getattr(self, name)).__name__}.")
        if self.likelihood is not None and not isinstance(self.likelihood, Likelihood):
            raise TypeError(
                f"likelihood: expected an instance of one of the package's likelihoods, got {self.likelihood!r}."
            )
        if not self.of_model:
            raise ValueError("model: no parameter requires gradients, so there is nothing to optimise.")
        if {id(p) for p in self.of_model.values()} & {id(p) for p in self.of_likelihood.values()}:
            raise ValueError(
                "likelihood: its parameters are in the model too. Keep the likelihood outside of the model."
            )

    def drawn(self, batch: Any) -> tuple[Any, Any]:
        """The inputs of a batch, with labels drawn from the model.

        Raises:
            TypeError: If ``draw`` gives anything but two.
        """
        with torch.no_grad():
            pair = self.draw(self.model, batch[0] if isinstance(batch, tuple | list) else batch)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"draw: expected it to return (data_x, data_y), got {type(pair).__name__}.")
        return pair[0], pair[1]

    @cached_property
    def of_likelihood(self) -> Tensors:
        """The likelihood's learnable parameters, by names that no parameter of a module has."""
        found = [] if self.likelihood is None else self.likelihood.get_parameters()
        return {f"likelihood[{position}]": p for position, p in enumerate(found)}

    @cached_property
    def params(self) -> Tensors:
        """All parameters that are optimised, by name."""
        return self.of_model | self.of_likelihood

    @cached_property
    def of_model(self) -> Tensors:
        """The model's parameters that require gradients."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


@dataclass(frozen=True, eq=False)
class InverseSettings:
    """How Q begins and how it is learned: see the arguments of :class:`FishLeg`.

    Args:
        damping: Damping γ.
        scale: Q₀ = scale · I.
        structure: Structure of the layers.
        lr: Learning rate.
        betas: Adam's betas.
        eps: Adam's eps.
        normalization: Whether directions have length one.
        precondition: Whether the gradient is preconditioned with Q.
        seed: Seed of everything random.
    """

    damping: float
    scale: float
    structure: str | Mapping[str, str]
    lr: float
    betas: tuple[float, float]
    eps: float
    normalization: bool
    precondition: bool
    seed: int

    def inverse(self, params: Any, structure: str | Mapping[str, str]) -> LearnedInverseLinearOperator:
        """Q₀ of some parameters."""
        return LearnedInverseLinearOperator(
            params,
            damping=self.damping,
            structure=structure,
            scale=self.scale,
            seed=self.seed,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
        )


def gradients_of(params: Mapping[str, Tensor]) -> Tensors:
    """The gradients of those parameters that have one.

    Args:
        params: The parameters by name.

    Raises:
        FloatingPointError: If one is not finite.
        NotImplementedError: If one is sparse.
    """
    found = {name: p.grad for name, p in params.items() if p.grad is not None}
    for name, gradient in found.items():
        if gradient.layout != torch.strided:
            raise NotImplementedError(f"FishLeg: the gradient of '{name}' is sparse, which is not supported.")
    if not all_finite(found.values()):
        bad = [name for name, gradient in found.items() if not bool(gradient.isfinite().all())]
        raise FloatingPointError(f"FishLeg: the gradients of {bad} are not finite. No parameter has been changed.")
    return found


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is infinite or NaN; one look at the device, not one for each tensor."""
    flags = [tensor.isfinite().all() for tensor in tensors]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())
