"""Models that are hard to differentiate: equal to reverse mode, or refused by name; never wrong without a word."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.risk.small import (
    SQUARE,
    STACKED,
    Counted,
    build,
    classes,
    inputs,
    labels,
    mlp,
    normal,
    numbers,
    relative_error,
    reverse_ggn,
    reverse_hessian,
    reverse_jacobian,
    vector,
)

SUM = nn.MSELoss(reduction="sum")
DATA = numbers((3, 4))
FORMS = ["module", "callable of X"]


def as_form(model: nn.Module, form: str) -> Any:
    """The model itself, or closed over."""
    return model if form == "module" else lambda X: model(X)


def apply(A: Any, V: Tensor, one_by_one: bool) -> Tensor:
    """Products with the columns of V, which take other ways one by one than together."""
    return torch.stack([A @ v for v in V.unbind(1)], 1) if one_by_one else A @ V


def truth(kind: str, model: nn.Module, data: Any = DATA) -> Tensor:
    """The matrix of the summed squared error by reverse mode alone."""
    params = list(model.parameters())
    if kind == "Hessian":
        return reverse_hessian(model, params, data)
    return (reverse_ggn if kind == "GGN" else reverse_jacobian)(model, params, [X for X, _ in data])


def right_or_refused(kind: str, model: nn.Module, refusal: str, data: Any = DATA, form: str = "module") -> set[str]:
    """Which of the two it was, for products with a vector and with a matrix."""
    matrix, seen = truth(kind, model, data), set()
    V = normal(matrix.shape[1], 2, seed=8)
    for one_by_one in (True, False):
        A = build(kind, as_form(model, form), data, SUM, params=list(model.parameters()))
        try:
            actual = apply(A, V, one_by_one)
        except NotImplementedError as error:
            assert re.search(refusal, str(error)), f"refused, but not by name: {error}"
            seen.add("refused")
        else:
            error_ = relative_error(actual, matrix @ V)
            assert error_ < 1e-9, f"{kind} is wrong by {error_:.1e} (one by one: {one_by_one})"
            seen.add("right")
    return seen


MATRICES = ["Hessian", "GGN", "Jacobian"]


class Around(nn.Module):
    """Two layers with something in between."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
        self.middle = middle

    def forward(self, X: Tensor) -> Tensor:
        """First, middle, last."""
        f: Tensor = self.last(self.middle(self.first(X)))
        return f


# -- checkpointing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "MC", "EF", "GGNDiagonal", "Jacobian", "TransposedJacobian"])
@pytest.mark.parametrize("columns", [(), (3,)])
@pytest.mark.filterwarnings("ignore:.*requires_grad=True:UserWarning")
def test_reentrant_checkpointing_is_refused(kind: str, columns: tuple[int, ...]) -> None:
    model = Around(lambda X: checkpoint(torch.tanh, X, use_reentrant=True))
    A = build(kind, model, classes())
    with pytest.raises(NotImplementedError, match="use_reentrant=False"):
        A @ vector(A, *columns)


@pytest.mark.filterwarnings("ignore:.*requires_grad=True:UserWarning")
def test_reentrant_checkpointing_is_refused_in_gradients() -> None:
    model = Around(lambda X: checkpoint(torch.tanh, X, use_reentrant=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        build("GGN", model, classes()).gradient_and_loss()


class Checkpointed(nn.Module):
    """Two layers that run again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, X: Tensor) -> Tensor:
        """The inner network."""
        f: Tensor = checkpoint(self.inner, X, use_reentrant=False)
        return f


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("form", FORMS)
def test_other_checkpointing(kind: str, form: str) -> None:
    assert right_or_refused(kind, Checkpointed(), "nothing", form=form) == {"right"}


@pytest.mark.parametrize("kind", [*SQUARE, *STACKED])
def test_checkpointing_at_foreign_values(kind: str) -> None:
    """The second forward must meet the values that were passed, not the model's own."""
    model, other = Checkpointed(), mlp(seed=7)
    foreign = {f"inner.{n}": p.detach().clone() for n, p in other.named_parameters()}
    A = build(kind, model, classes(), params=foreign)
    B = build(kind, other, classes())
    for columns in ((), (3,)):
        V = vector(B, *columns)
        assert relative_error(A @ V, B @ V) < 1e-10
    if kind in SQUARE:
        (gradients, loss), (expected, value) = A.gradient_and_loss(), B.gradient_and_loss()
        assert torch.allclose(loss, value)
        assert all(torch.allclose(g, e) for g, e in zip(gradients, expected, strict=True))


# -- custom functions --------------------------------------------------------------------------------------------------


class Sine(torch.autograd.Function):
    """The classic form, differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The sine."""
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The cosine."""
        (x,) = ctx.saved_tensors
        return g * x.cos()


class OnceSine(Sine):
    """May be differentiated once only."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        """The cosine."""
        (x,) = ctx.saved_tensors
        return g * x.cos()


class OnceSineWithTangents(OnceSine):
    """May be differentiated once in reverse mode, and has forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The sine."""
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        """The cosine."""
        (x,) = ctx.saved_tensors
        return tangents[0] * x.cos()


class DetachedSine(Sine):
    """Its backward hides from autograd that it depends on x."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The cosine."""
        (x,) = ctx.saved_tensors
        return g * x.detach().cos()


class KeptSine(Sine):
    """Keeps what its backward needs as an attribute, which autograd does not follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The sine."""
        ctx.cosine = x.cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The cosine."""
        return g * ctx.cosine


class NumpySine(Sine):
    """Its backward goes through NumPy, so its result depends on nothing that autograd could see."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The cosine."""
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * np.cos(x.detach().numpy()))


class WrongTangents(Sine):
    """Reverse mode is right, forward mode is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The sine."""
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        """Not the cosine."""
        (x,) = ctx.saved_tensors
        return tangents[0] * x.sin()


def around(function: type[torch.autograd.Function]) -> Around:
    """A model that calls a custom function."""
    return Around(lambda X: function.apply(X))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MATRICES)
def test_classic_functions(kind: str, form: str) -> None:
    assert right_or_refused(kind, around(Sine), "nothing", form=form) == {"right"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MATRICES)
def test_once_differentiable(kind: str, form: str) -> None:
    """Refused where it is differentiated twice; a transposed Jacobian does not."""
    model = around(OnceSine)
    for columns in ((), (3,)):
        A = build(kind, as_form(model, form), DATA, SUM, params=list(model.parameters()))
        with pytest.raises(NotImplementedError, match=r"OnceSine.*once_differentiable"):
            A @ vector(A, *columns)
    if kind == "Jacobian":
        A = build(kind, as_form(model, form), DATA, params=list(model.parameters()))
        U = normal(A.shape[0], 3, seed=5)
        try:
            result = A.T @ U
        except NotImplementedError as error:
            assert "OnceSine" in str(error)
        else:
            assert relative_error(result, reverse_jacobian(model, A._params, [X for X, _ in DATA]).T @ U) < 1e-10


def test_once_differentiable_with_forward_mode() -> None:
    model = around(OnceSineWithTangents)
    matrix, V = truth("GGN", model), normal(31, 2, seed=8)
    for one_by_one in (True, False):
        A = build("GGN", model, DATA, SUM)
        assert relative_error(apply(A, V, one_by_one), matrix @ V) < 1e-10
    A = build("Hessian", model, DATA, SUM)
    with pytest.raises(NotImplementedError, match=r"OnceSineWithTangents.*once_differentiable"):
        A @ vector(A)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", [DetachedSine, KeptSine, NumpySine])
@pytest.mark.parametrize("before", ["nothing", "gradient", "left"])
def test_wrong_double_backward_in_the_hessian(function: type, before: str, form: str) -> None:
    """Plain reverse mode is wrong, too, so only refusal is right; whatever was asked before."""
    model = around(function)
    for columns in ((), (3,)):
        A = build("Hessian", as_form(model, form), DATA, SUM, params=list(model.parameters()))
        if before == "gradient":
            A.gradient_and_loss()
        with pytest.raises(NotImplementedError, match=function.__name__):
            (torch.ones(2, A.shape[0]).double() @ A) if before == "left" else (A @ vector(A, *columns))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", [DetachedSine, KeptSine, NumpySine, WrongTangents])
@pytest.mark.parametrize("kind", ["GGN", "Jacobian"])
@pytest.mark.parametrize("gradient_first", [False, True])
def test_wrong_double_backward_in_products(kind: str, function: type, gradient_first: bool, form: str) -> None:
    """The backward is right and linear in the gradient: all is well if autograd can see at least that."""
    model = around(function)
    matrix, V = truth(kind, around(Sine)), normal(31, 2, seed=8)
    for one_by_one in (True, False):
        A = build(kind, as_form(model, form), DATA, SUM, params=list(model.parameters()))
        try:
            if gradient_first:
                A.gradient_and_loss() if kind == "GGN" else A.T @ torch.ones(A.shape[0], dtype=A.dtype)
            actual = apply(A, V, one_by_one)
        except NotImplementedError as error:
            assert function.__name__ in str(error)
            assert function is NumpySine, "only that one cannot be done"
        else:
            assert function is not NumpySine
            assert relative_error(actual, matrix @ V) < 1e-9


def test_once_differentiable_after_a_gradient() -> None:
    model = around(OnceSine)
    A = build("Hessian", model, DATA, SUM)
    A.gradient_and_loss()
    with pytest.raises(NotImplementedError, match="once_differentiable"):
        A @ vector(A)


@pytest.mark.parametrize("size", [1.0, 0.1, 0.01])
def test_a_wrong_double_backward_with_a_small_part_in_the_whole(size: float) -> None:
    """The Hessian of some of the parameters is all wrong, however small it is beside that of the others."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = mlp(), around(DetachedSine)

        def forward(self, X: Tensor) -> Tensor:
            f: Tensor = self.large(X) + size * self.small(X)
            return f

    A = build("Hessian", Two(), DATA, SUM)
    with pytest.raises(NotImplementedError, match="DetachedSine"):
        A @ vector(A)


# -- no_grad, hooks, straight-through ----------------------------------------------------------------------------------


def no_grad_gate(X: Tensor) -> Tensor:
    """A gate that counts as constant."""
    with torch.no_grad():
        gate = X.sigmoid()
    return X.tanh() * gate


def detached_gate(X: Tensor) -> Tensor:
    """The same by another name."""
    return X.tanh() * X.detach().sigmoid()


def rounded(X: Tensor) -> Tensor:
    """The straight-through estimator, written with detach()."""
    return X + (2 * X).round().div(2).sub(X).detach()


def scaled_by_hook(X: Tensor) -> Tensor:
    """A hook that triples the gradient."""
    Y = X.tanh()
    if Y.requires_grad:
        Y.register_hook(lambda g: 3 * g)
    return Y


def reversed_by_hook(X: Tensor) -> Tensor:
    """Gradient reversal, as in domain-adversarial training."""
    Y = X * 1.0
    if Y.requires_grad:
        Y.register_hook(torch.neg)
    return Y.tanh()


def clipped_by_hook(X: Tensor) -> Tensor:
    """A hook that is not linear."""
    Y = X.tanh()
    if Y.requires_grad:
        Y.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return Y


class Round(torch.autograd.Function):
    """The straight-through estimator, written as a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Multiples of one half."""
        return (2 * x).round() / 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """As if it were the identity."""
        return g


MIDDLES = [no_grad_gate, detached_gate, rounded, scaled_by_hook, reversed_by_hook]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("kind", MATRICES)
def test_parts_that_are_cut_off(kind: str, middle: Callable[[Tensor], Tensor], form: str) -> None:
    right_or_refused(kind, Around(middle), "disagree", form=form)


@pytest.mark.parametrize("middle", [detached_gate, rounded])
@pytest.mark.parametrize("kind", MATRICES)
def test_detach_is_the_same_in_both_modes(kind: str, middle: Callable[[Tensor], Tensor]) -> None:
    assert right_or_refused(kind, Around(middle), "nothing") == {"right"}


@pytest.mark.parametrize("kind", ["GGN", "Jacobian"])
def test_hooks_that_are_not_linear(kind: str) -> None:
    """There is no Jacobian then."""
    A = build(kind, Around(clipped_by_hook), DATA, SUM)
    with pytest.raises(NotImplementedError, match="disagree"):
        A @ vector(A)


@pytest.mark.parametrize("kind", MATRICES)
def test_straight_through_as_a_function(kind: str) -> None:
    right_or_refused(kind, Around(lambda X: Round.apply(X)), "disagree")  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kind", MATRICES)
def test_hooks_on_parameters(kind: str) -> None:
    """A hook of a training script on the parameter itself is not part of the model."""
    model = mlp()
    expected = truth(kind, model)
    model[0].weight.register_hook(lambda g: 0 * g)
    A = build(kind, model, DATA, SUM)
    assert relative_error(A.to_dense(), expected) < 1e-9


# -- values, vmap ------------------------------------------------------------------------------------------------------


class OneOutput(nn.Module):
    """The last layer has a vector for a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = mlp(), nn.Parameter(normal(3, seed=4))

    def forward(self, X: Tensor) -> Tensor:
        """Predictions ``[N]``."""
        return F.linear(self.first(X), self.weight)


@pytest.mark.parametrize("kind", MATRICES)
def test_a_layer_with_a_vector_for_a_weight(kind: str) -> None:
    data = [(X, y[:, 0]) for X, y in DATA]
    assert right_or_refused(kind, OneOutput(), "nothing", data) == {"right"}


def looks_at_values(X: Tensor) -> Tensor:
    """Branches on a number."""
    return X.tanh() if X.abs().max().item() > 1e-3 else X


def goes_to_numpy(X: Tensor) -> Tensor:
    """A constant factor computed by NumPy."""
    return X.tanh() * torch.from_numpy(np.cos(X.detach().numpy()))


def writes_in_place(X: Tensor) -> Tensor:
    """Fills a tensor of its own row by row, which vmap refuses."""
    result = torch.zeros(X.shape, dtype=X.dtype)
    for n in range(len(X)):
        result[n] = X[n].tanh()
    return result


def shape_of_values(X: Tensor) -> Tensor:
    """Uses a shape that depends on values."""
    result = X.clone()
    result[X > 0] = X[X > 0].tanh()
    return result


HOSTILE = [looks_at_values, goes_to_numpy, writes_in_place, shape_of_values]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("middle", HOSTILE)
@pytest.mark.parametrize("kind", MATRICES)
def test_models_that_vmap_cannot_follow(kind: str, middle: Callable[[Tensor], Tensor], form: str) -> None:
    if middle is goes_to_numpy and form == "callable of X":
        right_or_refused(kind, Around(middle), "disagree", form=form)  # it has a part that is cut off
    else:
        assert right_or_refused(kind, Around(middle), "nothing", form=form) == {"right"}


@pytest.mark.parametrize("middle", [looks_at_values, writes_in_place])
@pytest.mark.parametrize("kind", ["GGNDiagonal", "EFDiagonal", "EF", "MC"])
def test_other_matrices_of_such_models(kind: str, middle: Callable[[Tensor], Tensor]) -> None:
    A, B = (build(kind, Around(m), classes((3, 4))) for m in (middle, torch.tanh))
    assert relative_error(A @ vector(A, 3), B @ vector(B, 3)) < 1e-10


@pytest.mark.parametrize("kind", ["GGNDiagonal", "EFDiagonal"])
@pytest.mark.parametrize("middle", [torch.tanh, *MIDDLES, *HOSTILE])
def test_diagonals_of_parts_that_are_cut_off(kind: str, middle: Callable[[Tensor], Tensor]) -> None:
    model = Around(middle)
    J = reverse_jacobian(model, list(model.parameters()), [X for X, _ in DATA]).reshape(7, 3, -1)
    if kind == "GGNDiagonal":
        expected = 2 * J.square().sum((0, 1))
    else:
        residual = torch.cat([2 * (model(X) - y).detach() for X, y in DATA])
        expected = torch.einsum("nc,ncd->nd", residual, J).square().sum(0)
    try:
        actual = build(kind, model, DATA, SUM).diagonal()
    except NotImplementedError:
        return
    assert relative_error(actual, expected) < 1e-9


def test_models_run_once_for_all_columns() -> None:
    """Further columns follow the tape of the first, so that a model which vmap cannot follow runs but once."""
    model = Counted(Around(goes_to_numpy))
    A = build("GGN", model, DATA, SUM, check_deterministic=False)
    for _ in range(2):
        model.reset()
        A @ vector(A, 3)
        assert len(model.calls) == 2


def under_scarce_memory(monkeypatch: pytest.MonkeyPatch, at_most: int) -> list[int]:
    """Let vmap run out of memory beyond so many columns; the list of how many it was asked for."""
    sizes: list[int] = []
    real = torch.vmap

    def scarce(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        def run(*columns: Tensor) -> Any:
            sizes.append(len(columns[0]))
            if len(columns[0]) > at_most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(function, *args, **kwargs)(*columns)

        return run

    monkeypatch.setattr(torch, "vmap", scarce)
    return sizes


@pytest.mark.parametrize("linearised", [False, True])
@pytest.mark.parametrize("kind", ["GGN", "MC", "EF", "Jacobian"])
def test_out_of_memory_takes_fewer_columns(kind: str, linearised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are halved until they fit; vmap is not given up for it."""
    A, B = (build(kind, mlp(), classes(), **options) for options in ({}, {"chunk_size": 1}))
    A = A.linearize(engine="tangents") if linearised else A
    V = vector(A, 9)
    expected = B @ V
    sizes = under_scarce_memory(monkeypatch, 3)
    for _ in range(2):
        assert relative_error(A @ V, expected) < 1e-10
    # The first column goes alone.
    assert sizes[:6] == [8, 4, 2, 2, 2, 2]
    assert set(sizes) == {8, 4, 2}
    assert A._risk.engine.vmap


def test_out_of_memory_in_the_backward_takes_fewer_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what goes backward only, too."""
    from curvlinops.risk import linearization

    sizes: list[int] = []
    real = linearization.grad

    def scarce(outputs: Any, inputs: Any, U: Any = None, **options: Any) -> Any:
        if options.get("is_grads_batched"):
            sizes.append(len(U[0]))
            if sizes[-1] > 3:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return real(outputs, inputs, U, **options)

    for kind in ("Hessian", "GGN", "TransposedJacobian"):
        A, B = (build(kind, mlp(), classes(), **options) for options in ({}, {"chunk_size": 1}))
        V = vector(A, 9)
        expected = B @ V
        with monkeypatch.context() as patch:
            patch.setattr(linearization, "grad", scarce)
            assert relative_error(A @ V, expected) < 1e-10
        assert sizes[:3] == [8, 4, 2]
        assert set(sizes) == {8, 4, 2}
        sizes.clear()


def test_out_of_memory_with_one_column() -> None:
    class Big(nn.Linear):
        def forward(self, X: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    A = build("GGN", Big(3, 3, dtype=torch.float64), classes(), check_deterministic=False)
    for columns in ((), (4,)):
        with pytest.raises(torch.OutOfMemoryError):
            A @ vector(A, *columns)


class Attention(nn.Module):
    """Attention with a mask under which the first position may look nowhere."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(2, 2, dtype=torch.float64) for _ in range(3))
        seen = torch.ones(3, 3).tril(-1).bool()
        self.mask = {
            "boolean": seen,
            "infinite": torch.zeros(3, 3, dtype=torch.float64).masked_fill(~seen, -torch.inf),
            "finite": torch.zeros(3, 3, dtype=torch.float64).masked_fill(~seen, -1e30),
            "causal": None,
        }[mask]

    def forward(self, X: Tensor) -> Tensor:
        """Predictions ``[N, 6]``."""
        Q, K, V = (layer(X) for layer in self.layers)
        f = F.scaled_dot_product_attention(Q, K, V, attn_mask=self.mask, is_causal=self.mask is None)
        return f.flatten(1)


@pytest.mark.parametrize("mask", ["boolean", "infinite", "finite", "causal"])
@pytest.mark.parametrize("kind", MATRICES)
def test_attention_that_may_look_nowhere(kind: str, mask: str) -> None:
    """The kernels give zero there, not NaN."""
    data = [(normal(2, 3, 2, seed=s), normal(2, 6, seed=s + 5)) for s in (1, 2)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # for the truth by two backwards
        assert right_or_refused(kind, Attention(mask), "nothing", data) == {"right"}


# -- embeddings, unused parameters -------------------------------------------------------------------------------------


class Words(nn.Module):
    """An embedding with a padding index, summed over the sequence."""

    def __init__(self, function: Callable[..., Tensor], padding_idx: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(5, 3, dtype=torch.float64)
            self.last = nn.Linear(3, 3, dtype=torch.float64)
        self.function, self.padding_idx = function, padding_idx

    def forward(self, X: Tensor) -> Tensor:
        """Embed, squash, sum, predict; the row of the padding is not zero."""
        f: Tensor = self.last(self.function(X, self.embedding.weight, self.padding_idx).tanh().sum(1))
        return f


def by_function(X: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
    """``F.embedding``."""
    return F.embedding(X, weight, padding_idx)


def by_torch(X: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
    """``torch.embedding``, which some libraries call."""
    return torch.embedding(weight, X, padding_idx % 5)


def by_bag(X: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
    """``F.embedding_bag``, one bag a word."""
    bags = F.embedding_bag(X.reshape(-1, 1), weight, mode="sum", padding_idx=padding_idx)
    return bags.reshape(*X.shape, 3)


#: The backward of ``embedding_bag`` has no derivative in any mode.
EMBEDDINGS = [(k, f) for k in MATRICES for f in (by_function, by_torch, by_bag) if (k, f) != ("Hessian", by_bag)]


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
@pytest.mark.parametrize(("kind", "function"), EMBEDDINGS)
def test_padding_index(kind: str, function: Callable[..., Tensor], padding_idx: int) -> None:
    X = torch.tensor([[1, 0, 2], [3, 4, 4], [0, 0, 1], [4, 3, 2]])
    data = [(X[:2], normal(2, 3, seed=1)), (X[2:], normal(2, 3, seed=2))]
    seen = right_or_refused(kind, Words(function, padding_idx), "disagree|_embedding_bag_backward", data)
    if function is not by_bag:
        assert seen == {"right"}


@pytest.mark.parametrize(("kind", "function"), EMBEDDINGS)
def test_padding_index_in_a_later_batch_only(kind: str, function: Callable[..., Tensor]) -> None:
    """The checks at the first mini-batch see nothing of it."""
    X = torch.tensor([[1, 4, 2], [3, 4, 4], [0, 0, 1], [4, 3, 0]])
    data = [(X[:2], normal(2, 3, seed=1)), (X[2:], normal(2, 3, seed=2))]
    right_or_refused(kind, Words(function, 0), "disagree|_embedding_bag_backward", data)


class Half(nn.Module):
    """A model that uses half of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = mlp(), mlp(seed=1)

    def forward(self, X: Tensor) -> Tensor:
        """The first half."""
        f: Tensor = self.used(X)
        return f


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [*SQUARE, "Jacobian"])
def test_unused_parameters_give_zeros(kind: str, form: str) -> None:
    model = Half()
    A = build(kind, as_form(model, form), classes(), params=list(model.parameters()))
    B = build(kind, model.used, classes())
    M = A.to_dense()
    V = normal(A.shape[1], 2, seed=8)
    assert relative_error(apply(A, V, one_by_one=True), M @ V) < 1e-10
    rows = slice(0, 31) if kind in SQUARE else slice(None)
    assert relative_error(M[rows, :31], B.to_dense()) < 1e-10
    assert not M[:, 31:].any()
    assert kind not in SQUARE or not M[31:].any()
    if kind in SQUARE:
        gradients, _ = A.gradient_and_loss()
        assert [bool(g.any()) for g in gradients] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [*SQUARE, "Jacobian", "TransposedJacobian"])
def test_no_parameter_is_used(kind: str, form: str) -> None:
    model = Half()
    model.used.requires_grad_(False)
    A = build(kind, as_form(model, form), classes(), params=list(model.unused.parameters()))
    with pytest.raises(ValueError, match="does not depend on any of params"):
        A @ torch.ones(A.shape[1], 2, dtype=A.dtype)


def test_an_output_that_is_constant_in_one_batch() -> None:
    """A mini-batch that does not reach a parameter adds zero for it."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = mlp(), mlp(seed=1)

        def forward(self, X: Tensor) -> Tensor:
            f: Tensor = self.one(X[:, :3]) if bool(X[0, 3] > 0) else self.other(X[:, :3])
            return f

    sign = torch.tensor([1.0, 1, 1, -1, -1, -1, -1], dtype=torch.float64).unsqueeze(1)
    X = torch.cat([inputs(), sign], 1)
    model = Experts()
    for kind in ("Hessian", "GGN", "MC", "EF", "GGNDiagonal", "EFDiagonal"):
        loss = nn.CrossEntropyLoss(reduction="sum")
        A = build(kind, model, [(X[:3], labels()[:3]), (X[3:], labels()[3:])], loss).to_dense()
        if kind == "MC":  # the draws go on from mini-batch to mini-batch
            assert A[:31, :31].any()
        else:
            parts = [build(kind, m, [(X[s, :3], labels()[s])], loss).to_dense() for m, s in experts(model)]
            assert relative_error(A, torch.block_diag(*parts)) < 1e-10
        assert not A[:31, 31:].any()


def experts(model: Any) -> list[tuple[nn.Module, slice]]:
    """Which data go where."""
    return [(model.one, slice(0, 3)), (model.other, slice(3, 7))]
