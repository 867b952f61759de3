"""Wrapped models, prefixed names, subsets, ties and foreign values."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tests.risk.small import (
    KINDS,
    SQUARE,
    CountedData,
    build,
    classes,
    differences,
    mlp,
    normal,
    relative_error,
    snapshot,
    vector,
)

# Every wrapper is the same work for all kinds of operators, so some stand for all.
SOME = ["Hessian", "GGN", "EFDiagonal", "Jacobian"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    path: Path = tmp_path_factory.mktemp("group") / "init"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def agree(kind: str, wrapped: Any, params: Any, model: nn.Module, expected_names: list[str] | None = None) -> None:
    """Products of a wrapped model are those of the model itself, and leave it alone."""
    before = snapshot(wrapped)
    A, B = build(kind, wrapped, classes(), params=params), build(kind, model, classes())
    for columns in ((), (3,)):
        V = vector(B, *columns)
        assert relative_error(A @ V, B @ V) < 1e-12
    if kind in SQUARE:
        assert torch.equal(A.gradient_and_loss()[1], B.gradient_and_loss()[1])
    if expected_names is not None:
        assert list(A.domain.names) == expected_names
    assert differences(before, snapshot(wrapped)) == []


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("form", ["list", "dict", "inner dict"])
def test_distributed_data_parallel(kind: str, form: str, one_process: None) -> None:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    named = dict((model if form == "inner dict" else wrapped).named_parameters())
    assert ("module.0.weight" in named) == (form != "inner dict")
    agree(kind, wrapped, list(named.values()) if form == "list" else named, model, None if form == "list" else [*named])


@pytest.mark.parametrize("kind", SOME)
def test_data_parallel(kind: str) -> None:
    model = mlp()
    wrapped = DataParallel(model)
    agree(kind, wrapped, dict(wrapped.named_parameters()), model)


def refuse(*args: Any, **kwargs: Any) -> Any:
    """A compiler that must not be called."""
    raise AssertionError("compiled")


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("form", ["list", "dict", "inner dict"])
def test_compiled_modules(kind: str, form: str) -> None:
    """The original is called: forward mode and double backward do not compile."""
    model = mlp()
    wrapped: Any = torch.compile(model, backend=refuse)
    named = dict((model if form == "inner dict" else wrapped).named_parameters())
    assert ("_orig_mod.0.weight" in named) == (form != "inner dict")
    agree(kind, wrapped, list(named.values()) if form == "list" else named, model, None if form == "list" else [*named])


@pytest.mark.parametrize("kind", SOME)
def test_compiled_and_distributed(kind: str, one_process: None) -> None:
    model = mlp()
    for wrapped in (
        torch.compile(DistributedDataParallel(model), backend=refuse),
        DistributedDataParallel(torch.compile(model, backend=refuse)),
    ):
        agree(kind, wrapped, dict(wrapped.named_parameters()), model)


def test_foreign_values_under_wrapped_names() -> None:
    """Copies have no identity, so only names say what they are."""
    model, other = mlp(), mlp(seed=4)
    wrapped: Any = torch.compile(model, backend=refuse)
    foreign = {f"_orig_mod.{n}": p.detach().clone() for n, p in other.named_parameters()}
    A, B = build("GGN", wrapped, classes(), params=foreign), build("GGN", other, classes())
    assert relative_error(A @ vector(A, 2), B @ vector(B, 2)) < 1e-12
    assert list(A.domain.names) == list(foreign)
    foreign = {f"module.{n}": p for n, p in zip(dict(model.named_parameters()), foreign.values(), strict=True)}
    A = build("GGN", DataParallel(model), classes(), params=foreign)
    assert relative_error(A @ vector(A, 2), B @ vector(B, 2)) < 1e-12


def test_compiled_functions() -> None:
    model = mlp()

    def predict(params: dict[str, Tensor], X: Tensor) -> Tensor:
        result: Tensor = functional_call(model, params, (X,))
        return result

    compiled = torch.compile(predict, backend=refuse)
    params = dict(model.named_parameters())
    A, B = (build("GGN", m, classes(), params=params) for m in (compiled, model))
    assert relative_error(A @ vector(A, 2), B @ vector(B, 2)) < 1e-12


# -- subsets -----------------------------------------------------------------------------------------------------------


class LowRankAdapter(nn.Module):
    """A frozen linear layer with a trainable low-rank part, under the prefixes of adapter libraries."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)}).double()
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)}).double()

    def forward(self, X: Tensor) -> Tensor:
        """The sum of both."""
        f: Tensor = self.base_layer(X) + 0.5 * self.lora_B["default"](self.lora_A["default"](X))
        return f


class Wrapped(nn.Module):
    """Adds prefixes to names, as adapter libraries do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def forward(self, X: Tensor) -> Tensor:
        """The inner model."""
        f: Tensor = self.base_model["model"](X)
        return f


def adapted() -> Wrapped:
    """A network with two adapters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        inner = mlp()
        return Wrapped(nn.Sequential(LowRankAdapter(inner[0]), nn.Tanh(), LowRankAdapter(inner[2])))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters(kind: str) -> None:
    """The trainable subset has the block of the whole."""
    model = adapted()
    everything = dict(model.named_parameters())
    chosen = {n: p for n, p in everything.items() if p.requires_grad}
    assert list(chosen) == [f"base_model.model.{i}.lora_{x}.default.weight" for i in (0, 2) for x in ("A", "B")]
    before = snapshot(model)
    A = build(kind, model, classes(), params=chosen)
    full = build(kind, model, classes(), params=everything).to_dense()
    index = rows_of(everything, chosen)
    if kind == "Jacobian":
        expected = full[:, index]
    elif kind == "TransposedJacobian":
        expected = full[index]
    else:
        expected = full[index][:, index]
    assert relative_error(A.to_dense(), expected) < 1e-10
    assert differences(before, snapshot(model)) == []


def rows_of(everything: dict[str, Tensor], chosen: dict[str, Tensor]) -> Tensor:
    """Where the entries of some parameters lie among all."""
    numbers = torch.arange(sum(p.numel() for p in everything.values()))
    parts = dict(zip(everything, numbers.split([p.numel() for p in everything.values()]), strict=True))
    return torch.cat([parts[n] for n in chosen])


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("order", [(3, 0), (2, 3, 1, 0), (1,)])
@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EFDiagonal"])
def test_subsets_in_other_orders(kind: str, order: tuple[int, ...], as_dict: bool) -> None:
    model = mlp()
    everything = dict(model.named_parameters())
    names = [list(everything)[i] for i in order]
    chosen = {n: everything[n] for n in names}
    A = build(kind, model, classes(), params=chosen if as_dict else list(chosen.values()))
    index = rows_of(everything, chosen)
    full = build(kind, model, classes()).to_dense()
    assert relative_error(A.to_dense(), full[index][:, index]) < 1e-10
    assert A.domain.names == tuple(names)
    gradients, _ = A.gradient_and_loss()
    assert [g.shape for g in gradients] == [p.shape for p in chosen.values()]


def test_names_of_ones_own() -> None:
    """Tensors of the model may be given under any name; the answer has these."""
    model = mlp()
    named = {"last": model[2].weight, "first": model[0].weight}
    A = build("GGN", model, classes(), params=named)
    B = build("GGN", model, classes(), params=list(named.values()))
    answer = A @ {n: torch.ones_like(p) for n, p in named.items()}
    assert list(answer) == ["last", "first"]
    assert torch.equal(torch.cat([t.flatten() for t in answer.values()]), B @ torch.ones(24, dtype=torch.float64))


@pytest.mark.parametrize("kind", SOME)
def test_a_frozen_rest(kind: str) -> None:
    model = mlp()
    reference = build(kind, model, classes(), params=[model[2].weight]).to_dense()
    model.requires_grad_(False)
    model[2].weight.requires_grad_(True)
    assert relative_error(build(kind, model, classes(), params=[model[2].weight]).to_dense(), reference) < 1e-12
    model[2].weight.requires_grad_(False)
    assert relative_error(build(kind, model, classes(), params=[model[2].weight]).to_dense(), reference) < 1e-12
    assert not model[2].weight.requires_grad


# -- ties --------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Both layers have the same weight."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
        self.decoder.weight = self.encoder.weight

    def forward(self, X: Tensor) -> Tensor:
        """Encode and decode."""
        f: Tensor = self.decoder(self.encoder(X).tanh())
        return f


def untied(params: dict[str, Tensor], X: Tensor) -> Tensor:
    """The same function of its three tensors, without a module."""
    return (X @ params["W"].T + params["a"]).tanh() @ params["W"].T + params["b"]


@pytest.mark.parametrize("name", ["encoder.weight", "decoder.weight"])
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("kind", SOME)
def test_tied_weights(kind: str, foreign: bool, name: str) -> None:
    """A tied weight moves in both places, under either name, and also at foreign values."""
    model = Tied()
    values = [model.encoder.weight, model.encoder.bias, model.decoder.bias]
    if foreign:
        values = [p.detach() + 0.3 for p in values]
    params = dict(zip((name, "encoder.bias", "decoder.bias"), values, strict=True))
    A = build(kind, model, classes(), params=params)
    B = build(kind, untied, classes(), params=dict(zip("Wab", values, strict=True)))
    assert relative_error(A.to_dense(), B.to_dense()) < 1e-10
    assert model.decoder.weight is model.encoder.weight


def test_tied_weights_twice() -> None:
    model = Tied()
    both = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(ValueError, match=r"'encoder.weight' and 'decoder.weight' are the same tensor.*tied weights"):
        build("GGN", model, classes(), params=both)


# -- foreign values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_foreign_values(kind: str, requires_grad: bool) -> None:
    """Tensors with the model's names: evaluated there, and the model stays where it is."""
    model, other = mlp(), mlp(seed=4)
    foreign = {n: p.detach().clone().requires_grad_(requires_grad) for n, p in other.named_parameters()}
    before = snapshot(model)
    A, B = build(kind, model, classes(), params=foreign), build(kind, other, classes())
    V = vector(B, 3)
    assert relative_error(A @ V, B @ V) < 1e-12
    if kind in SQUARE:
        assert torch.equal(A.gradient_and_loss()[1], B.gradient_and_loss()[1])
    assert differences(before, snapshot(model)) == []
    assert [p.requires_grad for p in foreign.values()] == [requires_grad] * 4
    assert all(p.grad is None for p in foreign.values())


def test_foreign_values_of_some_parameters() -> None:
    """The others stay the model's."""
    model = mlp()
    foreign = {"2.weight": model[2].weight.detach() + 0.5}
    A = build("Hessian", model, classes(), params=foreign)
    with torch.no_grad():
        model[2].weight += 0.5
    B = build("Hessian", model, classes(), params=[model[2].weight])
    assert relative_error(A @ vector(A, 2), B @ vector(B, 2)) < 1e-12


# -- what a loader yields ----------------------------------------------------------------------------------------------


class Keywords(nn.Module):
    """A model of two named inputs, which also takes labels, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.seen: list[bool] = []

    def forward(self, features: Tensor, shift: Tensor | None = None, labels: Tensor | None = None) -> Any:
        """An object with logits."""
        self.seen.append(labels is None)
        f = self.inner(features if shift is None else features + shift)
        return type("Output", (), {"logits": f})()


@pytest.mark.parametrize("kind", SOME)
def test_one_mapping_with_labels(kind: str) -> None:
    model = Keywords()
    data = [{"features": X - 1.0, "shift": torch.ones_like(X), "labels": y} for X, y in classes()]
    kept = [dict(item) for item in data]
    A, B = build(kind, model, CountedData(data)), build(kind, model.inner, classes())
    assert relative_error(A @ vector(A, 2), B @ vector(B, 2)) < 1e-10
    assert all(model.seen), "the labels are not the model's"
    assert all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(data, kept, strict=True))


@pytest.mark.parametrize("kind", SOME)
def test_a_mapping_that_goes_in_whole(kind: str) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, X: dict[str, Tensor]) -> Tensor:
            f: Tensor = self.inner(X["features"] + X["shift"])
            return f

    model = Whole()
    data = [({"features": X - 1.0, "shift": torch.ones_like(X)}, y) for X, y in classes()]
    A, B = build(kind, model, data), build(kind, model.inner, classes())
    assert relative_error(A @ vector(A, 2), B @ vector(B, 2)) < 1e-10


@pytest.mark.parametrize("container", [tuple, list])
@pytest.mark.parametrize("kind", SOME)
def test_a_tuple_goes_in_whole(kind: str, container: type) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, X: Any) -> Tensor:
            assert type(X) is container
            features, (shift, scale) = X
            f: Tensor = self.inner((features + shift) * scale)
            return f

    model = Whole()
    data = [(container([X - 1.0, (torch.ones_like(X), 1.0)]), y) for X, y in classes()]
    A, B = build(kind, model, data), build(kind, model.inner, classes())
    assert relative_error(A @ vector(A, 2), B @ vector(B, 2)) < 1e-10


def test_items_may_be_lists() -> None:
    """As the default collate function gives them."""
    A, B = (build("GGN", mlp(), data) for data in ([list(item) for item in classes()], classes()))
    assert torch.equal(A @ vector(A), B @ vector(B))


@pytest.mark.parametrize("signature", ["defaults", "*args", "**kwargs", "partial", "method"])
def test_signatures_of_callables(signature: str) -> None:
    """How many required positional arguments there are says what a callable takes."""
    from functools import partial

    model = mlp()
    params: dict[str, Tensor] = dict(model.named_parameters())

    def with_defaults(p: dict[str, Tensor], X: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return functional_call(model, p, (X,)) * scale + shift

    def with_args(*args: Any) -> Tensor:
        result: Tensor = functional_call(model, args[0], args[1:])
        return result

    def with_kwargs(p: dict[str, Tensor], X: Tensor, **kwargs: Any) -> Tensor:
        assert not kwargs
        result: Tensor = functional_call(model, p, (X,))
        return result

    class Predictor:
        def predict(self, p: dict[str, Tensor], X: Tensor) -> Tensor:
            return with_kwargs(p, X)

    forms = {
        "defaults": with_defaults,
        "*args": with_args,
        "**kwargs": with_kwargs,
        "partial": partial(lambda scale, p, X: scale * with_kwargs(p, X), 1.0),
        "method": Predictor().predict,
    }
    A, B = build("GGN", forms[signature], classes(), params=params), build("GGN", model, classes())
    assert relative_error(A @ vector(A, 2), B @ vector(B, 2)) < 1e-12


def test_parameters_may_be_views_of_one_vector() -> None:
    """A callable of X that closes over leaves of its own."""
    theta = normal(12, seed=4).requires_grad_()
    A = build("Hessian", lambda X: X @ theta[:9].reshape(3, 3) + theta[9:], classes(), params=[theta])
    model = nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(theta[:9].reshape(3, 3).T)
        model.bias.copy_(theta[9:])
    B = build("Hessian", model, classes()).to_dense()
    index = torch.cat([torch.arange(9).reshape(3, 3).T.flatten(), torch.arange(9, 12)])
    assert relative_error(A.to_dense(), B[index][:, index]) < 1e-10
