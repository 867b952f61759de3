"""A model, a loss, parameters and data: the only loop over data, the only scale factor, the only all-reduce."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm import tqdm

from curvlinops.memory import default_budget
from curvlinops.risk.batches import Batch, read_batch
from curvlinops.risk.collective import all_reduced, rank_of
from curvlinops.risk.columns import Piece
from curvlinops.risk.derivatives import Derivatives
from curvlinops.risk.keeping import Keeper, T
from curvlinops.risk.linearization import (
    Engine,
    Use,
    is_out_of_memory,
)
from curvlinops.risk.losses import Loss
from curvlinops.risk.model import FunctionalModel
from curvlinops.risk.passes import Pass, are_finite, check_data
from curvlinops.risk.second_order import SecondOrder, filled, gradients_of
from curvlinops.risk.surroundings import differentiable, preserved_random_state
from curvlinops.risk.verification import check_hessian_by_difference, disagree
from curvlinops.risk.weighing import Weighing

#: Maps the inputs and targets of a mini-batch to its sum over data, piece by piece.
BatchSum = Callable[[Any, Any], Iterable[Piece]]


class EmpiricalRisk(Derivatives, Weighing):
    """The loss of a whole data set at the current parameters, and everything that is summed over its mini-batches.

    Args:
        model: The model with its parameters.
        loss: The loss, or ``None`` for quantities of the model alone.
        data: Iterable of mini-batches that can be read again and again.
        name: Name shown by progress bars.
        progressbar: Whether to show them.
        num_data: Number of data, checked where given.
        batch_size_fn: Number of data in X, where it cannot be seen.
        weight_fn: Weight of each datum ``[N]`` as a function of (X, y).
        process_group: Ranks that each hold a shard of the data.
    """

    def __init__(
        self,
        model: FunctionalModel,
        loss: Loss | None,
        data: Iterable[Any],
        *,
        name: str,
        progressbar: bool = False,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        weight_fn: Callable[[Any, Any], Tensor] | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_data(data)
        if weight_fn is not None and loss is not None:
            loss.require_known("weight_fn")
        Derivatives.__init__(self, model)
        self.loss = loss
        self.data = data
        self.name = name
        self.progressbar = progressbar
        self.num_data = num_data
        self.batch_size_fn = batch_size_fn
        self.weight_fn = weight_fn
        self.process_group = process_group
        self.use = Use(max_bytes=default_budget(self.device))
        self.keeper: Keeper | None = None
        self._pass: Pass | None = None

    @property
    def rank(self) -> int:
        """Number of this process in the process group; 0 without one."""
        return rank_of(self.process_group)

    # ---------------------------------------------------------------- the loop

    def batches(self, step: str) -> Iterator[Batch]:
        """The only loop over the data: mini-batches on the device of the parameters.

        Args:
            step: What the pass is for, shown by the progress bar.

        Raises:
            ValueError: If there is none, or an item is not understood.
        """
        keeper = self.keeper
        if keeper is not None and keeper.keeps_all:
            yield from keeper.batches()
            return
        if keeper is not None:
            keeper.prepare()
        items = tqdm(self.data, desc=f"{self.name}: {step}", disable=not self.progressbar, leave=False)
        index = -1
        for index, item in enumerate(items):
            batch = read_batch(index, item, self.device)
            yield batch if keeper is None else keeper.own(batch)
        if index < 0:
            raise ValueError("The data are empty: expected at least one mini-batch.")

    def total(
        self, begin: Callable[[], BatchSum], shapes: Sequence[Sequence[int]], step: str, use: Use | None = None
    ) -> list[Tensor]:
        """The scaled sum c Σ_b of a quantity of the mini-batches: one pass, one scale factor, one all-reduce.

        Args:
            begin: Called at the start of the pass; gives the function (X, y) -> sum over the mini-batch's data.
            shapes: Shapes of the tensors that are summed.
            step: What the pass is for.
            use: What linearisations are for.

        Returns:
            The tensors, in at least float32.

        Raises:
            FloatingPointError: If a mini-batch gives a number that is not finite.
            NotImplementedError: If no way through the network gives consistent products.
        """
        while True:
            was_forward = self.engine.forward_mode
            found = Pass.empty(shapes, self.model.params[0], use or self.use)
            self.accumulate(begin, found, step)
            disagrees = bool(found.disagreements) and bool(torch.stack(found.disagreements).any())
            if disagrees and not was_forward:
                found.error = NotImplementedError(
                    "Forward and reverse differentiation of the model disagree in every engine, so no product would "
                    "be right. Does the model use dropout, autocast, or hooks that change gradients?"
                )
            found, repeat = all_reduced(found, disagrees, self.process_group)
            if found.error is not None:
                raise found.error
            if not repeat:
                self._check_finished(begin, found, step)
                return found.scaled(self._checked_denominator(found))
            if self.keeper is not None:
                self.keeper.forget()
            if disagrees:
                self.engine = Engine(forward_mode=False)

    def accumulate(self, begin: Callable[[], BatchSum], found: Pass, step: str, num_batches: int | None = None) -> bool:
        """Go on with a pass where it stands: one rank's sums over its mini-batches, not scaled.

        An error of this rank is kept in the pass where other ranks wait for it, else raised.

        Args:
            begin: Called at the start; gives the function (X, y) -> sum over the mini-batch's data.
            found: The pass; mini-batches that it has are skipped.
            step: What the pass is for.
            num_batches: How many more mini-batches to take at most; ``None`` for all.

        Returns:
            Whether the data are at their end.
        """
        last = None if num_batches is None else found.num_batches + num_batches
        self._pass = found
        try:
            with preserved_random_state(self.data, self.device), differentiable(self.model):
                batch_sum, batch = begin(), None
                for batch in self.batches(step):
                    if batch.index < found.num_batches:
                        continue
                    if found.num_batches == last:
                        return False
                    try:
                        self._add(found, batch, batch_sum)
                    except FloatingPointError as error:
                        raise FloatingPointError(f"{self.name}: mini-batch {batch.index}: {error}") from error
                if batch is None or batch.index + 1 < found.num_batches:
                    raise ValueError(f"The data have fewer mini-batches than the {found.num_batches} that were summed.")
        except BaseException as error:
            if self.keeper is not None:
                self.keeper.drop()
            # The other ranks wait for this one, so the error travels with the sums.
            if self.process_group is None or not isinstance(error, Exception):
                raise
            found.error = error
        finally:
            self._pass = None
        return True

    def finished(self, begin: Callable[[], BatchSum], found: Pass, step: str) -> tuple[list[Tensor], float]:
        """The sums over all ranks, and the scale that is still to be applied to them.

        Called after the last mini-batch of :meth:`accumulate`.
        """
        found, _ = all_reduced(found, False, self.process_group)
        if found.error is not None:
            raise found.error
        self._check_finished(begin, found, step)
        denominator = self._checked_denominator(found)
        return found.sums, 1.0 if denominator is None else 1.0 / denominator

    def _check_finished(self, begin: Callable[[], BatchSum], found: Pass, step: str) -> None:
        self.check_num_data(found.num_data)
        if self.keeper is not None:
            self.keeper.finish(found.num_batches)
        if not are_finite(found.sums):
            self._raise_not_finite(begin, step, found.use)

    def _add(self, found: Pass, batch: Batch, batch_sum: BatchSum) -> None:
        found.batch_index = batch.index
        for piece in batch_sum(batch.X, batch.y):
            found.is_whole = False
            found.add(batch.index, piece)
        if self.keeper is not None:
            self.keeper.settle(batch)
        found.denominator += self.denominator(batch.X, batch.y).to(found.denominator.device)
        if self.num_data is not None:
            found.num_data += self.batch_size(batch.X, batch.y)
        found.num_batches += 1
        found.is_whole = True

    def _raise_not_finite(self, begin: Callable[[], BatchSum], step: str, use: Use) -> None:
        """Find the mini-batch that is to blame, in a pass of its own: looking at each in every pass would cost time."""
        advice = "Check the inputs, the loss, the parameters and the vector for NaN, infinity or overflow."
        self._pass = Pass.empty([], self.model.params[0], use)
        try:
            with preserved_random_state(self.data, self.device), differentiable(self.model):
                batch_sum = begin()
                for batch in self.batches(f"{step}, looking for numbers that are not finite"):
                    self._pass.batch_index = batch.index
                    pieces = batch_sum(batch.X, batch.y)
                    if not all(t.isfinite().all() for _, tensors in pieces for t in tensors):
                        raise FloatingPointError(
                            f"{self.name}: mini-batch {batch.index} gives numbers that are not finite. {advice}"
                        )
        finally:
            self._pass = None
        raise FloatingPointError(f"{self.name}: the sum over mini-batches or ranks is not finite. {advice}")

    def _checked_denominator(self, found: Pass) -> float | None:
        """By what the sums of all data are divided, ``None`` for nothing."""
        if not self.is_mean:
            return None
        denominator = found.denominator.item()
        if denominator == 0:
            raise ValueError(
                "The denominator of the mean is zero: every target is ignored or has weight zero, in all mini-batches."
            )
        return denominator

    def check_num_data(self, found: int) -> None:
        """Raise if the data of all ranks are not as many as was said."""
        if self.num_data is not None and found != self.num_data:
            raise ValueError(f"num_data={self.num_data}, but the mini-batches hold {found} data.")

    # ------------------------------------------------------- at one mini-batch

    def predict(self, X: Any) -> Tensor:
        """The prediction without its graph."""
        params = [p.detach() for p in self.model.params]
        try:
            with torch.no_grad():
                return self.model(params, X).detach()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
        # Some models differentiate inside of their forward.
        with torch.enable_grad():
            return self.model(self.model.leaves(), X).detach()

    @property
    def _current_use(self) -> Use:
        """What a linearisation of the current mini-batch is for."""
        if self._pass is None:
            return self.use
        is_kept = self.keeper is not None and self.keeper.wants(self._pass.batch_index)
        return replace(self._pass.use, is_reused=True) if is_kept else self._pass.use

    def kept(self, make: Callable[[], T]) -> T:
        """What is kept of the current mini-batch; it is made where nothing is."""
        if self.keeper is None or self._pass is None:
            return make()
        return self.keeper.obtain(self._pass.batch_index, make)

    def rewind(self, generator: torch.Generator) -> None:
        """Bring a generator to where it was when the current mini-batch drew first: kept ones draw no more."""
        if self.keeper is not None and self._pass is not None:
            self.keeper.rewind(self._pass.batch_index, generator)

    def second_order(self, X: Any, y: Any) -> SecondOrder:
        """The Hessian of a mini-batch's loss terms, summed."""
        self.check_directions(X)
        is_reused = self._current_use.is_reused
        second_order = SecondOrder(self.model, X, self.engine, lambda f: self.terms(f, X, y).value(), is_reused)
        if "Hessian" not in self.engine.verified:
            check_hessian_by_difference(self.model, second_order, lambda values: self._gradient_at(values, X, y)[0])
            self.engine.verified.add("Hessian")
        return second_order

    def note_products(self, U: Tensor, JV: Tensor, V: Sequence[Tensor], R: Sequence[Tensor]) -> None:
        """Compare the two ways through the network, at no further product; the pass looks at the outcome once.

        Products that are kept are compared in the first pass only.
        """
        is_known = self.keeper is not None and self.keeper.keeps_all
        if self._pass is not None and not is_known:
            self._pass.disagreements.append(disagree(U, JV, V, R))

    def gradient_and_loss(self) -> tuple[list[Tensor], Tensor]:
        """The gradient and the loss of the whole data set."""

        def gradient(X: Any, y: Any) -> list[Piece]:
            gradients, value = self._gradient_at(self.model.leaves(), X, y)
            return [(None, [*gradients, value])]

        shapes = [*(p.shape for p in self.model.params), ()]
        *gradients, loss = self.total(lambda: gradient, shapes, "gradient and loss")
        dtype = self.model.params[0].dtype
        return [g.to(dtype) for g in gradients], loss.to(dtype)

    def _gradient_at(self, values: Sequence[Tensor], X: Any, y: Any) -> tuple[list[Tensor], Tensor]:
        """The gradient and the value of a mini-batch's loss terms, summed, at some parameter values."""
        value = self.terms(self.model(values, X), X, y).value()
        return filled(gradients_of(self.model, value, values), values), value
