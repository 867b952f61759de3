"""What linearised operators keep: budgets, loaders that shuffle, errors half-way, copies, and what is the user's."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from curvlinops import CurvatureLinearOperator, GGNLinearOperator
from curvlinops.memory import default_budget, num_bytes, total_memory
from curvlinops.risk.keeping import Keeper
from tests.risk.small import (
    ORDERED,
    STREAMED,
    CountedData,
    build,
    classes,
    cut,
    differences,
    inputs,
    labels,
    mlp,
    normal,
    numbers,
    relative_error,
    snapshot,
    vector,
)

SIZES = (3, 2, 2, 1, 4)
KINDS = [*STREAMED, "Jacobian", "TransposedJacobian"]
FACTORED = ["GGN", "MC", "EF"]
ENGINES = [*((k, "tangents") for k in KINDS if k != "TransposedJacobian"), *((k, "factors") for k in FACTORED)]


def bytes_kept(kind: str, engine: str) -> int:
    """What all mini-batches take."""
    kept = build(kind, mlp(), classes(SIZES)).linearize(engine=engine)
    kept @ vector(kept, 3)
    assert kept._risk.keeper.keeps_all
    size: int = kept._risk.keeper.num_bytes
    return size


def partly(A: Any, kind: str, engine: str) -> Any:
    """A linearised operator that keeps some of the mini-batches."""
    return A.linearize(bytes_kept(kind, engine) // 2, engine=engine)


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "engine"), ENGINES)
def test_budgets(kind: str, engine: str) -> None:
    """All, some, one or none; the budget is kept, and the result is that of the streamed operator."""
    A = build(kind, mlp(), classes(SIZES))
    V, everything = vector(A, 3), bytes_kept(kind, engine)
    expected = A @ V
    counts = []
    for budget in (everything, everything - 1, everything // 2, everything // 4, 1, 0):
        kept = A.linearize(budget, engine=engine)
        keeper = kept._risk.keeper
        for _ in range(2):
            assert relative_error(kept @ V, expected) < 1e-12
            assert relative_error(kept @ V[:, 0], expected[:, 0]) < 1e-12
        assert keeper.num_bytes <= budget
        assert keeper.keeps_all == (len(keeper) == len(SIZES))
        counts.append(len(keeper))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 5 > counts[1] >= counts[2] > 0 == counts[-1] == counts[-2]


@pytest.mark.parametrize("kind", KINDS)
def test_products_by_tangents_are_those_of_the_streamed_operator_to_the_bit(kind: str) -> None:
    A = build(kind, mlp(), classes(SIZES))
    for columns in ((), (1,), (5,)):
        V = vector(A, *columns)
        streamed = A @ V
        kept = A.linearize(engine="tangents")
        first, second = kept @ V, kept @ V
        assert torch.equal(first, second)
        assert relative_error(first, streamed) < 1e-14


def test_the_budget_is_a_share_of_all_memory() -> None:
    device = torch.device("cpu")
    assert 0 < default_budget(device) <= total_memory(device) / 4
    assert default_budget(device) == default_budget(device)


def test_bytes_are_counted_once() -> None:
    X, p = torch.zeros(10, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    assert num_bytes([]) == 0
    assert num_bytes([X, X, X[:2], X.view(2, 5).T]) == 80
    assert num_bytes([X, p, p[1:]], apart_from=[p.detach()]) == 80
    assert num_bytes([X[:1]]) == 80, "a view holds all of it"


@pytest.mark.parametrize("bad", [-1, 1.5, True, "all"])
def test_budgets_that_make_no_sense(bad: Any) -> None:
    A = build("GGN", mlp(), classes())
    for call in (A.linearize, A.to_low_rank):
        with pytest.raises(ValueError, match=re.escape(f"{bad!r}")):
            call(bad)


def test_engines_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="'factor'"):
        build("GGN", mlp(), classes()).linearize(engine="factor")
    for kind in ("Hessian", "Jacobian", "TransposedJacobian"):
        with pytest.raises(NotImplementedError, match="factors"):
            build(kind, mlp(), classes()).linearize(engine="factors")
    with pytest.raises(NotImplementedError, match="huber_loss"):
        build("GGN", mlp(), numbers(), nn.functional.huber_loss).linearize(engine="factors")


# -- data that come in another order -----------------------------------------------------------------------------------


def loaders(shuffle: str) -> Any:
    """Loaders that shuffle by the global random state, by a generator, or by a sampler with one."""
    data = TensorDataset(inputs(12), labels(12))
    if shuffle == "global":
        return DataLoader(data, batch_size=3, shuffle=True)
    generator = torch.Generator().manual_seed(5)
    if shuffle == "generator":
        return DataLoader(data, batch_size=3, shuffle=True, generator=generator)
    return DataLoader(data, batch_size=3, sampler=RandomSampler(data, generator=generator))


@pytest.mark.parametrize("shuffle", ["global", "generator", "sampler"])
@pytest.mark.parametrize(("kind", "engine"), [(k, e) for k, e in ENGINES if k not in ("MC", "Jacobian")])
def test_shuffled_data(kind: str, engine: str, shuffle: str) -> None:
    """Each datum counts once, whether its mini-batch is kept or streamed, and the loader goes on as before."""
    loader = loaders(shuffle)
    A = build(kind, mlp(), loader)
    V = vector(A, 3)
    expected = build(kind, mlp(), cut(inputs(12), labels(12), [3] * 4)) @ V
    for kept in (partly(A, kind, engine), A.linearize(engine=engine), A.linearize(0, engine=engine)):
        for _ in range(3):
            torch.rand(1), next(iter(loader))  # somebody else's random numbers
            before = snapshot(nn.Linear(1, 1), loader)["torch"]
            assert relative_error(kept @ V, expected) < 1e-12
            assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("engine", ["tangents", "factors"])
def test_draws_over_shuffled_data(engine: str) -> None:
    """Kept and streamed mini-batches make one matrix, that of the first product."""
    A = build("MC", mlp(), loaders("global"), check_deterministic=False)
    kept = partly(A, "MC", engine)
    V = vector(A, 3)
    first = kept @ V
    for _ in range(3):
        torch.rand(1)
        assert relative_error(kept @ V, first) < 1e-13
    D = kept.to_dense()
    assert relative_error(D @ V, first) < 1e-12


@pytest.mark.parametrize("engine", ["tangents", "factors"])
@pytest.mark.parametrize("kind", ["MC", "GGN"])
@pytest.mark.parametrize("columns", [(), (3,)])
def test_draws_are_those_of_the_streamed_operator(kind: str, engine: str, columns: tuple[int, ...]) -> None:
    A = build(kind, mlp(), classes(SIZES), mc_samples=3, seed=7)
    V = vector(A, *columns)
    expected = A @ V
    for kept in (partly(A, kind, engine), A.linearize(engine=engine), A.linearize(0, engine=engine)):
        for _ in range(2):
            assert relative_error(kept @ V, expected) < 1e-12
            assert relative_error(kept @ vector(A, 20), A @ vector(A, 20)) < 1e-12


class Changing:
    """Mini-batches that somebody changes."""

    def __init__(self) -> None:
        self.data = classes(SIZES)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


@pytest.mark.parametrize(("kind", "engine"), ENGINES)
@pytest.mark.parametrize("change", ["order", "inputs", "targets", "sizes"])
def test_data_that_change_are_refused(kind: str, engine: str, change: str) -> None:
    if kind == "Jacobian" and change == "sizes":
        pytest.skip("the shape of a Jacobian is known beforehand")
    data = Changing()
    A = build(kind, mlp(), data, check_deterministic=False)
    kept, whole = partly(A, kind, engine), A.linearize(engine=engine)
    V = vector(A, 2)
    kept @ V
    expected = whole @ V
    if change == "order":
        data.data.reverse()
    elif change == "inputs":
        data.data[0] = (data.data[0][0] + 1.0, data.data[0][1])
    elif change == "targets":
        data.data[0] = (data.data[0][0], (data.data[0][1] + 1) % 3)
    else:
        data.data = classes((2, 3, 2, 1, 4))
    with pytest.raises(RuntimeError, match=r"Mini-batch 0 has other data.*max_memory"):
        kept @ V
    assert torch.equal(whole @ V, expected), "which reads no data any more"


# -- errors half-way ---------------------------------------------------------------------------------------------------


class Interrupted:
    """Mini-batches that fail at one of them, as often as is said."""

    def __init__(self, error: BaseException, at: int, times: int) -> None:
        self.error, self.at, self.remaining = error, at, times

    def __iter__(self) -> Iterator[Any]:
        for index, item in enumerate(classes(SIZES)):
            if index == self.at and self.remaining > 0:
                self.remaining -= 1
                raise self.error
            yield item


@pytest.mark.parametrize(
    ("at", "error"),
    [
        *((at, OSError("disk")) for at in (0, 2, 4)),
        (2, KeyboardInterrupt()),
        (2, torch.OutOfMemoryError("CUDA out of memory")),
    ],
)
@pytest.mark.parametrize(("kind", "engine"), ENGINES)
def test_errors_of_the_loader_leave_a_usable_operator(kind: str, engine: str, at: int, error: BaseException) -> None:
    data = Interrupted(error, at, 0)
    A = build(kind, mlp(), data, check_deterministic=False)
    V = vector(A, 3)
    expected = A @ V
    for kept in (A.linearize(engine=engine), partly(A, kind, engine)):
        for state in range(2):
            data.remaining = 2
            if kept._risk.keeper.keeps_all:
                break
            for _ in range(2):
                with pytest.raises(type(error)):
                    kept @ V
            assert relative_error(kept @ V, expected) < 1e-12, f"after errors in pass {state}"


@pytest.mark.parametrize(("kind", "engine"), [(k, e) for k, e in ENGINES if k != "Jacobian"])
def test_errors_of_the_model_leave_a_usable_operator(kind: str, engine: str) -> None:
    """In a forward of the first pass, anywhere."""
    remaining = [10**9]
    inner = mlp()

    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        remaining[0] -= 1
        if remaining[0] == 0:
            raise OSError("somebody pulled the plug")
        return torch.tanh(X @ params["0.weight"].T + params["0.bias"]) @ params["2.weight"].T + params["2.bias"]

    A = build(kind, model, classes(SIZES), params=dict(inner.named_parameters()), check_deterministic=False)
    V = vector(A, 3)
    expected = A @ V
    kept = A.linearize(engine=engine)
    for at in (4, 2, 1):
        remaining[0] = at
        try:
            kept @ V
        except (OSError, NotImplementedError, RuntimeError) as error:
            assert "plug" in str(error)
        remaining[0] = 10**9
    assert relative_error(kept @ V, expected) < 1e-12
    assert relative_error(kept @ V, expected) < 1e-12


def test_an_error_in_the_middle_of_a_later_pass() -> None:
    A = build("MC", mlp(), classes(SIZES), chunk_size=2)
    kept, V = A.linearize(), vector(A, 5)
    expected = kept @ V
    keeper = kept._risk.keeper
    product, count = type(next(iter(keeper.products()))), 0
    real = product.__call__

    def failing(self: Any, M: list[Tensor]) -> list[Tensor]:
        nonlocal count
        count += 1
        if count == 4:
            raise OSError("disk")
        result: list[Tensor] = real(self, M)
        return result

    product.__call__ = failing
    try:
        with pytest.raises(OSError, match="disk"):
            kept @ V
    finally:
        product.__call__ = real
    assert torch.equal(kept @ V, expected)


# -- linearised again, and in nodes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STREAMED)
def test_linearised_again(kind: str) -> None:
    A = build(kind, mlp(), classes(SIZES))
    kept, V = A.linearize(), vector(A, 2)
    expected = kept @ V
    assert kept.linearize() is kept
    assert kept.frozen() is kept
    lean = kept.linearize(0)
    assert lean is not kept
    assert len(lean._risk.keeper) == 0 < len(kept._risk.keeper)
    assert relative_error(lean @ V, expected) < 1e-12
    assert relative_error(kept.linearize(engine="tangents") @ V, expected) < 1e-12
    assert torch.equal(kept @ V, expected)


def nodes(A: Any, B: Any) -> dict[str, Any]:
    """Everything that passes linearising on."""
    return {
        "sum": A + B,
        "difference": A - 0.5 * B,
        "scaled": 3.0 * A,
        "damped": A.damped(0.1),
        "chain": A @ B,
        "sum of chains": A @ B + (2.0 * B).damped(1.0),
        "adjoint": (A @ B).adjoint(),
        "block": A.block("0.*"),
    }


def keepers(operator: Any) -> list[Keeper]:
    """All keepers inside of an operator."""
    if isinstance(operator, CurvatureLinearOperator):
        return [] if operator._risk.keeper is None else [operator._risk.keeper]
    inside = operator._inside() if hasattr(operator, "_inside") else []
    return [keeper for part in inside for keeper in keepers(part)]


@pytest.mark.parametrize(
    "node", list(nodes(*[build("GGN", mlp(), classes(), params=dict(mlp().named_parameters()))] * 2))
)
@pytest.mark.parametrize("max_memory", [None, 0, 10_000])
def test_nodes(node: str, max_memory: int | None) -> None:
    model = mlp()
    params = dict(model.named_parameters())
    A, B = build("GGN", model, classes(SIZES), params=params), build("EF", model, classes(), params=params)
    operator = nodes(A, B)[node]
    kept, V = operator.linearize(max_memory), vector(operator, 3)
    expected = operator @ V
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5
    for _ in range(2):
        assert relative_error(kept @ V, expected) < 1e-12
    assert relative_error(operator @ V, expected) > 1e-3
    found = keepers(kept)
    if max_memory is not None and found:
        assert sum(k.num_bytes for k in found) <= max_memory
        assert sum(k.max_bytes for k in found) <= max_memory


def test_terms_share_the_budget() -> None:
    A, B = build("GGN", mlp(), classes(SIZES)), build("Hessian", mlp(), classes())
    C = (A + B).damped(1.0).linearize(1000)
    assert [keeper.max_bytes for keeper in keepers(C)] == [500, 500]
    assert [k.max_bytes for k in keepers((A + B + 2.0 * A).linearize(999))] == [333] * 3
    assert [k.max_bytes for k in keepers((2.0 * A).linearize(999))] == [999]
    total = sum(k.max_bytes for k in keepers((A + B).linearize()))
    assert total <= default_budget(torch.device("cpu"))


# -- words, copies, and what is the user's -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "engine"), ENGINES)
def test_representations(kind: str, engine: str) -> None:
    """They tell what is kept, and nothing of this process."""
    texts = []
    for _ in range(2):
        A = build(kind, mlp(), classes(SIZES))
        assert "linearised" not in repr(A)
        kept = A.linearize(engine=engine)
        fresh = repr(kept)
        kept @ vector(A)
        some = partly(A, kind, engine)
        some @ vector(A)
        texts.append((fresh, repr(kept), repr(some), repr(kept.damped(1.0) if kind != "Jacobian" else kept.T)))
    assert texts[0] == texts[1]
    fresh, full, part, _ = texts[0]
    assert "frozen, linearised: nothing yet" in fresh
    assert "5 of 5 mini-batches kept" in full
    assert re.search(r"[1-4] of 5 mini-batches kept", part)
    assert ("factors" in full) == (engine == "factors")
    assert not any("0x" in text for pair in texts for text in pair)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda A: pickle.loads(pickle.dumps(A))], ids=["copy", "pickle"])
@pytest.mark.parametrize(("kind", "engine"), ENGINES)
def test_copies(kind: str, engine: str, duplicate: Callable[[Any], Any], prepared: bool) -> None:
    """A copy is the same matrix, or there is an error; the original goes on in any case."""
    A = build(kind, mlp(), classes(SIZES))
    kept, V = A.linearize(engine=engine), vector(A, 3)
    expected = A @ V
    if prepared:
        kept @ V
    try:
        other = duplicate(kept)
    except (TypeError, RuntimeError, NotImplementedError, AttributeError, pickle.PicklingError):
        assert prepared, "nothing is kept yet that could not be copied"
    else:
        for _ in range(2):
            assert relative_error(other @ V, expected) < 1e-12
    assert relative_error(kept @ V, expected) < 1e-12


@pytest.mark.parametrize(("kind", "engine"), ENGINES)
@pytest.mark.parametrize("when", ["before the first product", "after it"])
def test_later_changes_do_not_matter(kind: str, engine: str, when: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    A = build(kind, model, classes(SIZES))
    V = vector(A, 3)
    expected = A @ V
    operators = [A.linearize(engine=engine), A.linearize(20_000, engine=engine), A.linearize(0, engine=engine)]
    if when == "after it":
        for kept in operators:
            kept @ V
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.data += 0.3
    model.train()
    for kept in operators:
        assert relative_error(kept @ V, expected) < 1e-12
        assert relative_error(kept @ V[:, 1], expected[:, 1]) < 1e-12
    model.eval()
    assert relative_error(A @ V, expected) > 1e-3


@pytest.mark.parametrize("max_memory", [None, 0, 20_000])
@pytest.mark.parametrize(("kind", "engine"), ENGINES)
def test_what_is_the_users(kind: str, engine: str, max_memory: int | None) -> None:
    """Parameters, flags, hooks, modes and random states are left as they were; so are the vector and the data."""
    model, data = mlp(), classes(SIZES)
    model[0].weight.requires_grad_(False)
    loader = loaders("generator")
    for source in (data, loader):
        if source is loader and kind in ORDERED:
            continue
        A = build(kind, model, source)
        V = vector(A, 3)
        before, copied, contents = snapshot(model, source), V.clone(), [(X.clone(), y.clone()) for X, y in data]
        kept = A.linearize(max_memory, engine=engine)
        for columns in (V, V[:, 0], V):
            result = kept @ columns
            assert not result.requires_grad
            result.zero_()
        assert differences(before, snapshot(model, source)) == []
        assert torch.equal(V, copied)
        assert all(
            torch.equal(a, b) for pair, old in zip(data, contents, strict=True) for a, b in zip(pair, old, strict=True)
        )


@pytest.mark.parametrize("kind", STREAMED)
def test_gradients_of_linearised_operators(kind: str) -> None:
    model = mlp()
    A = build(kind, model, classes(SIZES))
    kept, (gradients, loss) = A.linearize(), A.gradient_and_loss()
    kept @ vector(A)
    with torch.no_grad():
        model[0].weight += 1.0
    for operator in (kept, A.linearize(0).linearize(1000)):
        found, value = operator.gradient_and_loss()
        if operator is kept:
            assert torch.equal(value, loss)
            assert all(relative_error(g, e) < 1e-14 for g, e in zip(found, gradients, strict=True))
    kept @ vector(A)


def test_a_matrix_of_the_users_own_is_frozen() -> None:
    class Squares(CurvatureLinearOperator):
        """The identity times the mean of the squared predictions."""

        def _matmat_batch(self, X: Any, y: Any, M: list[Tensor]) -> list[Tensor]:
            return [self._predict(X).detach().square().mean() * m for m in M]

    model = mlp()
    A = Squares(model, nn.CrossEntropyLoss(), list(model.parameters()), classes(SIZES))
    kept, expected = A.linearize(), A @ vector(A, 2)
    with torch.no_grad():
        model[2].bias += 1.0
    assert torch.equal(kept @ vector(A, 2), expected)
    assert relative_error(A @ vector(A, 2), expected) > 1e-3


def test_a_model_that_holds_its_parameters_cannot_be_linearised() -> None:
    model = mlp()
    for kind in KINDS:
        A = build(kind, lambda X: model(X), classes(), params=list(model.parameters()))
        with pytest.raises(NotImplementedError, match="closes over its parameters"):
            A.linearize()


def test_data_are_read_once() -> None:
    data = CountedData(classes(SIZES))
    model = mlp()
    kept = GGNLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), data, check_deterministic=False
    ).linearize()
    for _ in range(3):
        kept @ normal(31, 2)
    assert data.passes == 1
