"""Laws that every linear operator obeys, each a function of an operator and, where it needs one, its dense truth.

The laws know the public contract only: ``@`` in the formats of the documentation, the Python operators, ``shape``,
``dtype``, ``device``, ``domain``, ``codomain``, ``to_dense``, ``to_scipy``, ``linearize``, ``damped``, ``adjoint``.
They flatten and restore formats by themselves, since a law that used the package's own conversion could not see it
fail.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.problems import Instance

RTOL = 1e-9
ATOL = 1e-12


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers that do not touch the global random state."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, what: str, rtol: float = RTOL) -> None:
    """Compare two tensors in the Frobenius norm."""
    assert isinstance(actual, Tensor), f"{what}: expected a tensor, got {type(actual).__name__}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, wanted {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, wanted {expected.dtype}"
    assert not actual.requires_grad, f"{what}: the result is attached to a graph"
    difference, size = (actual - expected).norm().item(), expected.norm().item()
    assert difference <= rtol * size + ATOL, f"{what}: error {difference:.2e} against a truth of norm {size:.2e}"


# -- formats -----------------------------------------------------------------------------------------------------------


def split_columns(M: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Cut a matrix [D, K], or a vector [D], into tensors [*shape, K], or [*shape]."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    return [part.reshape((*shape, *M.shape[1:])) for part, shape in zip(M.split(sizes), shapes, strict=True)]


def split_rows(M: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Cut a matrix [K, D], or a vector [D], into tensors [K, *shape], or [*shape]."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    parts = M.split(sizes, dim=-1)
    return [part.reshape((*M.shape[:-1], *shape)) for part, shape in zip(parts, shapes, strict=True)]


def shapes_of(space: Any) -> list[tuple[int, ...]]:
    """Return the shapes of a Space's tensors."""
    return [tuple(shape) for shape in space.shapes]


def check_attributes(A: Any, D: Tensor) -> None:
    """Shape, dtype, device and ``repr``."""
    assert tuple(A.shape) == tuple(D.shape)
    assert A.dtype == D.dtype
    assert A.device == D.device
    text = repr(A)
    for part in (type(A).__name__, str(A.shape[0]), str(A.shape[1]), "float64", "cpu"):
        assert part in text, f"repr lacks {part!r}: {text}"


def check_products(A: Any, D: Tensor, rtol: float = RTOL) -> None:
    """A vector and a few random columns from either side; a wrong entry anywhere would show in each of them."""
    V, W = noise(A.shape[1], 4, seed=20), noise(2, A.shape[0], seed=21)
    assert_close(A @ V, D @ V, "A @ V", rtol)
    assert_close(A @ V[:, 0], D @ V[:, 0], "A @ v", rtol)
    assert_close(W @ A, W @ D, "W @ A", rtol)


def check_dense(A: Any, D: Tensor, rtol: float = RTOL) -> None:
    """All columns at once, each as its own product, and ``to_dense``."""
    identity = torch.eye(D.shape[1], dtype=D.dtype)
    assert_close(A @ identity, D, "A @ identity", rtol)
    assert_close(A @ identity[:, 0], D[:, 0], "A @ e_0", rtol)
    assert_close(A.to_dense(), D, "to_dense()", rtol)


def check_formats(A: Any, D: Tensor) -> None:
    """``A @ M`` answers in the format of the question: flat, list or dict, vector or matrix."""
    inputs, outputs = shapes_of(A.domain), shapes_of(A.codomain)
    for K in (None, 1, 3):
        M = noise(D.shape[1], *([] if K is None else [K]))
        truth = D @ M
        assert_close(A @ M, truth, f"flat, K={K}")
        answer = A @ split_columns(M, inputs)
        assert isinstance(answer, list), f"a list was asked, the answer is {type(answer).__name__}"
        assert len(answer) == len(outputs)
        for i, (a, t) in enumerate(zip(answer, split_columns(truth, outputs), strict=True)):
            assert_close(a, t, f"entry {i} of a list, K={K}")
        if A.domain.names is not None and A.codomain.names is not None:
            answer = A @ dict(zip(A.domain.names, split_columns(M, inputs), strict=True))
            assert isinstance(answer, dict), f"a dict was asked, the answer is {type(answer).__name__}"
            assert list(answer) == list(A.codomain.names)
            for name, t in zip(answer, split_columns(truth, outputs), strict=True):
                assert_close(answer[name], t, f"entry {name!r} of a dict, K={K}")


def check_left_formats(A: Any, D: Tensor) -> None:
    """``M @ A`` takes the columns first and answers in the format of the question."""
    inputs, outputs = shapes_of(A.codomain), shapes_of(A.domain)
    for K in (None, 1, 3):
        M = noise(*([] if K is None else [K]), D.shape[0])
        truth = M @ D
        assert_close(M @ A, truth, f"flat @ A, K={K}")
        answer = split_rows(M, inputs) @ A
        assert isinstance(answer, list), f"a list was asked, the answer is {type(answer).__name__}"
        for i, (a, t) in enumerate(zip(answer, split_rows(truth, outputs), strict=True)):
            assert_close(a, t, f"entry {i} of a list @ A, K={K}")
        if A.domain.names is not None and A.codomain.names is not None:
            answer = dict(zip(A.codomain.names, split_rows(M, inputs), strict=True)) @ A
            assert isinstance(answer, dict)
            for name, t in zip(A.domain.names, split_rows(truth, outputs), strict=True):
                assert_close(answer[name], t, f"entry {name!r} of a dict @ A, K={K}")


# -- algebra -----------------------------------------------------------------------------------------------------------


def check_linearity(A: Any) -> None:
    """A (a u + b v) = a A u + b A v."""
    u, v = noise(A.shape[1], seed=1), noise(A.shape[1], seed=2)
    assert_close(A @ (1.7 * u - 0.3 * v), 1.7 * (A @ u) - 0.3 * (A @ v), "linearity")


def check_adjoint(A: Any, D: Tensor) -> None:
    """The dot test for ``A.H``, ``A.T`` and ``A.adjoint()``, and an involution."""
    u, v = noise(A.shape[0], seed=3), noise(A.shape[1], seed=4)
    for name, B in (("H", A.H), ("T", A.T), ("adjoint()", A.adjoint())):
        assert tuple(B.shape) == (A.shape[1], A.shape[0])
        left, right = torch.dot(u, A @ v).item(), torch.dot(B @ u, v).item()
        size = ((A @ v).norm() * u.norm()).item()
        assert abs(left - right) <= RTOL * size + ATOL, f"dot test of {name}: {left} against {right}"
        assert_close(B @ u, D.T @ u, name)
        assert_close(B.H @ v, D @ v, f"{name}.H")
    if A.SELF_ADJOINT:
        assert A.H is A
        assert_close(u @ A, A @ u, "self-adjoint: u @ A = A @ u")


def check_arithmetic(A: Any, D: Tensor) -> None:
    """Sums, differences, scalings, negation, chains and damping against the same on dense matrices."""
    V = noise(A.shape[1], 2, seed=5)
    W = noise(A.shape[0], 2, seed=6)
    cases: dict[str, tuple[Any, Tensor]] = {
        "A + A": (A + A, 2 * D),
        "A - 0.5 A": (A - 0.5 * A, 0.5 * D),
        "A * 3": (A * 3.0, 3 * D),
        "A / 4": (A / 4, D / 4),
        "-A": (-A, -D),
        "sum": (sum([A, A, A]), 3 * D),
    }
    for name, (B, truth) in cases.items():
        assert_close(B @ V, truth @ V, name)
        assert_close(B.H @ W, truth.T @ W, f"({name}).H")
    for name, B, truth in (("Aᵀ A", A.H @ A, D.T @ D), ("A Aᵀ", A @ A.H, D @ D.T)):
        X = noise(truth.shape[1], 2, seed=7)
        assert_close(B @ X, truth @ X, name)
        assert_close(B.H @ X, truth.T @ X, f"({name}).H")
    if shapes_of(A.domain) == shapes_of(A.codomain):
        damped = A.damped(0.3)
        truth = D + 0.3 * torch.eye(len(D), dtype=D.dtype)
        assert_close(damped @ V, truth @ V, "damped")
        assert_close(damped.to_dense(), truth, "damped.to_dense()")
        assert damped.SELF_ADJOINT == A.SELF_ADJOINT
        assert damped.POSITIVE_SEMIDEFINITE == A.POSITIVE_SEMIDEFINITE


def check_definiteness(A: Any, D: Tensor) -> None:
    """What the class promises about symmetry and sign is true of the truth."""
    if A.SELF_ADJOINT:
        assert_close(D.T.contiguous(), D, "the truth is not symmetric")
    if A.POSITIVE_SEMIDEFINITE:
        assert torch.linalg.eigvalsh((D + D.T) / 2)[0] >= -1e-10 * D.norm()


# -- representations ---------------------------------------------------------------------------------------------------


def check_linearize(A: Any, D: Tensor) -> None:
    """``linearize()`` is mathematically the identity."""
    V, W = noise(A.shape[1], 3, seed=8), noise(A.shape[0], 3, seed=9)
    kept = A.linearize()
    assert_close(kept @ V, D @ V, "linearize()")
    assert_close(kept @ V[:, 0], D @ V[:, 0], "linearize(), used again with one column")
    assert_close(kept.H @ W, D.T @ W, "linearize().H")


def check_scipy(A: Any, D: Tensor) -> None:
    """``to_scipy`` with its four products, in the operator's own dtype and in another."""
    V, W = noise(A.shape[1], 3, seed=10).numpy(), noise(A.shape[0], 3, seed=11).numpy()
    for dtype, rtol in ((None, RTOL), (np.float32, 1e-5)):
        B, T = A.to_scipy(dtype=dtype), D.numpy()
        wanted = np.dtype(np.float64 if dtype is None else dtype)
        assert B.shape == tuple(D.shape)
        assert B.dtype == wanted
        x, y, X, Y = (M.astype(wanted) for M in (V[:, 0], W[:, 0], V, W))
        products: dict[str, tuple[Callable[[], Any], Any]] = {
            "matvec": (lambda x=x, B=B: B.matvec(x), T @ x),
            "matmat": (lambda X=X, B=B: B.matmat(X), T @ X),
            "rmatvec": (lambda y=y, B=B: B.rmatvec(y), T.T @ y),
            "rmatmat": (lambda Y=Y, B=B: B.rmatmat(Y), T.T @ Y),
        }
        for name, (product, truth) in products.items():
            answer = product()
            assert answer.dtype == wanted, f"{name}: dtype {answer.dtype}"
            assert answer.shape == truth.shape
            error, size = np.linalg.norm(answer - truth), np.linalg.norm(truth)
            assert error <= rtol * size + max(ATOL, rtol * 1e-3), f"{name}: error {error:.2e} of {size:.2e}"


def check_chunks(build: Callable[..., Any], D: Tensor) -> None:
    """The number of columns worked on at a time does not matter, on either side."""
    V, W = noise(D.shape[1], 5, seed=12), noise(5, D.shape[0], seed=13)
    for chunk_size in (1, 3, 5, 100, "auto"):
        A = build(chunk_size=chunk_size)
        assert_close(A @ V, D @ V, f"chunk_size={chunk_size!r}")
        assert_close(W @ A, W @ D, f"transposed, chunk_size={chunk_size!r}")


def check_repeatable(A: Any) -> None:
    """Two products are bitwise equal, whatever the global random state and the number of columns asked in between."""
    v = noise(A.shape[1], seed=14)
    first = A @ v
    with restored_random_state():
        torch.manual_seed(99)
        assert torch.equal(A @ v, first), "two products differ"
    V = noise(A.shape[1], 3, seed=15)
    assert torch.equal(A @ V, A @ V), "two products with a matrix differ"


def check_grad_modes(A: Any, D: Tensor) -> None:
    """Products work under ``no_grad`` and ``inference_mode``, and with a vector that requires gradients."""
    v = noise(A.shape[1], seed=16)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(A @ v, D @ v, mode.__name__)
    assert_close(A @ v.clone().requires_grad_(True), D @ v, "a vector that requires gradients")


# -- nothing of the user's changes -------------------------------------------------------------------------------------


@contextmanager
def restored_random_state() -> Iterator[None]:
    """Restore the global random states of torch, NumPy and Python at the end."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def modules_of(instance: Instance) -> list[nn.Module]:
    """Return all modules that can be reached from a problem's model and loss."""
    roots = [root for root in (instance.model, instance.loss) if isinstance(root, nn.Module)]
    closure = getattr(instance.model, "__closure__", None) or ()
    roots += [cell.cell_contents for cell in closure if isinstance(cell.cell_contents, nn.Module)]
    return [module for root in roots for module in root.modules()]


def snapshot(instance: Instance) -> dict[str, Any]:
    """Note everything of the user's that an operator could change by accident."""
    modules = modules_of(instance)
    tensors = [
        *instance.tensors,
        *(p for m in modules for p in m.parameters()),
        *(b for m in modules for b in m.buffers()),
    ]
    hooks = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return {
        "identities": [id(t) for t in tensors],
        "values": [t.detach().clone() for t in tensors],
        "requires_grad": [t.requires_grad for t in tensors],
        "grad": [None if t.grad is None else (id(t.grad), t.grad.clone()) for t in tensors],
        "tensor hooks": [
            (len(t._backward_hooks or {}), len(getattr(t, "_post_accumulate_grad_hooks", None) or {})) for t in tensors
        ],
        "modes": [m.training for m in modules],
        "module hooks": [[len(getattr(m, hook)) for hook in hooks] for m in modules],
        "attributes": [sorted(vars(m)) for m in modules],
        "torch random state": torch.get_rng_state(),
        "numpy random state": np.random.get_state(),
        "python random state": random.getstate(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "data": [t.clone() for item in instance.data for t in leaves(item)],
    }


def leaves(item: Any) -> Iterator[Tensor]:
    """Go through the tensors of a loader item."""
    if isinstance(item, Tensor):
        yield item
    else:
        for part in item.values() if isinstance(item, Mapping) else item:
            yield from leaves(part)


def same(a: Any, b: Any) -> bool:
    """Compare nested values with tensors and arrays in them."""
    if isinstance(a, Tensor | np.ndarray):
        return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def check_nothing_changed(instance: Instance, build: Callable[[], Any], linearize: bool = True) -> None:
    """Construct an operator and take products with it: the user's objects and the random states stay as they were."""
    for t in instance.tensors:
        if t.requires_grad:
            t.grad = torch.full_like(t, 0.5)
    before = snapshot(instance)
    A = build()
    A @ noise(A.shape[1], 2)
    noise(2, A.shape[0]) @ A
    if linearize:
        A.linearize() @ noise(A.shape[1])
    after = snapshot(instance)
    for key, value in before.items():
        assert same(value, after[key]), f"changed: {key}"
