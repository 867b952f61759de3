"""Solvers, eigenvalues and estimates on shards are those of the union, and both ranks decide alike."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import curvlinops
from curvlinops import LinearOperator
from tests.distributed.ranks import Found, needs_gloo, run_both
from tests.risk.small import build, classes, mlp, relative_error, vector

pytestmark = needs_gloo

BATCHES = classes((3, 1, 2, 4))
SHARDS = [BATCHES[:1], BATCHES[1:]]
DAMPING = 1e-2


def ggn(data: Any, **options: Any) -> Any:
    """The matrix of all methods for positive ones."""
    return build("GGN", mlp(), data, **options)


def hessian(data: Any, **options: Any) -> Any:
    """The matrix of all methods for indefinite ones."""
    return build("Hessian", mlp(), data, **options)


def solved(inverse: LinearOperator, A: LinearOperator) -> dict[str, Tensor]:
    """Solutions, and how many iterations they took."""
    X = inverse @ vector(A, 3)
    return {"solution": X, "iterations": inverse.info.num_iterations}  # type: ignore[attr-defined]


def eigenpairs(A: LinearOperator) -> dict[str, Tensor]:
    """Values, and the projection onto their vectors, which has no sign."""
    found = curvlinops.eigsh(A, 4, tol=1e-10)
    return {"values": found.values, "projection": found.vectors @ found.vectors.T}


def preconditioned(A: LinearOperator) -> dict[str, Tensor]:
    """Conjugate gradients behind a sketch."""
    P = curvlinops.NystromPreconditioner(A, 5, DAMPING)
    return solved(curvlinops.CGInverseLinearOperator(A.damped(DAMPING), preconditioner=P), A)


def path(A: LinearOperator) -> dict[str, Tensor]:
    """Several dampings at once."""
    found = curvlinops.damping_path(A, vector(A, 2), [1.0, 0.1, DAMPING])
    return {f"solution {i}": X for i, X in enumerate(found.solutions)}


def spectrum(A: LinearOperator) -> dict[str, Tensor]:
    """Grid and density."""
    return dict(zip(("grid", "density"), curvlinops.lanczos_approximate_spectrum(A, 6, 32, 2), strict=True))


#: What is asked of a positive semi-definite matrix.
POSITIVE: dict[str, Callable[[Any], Any]] = {
    "cg": lambda A: solved(curvlinops.CGInverseLinearOperator(A.damped(DAMPING)), A),
    "nystrom": preconditioned,
    "neumann": lambda A: solved(curvlinops.NeumannInverseLinearOperator(A.damped(1.0), 20, 0.2), A),
    "path": path,
    "eigsh": eigenpairs,
    "hutchinson": lambda A: {"trace": curvlinops.hutchinson_trace(A, 8)},
    "xtrace": lambda A: {"trace": curvlinops.xtrace(A, 8)},
    "xnystrace": lambda A: {"trace": curvlinops.xnystrace(A, 8)},
    "xdiag": lambda A: {"diagonal": curvlinops.xdiag(A, 8)},
    "logdet": lambda A: {"logdet": curvlinops.logdet(A.damped(DAMPING), num_probes=4)},
    "root": lambda A: {"root": curvlinops.inverse_sqrt_matvec(A.damped(DAMPING), vector(A, 2))},
    "spectrum": spectrum,
}
#: What is asked of an indefinite one.
INDEFINITE: dict[str, Callable[[Any], Any]] = {
    "minres": lambda A: solved(curvlinops.MINRESInverseLinearOperator(A.damped(0.05)), A),
    "lsmr": lambda A: solved(curvlinops.LSMRInverseLinearOperator(A, damp=0.3, atol=1e-10, btol=1e-10), A),
}


def asked(data: Any, **options: Any) -> Found:
    """All of it."""
    found = {name: ask(ggn(data, **options)) for name, ask in POSITIVE.items()}
    return found | {name: ask(hessian(data, **options)) for name, ask in INDEFINITE.items()}


def of_union(rank: int, group: Any) -> Found:
    """Everything, on this rank's shard."""
    return asked(SHARDS[rank], process_group=group)


def out_of_time(rank: int, group: Any) -> Found:
    """The time is over on one rank long before it is on the other."""

    def slowly(progress: Any) -> None:
        time.sleep(0.05 * rank)

    A = ggn(SHARDS[rank], process_group=group).damped(1e-8)
    inverse = curvlinops.CGInverseLinearOperator(A, rtol=0.0, max_iter=10**6, max_seconds=2.0, callback=slowly)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inverse @ vector(A)
    return {"iterations": inverse.info.num_iterations, "again": A @ vector(A)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Found]]:
    """One run of both processes."""
    return run_both(tmp_path_factory.mktemp("ranks"), {"of_union": of_union, "out_of_time": out_of_time})


def test_answers_are_those_of_the_union(ranks: dict[str, list[Found]]) -> None:
    assert "of_union" in ranks, "a rank broke down"
    truth = asked(BATCHES)
    assert set(truth) == {*POSITIVE, *INDEFINITE}
    for name, answers in truth.items():
        for what, value in answers.items():
            first, second = (found[name][what] for found in ranks["of_union"])
            assert torch.equal(first, second), f"{name}, {what}: the ranks differ"
            if what == "iterations":
                # Rounding differs between one sum and two, and an indefinite matrix magnifies it.
                assert (first - value).abs().max() <= 3, name
            else:
                assert relative_error(first, value) < 1e-6, f"{name}, {what}: {relative_error(first, value)}"


def test_ranks_agree_on_the_time(ranks: dict[str, list[Found]]) -> None:
    """Or else one of them would wait for the other."""
    assert "out_of_time" in ranks, "the ranks are out of step"
    first, second = ranks["out_of_time"]
    assert torch.equal(first["iterations"], second["iterations"]) and first["iterations"].item() >= 1
    A = ggn(BATCHES).damped(1e-8)
    assert relative_error(first["again"], A @ vector(A)) < 1e-10
