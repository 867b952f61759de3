"""A positive definite operator that learns to be the inverse of a matrix known through products."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from curvlinops import BlockDiagonal, IdentityLinearOperator, LinearOperator, Space
from curvlinops.applications.learned_inverse.checks import checked_numbers, checked_state
from curvlinops.applications.learned_inverse.directions import directions_from
from curvlinops.applications.learned_inverse.steps import (
    Matrix,
    counted_steps,
    mean_dot,
    prepared,
    product_of,
    take_step,
)
from curvlinops.applications.learned_inverse.structures import blocks_of, trainable_tensors
from curvlinops.applications.named_tensors import space_of


class LearnedInverseLinearOperator(LinearOperator):
    r"""A positive definite operator Q that learns to be :math:`(A + \gamma I)^{-1}`, for A known through products.

    It is block-diagonal, with a block for each layer. That of a weight of outputs by inputs, its bias as a last column,
    is

    .. math:: Q_l = s \, D_l (L L^\top \otimes R R^\top) D_l, \qquad
        Q_l(W) = s \, D \circ \bigl(L L^\top (D \circ W) R R^\top\bigr),

    (weights row by row, as everywhere here; column by column :math:`R R^\top \otimes L L^\top`), with one positive
    number a weight in D, and lower triangular L (outputs) and R (inputs) with a positive diagonal; ``"diagonal"``
    blocks are :math:`s D^2`, ``"full"`` ones :math:`s L L^\top`. It begins at :math:`s I`. Each
    :meth:`update` takes one step of Adam on the auxiliary loss :math:`\tfrac12 v^\top (A + \gamma I) v - u^\top v` of
    :math:`v = Q u`, which is least where v solves the system. A may change meanwhile: Q follows. It is evaluated at its
    factors as they are at each product; :meth:`frozen` and :meth:`linearize` keep a copy.

    **Cost**: O(out² in + out in²) a layer and product; :meth:`update` has its own. Memory: five times the factors.

    **Reference**: Garcia, Freddi, Fotiadis, Li, Vakili, Bernacchia and Hennequin (2023), Fisher-Legendre (FishLeg)
    optimization of deep neural networks, ICLR.

    Args:
        params_or_model: Module, whose trainable parameters count, in the layers of :func:`named_layers`. Or a dict or
            list of tensors: there, ``x.weight`` is paired with ``x.bias`` where the sizes fit, other tensors of two or
            more axes are matrices of their own, first axis by the rest, and the layers are called ``x``, or as their
            tensor.
        damping: The number γ.
        structure: ``"auto"``: Kronecker products for weights whose factors have at most 1024 rows, or at most 5000 and
            no more than 16 times the entries of the weight; else diagonals, and for norms. ``"kronecker"``: whatever
            the size. ``"diagonal"``, and ``"identity"``, which learns nothing. ``"full"``: one triangular factor for
            all parameters. Or a dict of these by layer, ``"full"`` for one factor a layer, ``"auto"`` where none is.
        scale: The number s; by default 1/γ, the inverse where A is zero.
        seed: Seed of the directions that :meth:`fit` draws.
        lr: Learning rate of Adam.
        betas: Its decay rates.
        eps: The number that it adds to its denominator.

    Attributes:
        damping: The number γ.
        scale: The number s.
        layers: The layers by name.
        num_updates: Updates so far.

    Raises:
        TypeError: If the parameters are neither a module nor a dict or list of tensors.
        ValueError: If there are no parameters, they differ in dtype or device, a number is out of range, or a structure
            does not fit.

    >>> A = torch.diag(torch.tensor([1.0, 9.0]))
    >>> Q = LearnedInverseLinearOperator({"x": torch.zeros(2)}, damping=1.0, lr=3e-2)
    >>> losses = Q.fit(lambda v: A @ v, 500)
    >>> [round(entry, 1) for entry in Q.diagonal().tolist()]
    [0.5, 0.1]
    """

    SELF_ADJOINT = True
    POSITIVE_SEMIDEFINITE = True

    def __init__(
        self,
        params_or_model: Any,
        *,
        damping: float,
        structure: str | Mapping[str, str] = "auto",
        scale: float | None = None,
        seed: int = 0,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        tensors, self.layers = trainable_tensors(params_or_model, "params_or_model")
        space = space_of(tensors, "params_or_model")
        super().__init__(space, space)
        self.damping, self.scale = checked_numbers(damping, scale, torch.promote_types(space.dtype, torch.float32))
        with torch.inference_mode(False):
            self._blocks = blocks_of(space, self.layers, structure, self.scale)
        learned = [raw for factors in self._blocks.raw.values() for raw in factors.values()]
        self._adam = torch.optim.Adam(learned, lr, betas, eps) if learned else None
        self._generator: Generator | None = Generator(space.device).manual_seed(seed)
        self.num_updates = 0

    @property
    def structure(self) -> dict[str, str]:
        """The structure of each layer's block, by name; of ``"full"`` alone where one block serves all."""
        return self._blocks.structure

    @property
    def learning_rate(self) -> float:
        """The learning rate of the updates; it may be set."""
        return float(self._learner().param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ValueError(f"learning_rate: expected a number of at least 0, got {value!r}.")
        self._learner().param_groups[0]["lr"] = value

    def _learner(self) -> torch.optim.Adam:
        if self._adam is None:
            raise ValueError("This operator does not learn: it is a frozen copy, or its structure is 'identity'.")
        return self._adam

    def _own_generator(self) -> Generator:
        if self._generator is None:
            raise ValueError("This operator is a frozen copy, which has no state: ask the one that it was made of.")
        return self._generator

    # ------------------------------------------------------------------ products

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [part.to(self.dtype) for part in self._blocks.product(X)]

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``, exactly. Cost: O(out² + in² + out in) a layer."""
        return self._blocks.diagonal(self.domain)

    def to_block_diagonal(self) -> BlockDiagonal:
        """A frozen copy, with an operator for each layer that has products and a diagonal."""
        return self._blocks.operator(self.domain)

    @torch.no_grad()
    def logdet(self) -> Tensor:
        """The logarithm of the determinant. Cost: O(out in) a layer."""
        return self._blocks.logdet().to(self.dtype)

    @torch.no_grad()
    def sample(self, num_samples: int, *, seed: int = 2147483647, generator: Generator | None = None) -> Tensor:
        """Draw from the normal distribution of mean zero with this matrix as its covariance.

        Args:
            num_samples: Number of samples, K.
            seed: Seed of the samples.
            generator: Drawn from in place of a new one with this seed; it must live on the operator's device.

        Returns:
            The samples as columns ``[D, K]``.

        Raises:
            TypeError: If the number of samples is no integer, or the generator is none.
            ValueError: If num_samples is below 1, or the generator lives on another device.
        """
        noise = IdentityLinearOperator(self.domain).sample(num_samples, seed=seed, generator=generator)
        return Space.merge(self._blocks.root(self.domain.split(noise))).to(self.dtype)

    # ------------------------------------------------------------------ learning

    def update(self, matvec: Matrix, u: Any, *, precondition: bool = False) -> float:
        r"""Take one step of Adam on :math:`\tfrac12 v^\top (A + \gamma I) v - u^\top v` with :math:`v = Q u`.

        Its gradient with respect to v is :math:`d = (A + \gamma I) v - u`; that of the factors follows by one backward
        through Q. Where this raises, or ``matvec`` does, nothing has changed.

        **Cost**: one product with A, one with Q and its backward, and one more with Q to precondition.

        Args:
            matvec: The operator A, or a function that multiplies it by what it gets, which has the format of u.
            u: Vector in any format: flat, list or dict. Or columns, over which the loss is averaged.
            precondition: Whether Q d takes the place of d in the backward; ``"full"`` factors need it.

        Returns:
            The value of the loss before the step.

        Raises:
            ValueError: If a vector does not fit, or this operator does not learn.
            FloatingPointError: If the product with A or the gradient is not finite.
        """
        adam = self._learner()
        with torch.inference_mode(False), torch.enable_grad():
            columns, form = self.domain.read(u)
            v = self._blocks.product(columns)
            Av = product_of(matvec, v, form, self.domain)
            with torch.no_grad():
                d = [a + self.damping * x - b for a, x, b in zip(Av, v, columns, strict=True)]
                value = 0.5 * (mean_dot(v, d) - mean_dot(v, columns))
                cotangent = self._blocks.product(d) if precondition else d
            take_step(adam, value, v, cotangent)
        self.num_updates += 1
        return value

    def fit(
        self,
        A: Matrix,
        num_steps: int,
        directions: str = "gaussian",
        *,
        gradient: Callable[[], Any] | None = None,
        num_directions: int = 1,
        precondition: bool = False,
        progressbar: bool = False,
    ) -> list[float]:
        """Take steps of :meth:`update` for a matrix that stays as it is; an operator is linearised once.

        **Cost**: ``num_steps`` updates.

        Args:
            A: The matrix to be inverted, without damping: an operator, or a function of ``[D]``, and of ``[D, K]`` for
                K directions.
            num_steps: Number of steps.
            directions: ``"gaussian"``: u is standard normal, so that Q learns the whole inverse. ``"gradient"``: u is a
                gradient, scaled to the length of those, so that Q learns the inverse where it will be used.
            gradient: Function that returns the gradient, as a vector in any format, for each step; by default that of
                A's own loss over all its data.
            num_directions: Number of normal directions in each step. More make steps less noisy, and cost less than as
                many steps.
            precondition: See :meth:`update`.
            progressbar: Whether to show progress.

        Returns:
            The values of the loss before each step.

        Raises:
            TypeError: If A has no gradient of its own and none is given.
            ValueError: If an option is not known, or this operator does not learn.
            FloatingPointError: If a product, a gradient or a step is not finite.
        """
        self._learner()
        draw = directions_from(A, directions, gradient, num_directions, self.domain, self._own_generator())
        matrix = prepared(A)
        steps = counted_steps(num_steps, progressbar)
        return [self.update(matrix, draw(), precondition=precondition) for _ in steps]

    # --------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The factors, the state of Adam and that of the random directions: copies, for ``torch.save``."""
        return {
            "damping": self.damping,
            "scale": self.scale,
            "structure": self.structure,
            "num_updates": self.num_updates,
            "factors": self._blocks.copied().raw,
            "adam": None if self._adam is None else copy.deepcopy(self._adam.state_dict()),
            "generator": self._own_generator().get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, to the bit.

        Args:
            state: What :meth:`state_dict` gave.

        Raises:
            ValueError: If it belongs to other settings or parameters; then nothing has changed.
        """
        checked_state(state, self.state_dict())
        with torch.inference_mode(False), torch.no_grad():
            if self._adam is not None:  # which refuses what does not fit
                self._adam.load_state_dict(copy.deepcopy(state["adam"]))
            self._blocks.load(state["factors"])
        self._own_generator().set_state(state["generator"].cpu())
        self.num_updates = int(state["num_updates"])

    def frozen(self) -> LearnedInverseLinearOperator:
        """The same operator with copies of the factors, which are not learned any more."""
        if self._holds_values:
            return self
        result = copy.copy(self)
        result._adam = result._generator = None
        result._blocks = self._blocks.copied()
        return result

    def linearize(self, max_memory: int | None = None, *, engine: str = "auto") -> LearnedInverseLinearOperator:
        """A frozen copy, so that no solver meets two matrices in one.

        Args:
            max_memory: Without effect: nothing is kept but the factors.
            engine: Without effect: there is no network to go through.
        """
        return self.frozen()

    @property
    def _holds_values(self) -> bool:
        return self._adam is None

    @property
    def _is_definite(self) -> bool:
        return True

    def _repr_extra(self) -> str:
        blocks = ", ".join(f"{count} {kind}" for kind, count in Counter(self.structure.values()).items())
        return f", damping {self.damping:.3g}, blocks: {blocks}, {self.num_updates} updates"
