"""On a GPU: merging, elastic weight consolidation, FishLeg and pruning do what they do in float64 on the CPU."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlinops import (
    EWC,
    CGInverseLinearOperator,
    FisherMCLinearOperator,
    FishLeg,
    GaussianLikelihood,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    LearnedInverseLinearOperator,
    SoftMaxLikelihood,
    diagonal_fisher,
    merge,
    merge_into,
    prune,
)
from tests.gpu.test_cuda import DEVICE, exact, problem
from tests.risk.small import normal, relative_error

__all__ = ["exact"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Problem = tuple[nn.Module, Any, dict[str, Tensor], Any]
FISHERS: dict[str, Callable[..., Any]] = {
    "diagonal": GGNDiagonalLinearOperator,
    "KFAC": lambda *problem: KFACLinearOperator(*problem, fisher_type="type-2"),
    "GGN": lambda *problem: GGNLinearOperator(*problem),
}


def task(device: str, dtype: torch.dtype = torch.float64, seed: int = 0, name: str = "MLP") -> Problem:
    """A model, moved a little away from the others by the seed, with its loss, parameters and data."""
    model, data = problem(name, dtype, device)
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.add_(0.1 * normal(*p.shape, seed=100 * seed + k).to(device, dtype))
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data


def flat(tensors: Mapping[Any, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors.values()])


def assert_on_device(tensors: Mapping[str, Tensor]) -> None:
    assert {tensor.device.type for tensor in tensors.values()} == {torch.device(DEVICE).type}


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FISHERS)
def test_merge_equals_the_cpu(kind: str) -> None:
    results = {}
    for device in (DEVICE, "cpu"):
        tasks = [task(device, seed=seed) for seed in (1, 2)]
        fishers = [FISHERS[kind](*one) for one in tasks]
        results[device] = merge([one[0] for one in tasks], fishers, damping=1e-2)
    assert_on_device(results[DEVICE])
    assert relative_error(flat(results[DEVICE]).cpu(), flat(results["cpu"])) < 1e-6


def test_merge_of_models_on_two_devices() -> None:
    """Each result is where the first model has the parameter; what is moved for it stays where it is."""
    here, there = task(DEVICE, seed=1), task("cpu", seed=2)
    fishers = [FISHERS["KFAC"](*one) for one in (here, there)]
    expected = merge([task("cpu", seed=s)[0] for s in (1, 2)], [FISHERS["KFAC"](*task("cpu", seed=s)) for s in (1, 2)],
                     damping=1e-2)  # fmt: skip
    for first, second in [(0, 1), (1, 0)]:
        pair = (here, there)
        merged = merge([pair[first][0], pair[second][0]], [fishers[first], fishers[second]], damping=1e-2)
        assert {t.device for t in merged.values()} == {p.device for p in pair[first][2].values()}
        assert relative_error(flat(merged).cpu(), flat(expected).cpu()) < 1e-6
    target = task(DEVICE)[0]
    merge_into(target, [here[0], there[0]], fishers, damping=1e-2)
    assert_on_device(dict(target.named_parameters()))
    assert relative_error(flat(dict(target.named_parameters())).cpu(), flat(expected)) < 1e-6


# -- elastic weight consolidation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["multi", "online"])
@pytest.mark.parametrize("kind", FISHERS)
def test_penalty_equals_the_cpu(kind: str, mode: str) -> None:
    """Its gradient and importance too; the state goes from one device to the other."""
    found, penalties = {}, {}
    for device in (DEVICE, "cpu"):
        model, loss, params, data = task(device, seed=1)
        ewc = penalties[device] = EWC(model, strength=3.0, mode=mode, prior_precision=0.1)
        for seed in (2, 3):
            ewc.consolidate(FISHERS[kind](model, loss, params, data), anchor=task(device, seed=seed)[0], num_data=9)
        value = ewc.penalty()
        assert value.device.type == torch.device(device).type
        gradient = torch.autograd.grad(value, list(params.values()))
        parts = {"value": value, "importance": flat(ewc.importance()), "gradient": flat(dict(enumerate(gradient)))}
        found[device] = {name: part.detach().cpu() for name, part in parts.items()}
    for name, part in found["cpu"].items():
        assert relative_error(found[DEVICE][name], part) < 1e-9, name
    for saved, loaded in [(DEVICE, "cpu"), ("cpu", DEVICE)] if kind != "GGN" else []:  # products cannot be stored
        other = EWC(task(loaded, seed=1)[0], mode=mode)
        other.load_state_dict(penalties[saved].state_dict())
        value = other.penalty()
        assert value.device.type == torch.device(loaded).type
        assert relative_error(value.detach().cpu(), found["cpu"]["value"]) < 1e-9


@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_diagonal_fisher_equals_the_cpu(kind: str) -> None:
    here, there = (diagonal_fisher(*task(device, name="CNN"), kind=kind) for device in (DEVICE, "cpu"))
    assert_on_device(here)
    assert relative_error(flat(here).cpu(), flat(there)) < 1e-9
    drawn = [diagonal_fisher(*task(DEVICE), kind="mc", mc_samples=3, seed=1) for _ in range(2)]
    assert torch.equal(flat(drawn[0]), flat(drawn[1]))


# -- FishLeg -----------------------------------------------------------------------------------------------------------


def test_learned_inverse() -> None:
    """It learns on the device, from directions that are the same on each, and is a preconditioner there."""
    found = {}
    for device in (DEVICE, "cpu"):
        model, loss, params, data = task(device)
        G = GGNLinearOperator(model, loss, params, data)
        Q = LearnedInverseLinearOperator(model, damping=0.1, lr=1e-2)
        Q.fit(G, 20)
        found[device] = Q
    M = found[DEVICE].to_dense()
    assert M.device.type == torch.device(DEVICE).type
    torch.testing.assert_close(found[DEVICE].diagonal(), M.diagonal())
    torch.testing.assert_close(found[DEVICE].logdet(), torch.logdet(M))
    samples = found[DEVICE].sample(2, generator=torch.Generator(DEVICE).manual_seed(0))
    assert samples.device.type == torch.device(DEVICE).type and samples.shape == (len(M), 2)
    state = found[DEVICE].state_dict()
    moved = LearnedInverseLinearOperator(task("cpu")[0], damping=0.1, lr=1e-2)
    moved.load_state_dict(state)
    assert relative_error(moved.to_dense(), M.cpu()) < 1e-12
    model, loss, params, data = task(DEVICE)
    A = GGNLinearOperator(model, loss, params, data).damped(0.1)
    v = normal(A.shape[0], seed=5).to(DEVICE)
    solution = CGInverseLinearOperator(A, preconditioner=found[DEVICE]) @ v
    assert relative_error((A @ solution).cpu(), v.cpu()) < 1e-6


def fishleg_run(device: str, likelihood: Any, num_steps: int, saved: Any = None) -> tuple[nn.Module, FishLeg]:
    """Some steps of FishLeg on a model, from a saved state of another optimiser if there is one."""
    model, _, _, data = task(device)
    if saved is not None:
        model.load_state_dict(saved[0].state_dict())

    def nll(net: nn.Module, batch: Any) -> Tensor:
        target = batch[1] if isinstance(likelihood, SoftMaxLikelihood) else nn.functional.one_hot(batch[1], 3).double()
        found: Tensor = likelihood.nll(net(batch[0]), target if batch[1].ndim == 1 else batch[1])
        return found

    def draw(net: nn.Module, X: Tensor) -> tuple[Tensor, Tensor]:
        return X, likelihood.draw(net(X))

    optimizer = FishLeg(model, draw, nll, data, likelihood, update_aux_every=1, aux_lr=1e-2, damping=0.1)
    if saved is not None:
        optimizer.load_state_dict(saved[1].state_dict())
    for _ in range(num_steps):
        optimizer.zero_grad()
        nll(model, data[0]).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("make", [SoftMaxLikelihood, lambda: GaussianLikelihood(0.7).double()])
def test_fishleg(make: Callable[[], Any]) -> None:
    """Parameters, momentum and Q stay on the device, the global random state as it was, and a state resumes."""
    state = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
    likelihood = make().to(DEVICE)
    model, optimizer = fishleg_run(DEVICE, likelihood, 4)
    assert torch.equal(torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state(), state)
    params = dict(model.named_parameters())
    assert_on_device(params)
    assert all(bool(p.isfinite().all()) for p in params.values())
    assert not torch.equal(flat(params), flat(task(DEVICE)[2]))
    assert optimizer.Q.device.type == torch.device(DEVICE).type
    assert bool((optimizer.Q.diagonal() > 0).all())
    resumed, other = fishleg_run(DEVICE, copy.deepcopy(likelihood), 0, (model, optimizer))
    torch.testing.assert_close(other.Q.to_dense(), optimizer.Q.to_dense())
    assert_on_device(dict(resumed.named_parameters()))


# -- pruning -----------------------------------------------------------------------------------------------------------

INVERSES: dict[str, Callable[..., Any]] = {
    "diagonal": lambda *problem: GGNDiagonalLinearOperator(*problem).inverse(1e-2),
    "KFAC": lambda *problem: FISHERS["KFAC"](*problem).inverse(1e-2),
    "low rank": lambda *problem: GGNLinearOperator(*problem).to_low_rank().damped(1e-2).inverse(),
}


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-6), (torch.float32, 2e-3)])
@pytest.mark.parametrize("dense_size", [0, 1024])
@pytest.mark.parametrize("kind", INVERSES)
def test_prune_equals_the_cpu(
    kind: str, dense_size: int, dtype: torch.dtype, allowed: float, exact: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curvlinops.applications.pruning.compensation.DENSE_SIZE", dense_size)
    here, there = task(DEVICE, dtype), task("cpu")
    masks = prune(here[0], INVERSES[kind](*here), 0.6, steps=2)
    expected = prune(there[0], INVERSES[kind](*there), 0.6, steps=2)
    assert isinstance(masks, dict) and isinstance(expected, dict)
    assert_on_device(masks)
    assert_on_device(here[2])
    if dtype == torch.float64 or kind == "diagonal":
        assert all(torch.equal(masks[name].cpu(), expected[name]) for name in expected)
        assert relative_error(flat(here[2]).cpu(), flat(there[2])) < allowed
    assert not any(bool(p[~masks[name]].any()) for name, p in here[2].items())


def test_prune_refuses_another_device() -> None:
    if DEVICE == "cpu":
        pytest.skip("there is one device")
    here, there = task(DEVICE), task("cpu")
    with pytest.raises(ValueError, match="where Q is, got"):
        prune(there[0], INVERSES["KFAC"](*here), 0.5)


def test_prune_a_large_layer() -> None:
    """A million weights take seconds."""
    if DEVICE != "cuda":
        pytest.skip("takes minutes on a CPU")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 10)).to(DEVICE)
        data = [(torch.rand(512, 1024, device=DEVICE), torch.randint(10, (512,), device=DEVICE))]
    K = KFACLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    masks = prune(model, K.inverse(1e-2, use_exact_damping=True), 0.5)
    assert isinstance(masks, dict)
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == round(sum(mask.numel() for mask in masks.values()) / 2)
    assert FisherMCLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data).shape[0] > 10**6
