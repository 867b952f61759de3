"""The kinds of curvature operators: how each is built as a user would, its dense truth, and where it is defined."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import curvlinops
from tests.oracles import Oracle
from tests.problems import PROBLEMS, Instance, Problem

SAMPLES, SEED = 3, 11


@dataclass(frozen=True)
class Kind:
    """One kind of operator: how to build it, its truth, and the problems it applies to."""

    class_name: str
    truth: Callable[[Oracle], Tensor]
    options: tuple[tuple[str, Any], ...] = ()
    wants: frozenset[str] = frozenset()  # tags that a problem must have
    fisher: bool = False  # refuses losses without Fisher matrices
    ridge: bool = False  # takes l2
    has_loss: bool = True

    def build(self, instance: Instance, **keywords: Any) -> Any:
        """Construct the operator as a user would."""
        options = {"check_deterministic": False, **instance.options, **dict(self.options), **keywords}
        head = [instance.model, instance.loss] if self.has_loss else [instance.model]
        if self.has_loss and instance.weight_fn is not None:
            options["weight_fn"] = instance.weight_fn
        if self.ridge and instance.l2:
            options["l2"] = instance.l2
        return getattr(curvlinops, self.class_name)(*head, instance.params, instance.data, **options)


def diagonal_of(matrix: Tensor) -> Tensor:
    """Return the diagonal of a matrix as a matrix."""
    return torch.diag(matrix.diagonal())


def without_ridge(oracle: Oracle) -> Tensor:
    """Return the GGN of the data alone."""
    return oracle.ggn - oracle.l2 * torch.eye(oracle.num_params, dtype=torch.float64)


# The problems that vary the loss and its options; the others vary the model.
LOSS_PROBLEMS = ("mse-", "ce-", "bce-", "generic-", "weights-", "ridge-", "mlp-", "linear-", "bare-")

CLASSES = frozenset({"classes"})
SAMPLING = (("mc_samples", SAMPLES), ("seed", SEED))
DATUM = (("terms", "datum"),)

KINDS: dict[str, Kind] = {
    "hessian": Kind("HessianLinearOperator", lambda o: o.hessian, ridge=True),
    "ggn": Kind("GGNLinearOperator", lambda o: o.ggn, ridge=True),
    "ggn-sampled": Kind(
        "GGNLinearOperator",
        lambda o: o.monte_carlo_fisher(SAMPLES, SEED) + o.l2 * torch.eye(o.num_params, dtype=torch.float64),
        SAMPLING,
        CLASSES,
        fisher=True,
        ridge=True,
    ),
    "fisher": Kind("FisherMCLinearOperator", lambda o: o.monte_carlo_fisher(1, 2147483647), (), CLASSES, fisher=True),
    "ef": Kind("EFLinearOperator", lambda o: o.empirical_fisher("position"), fisher=True),
    "ef-datum": Kind("EFLinearOperator", lambda o: o.empirical_fisher("datum"), DATUM, fisher=True),
    "ggn-diagonal": Kind("GGNDiagonalLinearOperator", lambda o: diagonal_of(without_ridge(o))),
    "ggn-diagonal-sampled": Kind(
        "GGNDiagonalLinearOperator",
        lambda o: diagonal_of(o.monte_carlo_fisher(SAMPLES, SEED)),
        SAMPLING,
        CLASSES,
        fisher=True,
    ),
    "ef-diagonal": Kind("EFDiagonalLinearOperator", lambda o: diagonal_of(o.empirical_fisher()), fisher=True),
    "ef-diagonal-datum": Kind(
        "EFDiagonalLinearOperator", lambda o: diagonal_of(o.empirical_fisher("datum")), DATUM, fisher=True
    ),
    "jacobian": Kind("JacobianLinearOperator", lambda o: o.flat_jacobian(), has_loss=False),
    "jacobian-transposed": Kind("TransposedJacobianLinearOperator", lambda o: o.flat_jacobian().T, has_loss=False),
}


def applies(problem: Problem, kind: Kind) -> bool:
    """Return whether a matrix is defined for a problem, and its truth is known."""
    return kind.wants <= problem.tags and not (kind.fisher and "no_fisher" in problem.tags)


def cases(
    *tags: str,
    only: Callable[[Problem, str], bool] = lambda problem, name: True,
) -> Any:
    """Parametrise a test over the problems with all these tags and the kinds that apply to them.

    Args:
        tags: What each problem must have.
        only: Further restricts problems and kinds.
    """
    pairs = [
        pytest.param(problem, kind, id=f"{problem.name}-{name}")
        for problem in PROBLEMS.values()
        for name, kind in KINDS.items()
        if set(tags) <= problem.tags
        and "refused" not in problem.tags
        and applies(problem, kind)
        and only(problem, name)
    ]
    return pytest.mark.parametrize(("problem", "kind"), pairs)


@cache
def oracle_of(problem: Problem) -> Oracle:
    """Build the oracle of a problem once, on tensors of its own."""
    return problem.make().oracle()


@cache
def truth_of(problem: Problem, kind: Kind) -> Tensor:
    """Compute a truth once."""
    return kind.truth(oracle_of(problem))
