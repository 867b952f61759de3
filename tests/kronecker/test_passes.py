"""Passes over the data, forwards and memory of the Kronecker family; when its matrices are live and when frozen."""

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlinops import (
    EKFACLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from tests.risk.small import Counted, CountedData, classes, mlp, normal, relative_error

CLASSES: list[Any] = [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator]
FISHERS = ("type-2", "mc", "empirical", "forward-only")
CASES = [(cls, f) for cls in CLASSES for f in FISHERS if f != "forward-only" or cls is KFACLinearOperator]
SIZES = (3, 1, 2)


def make(cls: Any, fisher: str = "mc", model: Any = None, data: Any = None, **options: Any) -> Any:
    """An operator of all parameters of a small network."""
    model = mlp() if model is None else model
    data = classes(SIZES) if data is None else data
    options = {"check_deterministic": False, "fisher_type": fisher, **options}
    return cls(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data, **options)


def counted(cls: Any, fisher: str, **options: Any) -> tuple[Any, Counted, CountedData]:
    """An operator with a model and data that count."""
    model, data = Counted(mlp()), CountedData(classes(SIZES))
    return make(cls, fisher, model, data, **options), model, data


def num_passes(A: Any) -> int:
    """What a computed operator says of itself."""
    return int(A.state_dict()["num_passes"])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"separate_weight_and_bias": False},
    {"weight_fn": lambda X, y: X[:, 0].abs()},
    {"num_data": sum(SIZES)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options), "plain"))
@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_one_forward_a_mini_batch(cls: Any, fisher: str, options: dict[str, Any]) -> None:
    """In each pass at most, in the first one exactly; KFAC takes one pass and EKFAC two."""
    A, model, data = counted(cls, fisher, **options)
    A.compute()
    assert model.calls[: len(SIZES)] == list(SIZES)
    assert data.passes == num_passes(A)
    assert len(model.calls) <= num_passes(A) * len(SIZES)
    if cls is KFACLinearOperator:
        assert (num_passes(A), model.calls) == (1, list(SIZES))
    if cls is EKFACLinearOperator:
        assert num_passes(A) == 2


@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("max_iter", [1, 2, 5])
def test_passes_of_an_iteration(max_iter: int, fisher: str) -> None:
    """One for the factors, and one for each of an alternation's two; it ends with the factors of gradients."""
    A, _, data = counted(KFOCLinearOperator, fisher, max_iter=max_iter, rtol=1e-14)
    A.compute()
    assert 2 * max_iter <= data.passes <= 2 * max_iter + 2
    B, _, few = counted(KFOCLinearOperator, fisher, max_iter=50, rtol=0.5)
    B.compute()
    assert few.passes <= 6


@pytest.mark.parametrize("mc_samples", [1, 4])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_columns_take_no_forward_of_their_own(approx: str, mc_samples: int) -> None:
    A, model, data = counted(KFACLinearOperator, "mc", kfac_approx=approx, mc_samples=mc_samples)
    A.compute()
    assert (model.calls, data.passes) == (list(SIZES), 1)


@pytest.mark.parametrize("cls", [EKFACLinearOperator, KFOCLinearOperator])
@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical"])
def test_without_room_for_columns(cls: Any, fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass runs each mini-batch once more; the matrix is the same."""
    expected = make(cls, fisher).to_dense()
    monkeypatch.setattr(cls, "_max_kept_bytes", 0)
    A, model, data = counted(cls, fisher)
    A.compute()
    assert model.calls == list(SIZES) * data.passes
    assert relative_error(A.to_dense(), expected) < 1e-9


@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_the_check_comes_first_and_apart(cls: Any, fisher: str) -> None:
    """At construction, as for every operator, and the two directions at one mini-batch; without it, nothing there."""
    A, model, data = counted(cls, fisher)
    repr(A), A.shape, A.domain, A.dtype
    assert (model.calls, data.passes) == ([], 0)
    A.compute()
    expected = list(model.calls)
    B, model, data = counted(cls, fisher, check_deterministic=True)
    check, others = list(model.calls), Counted(mlp())
    kind = FisherMCLinearOperator if fisher == "mc" else GGNLinearOperator
    kind(others, nn.CrossEntropyLoss(), list(others.parameters()), classes(SIZES))
    assert others.calls and check == others.calls + list(SIZES[:1]) * (fisher != "forward-only")
    model.reset()
    data.passes = 0
    B.compute()
    assert model.calls == expected
    assert torch.equal(A.to_dense(), B.to_dense())


@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_nothing_after_the_computation(cls: Any, fisher: str) -> None:
    A, model, data = counted(cls, fisher)
    v = normal(A.shape[1], 3)
    A @ v[:, 0]
    model.reset()
    data.passes = 0
    A @ v, v.T @ A, A.to_dense(), A.trace(), A.diagonal(), A.frobenius_norm(), A.det(), A.sqrt(), A.sample(2)
    A.inverse(0.1) @ v, A.inverse(0.1, use_exact_damping=True).to_dense(), A.damped(0.1).logdet()
    A.blocks, A.factors(0), A.state_dict(), A.compute(), A.compute(3), A.linearize(), A.frozen(), A.block("*weight")
    (2.0 * A + A).to_dense(), copy.deepcopy(A).to_dense(), repr(A), str(A.blocks)
    assert (model.calls, data.passes) == ([], 0)


# -- memory ------------------------------------------------------------------------------------------------------------


class Fresh:
    """Mini-batches that are made as they are read, and who of them is alive."""

    def __init__(self) -> None:
        self.known: list[weakref.ref[Tensor]] = []
        self.most = 0

    def alive(self) -> int:
        """How many inputs somebody holds; none may wait for the collector of cycles."""
        return sum(ref() is not None for ref in self.known)

    def __iter__(self) -> Iterator[Any]:
        for X, y in classes((4,) * 4):
            inputs = X.clone()
            self.known.append(weakref.ref(inputs))
            yield inputs, y
            del inputs
            self.most = max(self.most, self.alive())


@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_nothing_of_the_data_is_left(cls: Any, fisher: str) -> None:
    """One mini-batch at a time is held, and the one that is read meanwhile; none after the computation."""
    data = Fresh()
    A = make(cls, fisher, data=data, **({"max_iter": 1} if cls is KFOCLinearOperator else {}))
    A.compute()
    assert data.most <= 2
    assert data.alive() == 0
    first = len(data.known)
    A.to_dense()
    assert len(data.known) == first


def num_bytes(thing: Any) -> int:
    """Length of a pickle, which holds tensors that are shared once."""
    return len(pickle.dumps(thing))


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_kept_does_not_grow_with_the_data(cls: Any) -> None:
    """Of a thousand data no more is left than of ten: columns that were kept for further passes are gone."""
    sizes = []
    for count in (10, 100):
        A = make(cls, "empirical", data=classes((count, count)))
        A.compute()
        A._risk.data = []
        sizes.append(num_bytes(A))
    assert abs(sizes[1] - sizes[0]) < 2000


@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_the_memory_of_a_state(cls: Any, fisher: str) -> None:
    """Factors of a finished matrix, and nothing that only its computation needs."""
    state = make(cls, fisher).compute().state_dict()
    numbers = sum(t.numel() for t in state.values() if t.dtype == torch.float64)
    factors = (4 * 4 + 3 * 3) + (3 * 3 + 4 * 4) + 4 * 4 + 3 * 3
    eigenvalues = 4 * 3 + 3 * 4 if cls is EKFACLinearOperator else 0
    assert numbers <= factors + eigenvalues + 30
    assert not any(name.startswith("pass.") for name in state)


# -- live, then frozen -------------------------------------------------------------------------------------------------


def with_buffers() -> nn.Sequential:
    """A model in eval mode with statistics that matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    model[1].running_mean += normal(4, seed=5)
    return model


def change(model: nn.Module) -> None:
    """New values of parameters and buffers, in place."""
    with torch.no_grad():
        for index, tensor in enumerate([*model.parameters(), *model.buffers()]):
            if tensor.is_floating_point():
                tensor += 0.2 * normal(*tensor.shape, seed=20 + index).abs()


@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_live_until_it_is_computed(cls: Any, fisher: str) -> None:
    model = with_buffers()
    A = make(cls, fisher, model)
    old = make(cls, fisher, with_buffers()).to_dense()
    assert "frozen" not in repr(A)
    change(model)
    first = A.to_dense()
    assert relative_error(first, old) > 1e-3
    assert torch.equal(first, make(cls, fisher, model).to_dense())
    assert "frozen" in repr(A)
    change(model)
    assert torch.equal(A.to_dense(), first)
    assert A.frozen() is A
    inverse = A.inverse(0.1).to_dense()
    change(model)
    assert torch.equal(A.inverse(0.1).to_dense(), inverse)


@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_frozen_before_it_is_computed(cls: Any, fisher: str) -> None:
    """At the old values, the original at the new ones."""
    model = with_buffers()
    A = make(cls, fisher, model)
    F = A.frozen()
    assert F is not A and F.frozen() is F
    assert "frozen" in repr(F)
    old = make(cls, fisher, with_buffers()).to_dense()
    change(model)
    assert torch.equal(F.to_dense(), old)
    assert torch.equal(A.to_dense(), make(cls, fisher, model).to_dense())
    change(model)
    assert torch.equal(F.to_dense(), old)


@pytest.mark.parametrize("cls", CLASSES)
def test_frozen_half_way(cls: Any) -> None:
    """A copy begins at the values at hand, whatever the original has summed; the original goes on."""
    model = with_buffers()
    A = make(cls, model=model)
    expected = make(cls, model=with_buffers()).to_dense()
    A.compute(2)
    F = A.frozen()
    assert torch.equal(A.to_dense(), expected)
    change(model)
    assert torch.equal(F.to_dense(), expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_linearize_computes(cls: Any) -> None:
    model = with_buffers()
    A = make(cls, model=model)
    kept = A.linearize()
    expected = make(cls, model=with_buffers()).to_dense()
    change(model)
    assert torch.equal(kept.to_dense(), expected)


# -- copies ------------------------------------------------------------------------------------------------------------

DUPLICATES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda A: pickle.loads(pickle.dumps(A)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("num_batches", [0, 2, 4, None])
@pytest.mark.parametrize("duplicate", DUPLICATES)
@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_copies(cls: Any, fisher: str, duplicate: str, num_batches: int | None) -> None:
    """Not yet computed, half way and computed; a copy is the same matrix to the bit, whoever goes on first."""
    expected = make(cls, fisher, with_buffers()).to_dense()
    for copy_first in (True, False):
        A = make(cls, fisher, with_buffers())
        if num_batches != 0:
            A.compute(num_batches)
        B = DUPLICATES[duplicate](A)
        assert type(B) is cls and B.domain == A.domain
        for operator in (B, A) if copy_first else (A, B):
            assert torch.equal(operator.to_dense(), expected)
        assert torch.equal(A.inverse(0.1).to_dense(), B.inverse(0.1).to_dense())
        assert repr(A.blocks) == repr(B.blocks)


@pytest.mark.parametrize("duplicate", ["pickle", "deepcopy"])
@pytest.mark.parametrize("cls", CLASSES)
def test_copies_are_apart(cls: Any, duplicate: str) -> None:
    """What becomes of the original's parameters does not reach a copy."""
    model = with_buffers()
    A = make(cls, model=model)
    B = DUPLICATES[duplicate](A)
    change(model)
    assert torch.equal(B.to_dense(), make(cls, model=with_buffers()).to_dense())
    assert relative_error(A.to_dense(), B.to_dense()) > 1e-3
