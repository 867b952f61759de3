"""What a kept linearisation holds on to: values, draws and memory, with loaders that repeat and that shuffle."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlinops
from tests import laws
from tests.kinds import KINDS, applies, truth_of
from tests.linearized import ENGINES, FACTORED, TANGENTS_ONLY, engines_of, shuffled, train
from tests.problems import PROBLEMS, Instance

# None is the budget of the process; 0 keeps nothing; those between keep some of these small mini-batches.
BUDGETS = (None, 0, 1, *(4**k for k in range(5, 9)))


def grid(*names: str) -> Any:
    """Parametrise a test over some problems, the kinds that apply to them, and the kinds' engines."""
    triples = [
        pytest.param(problem, kind, engine, id=f"{problem}-{kind}-{engine}")
        for problem in names
        for kind in (*FACTORED, *TANGENTS_ONLY)
        if applies(PROBLEMS[problem], KINDS[kind])
        for engine in engines_of(PROBLEMS[problem], kind)
    ]
    return pytest.mark.parametrize(("problem", "kind", "engine"), triples)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_memory", [None, 0], ids=lambda m: f"max_memory={m}")
@grid("norms-of-vectors", "callable-of-params-and-x", "layers-known-and-unknown")
def test_keeps_its_values(problem: str, kind: str, engine: str, max_memory: int | None) -> None:
    """Later changes of parameters and buffers do not show, whether there was a product before them or not."""
    instance, D = PROBLEMS[problem].make(), truth_of(PROBLEMS[problem], KINDS[kind])
    A = KINDS[kind].build(instance)
    used, unused = A.linearize(max_memory, engine=engine), A.linearize(max_memory, engine=engine)
    V = laws.noise(D.shape[1], 3, seed=30)
    before = used @ V
    train(instance)
    laws.assert_close(unused @ V, D @ V, "first product after the change")
    assert torch.equal(used @ V, before)
    assert (A @ V - D @ V).norm() > 1e-3 * (D @ V).norm(), "the original must be live"
    assert "transposed" in kind or "frozen" in repr(used)


@grid("layers-known-and-unknown")
def test_linearised_again_at_new_values(problem: str, kind: str, engine: str) -> None:
    """An operator remembers nothing of its linearisations."""
    instance = PROBLEMS[problem].make()
    A = KINDS[kind].build(instance)
    first = A.linearize(engine=engine)
    V = laws.noise(A.shape[1], 2, seed=31)
    first @ V
    train(instance)
    laws.assert_close(A.linearize(engine=engine) @ V, A @ V, "linearised at the new values")


# -- memory ------------------------------------------------------------------------------------------------------------


@grid("callable-of-layers", "ce-positions-all-mean")
def test_budgets(problem: str, kind: str, engine: str) -> None:
    """All, none, or some of the mini-batches are kept: the matrix and its draws are the same, in every product."""
    D = truth_of(PROBLEMS[problem], KINDS[kind])
    A, V, W = KINDS[kind].build(PROBLEMS[problem].make()), laws.noise(D.shape[1], 2, seed=32), laws.noise(2, D.shape[0])
    for max_memory in BUDGETS:
        kept = A.linearize(max_memory, engine=engine)
        for again in range(2):
            laws.assert_close(kept @ V, D @ V, f"max_memory={max_memory}, product {again}")
            laws.assert_close(W @ kept, W @ D, f"max_memory={max_memory}, transposed product {again}")


def counted() -> tuple[Instance, list[int]]:
    """Return four mini-batches of one size, and the list to which each forward adds an entry."""
    instance, calls = PROBLEMS["callable-of-layers"].make(), []
    model = instance.model

    def counting(params: dict[str, Tensor], X: Tensor) -> Tensor:
        calls.append(len(X))
        return model(params, X)

    instance.model = counting
    X, y = instance.data[-1]
    instance.data = [(X.clone(), y.clone()) for _ in range(4)]
    return instance, calls


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [*FACTORED, "hessian"])
def test_kept_mini_batches_need_no_forward(name: str, engine: str) -> None:
    """More memory never means more forwards: none where all are kept, some in between, as streamed where none is."""
    if engine not in engines_of(PROBLEMS["callable-of-layers"], name):
        pytest.skip("no such engine for this matrix")
    instance, calls = counted()
    A, forwards = KINDS[name].build(instance), []
    v = laws.noise(A.shape[1], seed=33)
    for max_memory in (0, *(2**k for k in range(9, 20)), None):
        kept = A.linearize(max_memory, engine=engine)
        kept @ v
        calls.clear()
        kept @ v
        forwards.append(len(calls))
    assert forwards == sorted(forwards, reverse=True)
    assert forwards[0] >= 4
    assert forwards[-1] == 0
    assert any(0 < number < forwards[0] for number in forwards), "no budget keeps some of the mini-batches"


# -- loaders that shuffle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_memory", [None, 0, 1024, 8192], ids=lambda m: f"max_memory={m}")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["hessian", "ggn", "ef", "ef-datum"])
def test_sums_over_shuffled_data(name: str, engine: str, max_memory: int | None) -> None:
    """Each datum counts once, though kept and streamed mini-batches come from passes in unlike orders."""
    problem = "ce-positions-all-mean"
    if engine not in engines_of(PROBLEMS[problem], name):
        pytest.skip("no such engine for this matrix")
    A, D = KINDS[name].build(shuffled(problem)), truth_of(PROBLEMS[problem], KINDS[name])
    V = laws.noise(len(D), 2, seed=34)
    with laws.restored_random_state():
        torch.manual_seed(0)
        kept = A.linearize(max_memory, engine=engine)
        for again in range(3):
            laws.assert_close(kept @ V, D @ V, f"product {again}")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["ggn-sampled", "fisher"])
def test_draws_over_shuffled_data_are_kept(name: str, engine: str) -> None:
    """The draws follow the order of the pass that was kept: one positive semidefinite matrix from then on."""
    with laws.restored_random_state():
        torch.manual_seed(0)
        kept = KINDS[name].build(shuffled("ce-positions-all-mean")).linearize(engine=engine)
        D = kept.to_dense()
        laws.check_repeatable(kept)
        laws.check_products(kept, D)
    assert torch.linalg.eigvalsh((D + D.T) / 2)[0] > -1e-10 * D.norm()


class Reusing:
    """A loader that reuses one piece of memory for all of its mini-batches, in every pass."""

    def __init__(self, with_targets: bool = True) -> None:
        self._X, self._y = torch.empty(2, 3, dtype=torch.float64), torch.empty(2, 2, dtype=torch.float64)
        self._with_targets = with_targets

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for seed in range(3):
            y = self._y.copy_(laws.noise(2, 2, seed=seed + 9))
            yield self._X.copy_(laws.noise(2, 3, seed=seed)), y if self._with_targets else None


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loader_that_writes_over_its_batch(engine: str) -> None:
    """What is kept must not change with the loader's memory, in the first product or in a later one."""
    model = small_model()
    A = curvlinops.EFLinearOperator(model, nn.MSELoss(), list(model.parameters()), Reusing())
    kept, V = A.linearize(engine=engine), laws.noise(A.shape[1], 2, seed=3)
    for _ in range(2):
        laws.assert_close(kept @ V, A @ V, engine)
    laws.assert_close(A.to_low_rank() @ V, A @ V, "low rank")


def test_a_loader_that_writes_over_its_batch_without_targets() -> None:
    """The same for a Jacobian."""
    model = small_model()
    J = curvlinops.JacobianLinearOperator(model, list(model.parameters()), Reusing(with_targets=False))
    kept, V = J.linearize(), laws.noise(J.shape[1], 2, seed=3)
    for _ in range(2):
        laws.assert_close(kept @ V, J @ V, "product")


@pytest.mark.parametrize("engine", ENGINES)
def test_data_that_are_changed_later(engine: str) -> None:
    """What is kept does not follow the user's data."""
    model, X, y = small_model(), laws.noise(4, 3, seed=1), laws.noise(4, 2, seed=2)
    A = curvlinops.EFLinearOperator(model, nn.MSELoss(), list(model.parameters()), [(X, y)])
    kept, low_rank, V = A.linearize(engine=engine), A.to_low_rank(), laws.noise(A.shape[1], 2, seed=3)
    before = kept @ V
    X.mul_(2)
    laws.assert_close(kept @ V, before, engine)
    laws.assert_close(low_rank @ V, before, "low rank")
    assert (A @ V - before).norm() > 1e-3 * before.norm(), "the original must be live"


# -- vectors -----------------------------------------------------------------------------------------------------------


def test_vectors_that_share_memory() -> None:
    """A first product whose vectors share memory with each other, or with the parameters, prepares later ones well."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False)).double()
    params = dict(model.named_parameters())
    data = [(laws.noise(4, 2, seed=1), laws.noise(4, 2, seed=2))]
    A = curvlinops.GGNLinearOperator(model, nn.MSELoss(), params, data)
    w, V = laws.noise(2, 2, seed=3), laws.noise(A.shape[1], seed=4)
    frozen = A.frozen()
    for vectors in ([w, w], [w, w.T], frozen._params):
        kept = frozen.linearize(engine="tangents")
        kept @ [v.detach() for v in vectors]
        laws.assert_close(kept @ V, A @ V, "second product")


# -- what is counted, and what goes wrong ------------------------------------------------------------------------------


def test_samples_are_counted() -> None:
    """Many samples of many classes are most of what is kept."""
    model = nn.Linear(2, 50)
    data = [(torch.rand(8, 2), torch.randint(50, (8,)))]
    F = curvlinops.FisherMCLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), data, mc_samples=40
    ).linearize(engine="tangents")
    F @ torch.ones(F.shape[1])
    assert F._risk.keeper.num_bytes >= 4 * 8 * 50 * 40  # type: ignore[union-attr]


def test_interrupted_after_a_gradient() -> None:
    """Draws are repeated where a pass that knew the number of mini-batches already was interrupted."""

    class Failing(list[Any]):
        fails = False

        def __iter__(self) -> Iterator[Any]:
            for index, batch in enumerate(super().__iter__()):
                if self.fails and index == 2:
                    self.fails = False
                    raise KeyboardInterrupt
                yield batch

    model = small_model()
    batches = Failing((laws.noise(3, 3, seed=s), torch.tensor([0, 1, 1])) for s in range(4))
    F = curvlinops.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), batches)
    v = laws.noise(F.shape[1], seed=5)
    kept = F.linearize()
    kept.gradient_and_loss()
    batches.fails = True
    with pytest.raises(KeyboardInterrupt):
        kept @ v
    for _ in range(2):
        laws.assert_close(kept @ v, F @ v, "after the interruption")


def test_missing_values_are_the_same_data() -> None:
    """Where some mini-batches are streamed again, NaN equals NaN."""

    def masked(f: Tensor, y: Tensor) -> Tensor:
        return torch.where(y.isnan(), 0.0, f - y.nan_to_num()).square().sum()

    masked.reduction = "sum"  # type: ignore[attr-defined]
    model = nn.Linear(3, 2).double()
    data = [(laws.noise(2, 3, seed=s), torch.tensor([[float("nan"), 1.0], [0.0, 2.0]]).double()) for s in range(3)]
    G = curvlinops.GGNLinearOperator(model, masked, list(model.parameters()), data)
    v = laws.noise(G.shape[1], seed=5)
    everything = G.linearize()
    everything @ v
    kept = G.linearize(max_memory=everything._risk.keeper.num_bytes // 2)  # type: ignore[union-attr]
    for _ in range(2):
        laws.assert_close(kept @ v, G @ v, "partly kept")
    assert 0 < len(kept._risk.keeper) < 3  # type: ignore[arg-type]


def test_numbers_that_are_not_finite_in_a_lean_product() -> None:
    """The error names the mini-batch, whichever column is to blame."""
    model = nn.Linear(4, 3)
    data = [(torch.rand(6, 4), torch.randint(3, (6,)))]
    G = curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    V = torch.ones(15, 2)
    V[0, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="mini-batch 0"):
        G.linearize(max_memory=0) @ V
