"""Tapes of tangents: replayed, they are the Jacobian; what they cannot repeat is refused, and products stay right."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from curvlinops import GGNLinearOperator
from curvlinops.risk.tangents import TangentRules
from curvlinops.risk.tape import NoTapeError, Tape, TapeRecorder
from tests.risk.layer_models import CASES, Case
from tests.risk.small import build, classes, mlp, normal, relative_error, reverse_jacobian, vector

X = normal(5, 4, seed=1)
W, B = normal(4, 4, seed=2), normal(4, seed=3)
CHOSEN = torch.tensor([3, 0, 0, 2])
MASK = torch.tensor([[True, False, True, True], [False, True, False, True]])
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Cube(torch.autograd.Function):
    """A function with its own forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The cube."""
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Its derivative, from the right."""
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        """Its derivative, from the left."""
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangents[0]


# -- models that are followed ------------------------------------------------------------------------------------------


def in_place(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    Y += b
    Y.mul_(2).sub_(b)
    Y[:, 1] *= 3
    return Y.clamp_(min=-2).relu_()


def in_place_through_views(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = (X @ W).contiguous()
    rows = Y.view(-1)[3:9]
    rows.add_(b.sum())
    top = Y[:2].T
    top.mul_(b.unsqueeze(1))
    return Y * rows.sum()


def swapped_in_place(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    Y.transpose_(0, 1)
    Y.squeeze_().unsqueeze_(0)
    return Y.mT.add_(b)


def written_buffer(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = torch.ones(6, 4, dtype=X.dtype)
    Y.index_put_((CHOSEN[:2],), X[:2] @ W)
    Y = Y.index_add(0, torch.tensor([1, 1, 4, 0, 5]), X @ W * b)
    return Y[1:]


def copied_buffer(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = torch.full_like(X, 7.0)
    Y.copy_(X @ W)
    Y.addmm_(X, W).add_(b)
    return Y


def shared_buffer(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros_like(X)
    for scale in (1.0, 2.0):
        total += scale * X @ W
    return total + b


def slices(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    return Y[:, ::2] * Y[:, 1::2] + b[1:3] + Y[..., -2:].flip(1) - Y.diagonal()[:2]


def joined(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    return torch.cat([Y, X, b.expand(5, 4)], 1) + torch.stack([Y, X, Y], 1).flatten(1)


def joined_alone(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Lists of one tensor, and of one mask."""
    Y = torch.cat([X @ W], 0) + torch.stack([b])
    return torch.stack([Y], 1)[:, 0] * Y[Y.detach() > 0].sum()


def cut_up(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    one, two = (X @ W).split([1, 3], 1)
    three, four = two.chunk(2, 1)
    return torch.cat([four, one * three, b.unbind()[0].expand(5, 1)], 1)


def chosen(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    return torch.where(Y > 0, Y * b, Y.sin()) + torch.where(Y.detach() > 1, 0.0, Y)


def gathered(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    return Y.gather(1, CHOSEN.expand(5, 4)) + Y[:, CHOSEN] + Y.index_select(1, CHOSEN) + b[CHOSEN].take(CHOSEN)


def scattered(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    some = Y.scatter(1, CHOSEN[:1].expand(5, 1), Y[:, :1] * b[:1])
    return torch.zeros_like(X).scatter_add(1, CHOSEN.expand(5, 4), Y) + some


def put(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    return Y.index_put((CHOSEN,), b.expand(4, 4), accumulate=True).masked_scatter(MASK[0].expand(5, 4), Y.T)


def pooled(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    images = F.conv2d((X @ W).reshape(5, 1, 2, 2), b.reshape(2, 1, 2, 1), padding=1)
    pooled, places = F.max_pool2d(images, 2, return_indices=True)
    return F.adaptive_avg_pool2d(pooled, 1).flatten(1) * F.max_unpool2d(pooled, places, 2).sum((1, 2, 3)).unsqueeze(1)


def normalised(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    return F.batch_norm(Y, normal(4), normal(4).square() + 1, b, b) + F.layer_norm(Y, (4,), b) + F.rms_norm(Y, [4], b)


def batch_statistics(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return F.batch_norm(X @ W, None, None, b, b, training=True)


def distributed(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    return Y.softmax(1) * Y.log_softmax(0) + (Y + b).logsumexp(1, keepdim=True) + F.softmin(Y, 1)


def summed(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    return Y.cumsum(0) + Y.cumprod(1) + Y.mean() + Y.var(1, keepdim=True) + b.prod() + Y.amax(0) + Y.sort(1).values


def embedded(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    rows = F.embedding(CHOSEN.expand(5, 4), W, padding_idx=0)
    return torch.einsum("nti,i->nt", rows, b) + F.embedding(torch.tensor([0, 1, 1, 3, 2]), W)


def attended(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Q = (X @ W)[None, None]
    return F.scaled_dot_product_attention(Q, Q * b, Q, is_causal=True)[0, 0]


def looks_at_values(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    scale = float(Y.detach().abs().max())
    return (Y if b.detach().sum().item() > 1e9 else Y / scale) * torch.from_numpy(np.cos(Y.detach().numpy()))


def shape_of_values(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    result = Y.clone()
    result[Y > 0] = (Y * b)[Y > 0].tanh()
    return result


def checkpointed(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y: Tensor = checkpoint(lambda W: (X @ W).tanh(), W, use_reentrant=False)
    return Y * b


def custom(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return Cube.apply(X @ W) * b  # type: ignore[no-untyped-call,no-any-return]


def solved(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    M = W @ W.T + torch.eye(4, dtype=W.dtype)
    return torch.linalg.solve(M, X.T).T + b * torch.linalg.cholesky(M).logdet() + torch.linalg.eigvalsh(M)


def one_parameter(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return (X @ W).square()


def a_parameter_itself(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return b.expand(5, 4)


def strided(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return (X @ W).as_strided((5, 2), (4, 2), 1) * b.unfold(0, 2, 2).sum(1)


def repeated(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return (X @ W).repeat(1, 2)[:, 2:6] * b.repeat_interleave(2)[::2].roll(1) + F.pad(b[:3], (0, 1))


def spectrum(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    z = torch.fft.fft(X @ W)
    return (z * z.conj()).real + b


def conjugate_and_original(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """A conjugate shows the same memory with another sign."""
    z = torch.fft.fft(X @ W)
    c = z.conj()
    return (c * z + z * z + c).imag * b


def negative_and_original(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """So does the imaginary part of a conjugate."""
    z = torch.fft.fft(X @ W)
    minus = z.conj().imag
    return minus.sin() * b + 2 * z.imag


def real_and_complex(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    z = torch.view_as_complex((X @ W).reshape(5, 2, 2).contiguous())
    pairs = torch.view_as_real(z)
    z.mul_(2 + 1j)
    return pairs.flatten(1) * b + torch.polar(b.abs(), b).real


def in_two_dtypes(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return (X @ W).to(torch.complex128).real.double() * b


FOLLOWED: list[Function] = [
    in_place, in_place_through_views, swapped_in_place, copied_buffer, shared_buffer, slices, joined, joined_alone,
    cut_up, chosen, gathered, scattered, put, pooled, normalised, batch_statistics, distributed, summed, embedded,
    attended, looks_at_values, shape_of_values, checkpointed, custom, solved, one_parameter, a_parameter_itself,
    strided, repeated, spectrum, conjugate_and_original, negative_and_original, real_and_complex,
    in_two_dtypes,
]  # fmt: skip


# -- models that are not -----------------------------------------------------------------------------------------------


def constant_changed_later(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    scale = X.clone()
    Y = (X @ W) * scale
    with torch.no_grad():
        scale *= 2
    return Y * b


def primal_changed_later(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X @ W
    Z = Y.detach() * (X @ W)
    with torch.no_grad():
        Y.mul_(0.5)
    return Z * b


def view_of_a_buffer(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = torch.zeros_like(X)
    for n in range(len(X)):
        Y[n] = X[n] @ W * b
    return Y


def columns_of_a_buffer(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    Y = X.clone()
    Y[:, CHOSEN[2:]] += (X @ W)[:, CHOSEN[2:]]
    Y[:, 1] = b[0] * (X @ W)[:, 2]
    return Y


MAY_BE_REFUSED: list[Function] = [view_of_a_buffer, columns_of_a_buffer, written_buffer]


# -- replay ------------------------------------------------------------------------------------------------------------


def recorded(forward: Callable[..., Tensor], values: list[Tensor], seed: int = 0) -> tuple[Tape, Tensor, Tensor]:
    """The tape of a forward under the package's rules, with the prediction and its tangent."""
    tangents = [normal(*v.shape, seed=seed + i, dtype=v.dtype) for i, v in enumerate(values)]
    with forward_ad.dual_level(), TangentRules():
        duals = [forward_ad.make_dual(v, t) for v, t in zip(values, tangents, strict=True)]
        recorder = TapeRecorder([forward_ad.unpack_dual(dual).tangent for dual in duals])
        with recorder:
            primal, tangent = forward_ad.unpack_dual(forward(*duals))
    return recorder.finish(tangent, primal.shape), primal, tangent


def vectors(values: list[Tensor], *columns: int, seed: int = 40) -> list[Tensor]:
    """A tangent for each value, columns first."""
    return [normal(*columns, *v.shape, seed=seed + i, dtype=v.dtype) for i, v in enumerate(values)]


def check_replay(function: Function) -> Tape:
    """Runs of a tape with other vectors, many times, with and without vmap, against reverse mode."""
    leaves = [W.clone().requires_grad_(), B.clone().requires_grad_()]
    J = reverse_jacobian(lambda X: function(X, *leaves), leaves, [X])
    tape, primal, _ = recorded(lambda W, b: function(X, W, b), [W.clone().requires_grad_(), B.clone().requires_grad_()])
    with torch.no_grad():
        for seed in (40, 50, 40):
            V = vectors([W, B], seed=seed)
            copies = [v.clone() for v in V]
            expected = (J @ torch.cat([v.flatten() for v in V])).reshape(primal.shape)
            actual = tape.replay(V)
            assert actual.shape == primal.shape
            assert relative_error(actual, expected) < 1e-12
            assert all(torch.equal(v, c) for v, c in zip(V, copies, strict=True)), "it wrote to the vector"
        V = vectors([W, B], 3)
        try:
            together = torch.vmap(lambda *v: tape.replay(v, under_vmap=True))(*V)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return tape  # what vmap cannot follow goes one by one
        for k in range(3):
            assert relative_error(together[k], tape.replay([v[k] for v in V])) < 1e-12
    return tape


@pytest.mark.parametrize("function", FOLLOWED)
def test_replay(function: Function) -> None:
    check_replay(function)


@pytest.mark.parametrize("function", MAY_BE_REFUSED)
def test_replay_or_refusal(function: Function) -> None:
    try:
        check_replay(function)
    except NoTapeError:
        assert function is not written_buffer, "this one is followed"


@pytest.mark.parametrize("function", [constant_changed_later, primal_changed_later])
def test_a_constant_that_changes_later_is_refused(function: Function) -> None:
    with pytest.raises(NoTapeError, match="changes a tensor in place"):
        recorded(lambda W, b: function(X, W, b), [W, B])


def test_a_tangent_that_is_looked_at_is_refused() -> None:
    def looks(W: Tensor) -> Tensor:
        tangent = forward_ad.unpack_dual(W).tangent
        return W * 2 if tangent.sum().item() > 0 else W

    with pytest.raises(NoTapeError, match="Python number"):
        recorded(looks, [W])


def test_writing_through_a_view_of_a_buffer_is_refused() -> None:
    with pytest.raises(NoTapeError):
        recorded(lambda W, b: view_of_a_buffer(X, W, b), [W, B])


def test_nothing_depends_on_the_parameters() -> None:
    tape, _, tangent = recorded(lambda W: X * 2, [W])
    assert tangent is None
    replayed = tape.replay([W])
    assert replayed.shape == X.shape
    assert not replayed.any()
    assert list(tape.constants()) == []


def test_a_tape_holds_no_more_than_it_needs() -> None:
    """What leads nowhere is not replayed, and what nobody reads any more is dropped on the way."""

    def wasteful(W: Tensor) -> Tensor:
        _ = (W @ W).exp().sin()
        return W @ X.T

    assert len(recorded(wasteful, [W])[0]._operations) == len(recorded(lambda W: W @ X.T, [W])[0]._operations)

    def deep(W: Tensor) -> Tensor:
        for _ in range(20):
            W = W * 1.5
        return W

    alive: list[int] = []
    tape, _, _ = recorded(deep, [W])
    for operation in tape._operations:
        real = operation.run

        def run(slots: dict[int, Tensor], under_vmap: bool, real: Any = real) -> None:
            real(slots, under_vmap)
            alive.append(len(slots))

        operation.run = run  # type: ignore[method-assign]
    assert torch.allclose(tape.replay([W]), 1.5**20 * W)
    assert max(alive) <= 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_replay_of_layers(case: Case) -> None:
    """Every kind of layer: what follows a tape is what a forward for each column gives."""
    _, values, _ = case.build()
    torch.manual_seed(0)
    model, X = case.make()
    if isinstance(model, nn.Module):
        model = model.double()
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.data.copy_(value.data)
        forward: Any = lambda *values: torch.func.functional_call(  # noqa: E731
            model, dict(zip(dict(model.named_parameters()), values, strict=True)), (X,)
        )
    else:
        params, function = model
        forward = lambda *values: function(dict(zip(params, values, strict=True)), X)  # noqa: E731
    try:
        tape, _, first = recorded(forward, values)
        _, _, other = recorded(forward, values, seed=7)
    except (NoTapeError, RuntimeError):
        return
    for seed, expected in ((0, first), (7, other)):
        V = [normal(*v.shape, seed=seed + i) for i, v in enumerate(values)]
        with torch.no_grad():
            assert relative_error(tape.replay(V), expected) < 1e-12


# -- in products -------------------------------------------------------------------------------------------------------


def operator(function: Function) -> tuple[GGNLinearOperator, Tensor]:
    """The GGN of the squared error over two mini-batches, and its truth by reverse mode."""
    params = {"W": W.clone().requires_grad_(), "b": B.clone().requires_grad_()}
    model = lambda p, X: function(X, p["W"], p["b"])  # noqa: E731
    inputs = [X, normal(5, 4, seed=9)]
    predictions = [function(inputs_, *params.values()) for inputs_ in inputs]
    data = [(inputs_, torch.zeros_like(f)) for inputs_, f in zip(inputs, predictions, strict=True)]
    J = reverse_jacobian(lambda X: function(X, *params.values()), list(params.values()), inputs)
    # Some of the models mix their data, which the check refuses.
    return GGNLinearOperator(model, nn.MSELoss(reduction="sum"), params, data, check_deterministic=False), 2 * J.T @ J


@pytest.mark.parametrize("max_memory", ["streamed", None, 0, 20000])
@pytest.mark.parametrize("function", [*FOLLOWED, *MAY_BE_REFUSED])
def test_products(function: Function, max_memory: Any) -> None:
    """Right for one and for several columns, first and again, whether there is a tape or not."""
    A, matrix = operator(function)
    if max_memory != "streamed":
        A = A.linearize(max_memory)
    for columns in (4, 1, 12, 4):
        V = normal(20, columns, seed=columns)
        assert relative_error(A @ V, matrix @ V) < 1e-9


def test_what_has_no_tape_is_pushed_by_a_forward_for_each_column() -> None:
    A, _ = operator(view_of_a_buffer)
    A @ vector(A, 3)
    assert A._risk.engine.forward_mode
    assert not A._risk.engine.tape
    followed, _ = operator(in_place)
    followed @ vector(followed, 3)
    assert followed._risk.engine.tape


def test_what_was_changed_behind_autograd_is_refused() -> None:
    """Then a graph is as wrong as a tape."""

    def hidden(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
        Y = X @ W
        Z = Y * Y * b
        Y.data.mul_(2)
        return Z

    A, _ = operator(hidden)
    for product in (lambda: A @ vector(A, 3), lambda: A.linearize(engine="tangents") @ vector(A, 3)):
        with pytest.raises(NotImplementedError):
            product()


def test_masks_that_are_drawn_belong_to_one_matrix() -> None:
    """Dropout: each product is of one mask, that of its columns too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5), nn.Linear(40, 3)).double()
    A = build("GGN", model, classes(), check_deterministic=False)
    V = vector(A, 1).expand(-1, 5).contiguous()
    for operator_ in (A, A.linearize(engine="tangents")):
        R = operator_ @ V
        assert relative_error(R, R[:, :1].expand(-1, 5)) < 1e-12


# -- memory ------------------------------------------------------------------------------------------------------------


def tapes() -> list[Tape]:
    """All tapes that are alive."""
    return [o for o in gc.get_objects() if isinstance(o, Tape)]


@pytest.mark.parametrize("kind", ["GGN", "EF", "Jacobian"])
def test_streamed_products_leave_no_tape(kind: str) -> None:
    gc.collect()
    before = len(tapes())
    A = build(kind, mlp(), classes())
    A @ vector(A, 3)
    assert len(tapes()) == before


def check_release(kind: str, engine: str, collect: bool) -> None:
    """Nothing that was kept outlives the operator."""
    gc.collect()
    before = len(tapes())
    gc.disable()
    try:
        A = build(kind, mlp(), classes())
        kept = A.linearize(engine=engine)
        for columns in (1, 3):
            kept @ vector(A, columns)
        held = [weakref.ref(what) for what in kept._risk.keeper.products()]
        assert len(held) == 3
        del kept
        if collect:
            gc.collect()
        assert [h() for h in held] == [None] * len(held)
        assert len(tapes()) == before
    finally:
        gc.enable()


ENGINES = [("Hessian", "tangents"), *((k, e) for k in ("GGN", "EF") for e in ("tangents", "factors"))]


@pytest.mark.parametrize(("kind", "engine"), [*ENGINES, ("Jacobian", "tangents")])
def test_memory_is_released_with_the_operator(kind: str, engine: str) -> None:
    check_release(kind, engine, collect=True)


@pytest.mark.parametrize(("kind", "engine"), [*ENGINES, ("Jacobian", "tangents")])
def test_memory_is_released_at_once(kind: str, engine: str) -> None:
    """Without waiting for the collector of cycles."""
    check_release(kind, engine, collect=False)
