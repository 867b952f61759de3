"""Curvature matrices as low-rank matrices, made of per-datum columns: exact, kept, and with exact inverses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import laws
from tests.kinds import KINDS, Kind, applies, oracle_of, truth_of
from tests.linearized import FACTORED, shuffled, train
from tests.problems import LAYERED, PROBLEMS, Problem


def cases(*kinds: str) -> Any:
    """Parametrise a test over the problems of interest and the kinds that apply to them."""
    pairs = [
        pytest.param(problem, KINDS[name], id=f"{problem.name}-{name}")
        for problem in PROBLEMS.values()
        for name in kinds
        if "core" in problem.tags or problem.name in LAYERED or problem.name.startswith("weights-")
        if not problem.tags & {"closure", "refused"} and applies(problem, KINDS[name])
    ]
    return pytest.mark.parametrize(("problem", "kind"), pairs)


def check_low_rank(low: Any, D: Tensor, damping: float) -> None:
    """The matrix and, damped, its exact inverse, solutions and determinant, against the dense truth."""
    laws.check_products(low, D)
    laws.assert_close(low.to_dense(), D, "to_dense()")
    identity = torch.eye(len(D), dtype=D.dtype)
    damped = low.damped(damping)
    truth, inverse = D + damping * identity, damped.inverse()
    laws.assert_close(inverse.to_dense(), torch.linalg.inv(truth), "damped(c).inverse().to_dense()", rtol=1e-7)
    laws.assert_close(damped @ (inverse @ identity), identity, "A A⁻¹", rtol=1e-8)
    assert damped.logdet().item() == pytest.approx(torch.logdet(truth).item(), rel=1e-8, abs=1e-8)
    assert low.trace().item() == pytest.approx(D.trace().item(), rel=1e-9)
    laws.assert_close(low.diagonal(), D.diagonal(), "diagonal()")


@cases("ggn", "fisher", "ef", "ef-datum")
def test_low_rank(problem: Problem, kind: Kind) -> None:
    """Equal to the truth, with dampings that matter."""
    D = truth_of(problem, kind)
    low = kind.build(problem.make()).to_low_rank()
    laws.check_definiteness(low, D)
    check_low_rank(low, D, damping=0.1 * D.trace().item() / len(D))


@cases("ggn-sampled")
def test_low_rank_with_samples(problem: Problem, kind: Kind) -> None:
    """Several draws a datum."""
    check_low_rank(kind.build(problem.make()).to_low_rank(), truth_of(problem, kind), damping=0.3)


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("problem_name", ["norms-of-vectors", "layers-known-and-unknown"])
def test_keeps_its_values(problem_name: str, name: str) -> None:
    """Later changes of parameters and buffers do not show."""
    problem = PROBLEMS[problem_name]
    instance, D = problem.make(), truth_of(problem, KINDS[name])
    low = KINDS[name].build(instance).to_low_rank()
    train(instance)
    check_low_rank(low, D, damping=0.2)


def test_ridge() -> None:
    """The ridge term of a GGN is a multiple of the identity on top of the low-rank part."""
    problem = PROBLEMS["ridge-ce"]
    check_low_rank(KINDS["ggn"].build(problem.make()).to_low_rank(), oracle_of(problem).ggn, damping=0.1)


@pytest.mark.parametrize("name", FACTORED)
def test_shuffled_data(name: str) -> None:
    """All columns come from one pass: a Gram matrix across passes in unlike orders would belong to no matrix."""
    drawn = name in ("fisher", "ggn-sampled")
    with laws.restored_random_state():
        torch.manual_seed(0)
        low = KINDS[name].build(shuffled("ce-positions-all-mean")).to_low_rank()
        D = low.to_dense() if drawn else truth_of(PROBLEMS["ce-positions-all-mean"], KINDS[name])
        check_low_rank(low, D, damping=0.1)


@pytest.mark.parametrize("name", ["generic-function", "generic-huber-sum"])
def test_unknown_losses_are_refused(name: str) -> None:
    """A loss that is only a callable has no square root, and the error says which loss it was."""
    instance = PROBLEMS[name].make()
    loss_name = getattr(instance.loss, "__name__", type(instance.loss).__name__)
    with pytest.raises(NotImplementedError, match=loss_name):
        KINDS["ggn"].build(instance).to_low_rank()
