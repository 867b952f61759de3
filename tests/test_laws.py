"""Every problem of the table times every curvature operator, against dense truths that do not use the package."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import curvlinops
from tests import laws
from tests.kinds import KINDS, LOSS_PROBLEMS, Kind, applies, cases, diagonal_of, oracle_of, truth_of, without_ridge
from tests.oracles import Oracle
from tests.problems import LAYERED, PROBLEMS, Instance, Problem


@cases()
def test_equals_truth(problem: Problem, kind: Kind) -> None:
    """Products from either side."""
    A, D = kind.build(problem.make()), truth_of(problem, kind)
    laws.check_definiteness(A, D)
    laws.check_products(A, D)


@cases("core")
def test_dense_and_adjoint(problem: Problem, kind: Kind) -> None:
    """The whole matrix, its attributes, and its adjoint."""
    A, D = kind.build(problem.make()), truth_of(problem, kind)
    laws.check_attributes(A, D)
    laws.check_dense(A, D)
    laws.check_adjoint(A, D)


@cases("core")
def test_formats(problem: Problem, kind: Kind) -> None:
    """The four formats from both sides."""
    A, D = kind.build(problem.make()), truth_of(problem, kind)
    laws.check_formats(A, D)
    laws.check_left_formats(A, D)
    laws.check_formats(A.H, D.T)


@cases("core")
def test_names_of_the_space(problem: Problem, kind: Kind) -> None:
    """Names and shapes of the parameters are those of the dict that was passed."""
    instance = problem.make()
    A = kind.build(instance)
    space = A.codomain if kind.class_name.startswith("Transposed") else A.domain
    assert laws.shapes_of(space) == [tuple(t.shape) for t in instance.tensors]
    if isinstance(instance.params, dict):
        assert list(space.names) == list(instance.params)


@cases("core")
def test_algebra(problem: Problem, kind: Kind) -> None:
    """Linearity, sums, scalings, chains and damping."""
    A, D = kind.build(problem.make()), truth_of(problem, kind)
    laws.check_linearity(A)
    laws.check_arithmetic(A, D)


@cases("core")
def test_scipy(problem: Problem, kind: Kind) -> None:
    """The SciPy round trip."""
    laws.check_scipy(kind.build(problem.make()), truth_of(problem, kind))


@cases("core")
def test_chunks(problem: Problem, kind: Kind) -> None:
    """The number of columns worked on at a time does not matter."""
    instance = problem.make()
    laws.check_chunks(lambda **keywords: kind.build(instance, **keywords), truth_of(problem, kind))


@cases("core", only=lambda problem, name: "closure" not in problem.tags)
def test_linearize(problem: Problem, kind: Kind) -> None:
    """A kept linearisation is the same matrix, and draws the same random numbers."""
    laws.check_linearize(kind.build(problem.make()), truth_of(problem, kind))


@cases("core")
def test_repeats(problem: Problem, kind: Kind) -> None:
    """Two products are bitwise equal."""
    laws.check_repeatable(kind.build(problem.make()))


@cases("core")
def test_grad_modes(problem: Problem, kind: Kind) -> None:
    """Products work whatever the mode of automatic differentiation outside."""
    laws.check_grad_modes(kind.build(problem.make()), truth_of(problem, kind))


def worth_a_look(problem: Problem, name: str) -> bool:
    """Return whether a matrix goes through model and loss in a way of its own."""
    if "core" in problem.tags or name == "ggn-diagonal":
        return True
    return name in ("hessian", "ggn") and problem.name not in LAYERED


@cases(only=worth_a_look)
def test_nothing_changes(problem: Problem, kind: Kind) -> None:
    """Construction, with its check of determinism, and products leave the user's objects as they were."""
    instance = problem.make()
    options = {} if "check_deterministic" in instance.options else {"check_deterministic": True}
    laws.check_nothing_changed(instance, lambda: kind.build(instance, **options), "closure" not in problem.tags)


EXACT = ("hessian", "ggn", "ef", "ef-datum", "ggn-diagonal", "ef-diagonal", "ef-diagonal-datum")


@cases(only=lambda problem, name: name in EXACT and problem.name.startswith(LOSS_PROBLEMS))
def test_does_not_depend_on_the_cut(problem: Problem, kind: Kind) -> None:
    """One mini-batch, and one a datum, give the matrix of the problem's own ragged mini-batches."""
    D = truth_of(problem, kind)
    N = len(oracle_of(problem).targets)
    for sizes in ((N,), (1,) * N):
        A = kind.build(problem.make(sizes))
        V = laws.noise(D.shape[1], 3)
        laws.assert_close(A @ V, D @ V, f"mini-batches of {sizes}")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("problem", [p for p in PROBLEMS.values() if "refused" in p.tags], ids=lambda p: p.name)
def test_right_or_refused(problem: Problem, name: str) -> None:
    """Where forward and reverse mode mean different things, a product is that of reverse mode, or is refused."""
    kind = KINDS[name]
    if not applies(problem, kind):
        pytest.skip("not defined for this problem")
    A = kind.build(problem.make())
    try:
        laws.check_products(A, truth_of(problem, kind))
    except NotImplementedError as error:
        assert "no_grad" in str(error), "the error names the cause"


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_and_loss(name: str) -> None:
    """The operators with a loss know its value and gradient over the whole data."""
    problem = PROBLEMS[name]
    for kind_name in ("hessian", "ggn") + (() if oracle_of(problem).l2 else ("ef",)):
        kind = KINDS[kind_name]
        if not applies(problem, kind):
            continue
        gradient, loss = kind.build(problem.make()).gradient_and_loss()
        oracle = oracle_of(problem)
        parts = list(gradient.values()) if isinstance(gradient, dict) else list(gradient)
        assert [tuple(g.shape) for g in parts] == [tuple(p.shape) for p in oracle.params]
        laws.assert_close(torch.cat([g.reshape(-1) for g in parts]), oracle.gradient, "gradient")
        assert loss.item() == pytest.approx(oracle.loss, rel=1e-9)


@pytest.mark.parametrize("name", [n for n, p in PROBLEMS.items() if "no_fisher" in p.tags])
@pytest.mark.parametrize("kind_name", [n for n, kind in KINDS.items() if kind.fisher])
def test_fishers_refuse_unknown_losses(name: str, kind_name: str) -> None:
    """A loss that is only a callable has no Fisher matrix, and the error says which loss it was."""
    instance = PROBLEMS[name].make()
    loss_name = getattr(instance.loss, "__name__", type(instance.loss).__name__)
    with pytest.raises(NotImplementedError, match=loss_name):
        A = KINDS[kind_name].build(instance)
        A @ torch.zeros(A.shape[1], dtype=torch.float64)


# -- sampling without known draws: binary cross-entropy and squared error ----------------------------------------------

SAMPLED = [
    n
    for n, p in PROBLEMS.items()
    if not p.tags & {"classes", "no_fisher"}
    and n.startswith(("bce-", "mse-", "weights-bce", "weights-mse", "linear-bce"))
]


def sampled(problem: Problem, mc_samples: int, seed: int) -> Tensor:
    """Return a Monte-Carlo Fisher as a matrix."""
    instance = problem.make()
    options = {"check_deterministic": False, "mc_samples": mc_samples, "seed": seed, **instance.options}
    if instance.weight_fn is not None:
        options["weight_fn"] = instance.weight_fn
    A = curvlinops.FisherMCLinearOperator(instance.model, instance.loss, instance.params, instance.data, **options)
    return A.to_dense()


@pytest.mark.parametrize("name", [n for n, p in PROBLEMS.items() if "core" in p.tags or n in SAMPLED])
def test_the_three_sampled_operators_agree(name: str) -> None:
    """FisherMC, the sampled GGN and the sampled diagonal draw the same numbers, kept or streamed."""
    problem = PROBLEMS[name]
    instance = problem.make()
    options = {"mc_samples": 2, "seed": 7, "check_deterministic": False, **instance.options}
    if instance.weight_fn is not None:
        options["weight_fn"] = instance.weight_fn
    head = (instance.model, instance.loss, instance.params, instance.data)
    F = curvlinops.FisherMCLinearOperator(*head, **options)
    G = curvlinops.GGNLinearOperator(*head, **options)
    diagonal = curvlinops.GGNDiagonalLinearOperator(*head, **options)
    truth = F.to_dense()
    assert truth.norm() > 0
    laws.assert_close(G.to_dense(), truth, "GGN(mc_samples=2)")
    if "closure" not in problem.tags:
        laws.assert_close(G.linearize().to_dense(), truth, "linearised")
    laws.assert_close(diagonal.to_dense(), diagonal_of(truth), "diagonal")
    laws.assert_close(curvlinops.exact_diagonal(F), truth.diagonal(), "exact_diagonal")
    options["seed"] = 8
    other = curvlinops.FisherMCLinearOperator(*head, **options).to_dense()
    assert (other - truth).norm() > 1e-3 * truth.norm(), "another seed must give another matrix"


@pytest.mark.parametrize("name", SAMPLED)
def test_expected_fisher_is_the_ggn(name: str) -> None:
    """The mean over seeds is within five standard errors of the GGN, on a few random quadratic forms and the trace."""
    problem = PROBLEMS[name]
    ggn, probes = without_ridge(oracle_of(problem)), laws.noise(oracle_of(problem).num_params, 4, seed=1)
    figures = []
    for seed in range(16):
        F = sampled(problem, 25, seed)
        figures.append(torch.cat([torch.einsum("dk,de,ek->k", probes, F, probes), F.trace()[None]]))
    values = torch.stack(figures)
    truth = torch.cat([torch.einsum("dk,de,ek->k", probes, ggn, probes), ggn.trace()[None]])
    errors = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - truth).abs() <= 5 * errors).all()
    assert (errors < 0.2 * truth).all(), "the standard errors are too large for the comparison to say anything"


def square_problem(loss: nn.Module, y: Tensor) -> Instance:
    """Return a network with more parameters than predictions, whose loss factor can be read off the matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, y.shape[-1])).double()
    X = torch.randn(*y.shape[:-1], 3, dtype=torch.float64)
    instance = Instance(model, loss, list(model.parameters()), X, y)
    instance.cut((1, len(y) - 1))
    return instance


def core_of(instance: Instance, oracle: Oracle, seed: int) -> Tensor:
    """Return S Sᵀ of F = Jᵀ S Sᵀ J with one sample, scaled by one over c, by the pseudo-inverse of J."""
    head = (instance.model, instance.loss, instance.params, instance.data)
    F = curvlinops.FisherMCLinearOperator(*head, mc_samples=1, seed=seed, check_deterministic=False)
    J = oracle.flat_jacobian()
    assert torch.linalg.matrix_rank(J) == len(J)
    inverse = torch.linalg.pinv(J)
    return inverse.T @ (F @ inverse) / oracle.scale


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("seed", range(4))
def test_binary_draws_are_would_be_gradients(reduction: str, seed: int) -> None:
    """With one sample, each datum's block is s sᵀ with s = √m (σ(f) − ŷ) for one ŷ in {0, 1}, and none couples data."""
    y = torch.rand(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight, pos_weight = torch.tensor([0.5, 1.5]).double(), torch.tensor([2.0, 0.7]).double()
    loss = nn.BCEWithLogitsLoss(reduction=reduction, weight=weight, pos_weight=pos_weight)
    instance = square_problem(loss, y)
    oracle = instance.oracle()
    core = core_of(instance, oracle, seed)
    sigma = oracle.prediction.sigmoid()
    mass = oracle.loss_hessians.diagonal(dim1=1, dim2=2) / (sigma * (1 - sigma))
    core = core.reshape(3, 2, 3, 2)
    for n, k in product(range(3), range(3)):
        if n != k:
            assert core[n, :, k].norm() < 1e-8
    for n in range(3):
        candidates = [mass[n].sqrt() * (sigma[n] - torch.tensor(labels)) for labels in product((0.0, 1.0), repeat=2)]
        distances = [(core[n, :, n] - torch.outer(s, s)).norm().item() for s in candidates]
        assert min(distances) < 1e-8, f"datum {n}: no would-be label explains the block"


def test_binary_draws_follow_the_model_not_the_target() -> None:
    """The frequency of a would-be 1 is σ(f), whatever the target is; each draw shows in the value of s²."""
    y = torch.zeros(2, 1, dtype=torch.float64)
    instance = square_problem(nn.BCEWithLogitsLoss(reduction="sum"), y)
    with torch.no_grad():
        instance.model[2].bias.fill_(1.2)
    oracle = instance.oracle()
    sigma = oracle.prediction.sigmoid().reshape(-1)
    ones = torch.zeros(2)
    for seed in range(100):
        squares = core_of(instance, oracle, seed).diagonal()
        ones += ((squares - (1 - sigma) ** 2).abs() < (squares - sigma**2).abs()).float()
    error = (sigma * (1 - sigma) / 100).sqrt()
    assert ((ones / 100 - sigma).abs() < 5 * error).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_normal_draws_are_one_string_a_datum(reduction: str) -> None:
    """Squared error: s = 2 (f − ŷ) spans a datum's positions (rank one), couples no data, and has variance 2."""
    y = laws.noise(2, 2, 2)
    instance = square_problem(nn.MSELoss(reduction=reduction), y)
    oracle, entries = instance.oracle(), []
    for seed in range(60):
        core = core_of(instance, oracle, seed).reshape(2, 4, 2, 4)
        assert core[0, :, 1].norm() < 1e-8
        for n in range(2):
            eigenvalues = torch.linalg.eigvalsh(core[n, :, n])
            assert eigenvalues[:-1].abs().max() < 1e-8 * eigenvalues[-1].clamp_min(1)
            entries.append(core[n, :, n].diagonal())
    squares = torch.stack(entries) / 2  # each is chi squared with one degree of freedom
    deviation = (2 / squares.numel()) ** 0.5
    assert abs(squares.mean().item() - 1) < 5 * deviation
    assert abs(squares.var().item() - 2) < 5 * (56 / squares.numel()) ** 0.5


@pytest.mark.parametrize("name", ["ce-positions-all-mean", "ce-soft-all-sum", "weights-ce-all"])
def test_expected_sampled_cross_entropy_is_the_ggn(name: str) -> None:
    """With many samples the Monte-Carlo Fisher is the GGN to within its own standard error."""
    problem = PROBLEMS[name]
    ggn = without_ridge(oracle_of(problem))
    values = torch.stack([sampled(problem, 50, seed) for seed in range(20)])
    error = values.std(0).norm() / len(values) ** 0.5
    assert (values.mean(0) - ggn).norm() < 4 * error
    assert error < 0.1 * ggn.norm()
