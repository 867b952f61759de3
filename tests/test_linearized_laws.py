"""Kept linearisations by either engine, against the dense truths and the laws that their originals obey.

``tangents`` pushes and pulls through a kept graph; ``factors`` keeps each layer's inputs and output gradients, of which
every matrix here that is made of outer products is a sum. Outer products of single data show what sums would hide.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import laws
from tests.kinds import KINDS, Kind, applies, diagonal_of, oracle_of, truth_of
from tests.linearized import ENGINES, FACTORED, TANGENTS_ONLY, engines_of
from tests.problems import PROBLEMS, Problem


def cases(*tags: str, only: Callable[[Problem, str], bool] = lambda problem, name: True) -> Any:
    """Parametrise a test over problems with all these tags, the kinds that apply to them, and the kinds' engines."""
    triples = [
        pytest.param(problem, KINDS[name], engine, id=f"{problem.name}-{name}-{engine}")
        for problem in PROBLEMS.values()
        for name in (*FACTORED, *TANGENTS_ONLY)
        for engine in engines_of(problem, name)
        if set(tags) <= problem.tags and not problem.tags & {"refused", "closure"}
        if applies(problem, KINDS[name]) and only(problem, name)
    ]
    return pytest.mark.parametrize(("problem", "kind", "engine"), triples)


def one_of_a_sort(problem: Problem, name: str) -> bool:
    """Leave out what differs from others by a transposition, a number of samples or a factor of the risk only."""
    if "core" in problem.tags:
        return True
    if problem.name.startswith(("ce-", "bce-", "mse-")):  # the model is plain, and the loss matters to its factor only
        return name in ("ggn", "fisher", "ef", "ef-datum") and not problem.name.endswith("-sum")
    return name not in ("ggn-sampled", "jacobian-transposed")


TELLING = ("mlp-tanh-ce-dict", "bare-parameters-mse", "ce-positions-all-mean", "time-major-n-equals-t", "weights-mse")


def telling(problem: Problem, name: str) -> bool:
    """Return whether a case says something about formats and algebra that another core case does not."""
    return problem.name in TELLING and name not in ("ggn-sampled", "ef", "jacobian-transposed")


# -- the truth and the laws --------------------------------------------------------------------------------------------


@cases(only=one_of_a_sort)
def test_equals_truth(problem: Problem, kind: Kind, engine: str) -> None:
    """Products from either side; the matrix is as symmetric and as definite as its original."""
    A, D = kind.build(problem.make()), truth_of(problem, kind)
    kept = A.linearize(engine=engine)
    assert (kept.SELF_ADJOINT, kept.POSITIVE_SEMIDEFINITE) == (A.SELF_ADJOINT, A.POSITIVE_SEMIDEFINITE)
    laws.check_products(kept, D, rtol=1e-10)


@cases("core", only=telling)
def test_dense_and_adjoint(problem: Problem, kind: Kind, engine: str) -> None:
    """The whole matrix, its attributes and Spaces, its adjoint, and the same by way of the adjoint."""
    A, D = kind.build(problem.make()), truth_of(problem, kind)
    kept = A.linearize(engine=engine)
    assert (kept.domain, kept.codomain) == (A.domain, A.codomain)
    laws.check_attributes(kept, D)
    laws.check_dense(kept, D)
    laws.check_adjoint(kept, D)
    laws.assert_close(A.H.linearize(engine=engine) @ torch.eye(len(D), dtype=D.dtype), D.T, "A.H.linearize()")


@cases("core", only=telling)
def test_formats(problem: Problem, kind: Kind, engine: str) -> None:
    """The four formats from both sides."""
    A, D = kind.build(problem.make()).linearize(engine=engine), truth_of(problem, kind)
    laws.check_formats(A, D)
    laws.check_left_formats(A, D)


@cases("core", only=telling)
def test_algebra_and_scipy(problem: Problem, kind: Kind, engine: str) -> None:
    """Linearity, sums, scalings, chains, damping, and the SciPy round trip."""
    A, D = kind.build(problem.make()).linearize(engine=engine), truth_of(problem, kind)
    laws.check_linearity(A)
    laws.check_arithmetic(A, D)
    laws.check_scipy(A, D)


@cases("core", only=telling)
def test_chunks(problem: Problem, kind: Kind, engine: str) -> None:
    """The number of columns worked on at a time does not matter."""
    instance = problem.make()
    laws.check_chunks(
        lambda **keywords: kind.build(instance, **keywords).linearize(engine=engine), truth_of(problem, kind)
    )


@cases("core", only=telling)
def test_repeats(problem: Problem, kind: Kind, engine: str) -> None:
    """Products are bitwise equal, whatever the mode outside; two linearisations of one operator are equal too."""
    A = kind.build(problem.make())
    kept = A.linearize(engine=engine)
    laws.check_repeatable(kept)
    laws.check_grad_modes(kept, truth_of(problem, kind))
    with torch.inference_mode():
        made_inside = A.linearize(engine=engine)
    v = laws.noise(A.shape[1], seed=23)
    assert torch.equal(A.linearize(engine=engine) @ v, kept @ v)
    laws.assert_close(made_inside @ v, kept @ v, "linearised under inference_mode")
    laws.assert_close(kept.linearize() @ v, kept @ v, "linearised again")


@cases("core", only=lambda problem, name: name in FACTORED)
def test_engines_agree(problem: Problem, kind: Kind, engine: str) -> None:
    """Either engine gives the product of the streamed operator, and so does the automatic choice."""
    A = kind.build(problem.make())
    V = laws.noise(A.shape[1], 3, seed=24)
    streamed = A @ V
    laws.assert_close(A.linearize(engine=engine) @ V, streamed, engine, rtol=1e-10)
    laws.assert_close(A.linearize(engine="auto") @ V, streamed, "auto", rtol=1e-10)


@cases("core", only=telling)
def test_nothing_changes(problem: Problem, kind: Kind, engine: str) -> None:
    """Linearising and products leave the user's objects, hooks and random states as they were."""
    instance = problem.make()
    laws.check_nothing_changed(instance, lambda: kind.build(instance).linearize(engine=engine))


# -- draws whose values the oracle does not know -----------------------------------------------------------------------


DRAWN = (
    "mse-image-mean",
    "mse-one-channel-mean",
    "weights-mse-positions-sum",
    "bce-positions-weights-mean",
    "weights-bce",
)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", DRAWN)
def test_draws_are_those_of_the_streamed_operator(name: str, engine: str) -> None:
    """Normal and binary draws, kept and streamed, of the operator itself and of its diagonal."""
    problem = PROBLEMS[name]
    options = {"mc_samples": 2, "seed": 5}
    F = KINDS["fisher"].build(problem.make(), **options)
    truth = F.to_dense()
    for max_memory in (None, 0):
        kept = F.linearize(max_memory, engine=engine)
        laws.assert_close(kept.to_dense(), truth, f"max_memory={max_memory}", rtol=1e-10)
        laws.assert_close(kept.to_dense(), truth, f"again, max_memory={max_memory}", rtol=1e-10)
    diagonal = KINDS["ggn-diagonal"].build(problem.make(), **options)
    laws.assert_close(diagonal.to_dense(), diagonal_of(truth), "diagonal")


# -- nodes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_nodes_pass_the_engine_on(engine: str) -> None:
    """Sums, scalings, damping, chains and adjoints hold linearised operators: later training changes nothing."""
    problem = PROBLEMS["layers-known-and-unknown"]
    instance, truths = problem.make(), {n: truth_of(problem, KINDS[n]) for n in ("ggn", "ef", "jacobian")}
    G, E = (KINDS[name].build(instance) for name in ("ggn", "ef"))
    identity = torch.eye(G.shape[0], dtype=torch.float64)
    expressions = {
        "sum": (2.0 * G - E / 3, 2 * truths["ggn"] - truths["ef"] / 3),
        "damped": (E.damped(0.3), truths["ef"] + 0.3 * identity),
        "chain": (G @ E.damped(0.1), truths["ggn"] @ (truths["ef"] + 0.1 * identity)),
        "adjoint": ((G @ E).H, truths["ef"] @ truths["ggn"]),
    }
    kept = {text: A.linearize(engine=engine) for text, (A, _) in expressions.items()}
    with torch.no_grad():
        for p in instance.tensors:
            p.add_(0.5)
    for text, (_, truth) in expressions.items():
        laws.assert_close(kept[text] @ identity, truth, text)


def test_a_node_refuses_what_a_part_refuses() -> None:
    """A Hessian in a sum has no factors either."""
    instance = PROBLEMS["mlp-tanh-ce-dict"].make()
    A = KINDS["hessian"].build(instance) + KINDS["ggn"].build(instance)
    with pytest.raises(NotImplementedError, match="HessianLinearOperator"):
        A.linearize(engine="factors")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp-tanh-ce-dict", "ridge-mse-sum", "generic-sum", "layers-known-and-unknown"])
def test_hessians_have_no_factors(name: str) -> None:
    """The error says which operator, and what was asked."""
    A = KINDS["hessian"].build(PROBLEMS[name].make())
    with pytest.raises(NotImplementedError, match="HessianLinearOperator") as error:
        A.linearize(engine="factors")
    assert "factors" in str(error.value)


@pytest.mark.parametrize("name", ["jacobian", "jacobian-transposed"])
def test_jacobians_by_factors_are_right_or_refused(name: str) -> None:
    """A Jacobian has no loss factor; where it is kept by factors nonetheless, it is the same matrix."""
    problem, kind = PROBLEMS["mlp-tanh-ce-dict"], KINDS[name]
    try:
        kept = kind.build(problem.make()).linearize(engine="factors")
    except NotImplementedError as error:
        assert "JacobianLinearOperator" in str(error)
    else:
        laws.check_products(kept, truth_of(problem, kind))


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("name", [*FACTORED, *TANGENTS_ONLY])
@pytest.mark.parametrize("problem", [p for p in PROBLEMS.values() if "closure" in p.tags], ids=lambda p: p.name)
def test_closures_are_refused(problem: Problem, name: str, engine: str) -> None:
    """No copy can be made of a model that holds its parameters out of reach."""
    A = KINDS[name].build(problem.make())
    with pytest.raises(NotImplementedError, match=r"closes over|factors"):
        A.linearize(engine=engine)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS.values() if "generic" in p.tags], ids=lambda p: p.name)
def test_unknown_losses_have_no_factors(problem: Problem) -> None:
    """A loss that is only a callable has no square root; the automatic choice takes the tangents."""
    instance = problem.make()
    G = KINDS["ggn"].build(instance)
    loss_name = getattr(instance.loss, "__name__", type(instance.loss).__name__)
    with pytest.raises(NotImplementedError, match=loss_name):
        G.linearize(engine="factors")
    laws.check_products(G.linearize(engine="auto"), oracle_of(problem).ggn)


@pytest.mark.parametrize("name", [*FACTORED, *TANGENTS_ONLY])
def test_unknown_engines_are_refused(name: str) -> None:
    """The error says what there is, and a node's does too."""
    A = KINDS[name].build(PROBLEMS["mlp-tanh-ce-dict"].make())
    for B in (A, 2.0 * A, A + A, A.H):
        with pytest.raises(ValueError, match="tangents"):
            B.linearize(engine="tangent")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("problem", [p for p in PROBLEMS.values() if "refused" in p.tags], ids=lambda p: p.name)
def test_right_or_refused(problem: Problem, name: str, engine: str) -> None:
    """Where forward and reverse mode mean different things, a kept product is that of reverse mode, or is refused."""
    kind = KINDS[name]
    if not applies(problem, kind):
        pytest.skip("not defined for this problem")
    A = kind.build(problem.make())
    try:
        laws.check_products(A.linearize(engine=engine), truth_of(problem, kind))
    except NotImplementedError as error:
        assert "no_grad" in str(error), "the error names the cause"
