"""On a GPU: KFAC, EKFAC and KFOC equal those in float64 on the CPU, and states go from one device to the other."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator, KFOCLinearOperator
from tests.gpu.test_cuda import DEVICE, MODELS, exact, problem
from tests.risk.small import normal, relative_error

__all__ = ["exact"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLASSES: list[Any] = [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator]
FISHERS = ("type-2", "mc", "empirical", "forward-only")
CASES = [(cls, f) for cls in CLASSES for f in FISHERS if f != "forward-only" or cls is KFACLinearOperator]
#: Monte-Carlo draws come from another generator than on the CPU.
REPEATABLE = [(cls, f) for cls, f in CASES if f != "mc"]


def make(cls: Any, fisher: str, name: str, dtype: torch.dtype, device: str, **options: Any) -> Any:
    """An operator of all parameters of a model."""
    model, data = problem(name, dtype, device)
    options = {"check_deterministic": False, "fisher_type": fisher, **options}
    return cls(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data, **options)


def devices(A: Any) -> set[str]:
    """Where the factors are."""
    names = range(len(A.domain.shapes))
    return {t.device.type for name in names for t in A.factors(name).values()}


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("cls", "fisher"), REPEATABLE)
def test_equals_the_cpu(cls: Any, fisher: str, name: str, dtype: torch.dtype, allowed: float, exact: None) -> None:
    """Eigenbases of factors without full rank are not unique, so EKFAC is compared by what does not depend on them."""
    A, B = make(cls, fisher, name, dtype, DEVICE), make(cls, fisher, name, torch.float64, "cpu")
    V = normal(B.shape[1], 3, seed=3)
    result = A @ V.to(DEVICE, dtype)
    assert (result.device.type, result.dtype) == (DEVICE, dtype)
    assert devices(A) == {DEVICE}
    assert relative_error(A.trace().cpu(), B.trace()) < allowed
    assert [row.kind for row in A.blocks] == [row.kind for row in B.blocks]
    if cls is KFACLinearOperator:
        assert relative_error(result.cpu(), B @ V) < allowed
        assert relative_error(A.diagonal().cpu(), B.diagonal()) < allowed
    if cls is KFOCLinearOperator and dtype == torch.float64:
        assert relative_error(result.cpu(), B @ V) < 1e-6


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "forward-only"])
def test_options(fisher: str, approx: str, separate: bool) -> None:
    options = {"kfac_approx": approx, "separate_weight_and_bias": separate, "weight_fn": lambda X, y: 1.0 + y}
    for name in ("CNN", "transformer"):
        A, B = (make(KFACLinearOperator, fisher, name, torch.float64, d, **options) for d in (DEVICE, "cpu"))
        assert relative_error(A.to_dense().cpu(), B.to_dense()) < 1e-9


@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_closed_forms(cls: Any, fisher: str) -> None:
    """Against the dense matrix that they belong to."""
    K = make(cls, fisher, "MLP", torch.float64, DEVICE)
    M, v = K.to_dense(), normal(K.shape[1], 2, seed=4).to(DEVICE)
    eye = torch.eye(len(M), dtype=M.dtype, device=DEVICE)
    solution = K.inverse(0.1, use_exact_damping=True) @ v
    assert solution.device.type == DEVICE
    assert relative_error(solution.cpu(), torch.linalg.solve(M + 0.1 * eye, v).cpu()) < 1e-8
    for inverse in (
        K.inverse(0.1),
        K.damped(0.1).inverse(),
        K.inverse(0.1, True) if cls is not EKFACLinearOperator else K,
    ):
        assert (inverse @ v).device.type == DEVICE and bool((inverse @ v).isfinite().all())
    assert relative_error((K.sqrt() @ (K.sqrt() @ v)).cpu(), (M @ v).cpu()) < 1e-8
    assert relative_error(K.damped(0.1).logdet().cpu(), torch.logdet(M + 0.1 * eye).cpu()) < 1e-8
    assert relative_error(K.frobenius_norm().cpu(), M.norm().cpu()) < 1e-10
    samples = K.sample(3, generator=torch.Generator(DEVICE).manual_seed(0))
    assert samples.device.type == DEVICE and samples.shape == (len(M), 3)


@pytest.mark.parametrize("cls", CLASSES)
def test_samples_come_near_the_exact_matrix(cls: Any) -> None:
    """KFAC's factors do; the seed gives one matrix, and the global state of the device stays."""
    state = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
    few = [make(cls, "mc", "MLP", torch.float64, DEVICE, seed=3).to_dense() for _ in range(2)]
    assert relative_error(few[0].cpu(), few[1].cpu()) < 1e-9
    assert torch.equal(torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state(), state)
    many = make(KFACLinearOperator, "mc", "MLP", torch.float64, DEVICE, mc_samples=3000)
    assert relative_error(many.to_dense().cpu(), make(KFACLinearOperator, "type-2", "MLP", torch.float64, "cpu")
                          .to_dense()) < 0.15  # fmt: skip


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_data_on_the_cpu(cls: Any, pinned: bool) -> None:
    """They are moved batch by batch, and the loader keeps its own."""
    model, data = problem("MLP", torch.float64, DEVICE)
    X, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(X.cpu(), y.cpu()), batch_size=4, pin_memory=pinned)
    params = dict(model.named_parameters())
    A = cls(model, nn.CrossEntropyLoss(), params, loader, fisher_type="empirical")
    B = cls(
        model, nn.CrossEntropyLoss(), params, list(zip(X.split(4), y.split(4), strict=True)), fisher_type="empirical"
    )
    assert relative_error(A.trace().cpu(), B.trace().cpu()) < 1e-10


def moved(state: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """As ``torch.load(map_location=...)`` would, which leaves no tensor where it was."""
    return {n: t.to(device) for n, t in state.items()}


@pytest.mark.parametrize(("saved", "loaded"), [(DEVICE, "cpu"), ("cpu", DEVICE), (DEVICE, DEVICE)])
@pytest.mark.parametrize("between", ["cpu", DEVICE])
@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_states_move(cls: Any, fisher: str, between: str, saved: str, loaded: str) -> None:
    """Finished ones between all devices; the others too, as long as nothing is drawn."""
    A = make(cls, fisher, "MLP", torch.float64, saved).compute()
    B = make(cls, fisher, "MLP", torch.float64, loaded)
    B.load_state_dict(moved(A.state_dict(), between))
    assert devices(B) == {torch.device(loaded).type}
    assert relative_error(B.to_dense().cpu(), A.to_dense().cpu()) < 1e-12
    if fisher == "mc" and saved != loaded:
        return
    for k in (1, 2, 4):
        part = make(cls, fisher, "MLP", torch.float64, saved).compute(k)
        C = make(cls, fisher, "MLP", torch.float64, loaded)
        C.load_state_dict(moved(part.state_dict(), between))
        assert relative_error(C.to_dense().cpu(), A.to_dense().cpu()) < 1e-6
        assert devices(C) == {torch.device(loaded).type}


@pytest.mark.parametrize(("cls", "fisher"), CASES)
def test_resumed_with_the_same_bits(cls: Any, fisher: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        expected = make(cls, fisher, "MLP", torch.float32, DEVICE).compute().state_dict()
        for k in (1, 2, 3, 4):
            A = make(cls, fisher, "MLP", torch.float32, DEVICE)
            A.load_state_dict(make(cls, fisher, "MLP", torch.float32, DEVICE).compute(k).state_dict())
            found = A.compute().state_dict()
            assert [n for n in expected if not torch.equal(found[n], expected[n])] == []
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_bfloat16(cls: Any, fisher: str) -> None:
    """Factors are summed and decomposed in float32."""
    A = make(cls, fisher, "MLP", torch.bfloat16, DEVICE)
    B = make(cls, fisher, "MLP", torch.float64, "cpu")
    v = normal(A.shape[1], seed=3).to(DEVICE, torch.bfloat16)
    assert (A @ v).dtype == torch.bfloat16
    assert bool((A.inverse(0.1) @ v).isfinite().all())
    assert relative_error(A.trace().cpu(), B.trace()) < 0.05


def test_forward_only_in_a_process_group(tmp_path: Any) -> None:
    """Sums are reduced on the device, counts among them, which are made on none in particular."""
    backend = "nccl" if DEVICE == "cuda" and dist.is_nccl_available() else "gloo"
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        for cls, fisher in CASES:
            for name in ("MLP", "transformer"):
                A = make(cls, fisher, name, torch.float32, DEVICE, process_group=dist.group.WORLD)
                B = make(cls, fisher, name, torch.float32, DEVICE)
                assert relative_error(A.trace().cpu(), B.trace().cpu()) < 1e-4
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("cls", CLASSES)
def test_as_preconditioner(cls: Any) -> None:
    """A product with the inverse stays on the device, next to the matrix that it approximates."""
    model, data = problem("MLP", torch.float64, DEVICE)
    G = GGNLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    P = make(cls, "type-2", "MLP", torch.float64, DEVICE).inverse(0.1)
    v = normal(G.shape[1], 2, seed=5).to(DEVICE)
    assert (P @ (G @ v)).device.type == DEVICE
    assert relative_error((P @ (G @ v)).cpu(), P.to_dense().cpu() @ (G @ v).cpu()) < 1e-10


def test_peak_memory_of_columns() -> None:
    """KFAC of two mini-batches takes no more than of one, beside its sums."""
    if DEVICE != "cuda":
        pytest.skip("the allocator of CUDA counts")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)).to(DEVICE)
        batch = torch.rand(4096, 64, device=DEVICE), torch.randint(10, (4096,), device=DEVICE)
    params, peaks = dict(model.named_parameters()), []
    for count in (1, 1, 4):
        A = KFACLinearOperator(model, nn.CrossEntropyLoss(), params, [batch] * count, check_deterministic=False)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        A.compute()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    factors = 4 * (64**2 + 256**2 + 256**2 + 10**2 + 256**2 + 10**2)
    assert peaks[2] <= peaks[1] + 3 * factors
