"""Saved states: plain tensors, gone on with after any mini-batch to the same bits, refused where they do not fit."""

import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from curvlinops import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator
from tests.kronecker.cases import build, problem_of
from tests.risk.small import Counted, CountedData, Failing, classes, cut, differences, mlp, normal, snapshot

State = dict[str, Tensor]

CLASSES: list[Any] = [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator]
#: Passes over the data; KFOC is given a tolerance that it cannot reach.
PASSES = {KFACLinearOperator: 1, EKFACLinearOperator: 2}
FISHERS = ("type-2", "mc", "empirical", "forward-only")
CASES = [(cls, f) for cls in CLASSES for f in FISHERS if f != "forward-only" or cls is KFACLinearOperator]
SIZES = (3, 1, 2)


def make(cls: Any, fisher: str = "mc", model: Any = None, data: Any = None, **options: Any) -> Any:
    """An operator of all parameters of a small network."""
    model = mlp() if model is None else model
    if cls is KFOCLinearOperator:
        options = {"max_iter": 1, "rtol": 1e-12, **options}
    data = classes(SIZES) if data is None else data
    params = dict(model.named_parameters())
    options = {"check_deterministic": False, "fisher_type": fisher, **options}
    return cls(model, nn.CrossEntropyLoss(), params, data, **options)


def through_file(state: State) -> State:
    """Save and load."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: State = torch.load(buffer, weights_only=True)
    return loaded


def after(num_batches: int | None, operator: Any) -> Any:
    """The operator after some mini-batches, maybe none; after all for ``None``."""
    return operator if num_batches == 0 else operator.compute(num_batches)


def resumed(operator: Any, state: State) -> Any:
    """The operator from a state that went through a file."""
    operator.load_state_dict(through_file(state))
    return operator


def unequal(first: State, second: State) -> list[str]:
    """Names of the tensors that differ in a bit."""
    return [n for n in {*first, *second} if n not in first or n not in second or not same(first[n], second[n])]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all is equal, types and signs of zero included."""
    return a.dtype == b.dtype and a.shape == b.shape and bool((a.flatten().view(torch.uint8) == bytes_of(b)).all())


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.flatten().view(torch.uint8)


def check_same(actual: Any, expected: Any) -> None:
    """Compare two operators by all that can be seen of them, bit by bit; what is left is computed first."""
    actual.compute(), expected.compute()
    assert unequal(actual.state_dict(), expected.state_dict()) == []
    v = normal(actual.shape[1], 2, seed=9, dtype=actual.dtype)
    assert torch.equal(actual @ v, expected @ v)
    assert torch.equal(actual.to_dense(), expected.to_dense())
    assert repr(actual.blocks) == repr(expected.blocks)
    for i in range(len(actual.domain.shapes)):
        assert unequal(actual.factors(i), expected.factors(i)) == []


def are_apart(state: State) -> bool:
    """Whether no two tensors share memory."""
    places = [t.untyped_storage().data_ptr() for t in state.values() if t.numel()]
    return len(set(places)) == len(places)


def num_steps(cls: Any, fisher: str = "mc", **options: Any) -> int:
    """How many mini-batches an operator takes in all of its passes."""
    return len(SIZES) * int(make(cls, fisher, **options).compute().state_dict()["num_passes"])


def num_forwards(cls: Any, fisher: str = "mc", **options: Any) -> int:
    """How often an operator runs the model; columns that are kept need no second time."""
    model = Counted(mlp())
    make(cls, fisher, model, **options).compute()
    return len(model.calls)


# -- what is saved -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_plain_tensors(cls: Any, fisher: str) -> None:
    """Contiguous ones with memory of their own and no more of it than they need, at whatever time they are taken."""
    A = make(cls, fisher)
    for _ in range(3 * len(SIZES)):
        state = A.state_dict()
        assert all(type(n) is str and type(t) is Tensor for n, t in state.items())
        assert all(t.is_contiguous() and not t.requires_grad and t.layout == torch.strided for t in state.values())
        storages = [t.untyped_storage() for t in state.values()]
        assert are_apart(state)
        assert all(s.nbytes() == t.numel() * t.element_size() for s, t in zip(storages, state.values(), strict=True))
        A.compute(1)


@pytest.mark.parametrize("name", ["kf-attention", "kf-embedding", "kf-lstm"])
def test_shared_factors_are_saved_apart(name: str) -> None:
    """Projections of attention have the same inputs."""
    for k in (1, None):
        state = after(k, build(EKFACLinearOperator, problem_of(name).make())).state_dict()
        assert are_apart(state)


@pytest.mark.parametrize(("cls", "fisher"), CASES)
@pytest.mark.parametrize("num_batches", [1, 2, 4, None])
def test_a_state_is_a_copy(num_batches: int | None, cls: Any, fisher: str) -> None:
    """Neither going on nor writing to it has an effect on the other; the same when it is loaded."""
    A, expected = after(num_batches, make(cls, fisher)), make(cls, fisher)
    state = A.state_dict()
    before = {n: t.clone() for n, t in state.items()}
    B = make(cls, fisher)
    B.load_state_dict(state)
    A.compute()
    B.compute()
    A.inverse(0.1).to_dense()
    assert unequal(state, before) == []
    for t in state.values():
        t.zero_()
    check_same(A, expected)
    check_same(B, expected)


def test_safetensors(tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    for cls, fisher in CASES:
        for k in (0, 2, None):
            A, B = after(k, make(cls, fisher)), make(cls, fisher)
            safetensors.save_file(A.state_dict(), tmp_path / "state.safetensors")
            B.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
            assert unequal(A.state_dict(), B.state_dict()) == []
            check_same(B, A)


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_after_any_mini_batch(cls: Any, fisher: str) -> None:
    """In any pass, the last mini-batch included; what is left takes no forward more than it has mini-batches."""
    expected, total = make(cls, fisher).compute(), num_steps(cls, fisher)
    assert total == len(SIZES) * PASSES.get(cls, total // len(SIZES))
    for k in range(total + 1):
        state = after(k, make(cls, fisher)).state_dict()
        model = Counted(mlp())
        B = make(cls, fisher, model)
        B.load_state_dict(through_file(state))
        assert unequal(B.state_dict(), state) == [], f"after {k} mini-batches"
        assert B.compute() is B
        assert len(model.calls) <= total - k, f"after {k} mini-batches"
        assert cls is KFOCLinearOperator or model.calls == (list(SIZES) * total)[k:total], f"after {k} mini-batches"
        assert unequal(B.state_dict(), expected.state_dict()) == [], f"after {k} mini-batches"
        assert torch.equal(B.to_dense(), expected.to_dense()), f"after {k} mini-batches"


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("cls", [EKFACLinearOperator, KFOCLinearOperator])
def test_columns_that_memory_has_no_room_for(cls: Any, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of some mini-batches are kept for further passes, those of others computed anew, with the same draws."""
    expected, total = make(cls).compute(), num_steps(cls)
    columns = 2 * sum(SIZES) * (3 + 4 + 4 + 3) * 8  # inputs and output gradients of both layers, about twice over
    monkeypatch.setattr(cls, "_max_kept_bytes", int(share * columns))
    assert unequal(make(cls).compute().state_dict(), expected.state_dict()) == []
    for k in range(1, total):
        assert (
            unequal(resumed(make(cls), make(cls).compute(k).state_dict()).compute().state_dict(), expected.state_dict())
            == []
        ), f"after {k} mini-batches"


#: Kinds of blocks that a multilayer perceptron does not have.
MODELS = [
    "kf-hugging-face", "kf-conv1d", "kf-conv-transpose2d", "kf-embedding-padding", "kf-norms", "kf-attention-masked",
    "kf-tied", "kf-lstm",
]  # fmt: skip


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", MODELS)
def test_all_kinds_of_blocks(name: str, cls: Any, separate: bool) -> None:
    """Bases are summed with, and multiplied with, in the same layout of memory before and after."""
    num_data = len(problem_of(name).make().y)

    def anew() -> Any:
        fisher = "type-2" if separate else "mc"
        options: dict[str, Any] = {"max_iter": 1} if cls is KFOCLinearOperator else {}
        instance = problem_of(name).make((2, num_data - 2))
        return build(cls, instance, fisher_type=fisher, separate_weight_and_bias=separate, **options)

    expected = anew().compute()
    for k in (1, 2, 3):
        check_same(resumed(anew(), after(k, anew()).state_dict()), expected)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["kf-sequence-ce", "kf-embedding", "kf-norms", "kf-lstm"])
def test_without_gradients(name: str, approx: str) -> None:
    num_data = len(problem_of(name).make().y)

    def anew() -> Any:
        instance = problem_of(name).make((1, 2, num_data - 3))
        return build(KFACLinearOperator, instance, fisher_type="forward-only", kfac_approx=approx)

    for k in (1, 2, None):
        check_same(resumed(anew(), after(k, anew()).state_dict()), anew())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_less_precision(cls: Any, fisher: str, dtype: torch.dtype) -> None:
    """Layers that are wide enough for blocked products; sums of bfloat16 are kept in float32."""

    def anew() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 17), nn.Tanh(), nn.Linear(17, 17), nn.Tanh(), nn.Linear(17, 3)).to(dtype)
        return make(cls, fisher, model, classes((5, 6, 3), dtype))

    expected = anew().compute()
    for k in (2, 3, 5, None):
        state = after(k, anew()).state_dict()
        assert {t.dtype for t in state.values() if t.is_floating_point() and t.ndim} <= {torch.float32, torch.float64}
        check_same(resumed(anew(), state), expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_in_parts_without_saving(cls: Any) -> None:
    expected = make(cls).compute()
    for size in (1, 2, 5):
        A = make(cls)
        for _ in range(10 * len(SIZES)):
            A.compute(size)
        assert unequal(A.state_dict(), expected.state_dict()) == []
    A = make(cls)
    for k in (2, 1, 100, 1):
        A.compute(num_batches=k)
    assert unequal(A.state_dict(), expected.state_dict()) == []


@pytest.mark.parametrize("cls", CLASSES)
def test_any_use_computes_what_is_left(cls: Any) -> None:
    expected, state = make(cls), make(cls).compute(2).state_dict()
    uses: list[Callable[[Any], Any]] = [
        lambda A: A @ torch.ones(31, dtype=A.dtype), lambda A: A.trace(), lambda A: A.diagonal(),
        lambda A: A.factors("0.weight")["gradient_covariance" if cls is not EKFACLinearOperator else "eigenvalues"],
        lambda A: A.inverse(0.1).to_dense(), lambda A: A.sample(2), lambda A: A.damped(0.1).logdet(),
    ]  # fmt: skip
    for use in uses:
        assert torch.equal(use(resumed(make(cls), state)), use(expected))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_in_place_of_what_was_computed(cls: Any) -> None:
    """Loading replaces a matrix that is there, a finished one as well as a beginning."""
    one, other = make(cls), make(cls, model=mlp(seed=1))
    one.to_dense()
    one.load_state_dict(other.compute().state_dict())
    check_same(one, other)
    one.load_state_dict(make(cls).state_dict())
    check_same(one, make(cls))


@pytest.mark.parametrize("num_batches", [-1, 0, 1.5, "2", True])
def test_wrong_numbers_of_mini_batches(num_batches: Any) -> None:
    A = make(KFACLinearOperator)
    with pytest.raises((ValueError, TypeError), match="num_batches"):
        A.compute(num_batches)
    check_same(A, make(KFACLinearOperator))


class Hidden(nn.Module):
    """A layer whose weight is used in an unknown way where an input is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, _, self.last = mlp()

    def forward(self, X: Tensor) -> Tensor:
        if bool((X > 5).any()):
            h = X @ (1.0 * self.first.weight).T + self.first.bias
        else:
            h = self.first(X)
        f: Tensor = self.last(h.tanh())
        return f


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_layers_that_are_not_known_in_some_mini_batch(cls: Any, batch: int) -> None:
    """Where one turns up all begins anew with other blocks, also in a part that was resumed."""
    data = classes(SIZES)
    data[batch][0][0, 0] = 6.0

    def anew() -> Any:
        return make(cls, model=Hidden(), data=data)

    expected = anew().compute()
    assert expected.blocks[0].kind == "diagonal"
    for k in (1, 2, 3, 4, 5, 8):
        check_same(resumed(anew(), after(k, anew()).state_dict()), expected)


# -- loading ----------------------------------------------------------------------------------------------------------


class Unreadable(list[Any]):
    """Data that must not be read."""

    def __iter__(self) -> NoReturn:
        raise AssertionError("The data were read.")


@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_loading_touches_nothing(cls: Any, fisher: str) -> None:
    for k in (0, 1, 4, None):
        state = after(k, make(cls, fisher)).state_dict()
        model, data = Counted(mlp()), CountedData(classes(SIZES))
        A = make(cls, fisher, model, data)
        before = snapshot(model)
        A.load_state_dict(state)
        A.state_dict()
        repr(A)
        assert differences(before, snapshot(model)) == []
        assert (model.calls, data.passes) == ([], 0)


@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_a_finished_state_needs_neither_model_nor_data(cls: Any, fisher: str) -> None:
    """Nor the parameters it was computed at: it is frozen, as the operator that saved it."""
    expected = make(cls, fisher, Failing(mlp(), AssertionError(), at=10**9)).compute()
    model = Failing(mlp(seed=4), AssertionError("The model ran."), at=0)
    A = make(cls, fisher, model, Unreadable())
    A.load_state_dict(through_file(expected.state_dict()))
    assert "frozen" in repr(A)
    assert A.frozen() is A
    check_same(A, expected)
    for closed in (lambda K: K.inverse(0.1), lambda K: K.damped(0.1), lambda K: K.sqrt(), lambda K: 2.0 * K + K):
        assert torch.equal(closed(A).to_dense(), closed(expected).to_dense())
    for number in (lambda K: K.trace(), lambda K: K.frobenius_norm(), lambda K: K.damped(0.1).logdet()):
        assert torch.equal(number(A), number(expected))


@pytest.mark.parametrize("cls", CLASSES)
def test_states_are_in_the_memory_of_the_parameters_device(cls: Any) -> None:
    """What is computed lies on the device of the parameters, wherever the state was loaded to."""
    A = make(cls)
    A.load_state_dict(make(cls).compute(2).state_dict())
    assert {t.device for t in A.compute().state_dict().values()} == {torch.device("cpu")}


# -- what is refused ---------------------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fisher_type": ("mc", {}, {"fisher_type": "type-2"}),
    "fisher_type, too": ("type-2", {}, {"fisher_type": "empirical"}),
    "seed": ("mc", {"seed": 1}, {"seed": 2}),
    "mc_samples": ("mc", {}, {"mc_samples": 2}),
    "joins_biases": ("mc", {}, {"separate_weight_and_bias": False}),
    "sums_terms": ("empirical", {"terms": "position"}, {"terms": "datum"}),
}


def check_refused(operator: Any, state: State, match: str) -> None:
    """The state does not fit, and the operator is as if nobody had tried."""
    before = operator.state_dict()
    with pytest.raises(ValueError, match=match):
        operator.load_state_dict(state)
    assert unequal(operator.state_dict(), before) == []


@pytest.mark.parametrize("k", [2, None])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings(name: str, cls: Any, k: int | None) -> None:
    fisher, one, other = SETTINGS[name]
    state = after(k, make(cls, fisher, **one)).state_dict()
    check_refused(make(cls, **{"fisher_type": fisher, **other}), state, name.split(",")[0])


def test_other_approximation() -> None:
    for cls in (KFACLinearOperator, EKFACLinearOperator):
        check_refused(make(cls, kfac_approx="reduce"), make(cls).compute(2).state_dict(), "reduces")


def test_another_end_of_the_iteration() -> None:
    state = make(KFOCLinearOperator).compute().state_dict()
    check_refused(make(KFOCLinearOperator, max_iter=2), state, "max_passes")
    check_refused(make(KFOCLinearOperator, rtol=0.1), state, "rtol")


def test_a_seed_that_nothing_is_drawn_from() -> None:
    A = make(KFACLinearOperator, "type-2", seed=3)
    A.load_state_dict(make(KFACLinearOperator, "type-2", seed=4).compute(1).state_dict())
    check_same(A, make(KFACLinearOperator, "type-2"))


@pytest.mark.parametrize("k", [0, 2, 4, None])
@pytest.mark.parametrize(("saved", "loading"), [(a, b) for a in CLASSES for b in CLASSES if a is not b])
def test_another_class_of_operator(saved: Any, loading: Any, k: int | None) -> None:
    state = after(k, make(saved)).state_dict()
    check_refused(make(loading), state, "KFAC|KFOC|class|operator|settings")


def network(*widths: int) -> nn.Sequential:
    """Linear layers, from three features to three classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise((3, *widths, 3))]).double()


@pytest.mark.parametrize("k", [2, None])
@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_other_parameters(cls: Any, fisher: str, k: int | None) -> None:
    """Of other shapes, or another number of them; each is told before anything is computed."""
    state = after(k, make(cls, fisher, network(4))).state_dict()
    for other in (network(5), network(4, 4), network()):
        check_refused(make(cls, fisher, other), state, "param")


@pytest.mark.parametrize("cls", CLASSES)
def test_other_parameters_with_as_many_numbers(cls: Any) -> None:
    """The factors of a square weight fit a transposed one; a bias of four entries fits a row of four."""

    class Bare(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.shift, self.last = nn.Parameter(torch.ones(shape).double()), mlp()[2]

        def forward(self, X: Tensor) -> Tensor:
            f: Tensor = self.last(torch.cat([X, X[:, :1]], 1) + self.shift)
            return f

    state = make(cls, model=Bare(4)).compute().state_dict()
    check_refused(make(cls, model=Bare(1, 4)), state, "param|shape")


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("k", [2, 4, None])
def test_what_is_no_state(cls: Any, k: int | None) -> None:
    """Nothing at all, or a state with a tensor missing."""
    A = make(cls)
    check_refused(A, {}, "state")
    state = after(k, make(cls)).state_dict()
    for name in state:
        if name != "pass.generator":
            check_refused(A, {n: t for n, t in state.items() if n != name}, "state|settings")


# -- parameters that change in between ---------------------------------------------------------------------------------


def scale(model: nn.Sequential) -> None:
    model[0].weight.mul_(1.001)


def flip(model: nn.Sequential) -> None:
    """The other sign, which is another network of the same norms."""
    model[0].weight.neg_()


def reorder(model: nn.Sequential) -> None:
    model[0].weight.copy_(model[0].weight.flip(0))


def write_one(model: nn.Sequential) -> None:
    model[2].bias[1] += 1e-3


@pytest.mark.parametrize("change", [scale, flip, reorder, write_one])
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_changed_parameters(cls: Any, save: bool, change: Callable[[Any], None]) -> None:
    """Refused within a pass and between passes; the old values are welcome again."""
    for k in range(1, len(SIZES) * (1 if cls is KFACLinearOperator else 2)):
        model = mlp()
        A = after(k, make(cls, model=model))
        if save:
            A = resumed(make(cls, model=model), A.state_dict())
        with torch.no_grad():
            change(model)
        with pytest.raises(ValueError, match="parameters have changed"):
            A.compute()
        with pytest.raises(ValueError, match="parameters have changed"):
            A.trace()
        model.load_state_dict(mlp().state_dict())
        check_same(A, make(cls))


def test_changes_before_the_first_mini_batch() -> None:
    """Nothing was summed, so there is nothing to mix."""
    for cls in CLASSES:
        model = mlp()
        A = resumed(make(cls, model=model), make(cls).state_dict())
        model.load_state_dict(mlp(seed=1).state_dict())
        check_same(A, make(cls, model=mlp(seed=1)))


@pytest.mark.parametrize("cls", CLASSES)
def test_changes_after_the_first_mini_batch_failed(cls: Any) -> None:
    model = Failing(mlp(), ZeroDivisionError("now"), at=1)
    A = make(cls, model=model)
    with pytest.raises(ZeroDivisionError):
        A.compute()
    model.remaining[0] = 10**9
    model.inner.load_state_dict(mlp(seed=1).state_dict())
    assert torch.equal(A.to_dense(), make(cls, model=mlp(seed=1)).to_dense())


# -- exceptions --------------------------------------------------------------------------------------------------------

ERRORS = [ZeroDivisionError("now"), KeyboardInterrupt("now"), torch.OutOfMemoryError("now")]


class FailingLoader:
    """Data that raise at some item, counted over all passes."""

    def __init__(self, data: Any, error: BaseException, at: int) -> None:
        self.data, self.error, self.remaining = data, error, at

    def __iter__(self) -> Iterator[Any]:
        for item in self.data:
            self.remaining -= 1
            if self.remaining == 0:
                raise self.error
            yield item


def check_kept(A: Any, fresh: Callable[[], Any], num_batches: int, error: BaseException) -> None:
    """The mini-batches before the exception are kept, and going on gives the same bits."""
    with pytest.raises(type(error), match="now"):
        A.compute()
    state, expected = A.state_dict(), after(num_batches, fresh()).state_dict()
    if num_batches == 0:  # what is known of the parameters is of no concern before anything was summed
        assert not any(n.startswith(("block.", "pass.")) for n in state)
        state = {n: t for n, t in state.items() if n in expected} | {"num_entries": expected["num_entries"]}
    assert unequal(state, expected) == [], f"after {num_batches}"


@pytest.mark.parametrize("error", ERRORS[:2], ids=repr)
@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_the_model_raises(cls: Any, fisher: str, error: BaseException) -> None:
    """In the forward of any mini-batch of any pass."""
    expected, total = make(cls, fisher), num_forwards(cls, fisher)
    for k in range(total):
        model = Failing(mlp(), error, at=k + 1)
        A = make(cls, fisher, model)
        check_kept(A, lambda: make(cls, fisher), k, error)
        model.remaining[0] = 10**9
        assert unequal(A.compute().state_dict(), expected.compute().state_dict()) == [], f"after {k}"
        assert torch.equal(A.to_dense(), expected.to_dense()), f"after {k}"
        assert 10**9 - model.remaining[0] == total - k, "forwards that were still to be done"


@pytest.mark.parametrize("error", ERRORS[:2], ids=repr)
@pytest.mark.parametrize("cls", CLASSES)
def test_the_loader_raises(cls: Any, error: BaseException) -> None:
    expected = make(cls).compute()
    for k in range(num_steps(cls)):
        A = make(cls, data=FailingLoader(classes(SIZES), error, at=k + 1))
        check_kept(A, lambda: make(cls), k, error)
        assert unequal(A.compute().state_dict(), expected.state_dict()) == [], f"after {k}"


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_the_backward_raises(cls: Any, fisher: str, error: BaseException) -> None:
    """In the middle of a mini-batch, after samples were drawn."""
    remaining = [10**9]

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            remaining[0] -= 1
            if remaining[0] == 0:
                raise error
            return g.clone()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, _, self.last = mlp()

        def forward(self, X: Tensor) -> Tensor:
            f: Tensor = self.last(Backward.apply(self.first(X)).tanh())  # type: ignore[no-untyped-call]
            return f

    expected = make(cls, fisher, Model()).compute()
    num_backwards = 10**9 - remaining[0]
    if fisher == "forward-only" and num_backwards == 0:
        return
    for at in {1, num_backwards // 2, num_backwards - 1, num_backwards} - {0}:
        model = Model()
        A, before = make(cls, fisher, model), snapshot(model)
        remaining[0] = at
        with pytest.raises(type(error), match="now"):
            A.compute()
        remaining[0] = 10**9
        assert differences(before, snapshot(model)) == []
        assert unequal(A.compute().state_dict(), expected.state_dict()) == [], f"at backward {at}"


@pytest.mark.parametrize("error", ERRORS[:2], ids=repr)
@pytest.mark.parametrize("cls", [EKFACLinearOperator])
def test_an_eigendecomposition_is_interrupted(cls: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the passes, where matrices are large it takes the longest."""
    expected, A, real, calls = make(cls).compute(), make(cls), torch.linalg.eigh, []

    def raising(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", raising)
    with pytest.raises(type(error), match="now"):
        A.compute()
    monkeypatch.undo()
    check_same(resumed(make(cls), A.state_dict()), expected)
    check_same(A, expected)


@pytest.mark.parametrize(("cls", "fisher"), CASES)
@pytest.mark.parametrize("value", [torch.nan, 1e200])
def test_numbers_that_are_not_finite(cls: Any, fisher: str, value: float) -> None:
    """The mini-batch is named, however often one asks; nothing is left of the sums."""
    data = classes(SIZES)
    X = data[1][0].clone()
    data[1][0][0, 0] = value
    A = make(cls, fisher, network(), data)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="mini-batch 1"):
            A.to_dense()
    data[1][0].copy_(X)
    check_same(A, make(cls, fisher, network()))


def test_data_that_have_become_fewer() -> None:
    """A state of three mini-batches does not go with two."""
    state = make(EKFACLinearOperator).compute(5).state_dict()
    A = make(EKFACLinearOperator, data=classes(SIZES)[:1])
    A.load_state_dict(state)
    with pytest.raises(ValueError, match="mini-batches"):
        A.compute()


def test_shapes_of_the_last_mini_batch_do_not_matter() -> None:
    """Mini-batches are told by their number, so that other cuts of the same rest give the same sums."""
    X, y = (torch.cat(parts) for parts in zip(*classes((3, 4)), strict=True))
    state = make(KFACLinearOperator, "type-2", data=cut(X, y, (3, 4))).compute(1).state_dict()
    A = make(KFACLinearOperator, "type-2", data=cut(X, y, (3, 1, 3)))
    A.load_state_dict(state)
    whole = make(KFACLinearOperator, "type-2", data=cut(X, y, (3, 4))).to_dense()
    torch.testing.assert_close(A.to_dense(), whole, rtol=1e-12, atol=1e-15)
