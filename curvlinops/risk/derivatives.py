"""The derivatives of a model at one mini-batch, by the engine that was found to be right for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvlinops.risk.layers.factors import LayerNotes
from curvlinops.risk.layers.recorder import LayerRecorder
from curvlinops.risk.linearization import Engine, Linearization, NoPushError, Use, is_out_of_memory, linearize
from curvlinops.risk.model import FunctionalModel
from curvlinops.risk.surroundings import any_attention_kernel, preserved_random_state
from curvlinops.risk.verification import check_by_difference, disagree


class Derivatives:
    """Push and pull through a model, with checks that the two directions agree.

    Args:
        model: The model with its parameters.
    """

    def __init__(self, model: FunctionalModel) -> None:
        self.model = model
        self.engine = Engine(forward_mode=not model.is_closure, proofs=model.proofs)

    @property
    def device(self) -> torch.device:
        """Device of the parameters, to which mini-batches are moved."""
        return self.model.params[0].device

    @property
    def _current_use(self) -> Use:
        """What a linearisation is for."""
        return Use()

    def check_directions(self, X: Any) -> None:
        """Once: the two directions through the network agree, for what uses only one of them.

        Cost: about a product, at one mini-batch.

        Raises:
            NotImplementedError: If they differ in every engine.
        """
        if "directions" in self.engine.verified:
            return
        engine = self.engine
        engine.verified.add("directions")  # at once, since the check pushes, too
        try:
            self._compare_directions(X)
        except BaseException:
            engine.verified.discard("directions")
            raise

    def _compare_directions(self, X: Any) -> None:
        with preserved_random_state(None, self.device):
            try:
                # A lean linearisation can be pulled back only once.
                _, disagrees = self.compared(self.linearize(X, Use()), X)
            except NoPushError:
                return  # nothing to compare with
            if disagrees:
                self.engine = Engine(forward_mode=False, proofs=self.engine.proofs)
                check_by_difference(self.model, X, self.linearize(X, Use()))
                self.engine.verified |= {"differences", "directions"}

    def compared(self, linearization: Linearization, X: Any) -> tuple[Linearization, bool]:
        """Push a random vector; and whether forward mode, where it is the engine, disagrees with `pull` on it."""
        generator = torch.Generator(self.device).manual_seed(0)
        V = [torch.randn(*p.shape, 1, dtype=p.dtype, device=p.device, generator=generator) for p in self.model.params]
        linearization, JV = self.push(linearization, X, V)
        u = torch.randn(JV.shape, dtype=JV.dtype, device=JV.device, generator=generator)
        return linearization, self.engine.forward_mode and bool(disagree(u, JV, V, linearization.pull(u)))

    def linearize(self, X: Any, use: Use | None = None) -> Linearization:
        """The model at one mini-batch as push and pull; forward mode where the model has it."""
        return linearize(self.model, X, self.engine, use or self._current_use)

    def noted(self, X: Any) -> tuple[Linearization, LayerNotes]:
        """One forward at a mini-batch, with notes of its layers; to be pulled back only."""
        linearization = self.linearize(X, Use())
        with LayerRecorder(linearization.values) as recorder, any_attention_kernel():
            prediction = linearization.prediction
        return linearization, LayerNotes(recorder, prediction, self.engine, self.engine.proofs)

    def push(self, linearization: Linearization, X: Any, V: Sequence[Tensor]) -> tuple[Linearization, Tensor]:
        """J V, going over to double backward where the model has no forward mode."""
        if self.engine.forward_mode:
            try:
                JV = linearization.push(V)
            except (RuntimeError, NotImplementedError) as error:
                if is_out_of_memory(error):
                    raise
                # What was wrong may have been X, which then fails here, and not the engine.
                linearization = linearize(self.model, X, engine := Engine(forward_mode=False), linearization.use)
                _ = linearization.prediction
                self.engine = engine
            else:
                if self._is_plausible(JV, X):
                    return linearization, JV
                linearization = linearize(self.model, X, self.engine, linearization.use)
        if "differences" not in self.engine.verified:
            check_by_difference(self.model, X, self.linearize(X, Use()))
            self.engine.verified.add("differences")
        return linearization, linearization.push(V)

    def _is_plausible(self, JV: Tensor, X: Any) -> bool:
        """Whether forward mode can be believed: where tangents are lost entirely, a product has nothing to compare."""
        if "directions" not in self.engine.verified and not bool(JV.flatten(0, -2).any(0).all()):
            self.check_directions(X)
        return self.engine.forward_mode
