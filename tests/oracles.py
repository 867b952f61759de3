"""Dense truths in float64, computed without the package.

An oracle that shared a helper with the code it checks would share its mistakes: a wrong scale, a wrong order of rows or
a wrong square root would appear on both sides and cancel. So nothing here imports the package, Jacobians come from one
reverse pass for each element of the prediction, and derivatives of a loss come from automatic differentiation of
torch's own loss with ``reduction="sum"``, one datum at a time. The denominator of ``reduction="mean"`` is that of the
whole data set, and ``test_oracle_self.py`` checks it against torch's loss on the concatenated data.

Shapes: N data, D parameters, P elements of one datum's prediction (flattened in the layout of the prediction), C
classes, T positions, M samples.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import hessian
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss
from torch.nn.attention import SDPBackend, sdpa_kernel

KNOWN_LOSSES = (MSELoss, CrossEntropyLoss, BCEWithLogitsLoss)


def unpack(item: Any) -> tuple[Any, Tensor]:
    """Take the labels out of a loader item: a pair ``(X, y)``, or one mapping with ``labels``."""
    if isinstance(item, Mapping):
        return {key: value for key, value in item.items() if key != "labels"}, item["labels"]
    X, y = item
    return X, y


def math_attention() -> AbstractContextManager[None]:
    """Let attention use the one kernel that has a double backward on the CPU."""
    return sdpa_kernel(SDPBackend.MATH)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors into one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


class Oracle:
    """All dense matrices of one empirical risk.

    Args:
        forward: Maps X to the prediction, evaluated at ``params``, with a graph to them.
        loss: A loss of ``torch.nn``, or any callable ``(prediction, y) -> scalar``.
        params: The tensors to differentiate, in order. They are made to require gradients.
        data: The mini-batches, in order.
        weight_fn: Maps (X, y) to one weight a datum, which multiplies that datum's loss.
        l2: Adds ½ l2 ‖params‖² to the risk.
    """

    def __init__(
        self,
        forward: Callable[[Any], Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        params: Sequence[Tensor],
        data: Sequence[Any],
        weight_fn: Callable[[Any, Tensor], Tensor] | None = None,
        l2: float = 0.0,
    ) -> None:
        self.params = [p.requires_grad_(True) for p in params]
        self.loss_func, self.l2 = loss, l2
        self.num_params = sum(p.numel() for p in self.params)
        batches = [unpack(item) for item in data]
        with math_attention():
            self.outputs = [forward(X) for X, _ in batches]  # with graphs
        assert all(f.dtype == torch.float64 for f in self.outputs)
        self.targets = torch.cat([y for _, y in batches])
        self.prediction = torch.cat([f.detach() for f in self.outputs])
        self.example_weights = (
            torch.ones(len(self.prediction), dtype=torch.float64)
            if weight_fn is None
            else torch.cat([weight_fn(X, y).detach() for X, y in batches])
        )
        self.known = isinstance(loss, KNOWN_LOSSES)

    # -- the loss ------------------------------------------------------------------------------------------------

    def datum_loss(self, n: int) -> Callable[[Tensor], Tensor]:
        """Return the map of datum n's flat prediction to its unweighted, unscaled loss, by torch's own loss."""
        loss = copy(self.loss_func)
        loss.reduction = "sum"  # type: ignore[attr-defined]
        shape = (1, *self.prediction.shape[1:])
        return lambda f: loss(f.reshape(shape), self.targets[n : n + 1])

    @cached_property
    def scale(self) -> float:
        """The factor c: 1 for 'sum', one over the denominator of the whole data set for 'mean'."""
        loss, y, weights = self.loss_func, self.targets, self.example_weights
        if not self.known or loss.reduction == "sum":  # type: ignore[attr-defined]
            return 1.0
        if isinstance(loss, CrossEntropyLoss) and not y.is_floating_point():
            kept = y != loss.ignore_index
            classes = torch.ones(self.prediction.shape[1], dtype=torch.float64) if loss.weight is None else loss.weight
            terms = classes[torch.where(kept, y, 0)] * kept
        elif isinstance(loss, CrossEntropyLoss):
            terms = torch.ones_like(y[:, 0])  # one for each position
        else:
            terms = torch.ones_like(self.prediction)
        return 1 / (weights * terms.reshape(len(terms), -1).sum(1)).sum().item()

    def risk(self) -> Tensor:
        """Return the risk as a scalar with a graph to the parameters, the l2 term included."""
        everything = torch.cat(self.outputs)
        if self.known:
            pairs = zip(self.example_weights, everything, strict=True)
            value = self.scale * sum(w * self.datum_loss(n)(f) for n, (w, f) in enumerate(pairs))
        else:
            value = self.loss_func(everything, self.targets)
        return value + 0.5 * self.l2 * sum((p**2).sum() for p in self.params)

    # -- derivatives of the model and of the loss ----------------------------------------------------------------

    def gradient_of(self, value: Tensor, create_graph: bool = False) -> Tensor:
        """Return the gradient [D] of a scalar, by reverse mode."""
        grads = torch.autograd.grad(
            value, self.params, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        return flat(grads)

    @cached_property
    def jacobian(self) -> Tensor:
        """The Jacobian [N, P, D] of the predictions, data in the order of the loader."""
        rows = [self.gradient_of(element) for f in self.outputs for element in f.reshape(-1)]
        return torch.stack(rows).reshape(len(self.prediction), -1, self.num_params)

    @cached_property
    def loss_gradients(self) -> Tensor:
        """The gradients [N, P] of the loss terms with respect to the prediction, weights included."""
        rows = []
        for n, f in enumerate(self.prediction):
            f = f.reshape(-1).clone().requires_grad_(True)
            rows.append(self.example_weights[n] * torch.autograd.grad(self.datum_loss(n)(f), f)[0])
        return torch.stack(rows)

    @cached_property
    def loss_hessians(self) -> Tensor:
        """The Hessians [N, P, P] of each datum's loss with respect to its prediction, weights included."""
        return torch.stack(
            [
                self.example_weights[n] * hessian(self.datum_loss(n), f.reshape(-1).clone())
                for n, f in enumerate(self.prediction)
            ]
        )

    # -- layout of a datum's prediction --------------------------------------------------------------------------

    def positions_first(self, per_datum: Tensor) -> Tensor:
        """Reshape [N, P, ...] to [N, T, C, ...]: classes are axis 1 for cross-entropy, else channels come last."""
        N, *rest = self.prediction.shape
        tail = per_datum.shape[2:]
        if isinstance(self.loss_func, CrossEntropyLoss):
            C, T = rest[0], int(torch.tensor(rest[1:]).prod()) if len(rest) > 1 else 1
            return per_datum.reshape(N, C, T, *tail).transpose(1, 2)
        C = rest[-1] if rest else 1
        return per_datum.reshape(N, -1, C, *tail)

    # -- matrices ------------------------------------------------------------------------------------------------

    @cached_property
    def loss(self) -> float:
        """The risk."""
        return self.risk().item()

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient [D] of the risk."""
        with math_attention():
            return self.gradient_of(self.risk())

    @cached_property
    def hessian(self) -> Tensor:
        """The Hessian [D, D] of the risk: reverse mode over reverse mode, one row at a time."""
        with math_attention():
            gradient = self.gradient_of(self.risk(), create_graph=True)
            return torch.stack([self.gradient_of(element) for element in gradient])

    @cached_property
    def ggn(self) -> Tensor:
        """The GGN [D, D]: c Σ_n J_nᵀ ∇²ℓ_n J_n, plus l2 times the identity."""
        ridge = self.l2 * torch.eye(self.num_params, dtype=torch.float64)
        if self.known:
            J, H = self.jacobian, self.loss_hessians
            return self.scale * torch.einsum("npd,npq,nqe->de", J, H, J) + ridge
        shape = self.prediction.shape
        H = hessian(lambda f: self.loss_func(f.reshape(shape), self.targets), self.prediction.reshape(-1))
        J = self.jacobian.flatten(end_dim=1)
        return J.T @ H @ J + ridge

    def empirical_fisher(self, terms: str = "position") -> Tensor:
        """Return the empirical Fisher [D, D]: c times the sum of outer products of the terms' own gradients."""
        F = self.empirical_factor(terms)
        return F @ F.T

    @cached_property
    def masses(self) -> Tensor:
        """The masses m of cross-entropy [N, T], read off torch's Hessian: trace ∇²ℓ = m (1 − Σ p²)."""
        traces = self.position_blocks.diagonal(dim1=-2, dim2=-1).sum(-1)
        return traces / (1 - (self.probabilities**2).sum(-1))

    @cached_property
    def position_blocks(self) -> Tensor:
        """The blocks [N, T, C, C] of the loss Hessians that belong to one position."""
        rows = self.positions_first(self.loss_hessians)  # [N, T, C, P]
        T = rows.shape[1]
        blocks = [self.positions_first(rows[:, t].transpose(1, 2))[:, t].transpose(1, 2) for t in range(T)]
        return torch.stack(blocks, dim=1)

    @cached_property
    def probabilities(self) -> Tensor:
        """The class probabilities [N, T, C] of cross-entropy."""
        return self.positions_first(self.prediction.flatten(start_dim=1)).softmax(-1)

    def draws(self, mc_samples: int, seed: int) -> Tensor:
        """Draw would-be labels [N, T, M] for cross-entropy: one generator, one draw a mini-batch over all positions."""
        generator = torch.Generator().manual_seed(seed)
        labels, start = [], 0
        for f in self.outputs:
            rows = self.probabilities[start : start + len(f)]
            in_order = rows.flatten(end_dim=1).contiguous()  # a draw depends on the order in memory
            drawn = torch.multinomial(in_order, mc_samples, replacement=True, generator=generator)
            labels.append(drawn.reshape(*rows.shape[:2], mc_samples))
            start += len(f)
        return torch.cat(labels)

    def monte_carlo_fisher(self, mc_samples: int, seed: int) -> Tensor:
        """Return the Monte-Carlo Fisher [D, D] of cross-entropy with the package's documented draws."""
        F = self.monte_carlo_factor(mc_samples, seed)
        return F @ F.T

    def flat_jacobian(self) -> Tensor:
        """Return the Jacobian as the operator has it: [N·P, D], rows in the layout of the stacked predictions."""
        return self.jacobian.flatten(end_dim=1)

    # -- one datum at a time -------------------------------------------------------------------------------------

    @cached_property
    def term_gradients(self) -> Tensor:
        """The gradients [N, T, D] of each position's loss with respect to the parameters, weights included, without c.

        Summed over a datum's positions they are that datum's gradient; these, summed over data and times c, are the
        gradient of the risk.
        """
        return torch.einsum(
            "ntcd,ntc->ntd", self.positions_first(self.jacobian), self.positions_first(self.loss_gradients)
        )

    @cached_property
    def example_gradients(self) -> Tensor:
        """The gradients [N, D] of each datum's loss, weights included, without c."""
        return self.term_gradients.sum(1)

    def empirical_factor(self, terms: str = "position") -> Tensor:
        """Return F with F Fᵀ the empirical Fisher, c shared evenly: [D, N·T], or [D, N] for ``terms="datum"``.

        Columns are in the order of the loader, datum by datum, a datum's positions together: column n T + t belongs to
        position t of datum n, positions in the order of the target's memory.
        """
        columns = {"position": self.term_gradients.flatten(end_dim=1), "datum": self.example_gradients}[terms]
        return self.scale**0.5 * columns.T

    def empirical_gram(self, terms: str = "position") -> Tensor:
        """Return FᵀF of ``empirical_factor``, rows and columns in its order."""
        F = self.empirical_factor(terms)
        return F.T @ F

    def squared_gradients(self, terms: str = "position") -> Tensor:
        """Return the diagonals [N, D] of each datum's share in the empirical Fisher, c included."""
        squares = {"position": self.term_gradients**2, "datum": self.example_gradients[:, None] ** 2}[terms]
        return self.scale * squares.sum(1)

    @cached_property
    def ggn_shares(self) -> Tensor:
        """The shares [N, D, D] of each datum in the GGN, c included, without the ridge.

        A square root of the loss Hessian is not unique, so the columns of an exact factor are not either; the products
        F_n F_nᵀ of a datum's columns are.
        """
        J, H = self.jacobian, self.loss_hessians
        return self.scale * torch.einsum("npd,npq,nqe->nde", J, H, J)

    def monte_carlo_factor(self, mc_samples: int, seed: int) -> Tensor:
        """Return F [D, N·M] with F Fᵀ the Monte-Carlo Fisher of cross-entropy, with the package's documented draws.

        Column n M + m is draw m of datum n, all of its positions together.
        """
        assert isinstance(self.loss_func, CrossEntropyLoss)
        p, C = self.probabilities, self.prediction.shape[1]
        one_hot = torch.nn.functional.one_hot(self.draws(mc_samples, seed), C)  # [N, T, M, C]
        s = self.masses[..., None, None].sqrt() * (p[:, :, None] - one_hot)
        columns = torch.einsum("ntcd,ntmc->nmd", self.positions_first(self.jacobian), s).flatten(end_dim=1)
        return (self.scale / mc_samples) ** 0.5 * columns.T
