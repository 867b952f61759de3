"""The oracles checked by closed forms, finite differences and second routes: a truth nobody checks is an opinion."""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles import Oracle, math_attention
from tests.problems import PROBLEMS, Instance


@cache
def case(name: str) -> tuple[Instance, Oracle]:
    """Build a problem and its oracle once."""
    instance = PROBLEMS[name].make()
    return instance, instance.oracle()


def tagged(*wanted: str, without: tuple[str, ...] = ()) -> list[str]:
    """Return the names of problems that have all the wanted tags and none of the others."""
    return [n for n, p in PROBLEMS.items() if set(wanted) <= p.tags and not set(without) & p.tags]


SMALL = [n for n in PROBLEMS if n.startswith(("ce-", "mse-", "bce-", "weights-", "ridge-", "generic-"))]
KNOWN = tagged(without=("generic",))

# Where the embedding of the padding index lies among the parameters: it moves the output, and counts as constant.
PADDED_ROWS = {"embedding-padding-idx": slice(3, 6), "hugging-face-bert": slice(0, 4)}


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("name", PROBLEMS)
def test_loss_is_that_of_the_whole_data_set(name: str) -> None:
    """Torch's loss of the concatenated data, called as the user would, ridge added."""
    instance, oracle = case(name)
    if instance.weight_fn is not None:
        pytest.skip("torch's losses know no example weights; see the test with repeated data")
    with torch.no_grad():
        loss = instance.loss(oracle.prediction, oracle.targets).item()
        loss += 0.5 * instance.l2 * sum((p**2).sum().item() for p in instance.tensors)
    assert oracle.loss == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("name", KNOWN)
def test_gradient_by_two_routes(name: str) -> None:
    """The gradient of the risk is c Σ Jᵀ ∇ℓ, plus l2 θ."""
    instance, oracle = case(name)
    gradient = oracle.scale * torch.einsum("npd,np->d", oracle.jacobian, oracle.loss_gradients)
    gradient = gradient + instance.l2 * torch.cat([p.detach().reshape(-1) for p in instance.tensors])
    assert error(gradient, oracle.gradient) < 1e-12


@pytest.mark.parametrize("name", PROBLEMS)
def test_jacobian_and_hessian_by_central_differences(name: str) -> None:
    """Move the parameters a little along one direction; parts under ``no_grad`` or detached have no such derivative."""
    if "cut" in PROBLEMS[name].tags:
        pytest.skip("its derivative is that of reverse mode by definition")
    _, oracle = case(name)
    direction = torch.randn(oracle.num_params, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direction[PADDED_ROWS.get(name, slice(0, 0))] = 0.0
    h, moved = 1e-6, []
    for sign in (1, -1):
        other = PROBLEMS[name].make()
        with torch.no_grad():
            parts = direction.split([p.numel() for p in other.tensors])
            for p, d in zip(other.tensors, parts, strict=True):
                p.add_(sign * h * d.reshape(p.shape))
        moved.append(other.oracle())
    outputs = (moved[0].prediction - moved[1].prediction) / (2 * h)
    assert error(outputs.reshape(len(outputs), -1), oracle.jacobian @ direction) < 1e-6
    gradients = (moved[0].gradient - moved[1].gradient) / (2 * h)
    assert error(gradients, oracle.hessian @ direction) < 1e-6


@pytest.mark.parametrize(
    "name", ["mlp-tanh-ce-dict", "cnn-batchnorm-eval-ce", "transformer-sdpa-ce", "tied-embeddings"]
)
def test_jacobian_by_forward_mode(name: str) -> None:
    """Forward mode gives the same Jacobian where both modes mean the same."""
    instance, oracle = case(name)
    names = {id(p): n for n, p in instance.model.named_parameters()}
    values = {names[id(p)]: p.detach() for p in instance.tensors}
    X = torch.cat([X for X, _ in instance.data])
    with math_attention():
        J = torch.func.jacfwd(lambda values: torch.func.functional_call(instance.model, values, (X,)))(values)
    N = len(oracle.prediction)
    columns = [J[n].reshape(N, -1, values[n].numel()) for n in values]
    assert error(torch.cat(columns, dim=-1), oracle.jacobian) < 1e-12


@pytest.mark.parametrize("name", KNOWN)
def test_ggn_is_the_hessian_of_the_linearised_model(name: str) -> None:
    """The second derivative of θ -> loss(f₀ + J (θ − θ₀)), with the whole data set in one call of the loss."""
    instance, oracle = case(name)
    if instance.weight_fn is not None:
        pytest.skip("torch's losses know no example weights; see the test with repeated data")
    J = oracle.flat_jacobian()

    def risk(step: Tensor) -> Tensor:
        prediction = oracle.prediction + (J @ step).reshape(oracle.prediction.shape)
        theta = step + torch.cat([p.detach().reshape(-1) for p in instance.tensors])
        return instance.loss(prediction, oracle.targets) + 0.5 * instance.l2 * (theta**2).sum()

    H = torch.autograd.functional.hessian(risk, torch.zeros(oracle.num_params, dtype=torch.float64))
    assert error(oracle.ggn, H) < 1e-12


def linear_problem(loss: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Oracle:
    """Build the oracle of a linear model."""
    model = nn.Linear(3, y.shape[1] if y.is_floating_point() else 3).double()
    X = torch.randn(len(y), 3, dtype=torch.float64)
    return Oracle(model, loss, list(model.parameters()), [(X[:2], y[:2]), (X[2:], y[2:])])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_hessian_equals_ggn_for_linear_models(reduction: str) -> None:
    """A linear model has no second derivative of its own."""
    torch.manual_seed(0)
    y = torch.rand(5, 3, dtype=torch.float64)
    weight = torch.rand(3, dtype=torch.float64) + 0.5
    losses: list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = [
        (nn.MSELoss(reduction=reduction), y),
        (nn.BCEWithLogitsLoss(reduction=reduction, weight=weight, pos_weight=2 * weight), y),
        (nn.CrossEntropyLoss(reduction=reduction, weight=weight, label_smoothing=0.1), y),
        (
            nn.CrossEntropyLoss(reduction=reduction, weight=weight, label_smoothing=0.1),
            torch.tensor([0, 1, 2, -100, 1]),
        ),
        (nn.HuberLoss(reduction=reduction), y),
    ]
    for loss, targets in losses:
        oracle = linear_problem(loss, targets)
        assert error(oracle.hessian, oracle.ggn) < 1e-12


def smoothed(oracle: Oracle) -> Tensor:
    """Return q [N, T, C] of the definition: class weight times the smoothed target, zero where ignored."""
    loss, y, C = oracle.loss_func, oracle.targets, oracle.prediction.shape[1]
    assert isinstance(loss, nn.CrossEntropyLoss)
    if y.is_floating_point():
        target, kept = y.reshape(len(y), C, -1).transpose(1, 2), torch.ones(1, dtype=torch.float64)
    else:
        y = y.reshape(len(y), -1)
        kept = (y != loss.ignore_index)[..., None].double()
        target = F.one_hot(torch.where(kept[..., 0] > 0, y, 0), C).double()
    weight = torch.ones(C, dtype=torch.float64) if loss.weight is None else loss.weight
    q = weight * ((1 - loss.label_smoothing) * target + loss.label_smoothing / C) * kept
    return oracle.example_weights[:, None, None] * q


@pytest.mark.parametrize("name", tagged("classes"))
def test_closed_form_of_cross_entropy(name: str) -> None:
    """Gradient m p − q, Hessian m (diag p − p pᵀ) with m the sum of q, no coupling between positions."""
    _, oracle = case(name)
    p, q = oracle.probabilities, smoothed(oracle)
    m = q.sum(-1)
    assert error(oracle.masses, m) < 1e-10
    assert error(oracle.positions_first(oracle.loss_gradients), m[..., None] * p - q) < 1e-12
    blocks = m[..., None, None] * (torch.diag_embed(p) - p[..., :, None] * p[..., None, :])
    assert error(oracle.position_blocks, blocks) < 1e-12
    assert (oracle.loss_hessians**2).sum().item() == pytest.approx((blocks**2).sum().item(), rel=1e-12)


@pytest.mark.parametrize("name", [n for n in KNOWN if n.startswith(("bce-", "linear-bce", "weights-bce"))])
def test_closed_form_of_binary_cross_entropy(name: str) -> None:
    """With a = weight pos_weight y and b = weight (1 − y): gradient (a + b) σ − a, Hessian (a + b) σ (1 − σ)."""
    _, oracle = case(name)
    loss, y, f = oracle.loss_func, oracle.targets, oracle.prediction
    one = torch.ones((), dtype=torch.float64)
    weight = one if loss.weight is None else loss.weight
    pos_weight = one if loss.pos_weight is None else loss.pos_weight
    data = oracle.example_weights.reshape(-1, *[1] * (f.ndim - 1))
    a, b, sigma = data * weight * pos_weight * y, data * weight * (1 - y), f.sigmoid()
    N = len(f)
    assert error(oracle.loss_gradients, ((a + b) * sigma - a).reshape(N, -1)) < 1e-12
    assert error(oracle.loss_hessians, torch.diag_embed(((a + b) * sigma * (1 - sigma)).reshape(N, -1))) < 1e-12


@pytest.mark.parametrize("name", [n for n in KNOWN if "mse" in n])
def test_closed_form_of_squared_error(name: str) -> None:
    """Gradient 2 w (f − y), Hessian 2 w I; the mean divides by the weighted number of elements."""
    instance, oracle = case(name)
    w, (N, P) = oracle.example_weights, oracle.loss_gradients.shape
    assert error(oracle.loss_gradients, 2 * w[:, None] * (oracle.prediction - oracle.targets).reshape(N, P)) < 1e-12
    assert error(oracle.loss_hessians, 2 * w[:, None, None] * torch.eye(P, dtype=torch.float64).expand(N, P, P)) < 1e-12
    wanted = 1 / (w.sum().item() * P) if instance.loss.reduction == "mean" else 1.0  # type: ignore[attr-defined]
    assert oracle.scale == pytest.approx(wanted)


@pytest.mark.parametrize(
    "name", ["ce-positions-all-mean", "ce-soft-all-sum", "weights-ce-all", "ce-zero-weight-smoothing-sum"]
)
def test_expected_monte_carlo_fisher_is_the_ggn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Average over all label strings of one datum at a time, each with its probability: no sampling error."""
    _, oracle = case(name)
    N, T, C = oracle.probabilities.shape
    expectation = torch.zeros_like(oracle.ggn)
    for labels in product(range(C), repeat=T):
        drawn = torch.tensor(labels).expand(N, T)
        chance = oracle.probabilities.gather(-1, drawn[..., None])[..., 0].prod(1)  # [N]
        for n in range(N):
            only = oracle.masses * (torch.arange(N) == n)[:, None]
            monkeypatch.setitem(oracle.__dict__, "masses", only)
            monkeypatch.setattr(oracle, "draws", lambda mc_samples, seed, drawn=drawn: drawn[..., None])
            expectation += chance[n] * oracle.monte_carlo_fisher(1, 0)
            monkeypatch.undo()
    assert error(expectation, oracle.ggn) < 1e-12


def test_draws_are_one_call_a_mini_batch() -> None:
    """Written out by hand for two mini-batches of two data with two positions."""
    _, oracle = case("ce-positions-all-mean")
    generator = torch.Generator().manual_seed(5)
    start, wanted = 0, []
    for size in PROBLEMS["ce-positions-all-mean"].sizes:
        rows = [oracle.prediction[n, :, t].softmax(0) for n in range(start, start + size) for t in range(2)]
        wanted.append(torch.multinomial(torch.stack(rows), 3, replacement=True, generator=generator))
        start += size
    assert torch.equal(torch.cat(wanted), oracle.draws(3, 5).flatten(end_dim=1))


@pytest.mark.parametrize("name", [n for n in KNOWN if "order" not in PROBLEMS[n].tags])
def test_empirical_fisher(name: str) -> None:
    """Sum over data and positions of outer products, written as loops; one position makes both kinds of terms equal."""
    _, oracle = case(name)
    J, g = oracle.positions_first(oracle.jacobian), oracle.positions_first(oracle.loss_gradients)
    totals = {"position": torch.zeros_like(oracle.ggn), "datum": torch.zeros_like(oracle.ggn)}
    for n in range(J.shape[0]):
        columns = [J[n, t].T @ g[n, t] for t in range(J.shape[1])]
        for column in columns:
            totals["position"] += torch.outer(column, column)
        whole = torch.stack(columns).sum(0)
        totals["datum"] += torch.outer(whole, whole)
    for terms, total in totals.items():
        assert error(oracle.empirical_fisher(terms), oracle.scale * total) < 1e-12
    if "sequence" not in PROBLEMS[name].tags:
        assert torch.allclose(totals["position"], totals["datum"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [n for n in SMALL if not n.startswith("generic-num")])
def test_matrices_do_not_depend_on_the_cut(name: str) -> None:
    """One mini-batch, or one a datum."""
    _, oracle = case(name)
    N = len(oracle.targets)
    for sizes in ((N,), (1,) * N):
        other = PROBLEMS[name].make(sizes).oracle()
        assert error(other.ggn, oracle.ggn) < 1e-12
        assert error(other.hessian, oracle.hessian) < 1e-12
        if oracle.known:
            assert error(other.empirical_fisher("position"), oracle.empirical_fisher("position")) < 1e-12
            assert error(other.empirical_fisher("datum"), oracle.empirical_fisher("datum")) < 1e-12


@pytest.mark.parametrize(
    "name", ["ce-positions-all-mean", "ce-soft-all-mean", "bce-channels-weights-mean", "mse-positions-mean"]
)
def test_integer_weights_are_repetitions(name: str) -> None:
    """A datum of weight k is a datum that comes k times, for everything linear in the loss terms."""
    counts = torch.tensor([2, 0, 1, 3, 1, 2])

    def weights(X: Any, y: Tensor) -> Tensor:
        return counts[: len(y)].double()

    weighted = PROBLEMS[name].make()
    weighted.cut((len(weighted.y),))
    weighted.weight_fn = weights
    repeated = PROBLEMS[name].make()
    repeats = counts[: len(repeated.y)]
    repeated.X, repeated.y = repeated.X.repeat_interleave(repeats, 0), repeated.y.repeat_interleave(repeats, 0)
    repeated.cut((len(repeated.y),))
    a, b = weighted.oracle(), repeated.oracle()
    assert a.loss == pytest.approx(b.loss, rel=1e-12)
    for matrix in ("gradient", "hessian", "ggn"):
        assert error(getattr(a, matrix), getattr(b, matrix)) < 1e-12
