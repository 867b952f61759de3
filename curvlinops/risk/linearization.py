"""The model at one mini-batch: push(V) = J V and pull(U) = Jᵀ U, by two engines, in chunks of columns.

*Forward mode* pushes with dual numbers. A single column is pushed in the same forward that records the graph for
`pull` (5 units for a whole product, a gradient being 3). Where more products are to come, that forward also leaves a
tape of its tangents, and each further product takes 4 units.
*Double backward* pushes by differentiating `pull` (the R-operator); it serves models that forward mode cannot
follow, and callables that close over their parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from backpack.hessianfree.rop import R_op
from torch import Tensor
from torch.autograd import forward_ad, grad

from curvlinops.memory import num_bytes
from curvlinops.risk.graph import named, operations_in, refuse_by_name, saved_tensors
from curvlinops.risk.layers.proofs import Proofs
from curvlinops.risk.model import FunctionalModel
from curvlinops.risk.tangents import TangentRules, TooLargeError
from curvlinops.risk.tape import NoTapeError, Tape, TapeRecorder

#: Bytes of activations that columns going through the network together may add up to, and how many may at most. On
#: the CPU about what a cache holds, as measured; see docs/concepts/columns.rst. Convolutions are slower under vmap.
_CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 2**30}
_CHUNK_BYTES_OF_CONVOLUTIONS = {"cpu": 2**20, "cuda": 2**30}
_MAX_CHUNK_SIZE = {"cpu": 16, "cuda": 64}
#: Columns of the identity that are multiplied together where a matrix is found by products.
DEFAULT_CHUNK_SIZE = 8
Columns = Sequence[Tensor]


@dataclass(frozen=True)
class Use:
    """What a linearisation is for.

    Attributes:
        is_reused: Whether more products follow the first.
        is_lean: Whether to hold no more than a gradient does, at the cost of a further forward.
        max_bytes: Bytes that a forward with tangents may hold; beyond, the product is lean.
    """

    is_reused: bool = False
    is_lean: bool = False
    max_bytes: int | None = None


class Engine:
    """What was learnt about how a model can be differentiated; shared by all mini-batches of an operator.

    Attributes:
        forward_mode: Whether to push by forward mode; otherwise by double backward.
        tape: Whether the tangents of a forward can be replayed.
        vmap: Whether several columns may go through the network at once.
        fused: Whether the forward that pushes a single column may also record the graph.
        verified: Names of the checks that are done; each is made once.
        chunk_size: Columns that go through the network together, once that is known.
        proofs: What was measured of the model's layers.
    """

    def __init__(self, forward_mode: bool = True, proofs: Proofs | None = None) -> None:
        self.forward_mode = forward_mode
        self.tape = True
        self.vmap = True
        self.fused = True
        self.verified: set[str] = set()
        self.chunk_size: int | None = None
        self.proofs: Proofs = {} if proofs is None else proofs

    def give_up_vmap(self, error: Exception) -> None:
        """Go column by column from now on, unless memory was the trouble, which smaller chunks mend."""
        if is_out_of_memory(error):
            raise error
        self.vmap = False
        self.chunk_size = 1

    def learn_chunk_size(self, prediction: Tensor) -> None:
        """Choose how many columns go through the network together.

        Columns that go together share the calls of kernels but not their work. So it pays where kernels are short,
        and costs where the activations no longer fit into the cache.
        """
        if self.chunk_size is None:
            device = "cpu" if prediction.device.type == "cpu" else "cuda"
            allowed = (_CHUNK_BYTES_OF_CONVOLUTIONS if operations_in(prediction, ["Convolution"]) else _CHUNK_BYTES)[
                device
            ]
            size = allowed // max(1, num_bytes(saved_tensors(prediction)))
            self.chunk_size = min(_MAX_CHUNK_SIZE[device], max(1, size))


class NoPushError(NotImplementedError):
    """A model that no engine can push through; pulling may still work."""


class Linearization(ABC):
    """The Jacobian of the model at one mini-batch, as two products.

    Columns come last: V is a list of ``[*shape, K]``, U is ``[*out, K]``.
    """

    def __init__(self, model: FunctionalModel, X: Any, engine: Engine, use: Use) -> None:
        self._model = model
        self._X = X
        self._engine = engine
        self.use = use
        self.values = model.leaves()
        self._prediction: Tensor | None = None

    @property
    def prediction(self) -> Tensor:
        """The prediction with its graph; the first use runs the forward."""
        if self._prediction is None:
            prediction = self._model(self.values, self._X)
            self._prediction = self._checked(prediction, twice=not self._engine.forward_mode)
        return self._prediction

    def _checked(self, prediction: Tensor, twice: bool) -> Tensor:
        checked(prediction, self._engine, twice)
        if self.use.is_reused:
            self._engine.learn_chunk_size(prediction)
        return prediction

    @property
    def output(self) -> Tensor:
        """The prediction without its graph."""
        return self.prediction.detach()

    @abstractmethod
    def push(self, V: Columns) -> Tensor:
        """J V."""

    def pull(self, U: Tensor) -> list[Tensor]:
        """Jᵀ U, by one backward a column; a lean linearisation for a single product does so only once."""
        prediction = self.prediction
        retain = self.use.is_reused or not self.use.is_lean
        return self._model.holding(
            self.values, lambda: backward([prediction], self.values, [U.to(prediction.dtype)], self._engine, retain)
        )

    def held(self) -> Iterator[Tensor]:
        """The tensors that are held between products."""
        if self._prediction is not None:
            yield from saved_tensors(self._prediction)
            yield self._prediction


class ForwardMode(Linearization):
    """Pushes by dual numbers, and once there is a tape of them by replaying it."""

    _has_tangents = False
    _tape: Tape | None = None

    def push(self, V: Columns) -> Tensor:
        """J V."""
        tape = self._tape
        if tape is not None and V[0].shape[-1] > 1 and self._engine.vmap:
            try:
                with torch.no_grad():
                    replayed = torch.vmap(lambda *v: tape.replay(v, under_vmap=True))(*(v.movedim(-1, 0) for v in V))
                return replayed.movedim(0, -1)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                self._engine.give_up_vmap(error)
        return torch.stack([self._push_one(column) for column in unstacked(V)], -1)

    def pull(self, U: Tensor) -> list[Tensor]:
        """Jᵀ U; a forward that runs again in the backward (checkpointing) needs a graph without tangents."""
        try:
            return super().pull(U)
        except RuntimeError as error:
            if is_out_of_memory(error) or not self._has_tangents:
                raise
        self._engine.fused, self._has_tangents, self._prediction = False, False, None
        return super().pull(U)

    def held(self) -> Iterator[Tensor]:
        """The tensors that are held between products."""
        yield from super().held()
        if self._tape is not None:
            yield from self._tape.constants()

    def _push_one(self, v: Columns) -> Tensor:
        if self._tape is not None:
            return self._replay(v)
        record = self._engine.fused and self._prediction is None and not self.use.is_lean
        wants_tape = self.use.is_reused and self._engine.tape and not self.use.is_lean
        try:
            return self._run(v, record, wants_tape)
        except NoTapeError:
            self._engine.tape = False
        except TooLargeError:
            self.use = replace(self.use, is_lean=True)
        lean = self.use.is_lean
        return self._run(v, record and not lean, wants_tape and self._engine.tape and not lean)

    def _replay(self, v: Columns) -> Tensor:
        assert self._tape is not None
        with torch.no_grad():
            return self._tape.replay([column.contiguous() for column in v])

    def _run(self, v: Columns, record: bool, wants_tape: bool) -> Tensor:
        """A forward with tangents, which records the graph, the tape, both or neither."""
        values = self.values if record else [value.detach() for value in self.values]
        # The recorder knows tangents by their memory, which must not be that of another one or of a parameter.
        form = torch.contiguous_format
        tangents = [column.clone(memory_format=form) if wants_tape else column.contiguous() for column in v]
        rules = TangentRules(max_bytes=self.use.max_bytes if record else None)
        with torch.set_grad_enabled(record), forward_ad.dual_level(), rules, ExitStack() as stack:
            duals = [forward_ad.make_dual(value, tangent) for value, tangent in zip(values, tangents, strict=True)]
            recorder = TapeRecorder([forward_ad.unpack_dual(dual).tangent for dual in duals]) if wants_tape else None
            if recorder is not None:
                stack.enter_context(recorder)
            primal, tangent = forward_ad.unpack_dual(self._model(duals, self._X))
        if recorder is not None:
            self._tape = recorder.finish(tangent, primal.shape)
        if record:
            self._prediction = self._checked(primal, twice=False)
            self._has_tangents = True
        return torch.zeros_like(primal).detach() if tangent is None else tangent.detach()


class DoubleBackward(Linearization):
    """Pushes by differentiating `pull`, which is linear: the R-operator."""

    _pulled: tuple[Tensor, Sequence[Tensor | None]] | None = None

    def push(self, V: Columns) -> Tensor:
        """J V, by one backward through a backward for each column; the latter is kept where there are more to come."""
        prediction = self.prediction
        push_one = self._push_through_kept if self.use.is_reused else self._push_anew
        try:
            pushed = [self._model.holding(self.values, lambda c=column: push_one(c)) for column in unstacked(V)]  # type: ignore[misc]
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise NoPushError(
                f"The model has neither forward mode nor a backward that can be differentiated{named(prediction)}: "
                f"{error}"
            ) from error
        return torch.stack(pushed, -1)

    def _push_anew(self, v: Columns) -> Tensor:
        return R_op(self.prediction, self.values, v)[0]  # type: ignore[no-any-return]

    def _push_through_kept(self, v: Columns) -> Tensor:
        if self._pulled is None:
            u = torch.zeros_like(self.prediction).requires_grad_()
            self._pulled = u, grad(self.prediction, self.values, u, create_graph=True, allow_unused=True)
        u, gradients = self._pulled
        pairs = [(g, c) for g, c in zip(gradients, v, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros_like(u).detach()
        outputs, columns = zip(*pairs, strict=True)
        return grad(outputs, u, columns, retain_graph=True, materialize_grads=True)[0]

    def held(self) -> Iterator[Tensor]:
        """The tensors that are held between products."""
        yield from super().held()
        gradients = () if self._pulled is None else self._pulled[1]
        yield from saved_tensors(*(gradient for gradient in gradients if gradient is not None))


def unstacked(V: Columns) -> list[list[Tensor]]:
    """The columns of ``[*shape, K]``, each as a tensor for each parameter."""
    return [[v[..., k] for v in V] for k in range(V[0].shape[-1])]


def checked(prediction: Tensor, engine: Engine, twice: bool) -> Tensor:
    """The prediction, refused if its graph cannot give what is asked."""
    if not prediction.requires_grad:
        raise ValueError(
            "The prediction does not depend on any of params in a way that autograd can follow: are they used by the "
            "model, outside of no_grad() and detach()?"
        )
    check = "twice differentiable" if twice else "differentiable"
    if check not in engine.verified:
        refuse_by_name(prediction, twice)
        engine.verified.add(check)
    return prediction


def linearize(model: FunctionalModel, X: Any, engine: Engine, use: Use = Use()) -> Linearization:
    """The model at one mini-batch, by the engine that fits it."""
    return (ForwardMode if engine.forward_mode else DoubleBackward)(model, X, engine, use)


def backward(
    outputs: Sequence[Tensor], values: Sequence[Tensor], U: Sequence[Tensor], engine: Engine, retain: bool = True
) -> list[Tensor]:
    """Pull columns-last tensors ``[*out, K]`` back to the values, at once under vmap where the model allows it."""
    if U[0].shape[-1] > 1 and engine.vmap:
        try:
            return _pull(outputs, values, [u.movedim(-1, 0).contiguous() for u in U], batched=True, retain=retain)
        except RuntimeError as error:
            engine.give_up_vmap(error)
    columns = [
        _pull(outputs, values, [u[..., k] for u in U], batched=False, retain=retain) for k in range(U[0].shape[-1])
    ]
    return [torch.cat(parts, -1) for parts in zip(*columns, strict=True)] if len(columns) > 1 else columns[0]


def _pull(
    outputs: Sequence[Tensor], values: Sequence[Tensor], U: Sequence[Tensor], batched: bool, retain: bool
) -> list[Tensor]:
    gradients = grad(outputs, values, U, retain_graph=retain, allow_unused=True, is_grads_batched=batched)
    num_columns = U[0].shape[0] if batched else 1
    return [
        v.new_zeros(num_columns, *v.shape).movedim(0, -1)
        if g is None
        else (g.movedim(0, -1) if batched else g.unsqueeze(-1))
        for v, g in zip(values, gradients, strict=True)
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the GPU or the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
