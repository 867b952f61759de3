"""On a GPU: products equal those in float64 on the CPU, data move batch by batch, results repeat."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import CGInverseLinearOperator
from tests.risk.small import KINDS, SQUARE, build, normal, relative_error, vector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
# Read when the first matrix product runs: without it there is no deterministic one.
if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
#: Monte-Carlo draws come from another generator than on the CPU.
REPEATABLE = [kind for kind in KINDS if kind != "MC"]

Batches = list[tuple[Tensor, Tensor]]


class Transformer(nn.Module):
    """One layer with both kinds of attention calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.query = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, X: Tensor) -> Tensor:
        """Predictions ``[N, 3]``."""
        H = self.layer(self.embedding(X))
        Q = self.query(H).unsqueeze(1)
        A = F.scaled_dot_product_attention(Q, H.unsqueeze(1), H.unsqueeze(1), is_causal=True)
        f: Tensor = self.last(A.squeeze(1).mean(1))
        return f


class Recurrent(nn.Module):
    """An LSTM and its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.last = nn.Linear(5, 3)

    def forward(self, X: Tensor) -> Tensor:
        """Predictions ``[N, 3]``."""
        f: Tensor = self.last(self.lstm(X)[0][:, -1])
        return f


def perceptron() -> nn.Module:
    """Three layers, one of them in place."""
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3))


def convolutional() -> nn.Module:
    """Convolutions and batch norm in eval mode."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "MLP": (perceptron, lambda: normal(9, 5, seed=1)),
    "CNN": (convolutional, lambda: normal(9, 2, 4, 4, seed=1)),
    "transformer": (Transformer, lambda: torch.arange(9 * 6).reshape(9, 6) * 5 % 7),
    "LSTM": (Recurrent, lambda: normal(9, 4, 3, seed=1)),
}


def problem(name: str, dtype: torch.dtype, device: str) -> tuple[nn.Module, Batches]:
    """A model in eval mode and its mini-batches."""
    make, make_inputs = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval().to(device, dtype)
    X, y = make_inputs().to(device), torch.arange(9, device=device) % 3
    X = X.to(dtype) if X.is_floating_point() else X
    return model, list(zip(X.split([4, 3, 2]), y.split([4, 3, 2]), strict=True))


@pytest.fixture
def exact() -> Iterator[None]:
    """Matrix products in full float32."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", REPEATABLE)
def test_equals_the_cpu(kind: str, name: str, dtype: torch.dtype, allowed: float, exact: None) -> None:
    model, data = problem(name, dtype, DEVICE)
    reference, on_cpu = problem(name, torch.float64, "cpu")
    A, B = build(kind, model, data), build(kind, reference, on_cpu)
    for columns in ((), (3,)):
        V = vector(B, *columns)
        result = A @ V.to(DEVICE, dtype)
        assert (result.device.type, result.dtype) == (DEVICE, dtype)
        assert relative_error(result.cpu(), B @ V) < allowed
    if kind in SQUARE:
        (gradients, value), (others, other) = A.gradient_and_loss(), B.gradient_and_loss()
        flat, expected = (torch.cat([g.flatten().cpu() for g in part]) for part in (gradients, others))
        assert relative_error(flat, expected) < allowed
        assert relative_error(value.cpu(), other) < allowed


@pytest.mark.parametrize("name", MODELS)
def test_samples(name: str) -> None:
    """Many samples come near the GGN; few are the same at each product."""
    model, data = problem(name, torch.float64, DEVICE)
    A, G = build("MC", model, data, mc_samples=4000), build("GGN", model, data)
    v = vector(G).to(DEVICE)
    assert relative_error((A @ v).cpu(), (G @ v).cpu()) < 0.15
    few = build("MC", model, data, seed=3)
    assert torch.allclose(few @ v, few @ v, rtol=1e-10)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_data_on_the_cpu(kind: str, pinned: bool) -> None:
    """They are moved batch by batch, and the loader keeps its own."""
    model, data = problem("MLP", torch.float64, DEVICE)
    X, y = (torch.cat(parts).cpu() for parts in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(X, y), batch_size=4, pin_memory=pinned)
    A, B = build(kind, model, loader), build(kind, model, list(zip(X.to(DEVICE).split(4), y.to(DEVICE).split(4))))
    V = vector(B, 3).to(DEVICE)
    assert relative_error((A @ V).cpu(), (B @ V).cpu()) < 1e-10
    assert X.device.type == "cpu"


def test_packed_sequences() -> None:
    """Their sizes stay on the CPU, wherever the values go."""

    class Packed(Recurrent):
        def forward(self, X: Any) -> Tensor:
            f: Tensor = self.last(self.lstm(X)[1][0][-1])
            return f

    model = Packed().to(DEVICE)
    X = nn.utils.rnn.pack_sequence([torch.rand(n, 3) for n in (4, 3, 3, 1)])
    A = build("GGN", model, [(X, torch.tensor([0, 1, 2, 0]))])
    assert (A @ vector(A).to(DEVICE)).isfinite().all()


def test_random_state_of_the_device() -> None:
    """Neither the check nor products move it."""
    model, data = problem("MLP", torch.float32, DEVICE)
    torch.cuda.manual_seed(5)
    torch.rand(3, device=DEVICE)
    state = torch.cuda.get_rng_state()
    for kind in KINDS:
        A = build(kind, model, data)
        A @ vector(A).to(DEVICE)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_dropout_on_the_device_is_found() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).to(DEVICE).train()
    _, data = problem("MLP", torch.float32, DEVICE)
    with pytest.raises(RuntimeError, match="Dropout '1'"):
        build("GGN", model, data)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["Hessian", "GGN", "MC", "EF", "GGNDiagonal", "Jacobian"])
def test_bitwise_equal_under_deterministic_algorithms(kind: str, name: str) -> None:
    model, data = problem(name, torch.float32, DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        V = None
        results = []
        for _ in range(2):
            A = build(kind, model, data)
            V = vector(A, 3).to(DEVICE) if V is None else V
            results += [A @ V, A @ V]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("name", ["MLP", "LSTM"])
def test_conjugate_gradients(name: str) -> None:
    model, data = problem(name, torch.float64, DEVICE)
    A = build("GGN", model, data).damped(0.1)
    B = vector(A, 4).to(DEVICE)
    inverse = CGInverseLinearOperator(A, rtol=1e-10, max_iter=500)
    X = inverse @ B
    assert X.device.type == DEVICE
    assert relative_error((A @ X).cpu(), B.cpu()) < 1e-9
    assert bool(inverse.info.converged.all())


def test_out_of_memory_takes_fewer_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are halved and tried again; the memory limit is as if the device were nearly full."""
    sizes: list[int] = []
    real = torch.func.vmap

    def scarce(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        def run(*columns: Any) -> Any:
            sizes.append(len(columns[0]))
            if len(columns[0]) > 3:
                torch.empty(2**50, dtype=torch.uint8, device=DEVICE)  # a true error of the allocator
            return real(function, *args, **kwargs)(*columns)

        return run

    model, data = problem("MLP", torch.float64, DEVICE)
    A, B = (build("GGN", model, data, **options) for options in ({}, {"chunk_size": 1}))
    V = vector(A, 9).to(DEVICE)
    expected = B @ V
    monkeypatch.setattr(torch.func, "vmap", scarce)
    assert relative_error((A @ V).cpu(), expected.cpu()) < 1e-10
    assert 8 in sizes
    assert 2 in sizes


def test_peak_memory_of_many_columns() -> None:
    """64 columns take no more than about four results above eight of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10))
    model = model.to(DEVICE)
    data = [(torch.rand(8192, 32, device=DEVICE), torch.randint(10, (8192,), device=DEVICE))] * 2
    for kind in ("Hessian", "GGN", "EF"):
        A = build(kind, model, data, check_deterministic=False)
        peaks = []
        for num_columns in (8, 64):
            V = torch.ones(A.shape[1], num_columns, device=DEVICE)
            A @ V[:, :1]
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            A @ V
            peaks.append(torch.cuda.max_memory_allocated() - before)
        result = 64 * A.shape[1] * 4
        assert peaks[1] - peaks[0] <= 4 * result, f"{kind}: {peaks} bytes, one result has {result}"


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EF", "GGNDiagonal"])
def test_bfloat16(kind: str) -> None:
    model, data = problem("MLP", torch.bfloat16, DEVICE)
    reference = problem("MLP", torch.bfloat16, "cpu")[0].double()
    A = build(kind, model, data)
    B = build(kind, reference, [(X.cpu().double(), y.cpu()) for X, y in data])
    v = vector(B).bfloat16()
    assert (A @ v.to(DEVICE)).dtype == torch.bfloat16
    assert relative_error((A @ v.to(DEVICE)).cpu(), B @ v.double()) < 0.05


def test_autocast_is_refused_on_the_device() -> None:
    model, data = problem("MLP", torch.float32, DEVICE)
    A = build("GGN", model, data)
    with torch.autocast(DEVICE, dtype=torch.bfloat16), pytest.raises(NotImplementedError, match=f"active for {DEVICE}"):
        A @ vector(A).to(DEVICE)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of no concern here
        assert (A @ vector(A).to(DEVICE)).isfinite().all()


def test_vectors_on_another_device() -> None:
    model, data = problem("MLP", torch.float32, DEVICE)
    A = build("GGN", model, data)
    with pytest.raises(ValueError, match=r"expected torch.float32 on cuda:0, got torch.float32 on cpu"):
        A @ vector(A)


def test_parameters_on_two_devices() -> None:
    model = nn.Sequential(nn.Linear(5, 4).to(DEVICE), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"'0.weight' is torch.float32 on cuda:0, '1.weight' is torch.float32 on cpu"):
        build("GGN", model, [], params=dict(model.named_parameters()))
