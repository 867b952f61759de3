"""Low precision, data and vectors of inference mode, progress bars."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.risk.small import (
    KINDS,
    SQUARE,
    build,
    classes,
    inputs,
    labels,
    mlp,
    numbers,
    relative_error,
    vector,
)

LOSSES = {"cross-entropy": nn.CrossEntropyLoss(), "squared error": nn.MSELoss(reduction="sum")}


def in_dtype(kind: str, loss: str, dtype: torch.dtype) -> Any:
    """The operator with everything rounded to bfloat16, computed in a dtype."""
    data = classes() if loss == "cross-entropy" else numbers()
    model = mlp().to(torch.bfloat16).to(dtype)
    rounded = [(X.bfloat16().to(dtype), y.bfloat16().to(dtype) if y.is_floating_point() else y) for X, y in data]
    return build(kind, model, rounded, LOSSES[loss])


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "MC"])
def test_low_precision(kind: str, loss: str, dtype: torch.dtype, allowed: float) -> None:
    """Within the rounding of the dtype of the same in float64, and in the dtype of the parameters."""
    A, B = in_dtype(kind, loss, dtype), in_dtype(kind, loss, torch.float64)
    for columns in ((), (3,)):
        V = vector(B, *columns).bfloat16()
        result = A @ V.to(dtype)
        assert result.dtype == A.dtype == dtype
        assert relative_error(result, B @ V.double()) < allowed
    if kind in SQUARE:
        (gradients, value), (others, other) = A.gradient_and_loss(), B.gradient_and_loss()
        assert {g.dtype for g in gradients} == {value.dtype} == {dtype}
        assert relative_error(torch.cat([g.flatten() for g in gradients]), flat(others)) < allowed
        assert relative_error(value, other) < allowed


def flat(tensors: list[Tensor]) -> Tensor:
    """One vector of all."""
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_in_low_precision(dtype: torch.dtype) -> None:
    """The draws may differ in single data; the matrix is that of as many samples."""
    A = build("MC", mlp().to(dtype), classes(dtype=dtype), mc_samples=2000)
    G = build("GGN", mlp(), classes())
    v = vector(G)
    assert relative_error(A @ v.to(dtype), G @ v) < 0.15
    assert torch.equal(A @ v.to(dtype), A @ v.to(dtype))


def test_sums_of_many_batches_in_bfloat16() -> None:
    """Added up in bfloat16, equal summands would stall at 256 times the first."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    for kind in ("Hessian", "GGN", "GGNDiagonal"):
        A = build(kind, model, [(one, one)] * 320, nn.MSELoss(reduction="sum"), check_deterministic=False)
        assert (A @ torch.ones(1, dtype=torch.bfloat16)).item() == 640


def test_float16_sums_that_do_not_fit() -> None:
    """The sum over the entries of a product exceeds float16, the entries do not."""
    model = nn.Linear(400, 2, bias=False).half()
    with torch.no_grad():
        model.weight.zero_()
    X = torch.ones(8, 400, dtype=torch.float16)
    A = build("GGN", model, [(X, torch.zeros(8, 2, dtype=torch.float16))], nn.MSELoss(reduction="sum"))
    v = torch.full((800,), 0.03125, dtype=torch.float16)
    assert (A @ v).tolist() == [2 * 8 * 400 * 0.03125] * 800


@pytest.mark.parametrize("kind", KINDS)
def test_data_and_vectors_of_inference_mode(kind: str) -> None:
    A = build(kind, mlp(), classes())
    V = vector(A, 3)
    expected = A @ V
    with torch.inference_mode():
        data = [(X.clone(), y.clone()) for X, y in classes()]
        W = V.clone()
        inside = data[0][0].is_inference() and W.is_inference()
    assert inside
    B = build(kind, mlp(), data)
    assert relative_error(B @ W, expected) < 1e-12
    with torch.inference_mode():
        assert relative_error(B @ W, expected) < 1e-12
        assert relative_error(B @ W[:, 0], expected[:, 0]) < 1e-12
        parts = [w.clone() for w in B.domain.split(W)]
        assert relative_error(B.codomain.merge(B @ parts), expected) < 1e-12


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_inside_of_a_mode(kind: str, mode: Any) -> None:
    """Construction, first use of what is computed once, gradients."""
    model = mlp()
    expected = build(kind, model, classes())
    v = vector(expected)
    with mode():
        A = build(kind, model, classes())
        result = A @ v
        assert A.shape == expected.shape
        assert torch.equal(result, expected @ v)
        assert torch.equal(A.T @ (expected @ v), expected.T @ (expected @ v))
        if kind in SQUARE:
            assert torch.equal(A.gradient_and_loss()[1], expected.gradient_and_loss()[1])
            assert torch.equal(A.frozen() @ v, result)
    # what was kept inside can be used outside
    assert torch.equal(A @ v, result)
    result.clone().requires_grad_().sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_progress_bars(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = mlp()
    A = build(kind, model, classes(), progressbar=True)
    name = type(A).__name__.removeprefix("Transposed")
    seen = capfd.readouterr()
    assert name in seen.err
    assert "check" in seen.err
    A @ vector(A)
    seen = capfd.readouterr()
    assert name in seen.err
    assert ("diagonal" if "Diagonal" in kind else "product") in seen.err
    assert seen.out == ""
    if kind in SQUARE:
        A.gradient_and_loss()
        seen = capfd.readouterr()
        assert name in seen.err
        assert "gradient" in seen.err


@pytest.mark.parametrize("kind", KINDS)
def test_silence(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        A = build(kind, mlp(), [(inputs(), labels())])
        A @ vector(A)
        A @ vector(A, 3)
        repr(A)
        if kind in SQUARE:
            A.gradient_and_loss()
    seen = capfd.readouterr()
    assert (seen.out, seen.err) == ("", "")


@pytest.mark.parametrize("kind", KINDS)
def test_integer_inputs_are_left_alone(kind: str) -> None:
    """Words stay words, whatever the dtype of the parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3)).bfloat16()
    words = torch.tensor([[0, 1], [2, 3], [4, 4]])
    A = build(kind, model, [(words, labels(3))])
    result = A @ vector(A)
    assert result.dtype == torch.bfloat16
    assert result.isfinite().all()
