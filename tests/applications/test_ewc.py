"""Elastic weight consolidation against dense matrices, and the identities it stands on."""

import io
import json
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlinops import (
    Diagonal,
    EFDiagonalLinearOperator,
    EFLinearOperator,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    LinearOperator,
    TensorLinearOperator,
)
from curvlinops.applications.consolidation.diagonal_fisher import diagonal_fisher
from curvlinops.applications.consolidation.ewc import EWC

REFERENCE = json.loads((Path(__file__).parent / "ewc_reference.json").read_text())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int = 1) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(noise(*p.shape, seed=seed + i))
    return model


X, Y = noise(6, 3, seed=20), torch.tensor([0, 1, 2, 2, 1, 0])
OTHER_X, OTHER_Y = noise(5, 3, seed=21), torch.tensor([0, 2, 2, 1, 1])
D = 3 * 4 + 4 + 4 * 3


def flat(tensors: Any) -> Tensor:
    values = tensors.values() if isinstance(tensors, dict) else tensors
    return torch.cat([t.detach().flatten() for t in values])


def by_name(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    parts = vector.split([p.numel() for p in model.parameters()])
    return {name: part.reshape(p.shape) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    return flat(torch.autograd.grad(value, list(model.parameters())))


def moved(model: nn.Module, seed: int = 30) -> nn.Module:
    """The model after more training, so to say."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(noise(*p.shape, seed=seed + i))
    return model


KRON = {"fisher_type": "type-2", "separate_weight_and_bias": False}
#: Fisher matrices of all kinds, as functions of what curvature operators take.
KINDS: dict[str, Callable[..., Any]] = {
    "diagonals": lambda m, loss, params, data: diagonal_fisher(m, loss, None, data),
    "list of diagonals": lambda m, loss, params, data: list(diagonal_fisher(m, loss, None, data, kind="true").values()),
    "GGN diagonal": GGNDiagonalLinearOperator,
    "EF diagonal": EFDiagonalLinearOperator,
    "KFAC": partial(KFACLinearOperator, **KRON),
    "KFAC mc": KFACLinearOperator,
    "EKFAC": EKFACLinearOperator,
    "KFOC": KFOCLinearOperator,
    "dense": lambda *arguments: TensorLinearOperator(GGNLinearOperator(*arguments).to_dense()),
    "low rank": lambda *arguments: GGNLinearOperator(*arguments).to_low_rank(),
    "sum": lambda *arguments: KFACLinearOperator(*arguments) + EFDiagonalLinearOperator(*arguments),
    "GGN": GGNLinearOperator,
    "EF": lambda *arguments: 2.0 * EFLinearOperator(*arguments),
}


def fisher_of(kind: str, model: nn.Module, X: Tensor = X, Y: Tensor = Y) -> Any:
    """A Fisher matrix of a kind; what can be computed later is not computed yet."""
    return KINDS[kind](model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, Y)])


def dense(fisher: Any) -> Tensor:
    if isinstance(fisher, LinearOperator):
        return fisher.to_dense()
    return torch.diag(flat(fisher))


# -- one task ----------------------------------------------------------------------------------------------------------


def test_reference_numbers() -> None:
    def pattern(shape: tuple[int, ...], a: float, b: float, c: float, s: float) -> Tensor:
        k = torch.arange(prod(shape), dtype=torch.float64)
        return (s * torch.sin(a + b * k + c * k * k)).reshape(shape)

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(pattern(tuple(p.shape), 0.3 + i, 1.7, 0.01, 0.5))
    data = pattern((6, 4), 0.1, 2.3, 0.02, 1.0), torch.tensor(REFERENCE["inputs"]["labels"])
    ewc = EWC(model)
    ewc.consolidate(diagonal_fisher(model, nn.CrossEntropyLoss(), None, data))
    assert abs(float(flat(ewc.importance()).sum()) - REFERENCE["fisher_trace"]) < 1e-6
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            k = torch.arange(p.numel(), dtype=torch.float64).reshape(p.shape)
            p.add_(0.1 * torch.cos(0.2 + i + 0.9 * k))
    penalty = ewc.penalty()
    assert abs(penalty.item() - REFERENCE["penalty_after_one_task"]) < 1e-6
    assert abs(gradient(penalty, model).norm().item() - REFERENCE["penalty_gradient_norm"]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_derivatives_of_every_kind(kind: str) -> None:
    """½ δᵀFδ with gradient Fδ and second derivative F; what is trained after the consolidation has no effect on F."""
    model = network()
    fisher = fisher_of(kind, model)
    F, anchor = dense(fisher_of(kind, model)), flat(model.parameters())
    ewc = EWC(model, strength=3.0)
    ewc.consolidate(fisher, num_data=6)
    moved(model)
    if isinstance(fisher, dict):
        fisher["0.weight"].zero_()
    delta = flat(model.parameters()) - anchor
    penalty = ewc.penalty()
    torch.testing.assert_close(penalty.item(), (3 * 6 * 0.5 * delta @ F @ delta).item())
    found = gradient(penalty, model)
    torch.testing.assert_close(found, 18 * F @ delta)
    free = delta.requires_grad_()
    detached = torch.autograd.grad(18 * 0.5 * free @ (F @ free).detach(), free)[0]
    torch.testing.assert_close(found, 2 * detached)  # half of the gradient gets lost where the product is detached
    at = flat(model.parameters())
    hessian = torch.autograd.functional.hessian(lambda theta: ewc.penalty(by_name(model, theta)), at)
    torch.testing.assert_close(hessian, 18 * F)
    torch.testing.assert_close(flat(ewc.importance()), 6 * F.diagonal())


def test_calling_it_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model(X)
    arguments = (nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, Y)])
    ewc = EWC(model, mode="online", decay=0.5, prior_precision=0.1)
    for kind in (KFACLinearOperator, GGNLinearOperator):
        ewc.consolidate(kind(model.eval(), *arguments))
    moved(model.train())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    random_state, hooks = torch.get_rng_state(), len(model._forward_hooks)
    value, slope = ewc.penalty(), gradient(ewc.penalty(), model)
    for _ in range(20):
        assert ewc.penalty().item() == value.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = ewc.penalty()
    assert again.item() == value.item() and torch.equal(gradient(again, model), slope)
    assert len(ewc.importance()) == 6 and ewc.num_tasks == 2
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert model.training and all(m.training for m in model) and len(model._forward_hooks) == hooks
    assert torch.equal(torch.get_rng_state(), random_state)
    ewc.penalty().backward()
    torch.testing.assert_close(flat(p.grad for p in model.parameters()), 1 + slope)


# -- several tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_several_tasks(kind: str) -> None:
    """Both modes with three tasks, decays, numbers of data and a prior, against sums of dense matrices."""
    model = network()
    mean = by_name(model, noise(D, seed=50))
    options = {"strength": 0.7, "prior_precision": 0.3, "prior_mean": mean}
    multi = EWC(model, **options)
    online = [
        EWC(model, mode="online", decay=0.6, decay_in_penalty=in_penalty, **options) for in_penalty in (True, False)
    ]
    F, anchors = [], []
    for task, num_data in enumerate([6, None, 2.5]):
        fisher = fisher_of(kind, moved(model, seed=60 + task))
        F.append((num_data or 1.0) * dense(fisher))
        anchors.append(flat(model.parameters()))
        for ewc in (multi, *online):
            ewc.consolidate(fisher, num_data=num_data, task=f"task {task}")
    theta = flat(moved(model).parameters())
    prior = 0.3 * (theta - flat(mean))
    slope = 0.7 * (prior + sum(f @ (theta - a) for f, a in zip(F, anchors, strict=True)))
    torch.testing.assert_close(gradient(multi.penalty(), model), slope)
    torch.testing.assert_close(flat(multi.importance()), sum(f.diagonal() for f in F))
    running, delta = F[2] + 0.6 * (F[1] + 0.6 * F[0]), theta - anchors[2]
    for ewc, factor in zip(online, (0.6, 1.0), strict=True):
        value = 0.7 * 0.5 * (factor * delta @ running @ delta + prior @ prior / 0.3)
        torch.testing.assert_close(ewc.penalty().item(), value.item())
        torch.testing.assert_close(gradient(ewc.penalty(), model), 0.7 * (prior + factor * running @ delta))
        torch.testing.assert_close(flat(ewc.importance()), running.diagonal())
        assert ewc.num_tasks == 3 and ewc.tasks == multi.tasks == ("task 0", "task 1", "task 2")


def test_a_thousand_calls_give_one_number() -> None:
    model = network()
    for mode in ("multi", "online"):
        ewc = EWC(model, mode=mode, decay=0.5 if mode == "online" else 1.0)
        for kind in ("diagonals", "KFAC"):
            ewc.consolidate(fisher_of(kind, moved(model)))
        at = {name: tensor.requires_grad_() for name, tensor in by_name(model, noise(D, seed=8)).items()}
        value, slope = ewc.penalty(at).item(), torch.autograd.grad(ewc.penalty(at), list(at.values()))
        for _ in range(1000):
            assert ewc.penalty(at).item() == value
        assert all(map(torch.equal, torch.autograd.grad(ewc.penalty(at), list(at.values())), slope))


@pytest.mark.parametrize("mode", ["multi", "online"])
@pytest.mark.parametrize("kind", ["KFAC", "GGN", "low rank"])
def test_the_minimum_is_that_of_all_data_together(mode: str, kind: str) -> None:
    """With an exact Fisher and sums over data, three linear regressions in turn are one of all their data.

    A single linear layer with squared error has a curvature that does not depend on the parameters and is a Kronecker
    product, so that KFAC is exact too. In mode "multi" the anchors are the minima of the tasks' own losses, and there
    is a prior; in mode "online" they are the minima of loss and penalty.
    """
    variance, precision = 0.5, 0.8 if mode == "multi" else 0.0
    tasks = [(noise(n, 3, seed=70 + n), noise(n, 2, seed=80 + n)) for n in (4, 7, 5)]
    model = nn.Linear(3, 2, bias=False).double()
    mean = noise(2, 3, seed=90)
    ewc = EWC(model, mode=mode, prior_precision=precision, prior_mean={"weight": mean})
    gram, moment = precision * torch.eye(3).double(), precision * mean
    for inputs, targets in tasks:
        gram, moment = gram + inputs.T @ inputs / variance, moment + targets.T @ inputs / variance
        together = (moment @ torch.linalg.inv(gram)).requires_grad_()  # the mode of the posterior given all data so far
        loss = 0.5 / variance * (inputs @ together.T - targets).square().sum() + ewc.penalty({"weight": together})
        assert torch.autograd.grad(loss, together)[0].abs().max() < 1e-10
        alone = torch.linalg.lstsq(inputs, targets).solution.T
        with torch.no_grad():
            model.weight.copy_(alone if mode == "multi" else together)
        # The mean over data and both outputs of (f - y)² is, over data, that of ½ ‖f - y‖².
        F = KINDS[kind](model, nn.MSELoss(), dict(model.named_parameters()), [(inputs, targets)])
        ewc.consolidate(1 / variance * F, num_data=len(inputs))


def test_without_tasks() -> None:
    model = network()
    nothing = EWC(model)
    nothing.penalty().backward()
    assert nothing.penalty().item() == 0 and all(not p.grad.any() for p in model.parameters())
    assert nothing.num_tasks == 0 and not flat(nothing.importance()).any()
    ewc = EWC(model, strength=2.0, prior_precision=3.0)
    torch.testing.assert_close(ewc.penalty().item(), 3.0 * flat(model.parameters()).square().sum().item())
    torch.testing.assert_close(gradient(ewc.penalty(), model), 6.0 * flat(model.parameters()))


# -- states ------------------------------------------------------------------------------------------------------------


def saved(ewc: EWC) -> Any:
    file = io.BytesIO()
    torch.save(ewc.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_part_of_a_matrix_is_not_stored_as_the_whole() -> None:
    ewc = EWC(network())
    ewc.consolidate(fisher_of("low rank", network()).block("0.*"))
    with pytest.raises(NotImplementedError, match="or a part of it, is known by its products alone"):
        ewc.state_dict()


def test_states_of_every_kind_and_mode() -> None:
    for mode, kinds in (("multi", list(KINDS)), ("online", ["diagonals", "KFAC", "EKFAC", "low rank"])):
        for kind in kinds:
            model = network()
            options: dict[str, Any] = {"mode": mode, "decay": 0.5 if mode == "online" else 1.0}
            ewc = EWC(model, strength=2.0, prior_precision=0.1, prior_mean=network(seed=5), **options)
            found = fisher_of(kind, model)
            ewc.consolidate(found, num_data=6)
            ewc.consolidate(fisher_of(kind, moved(model), OTHER_X, OTHER_Y))
            if kind in ("GGN", "EF"):
                with pytest.raises(NotImplementedError, match=rf"F, <{kind}LinearOperator.*to_low_rank\(\)"):
                    ewc.state_dict()
                continue
            state = saved(ewc)
            assert set(state["parabolas"][0]["anchor"]) == {"0.weight", "0.bias", "2.weight"}
            fresh = EWC(moved(network(), seed=40), mode=mode)
            fresh.load_state_dict(state)
            later = fisher_of(kind, moved(model, seed=45))
            for one in (ewc, fresh):
                one.consolidate(later, anchor=model, num_data=2)
            assert fresh.tasks == ewc.tasks and fresh.strength == 2.0
            at = by_name(model, noise(D, seed=99))
            torch.testing.assert_close(fresh.penalty(at), ewc.penalty(at), rtol=1e-12, atol=0)
            torch.testing.assert_close(flat(fresh.importance()), flat(ewc.importance()))


@pytest.mark.parametrize("first", ["KFAC", "diagonals", "sum"])
@pytest.mark.parametrize("second", ["dense", "low rank"])
def test_states_of_sums_go_round_again_and_again(first: str, second: str) -> None:
    """Online sums of matrices with and without names, scaled by a decay, and such a sum as one Fisher matrix."""
    model = network()
    ewc = EWC(model, mode="online", decay=0.5)
    total, params = torch.zeros(D, D).double(), dict(model.named_parameters())
    named = fisher_of("KFAC", model) if first != "diagonals" else Diagonal(fisher_of("diagonals", model))
    flat_one = fisher_of(second, model)
    for fisher in (named + flat_one, fisher_of(first, model), fisher_of(second, model), named + flat_one):
        ewc.consolidate(fisher, num_data=3, anchor=params)
        total = 3 * dense(fisher) + 0.5 * total
        for _ in range(2):
            state = saved(ewc)
            ewc = EWC(model, mode="online")
            ewc.load_state_dict(state)
    delta = noise(D, seed=7)
    at = by_name(model, flat(model.parameters()) + delta)
    torch.testing.assert_close(ewc.penalty(at), 0.5 * 0.5 * delta @ total @ delta)
    torch.testing.assert_close(flat(ewc.importance()), total.diagonal())


class Embedded(nn.Module):
    """An embedding, whose input factor is a diagonal, and convolutions in groups and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.grouped = nn.Conv1d(4, 6, 2, groups=2)
        self.transposed = nn.ConvTranspose1d(6, 3, 2)

    def forward(self, X: Tensor) -> Tensor:
        return self.transposed(self.grouped(self.table(X).mT)).mean(2)


def test_states_of_all_arrangements() -> None:
    torch.manual_seed(0)
    model = Embedded().double()
    data = [(torch.randint(7, (6, 5)), Y)]
    params = dict(model.named_parameters())
    for kind in (KFACLinearOperator, EKFACLinearOperator):
        for fisher_type in ("mc", "forward-only") if kind is KFACLinearOperator else ("mc",):
            for separate in (True, False):
                K = kind(
                    model,
                    nn.CrossEntropyLoss(),
                    params,
                    data,
                    fisher_type=fisher_type,
                    separate_weight_and_bias=separate,
                )
                ewc, fresh = EWC(model), EWC(model)
                ewc.consolidate(K)
                fresh.load_state_dict(saved(ewc))
                value = ewc.penalty({name: p.detach() + 1 for name, p in params.items()})
                truth = 0.5 * K.to_dense().sum()
                torch.testing.assert_close(value, truth)
                again = fresh.penalty({name: p.detach() + 1 for name, p in params.items()})
                torch.testing.assert_close(again, value, rtol=1e-12, atol=0)


def test_a_state_that_does_not_fit_is_refused() -> None:
    model = network()
    ewc = EWC(model)
    ewc.consolidate(fisher_of("KFAC", model))
    state = saved(ewc)
    before = ewc.penalty(moved(network())).item()
    others: list[tuple[EWC, dict[str, Any], str]] = [
        (EWC(model, mode="online"), state, "mode 'multi'.*'online'"),
        (EWC(nn.Linear(3, 4).double()), state, "spaces differ|names do not fit"),
        (EWC(network().float()), state, "dtype"),
        (ewc, {**state, "parabolas": [{**state["parabolas"][0], "anchor": {}}]}, "anchor of the state"),
        (ewc, {**state, "parabolas": [{"anchor": {}}]}, "it has no .'parabolas: fisher'"),
        (ewc, {**state, "strength": "x"}, "strength: expected"),
        (ewc, {**state, "parabolas": [{**state["parabolas"][0], "fisher": {"kind": "?"}}]}, "state of an operator"),
    ]
    for other, given, message in others:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(given)
    assert ewc.penalty(moved(network())).item() == before


# -- forms of parameters, and errors -----------------------------------------------------------------------------------


def test_forms_of_parameters() -> None:
    """A module, a dict and a list; operators and diagonals for each; read as they are at each penalty."""
    model = network()
    model[0].bias.requires_grad_(False)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = []
    for params in (model, named, list(named.values())):
        data = [(X, Y)]
        for made in (
            diagonal_fisher(model, nn.CrossEntropyLoss(), None if params is model else params, (X, Y)),
            KFACLinearOperator(model, nn.CrossEntropyLoss(), params if params is not model else named, data),
        ):
            ewc = EWC(params)
            ewc.consolidate(made)
            theta = {name: p.detach() + 0.1 for name, p in named.items()}
            given = list(theta.values()) if isinstance(params, list) else theta
            values.append(ewc.penalty(given).item())
            assert list(ewc.importance()) == (["0", "1"] if isinstance(params, list) else list(named))
    assert values[0] == values[2] == values[4] and values[1] == values[3] == values[5]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    ewc = EWC(tied)
    ewc.consolidate({name: torch.ones_like(p) for name, p in tied.named_parameters()})
    assert list(ewc.importance()) == ["0.weight", "0.bias", "1.bias"]
    tied[0].bias = nn.Parameter(tied[0].bias.detach() + 2)
    assert ewc.penalty().item() == pytest.approx(0.5 * 3 * 4)


@pytest.mark.parametrize("kind", ["diagonals", "GGN diagonal", "KFAC", "EKFAC", "low rank", "GGN"])
def test_names_in_any_order_and_some_of_them(kind: str) -> None:
    """A matrix on names in another order, or on some, is that of all with zeros elsewhere; so in states."""
    model = network()
    named = dict(model.named_parameters())
    index = by_name(model, torch.arange(D))
    delta = noise(D, seed=7)
    at = by_name(model, flat(named) + delta)
    for chosen in (["2.weight", "0.bias", "0.weight"], ["2.weight"], ["2.weight", "0.weight"]):
        params = {name: named[name] for name in chosen}
        if kind == "diagonals":
            fisher: Any = diagonal_fisher(model, nn.CrossEntropyLoss(), params, (X, Y))
        else:
            fisher = KINDS[kind](model, nn.CrossEntropyLoss(), params, [(X, Y)])
        places = torch.cat([index[name].flatten() for name in chosen])
        F = torch.zeros(D, D).double()
        F[places[:, None], places] = dense(fisher)
        ewc = EWC(model, mode="online")
        ewc.consolidate(fisher)
        ewc.consolidate(fisher_of("KFAC", model), num_data=2)
        F += 2 * dense(fisher_of("KFAC", model))
        torch.testing.assert_close(ewc.penalty(at), 0.5 * delta @ F @ delta)
        torch.testing.assert_close(flat(ewc.importance()), F.diagonal())
        if kind != "GGN":
            other = EWC(dict(reversed(named.items())), mode="online")
            other.load_state_dict(saved(ewc))
            torch.testing.assert_close(other.penalty(at), ewc.penalty(at))
            assert list(other.importance()) == list(reversed(named))


def test_a_matrix_without_names_goes_by_the_order_of_its_state() -> None:
    model = network()
    ewc, other = EWC(model), EWC(dict(reversed(list(model.named_parameters()))))
    ewc.consolidate(fisher_of("dense", model))
    other.load_state_dict(saved(ewc))
    other.load_state_dict(saved(other))
    at = by_name(model, noise(D, seed=7))
    torch.testing.assert_close(other.penalty(at), ewc.penalty(at))
    listed = EWC(list(model.parameters()), mode="online")  # positions: names of the module's do not matter
    kinds = ("KFAC", "list of diagonals", "low rank", "GGN diagonal")
    for kind in kinds:
        listed.consolidate(fisher_of(kind, model), anchor=list(network(seed=5).parameters()))
    delta = flat(model.parameters()) - flat(network(seed=5).parameters())
    F = sum(dense(fisher_of(kind, model)) for kind in kinds)
    torch.testing.assert_close(listed.penalty(), 0.5 * delta @ F @ delta)


def test_autocast_does_not_round_the_penalty() -> None:
    model = network().float()
    ewc = EWC(model)
    ewc.consolidate(TensorLinearOperator(torch.eye(D)), anchor=by_name(model, noise(D, seed=3).float()))
    value = ewc.penalty().item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ewc.penalty().item() == value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 4, bias=False).to(dtype)
    anchor, fisher = model.weight.detach().float().clone(), torch.full((4, 3), 1e-9)
    ewc = EWC(model)
    ewc.consolidate({"weight": fisher})
    with torch.no_grad():
        model.weight.add_(0.5)
    expected = 0.5e-9 * (model.weight.detach().float() - anchor).square().sum()
    assert ewc.penalty().dtype == torch.float32
    torch.testing.assert_close(ewc.penalty(), expected)
    ewc.consolidate(TensorLinearOperator(torch.eye(12, dtype=dtype)))  # around the parameters as they are
    torch.testing.assert_close(ewc.penalty(), expected)
    (1e3 * ewc.penalty()).backward()
    assert model.weight.grad.dtype == dtype


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda m, e: EWC(m, mode="single"), ValueError, "mode: expected 'multi' or 'online'"),
        (lambda m, e: EWC(m, strength=-1.0), ValueError, "strength: expected a finite number of at least 0"),
        (lambda m, e: EWC(m, decay=0.5), ValueError, "decay: belongs to mode 'online'"),
        (lambda m, e: EWC(m, mode="online", decay=float("nan")), ValueError, "decay: expected a finite"),
        (lambda m, e: EWC(m, prior_precision=-2), ValueError, "prior_precision: expected"),
        (lambda m, e: EWC(m, prior_mean={"0.weight": torch.ones(4, 3)}), ValueError, "prior_mean: .* missing"),
        (lambda m, e: EWC(m.requires_grad_(False)), ValueError, "no parameter of the module requires gradients"),
        (lambda m, e: EWC([]), ValueError, "no parameters"),
        (lambda m, e: e.consolidate(fisher_of("dense", m), task="first"), ValueError, "task: 'first' was consolidated"),
        (lambda m, e: e.consolidate(fisher_of("dense", m), num_data=0), ValueError, "num_data: expected"),
        (lambda m, e: e.consolidate({"head": torch.ones(4, 3)}), ValueError, r"fisher: .* unknown are \['head'\]"),
        (lambda m, e: e.consolidate({}), ValueError, "fisher: there are no parameters"),
        (lambda m, e: e.consolidate(Diagonal([-t for t in e.importance().values()])), ValueError, "negative diagonal"),
        (lambda m, e: e.consolidate(Diagonal(by_name(m, 0 * noise(D) / 0))), ValueError, "not finite"),
        (lambda m, e: setattr(e, "strength", -1.0), ValueError, "strength: expected a finite number of at least 0"),
        (lambda m, e: e.consolidate(e.importance(), num_data="all"), ValueError, "num_data: expected a positive"),
        (lambda m, e: e.consolidate(e.importance(), num_data=-3), ValueError, "num_data: expected a positive"),
        (lambda m, e: e.load_state_dict({}), ValueError, r"EWC.state_dict\(\) gave; it has no \['mode'"),
        (lambda m, e: e.load_state_dict({"mode": "multi"}), ValueError, r"it has no \['strength'.*'parabolas'\]"),
        (lambda m, e: e.load_state_dict(m.state_dict()), ValueError, "it has no"),
        (lambda m, e: e.load_state_dict("ewc.pt"), TypeError, "got str. Read files by torch.load"),
        (lambda m, e: e.consolidate(-torch.eye(D)), TypeError, "fisher: expected"),
        (lambda m, e: e.consolidate({**e.importance(), "0.bias": -torch.ones(4)}), ValueError, "negative diagonal"),
        (lambda m, e: e.consolidate(TensorLinearOperator(noise(D, D))), ValueError, "symmetric operator"),
        (
            lambda m, e: e.consolidate(TensorLinearOperator(torch.eye(4).double())),
            ValueError,
            "fisher: the spaces differ",
        ),
        (lambda m, e: e.consolidate(e.importance(), anchor=nn.Linear(3, 4)), ValueError, "anchor: .* missing"),
        (
            lambda m, e: e.consolidate(e.importance(), anchor=by_name(m, torch.full((D,), torch.nan))),
            ValueError,
            "anchor: 28 numbers are not finite",
        ),
        (lambda m, e: e.penalty(list(m.parameters())), ValueError, "params: the names do not fit"),
        (lambda m, e: e.penalty({**by_name(m, noise(D)), "0.bias": noise(5)}), ValueError, "'0.bias' in the shape"),
    ],
)
def test_errors_leave_it_as_it_was(act: Callable[[nn.Module, EWC], Any], error: type[Exception], message: str) -> None:
    model = network()
    ewc = EWC(model)
    ewc.consolidate(fisher_of("diagonals", model), task="first")
    at = by_name(model, noise(D, seed=3))
    before = ewc.penalty(at).item()
    with pytest.raises(error, match=message):
        act(model, ewc)
    assert ewc.penalty(at).item() == before and ewc.tasks == ("first",)
