"""The oracles of single data, checked by running each datum through the model alone."""

import pytest
import torch
from torch import Tensor

from tests.kinds import oracle_of
from tests.oracles import flat, unpack
from tests.problems import PROBLEMS, Problem

KNOWN = [p for p in PROBLEMS.values() if "generic" not in p.tags]


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def gradients_alone(problem: Problem) -> Tensor:
    """Run each datum alone, with torch's own sum of its terms, and differentiate once for each."""
    instance = problem.make()
    instance.cut((1,) * len(instance.y))
    forward, loss, rows = instance.forward or instance.model, instance.loss, []
    loss.reduction = "sum"  # type: ignore[attr-defined]
    params = [p.requires_grad_(True) for p in instance.tensors]
    for X, y in map(unpack, instance.data):
        value = loss(forward(X), y)
        if instance.weight_fn is not None:
            value = value * instance.weight_fn(X, y)[0]
        rows.append(flat(torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("problem", KNOWN, ids=lambda p: p.name)
def test_example_gradients_are_those_of_each_datum_alone(problem: Problem) -> None:
    """No row of a problem's prediction depends on another datum, nor does an oracle confuse data."""
    oracle = oracle_of(problem)
    assert error(oracle.example_gradients, gradients_alone(problem)) < 1e-12
    ridge = oracle.l2 * flat([p.detach() for p in oracle.params])
    assert error(oracle.scale * oracle.example_gradients.sum(0) + ridge, oracle.gradient) < 1e-12


@pytest.mark.parametrize("terms", ["position", "datum"])
@pytest.mark.parametrize("problem", KNOWN, ids=lambda p: p.name)
def test_columns_of_the_empirical_fisher(problem: Problem, terms: str) -> None:
    """The columns of a datum stand together and add up to its gradient; squares add up to the diagonal."""
    oracle = oracle_of(problem)
    F, N = oracle.empirical_factor(terms), len(oracle.targets)
    columns = F.unflatten(1, (N, -1))
    assert error(columns.sum(2).T, oracle.scale**0.5 * oracle.example_gradients) < 1e-12
    assert error(columns.square().sum(2).T, oracle.squared_gradients(terms)) < 1e-12
    assert error(oracle.squared_gradients(terms).sum(0), oracle.empirical_fisher(terms).diagonal()) < 1e-12
    gram = oracle.empirical_gram(terms)
    assert error(gram.trace(), oracle.empirical_fisher(terms).trace()) < 1e-12
    assert error(F @ gram, oracle.empirical_fisher(terms) @ F) < 1e-12
    if terms == "position" and "sequence" not in problem.tags:
        assert F.shape[1] == N


@pytest.mark.parametrize("problem", KNOWN, ids=lambda p: p.name)
def test_shares_of_the_ggn(problem: Problem) -> None:
    """The shares of the data add up, and so does the expectation of each datum's sampled columns over many draws."""
    oracle = oracle_of(problem)
    ridge = oracle.l2 * torch.eye(oracle.num_params, dtype=torch.float64)
    assert error(oracle.ggn_shares.sum(0) + ridge, oracle.ggn) < 1e-12
    if "classes" in problem.tags:
        F = oracle.monte_carlo_factor(400, 0).unflatten(1, (len(oracle.targets), 400))
        shares = torch.einsum("dnm,enm->nde", F, F)
        assert error(shares, oracle.ggn_shares) < 0.5
