"""The diagonal Fisher matrix against a loop over data, one at a time, with plain automatic differentiation."""

import json
from collections.abc import Callable
from functools import partial
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from curvlinops.applications.consolidation.diagonal_fisher import diagonal_fisher

REFERENCE = json.loads((Path(__file__).parent / "ewc_reference.json").read_text())
C, T = 4, 3


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, num: int = C, seed: int = 1) -> Tensor:
    return torch.randint(num, shape, generator=torch.Generator().manual_seed(seed))


def mlp(num_outputs: int = C, seed: int = 2) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, num_outputs)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(noise(*p.shape, seed=seed + i))
    return model


class Sequences(nn.Module):
    """Predictions ``[N, C, T]`` for inputs ``[N, T, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, X: Tensor) -> Tensor:
        return self.inner(X).mT


# -- the truth ---------------------------------------------------------------------------------------------------------


def squares(value: Tensor, params: list[Tensor]) -> Tensor:
    """The squared gradient of a number, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, params, retain_graph=True)]).square()


def empirical(values: Callable[[Tensor, Tensor], Tensor], model: nn.Module, X: Tensor, y: Tensor, terms: str) -> Tensor:
    """Each datum's squares ``[N, D]``; ``values`` gives the negative log-likelihood of each of its positions."""
    rows, params = [], list(model.parameters())
    for n in range(len(y)):
        found = values(model(X[n : n + 1])[0], y[n]).reshape(-1)
        found = found.sum().reshape(1) if terms == "datum" else found
        rows.append(sum(squares(value, params) for value in found))
    return torch.stack(rows)


def classes(f: Tensor, y: Tensor) -> Tensor:
    """Cross-entropies ``[T]`` or a number, of logits ``[C, T]`` or ``[C]``."""
    return -f.log_softmax(0).gather(0, y.unsqueeze(0)).squeeze(0)


def expected_over_classes(model: nn.Module, X: Tensor) -> Tensor:
    """E over labels of the model's own: all classes of all positions, one after the other."""
    total, params = torch.zeros(()), list(model.parameters())
    for n in range(len(X)):
        logits = model(X[n : n + 1])[0].reshape(C, -1)
        for t in range(logits.shape[1]):
            log_p = logits[:, t].log_softmax(0)
            total = total + sum(log_p[c].exp().detach() * squares(log_p[c], params) for c in range(C))
    return total / len(X)


def gaussian(variance: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, y: 0.5 / variance * (f - y).square().sum(-1)


def flat(fisher: dict[str, Tensor]) -> Tensor:
    return torch.cat([entries.flatten() for entries in fisher.values()])


def assert_close(found: dict[str, Tensor] | Tensor, truth: Tensor, tolerance: float = 1e-10) -> None:
    found = found if isinstance(found, Tensor) else flat(found)
    assert (found - truth).abs().max() <= tolerance * truth.abs().max()


# -- tests -------------------------------------------------------------------------------------------------------------

X, Y = noise(7, 3), labels(7)


def test_reference_numbers() -> None:
    def pattern(shape: tuple[int, ...], a: float, b: float, c: float, s: float) -> Tensor:
        k = torch.arange(prod(shape), dtype=torch.float64)
        return (s * torch.sin(a + b * k + c * k * k)).reshape(shape)

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(pattern(tuple(p.shape), 0.3 + i, 1.7, 0.01, 0.5))
    data = pattern((6, 4), 0.1, 2.3, 0.02, 1.0), torch.tensor(REFERENCE["inputs"]["labels"])
    fisher = diagonal_fisher(model, nn.CrossEntropyLoss(), None, data)
    for entries, known in zip(fisher.values(), REFERENCE["fisher_diagonal"].values(), strict=True):
        torch.testing.assert_close(entries.flatten(), torch.tensor(known).double(), rtol=0, atol=1e-6)
    assert abs(float(flat(fisher).sum()) - REFERENCE["fisher_trace"]) < 1e-6


def test_classification_whatever_the_form_of_loss_and_data() -> None:
    model = mlp()
    each = empirical(classes, model, X, Y, "position")
    dataset = TensorDataset(X, Y)
    forms: list[Any] = [
        (X, Y),
        dataset,
        [(X[:2], Y[:2]), (X[2:3], Y[2:3]), (X[3:], Y[3:])],
        DataLoader(dataset, batch_size=3, shuffle=True),
    ]
    losses = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), F.cross_entropy]
    losses += [partial(F.cross_entropy, reduction="mean"), *losses[:1] * 2]
    for data, loss in zip(forms * 2, losses, strict=False):
        for params in (None, dict(model.named_parameters()), list(model.parameters())):
            fisher = diagonal_fisher(model, loss, params, data, batch_size=2)
            assert_close(fisher, each.mean(0))
            names = ["0", "1", "2", "3"] if isinstance(params, list) else list(dict(model.named_parameters()))
            assert list(fisher) == names and [e.shape for e in fisher.values()] == [p.shape for p in model.parameters()]
        assert_close(diagonal_fisher(model, loss, None, data, kind="true"), expected_over_classes(model, X))
    mean_gradient = torch.autograd.grad(F.cross_entropy(model(X), Y), list(model.parameters()))
    assert each.mean(0).sum() > 2 * sum(g.square().sum() for g in mean_gradient), "not the square of the mean"
    ignored = torch.where(torch.arange(7) % 3 == 0, -100, Y)
    truth = each[ignored >= 0].sum(0) / 7
    assert_close(diagonal_fisher(model, nn.CrossEntropyLoss(), None, (X, ignored)), truth)


def test_samples_have_the_expectation_and_a_seed() -> None:
    model = mlp()
    truth = expected_over_classes(model, X)
    options: dict[str, Any] = {"kind": "mc", "batch_size": 4}
    many = flat(diagonal_fisher(model, nn.CrossEntropyLoss(), None, (X, Y), mc_samples=3000, **options))
    assert (many - truth).norm() < 0.03 * truth.norm()
    few = [flat(diagonal_fisher(model, nn.CrossEntropyLoss(), None, (X, Y), seed=s, **options)) for s in (1, 1, 2)]
    assert torch.equal(few[0], few[1]) and not torch.equal(few[0], few[2])


def test_regression_with_its_noise() -> None:
    model, y, variance = mlp(), noise(7, C, seed=5), 0.3
    data, params = [(X[:4], y[:4]), (X[4:], y[4:])], list(model.parameters())
    for loss in (nn.MSELoss(), nn.MSELoss(reduction="sum"), F.mse_loss):
        found = diagonal_fisher(model, loss, None, data, noise_variance=variance)
        assert_close(found, empirical(gaussian(variance), model, X, y, "datum").mean(0))
        # Without it, the loss of a datum is the squared error summed over outputs: a variance of ½.
        assert_close(diagonal_fisher(model, loss, None, data), empirical(gaussian(0.5), model, X, y, "datum").mean(0))
        outputs = [model(X[n : n + 1])[0, c] for n in range(7) for c in range(C)]
        truth = sum(squares(output, params) for output in outputs) / (7 * variance)
        assert_close(diagonal_fisher(model, loss, None, data, kind="true", noise_variance=variance), truth)
    sampled = diagonal_fisher(model, loss, None, data, kind="mc", mc_samples=4000, noise_variance=variance)
    assert (flat(sampled) - truth).norm() < 0.03 * truth.norm()


@pytest.mark.parametrize("terms", ["position", "datum"])
def test_sequences(terms: str) -> None:
    model, inputs, y = Sequences(), noise(5, T, 3), labels(5, T)
    data, loss = [(inputs[:2], y[:2]), (inputs[2:], y[2:])], nn.CrossEntropyLoss()
    truth = empirical(classes, model, inputs, y, terms).mean(0)  # a mean over data, not over positions
    assert_close(diagonal_fisher(model, loss, None, data, terms=terms), truth)
    assert_close(
        diagonal_fisher(model, loss, None, data, terms=terms, kind="true"), expected_over_classes(model, inputs)
    )
    masked = torch.where(torch.arange(T) == 1, -100, y)
    kept = empirical(lambda f, t: classes(f[:, [0, 2]], t[[0, 2]]), model, inputs, y, terms).mean(0)
    assert_close(diagonal_fisher(model, loss, None, [(inputs, masked)], terms=terms), kept)


@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_positions_as_rows_are_refused(kind: str) -> None:
    """The operators count rows of X: a mean over rows of targets would be another scale."""
    model = nn.Sequential(mlp(), nn.Flatten(0, 1))
    inputs, y = noise(5, T, 3), labels(5 * T)
    for data in ([(inputs, y)], [{"input": inputs, "labels": y}]):
        with pytest.raises(ValueError, match=r"15 targets for inputs of \[5\] rows.*predict \[N, C, T\]"):
            diagonal_fisher(model, nn.CrossEntropyLoss(), None, data, kind=kind)


def test_weights_of_classes_enter_squared_or_once() -> None:
    model, weight = mlp(), torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    loss = nn.CrossEntropyLoss(weight)
    truth = (weight[Y].square().unsqueeze(1) * empirical(classes, model, X, Y, "position")).mean(0)
    assert_close(diagonal_fisher(model, loss, None, (X, Y)), truth)
    params = list(model.parameters())
    hessians = []
    for n in range(len(Y)):  # a linear last layer: its block of the Gauss-Newton matrix is the loss's Hessian
        value = weight[Y[n]] * classes(model(X[n : n + 1])[0], Y[n])
        (slope,) = torch.autograd.grad(value, params[3], create_graph=True)
        hessians.append(
            torch.stack([torch.autograd.grad(s, params[3], retain_graph=True)[0][i] for i, s in enumerate(slope)])
        )
    assert_close(diagonal_fisher(model, loss, None, (X, Y), kind="true")["2.bias"], torch.stack(hessians).mean(0))


def test_results_of_inference_mode_are_ordinary() -> None:
    model = mlp()
    with torch.inference_mode():
        found = diagonal_fisher(model, nn.CrossEntropyLoss(), None, (X, Y))
    assert not any(entries.is_inference() or entries.requires_grad for entries in found.values())
    assert_close(found, empirical(classes, model, X, Y, "position").mean(0))


class OfMapping(nn.Module):
    """Reads named inputs and gives an object with logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor, scale: Tensor) -> Any:
        output = type("Output", (), {})()
        output.logits = self.inner(inputs * scale.unsqueeze(1))
        return output


def test_outputs_of_one_head() -> None:
    model, index = mlp(6), torch.tensor([4, 1, 5])
    y, loss = labels(7, num=3), nn.CrossEntropyLoss()
    named, scale = dict(model.named_parameters()), noise(7, seed=9)
    copies = {name: p.detach().clone() for name, p in named.items()}
    for chosen, kept in [(slice(2, 5), [2, 3, 4]), (index, [4, 1, 5]), ([4, 1, 5], [4, 1, 5])]:
        truth = empirical(lambda f, t, k=kept: classes(f[k], t), model, X, y, "position").mean(0)
        for params in (None, named, copies, list(named.values())):
            assert_close(diagonal_fisher(model, loss, params, (X, y), output_slice=chosen), truth)

        def function(params: dict[str, Tensor], inputs: Tensor) -> Tensor:
            return torch.func.functional_call(model, params, (inputs,))

        assert_close(diagonal_fisher(function, loss, copies, (X, y), output_slice=chosen), truth)
        scaled = empirical(lambda f, t, k=kept: classes(f[k], t), model, X * scale.unsqueeze(1), y, "position").mean(0)
        batches = [{"inputs": X, "scale": scale, "labels": y}]
        assert_close(diagonal_fisher(OfMapping(model), loss, None, batches, output_slice=chosen), scaled)
    head = diagonal_fisher(model, loss, None, (X, y), output_slice=slice(0, 3))["2.weight"]
    assert not head[3:].any() and bool((head[:3] > 0).all())


def test_chosen_data_are_some_of_the_data_and_follow_the_seed() -> None:
    model, dataset = mlp(), TensorDataset(X, Y)
    each = empirical(classes, model, X, Y, "position")
    subsets = torch.stack([each[list(chosen)].mean(0) for chosen in combinations(range(7), 4)])
    batches = [(X[:3], Y[:3]), (X[3:4], Y[3:4]), (X[4:], Y[4:])]
    mappings = [{"input": x, "labels": y} for x, y in batches]
    forms = [(X, Y), dataset, batches, mappings]
    forms += [DataLoader(dataset, batch_size=2, shuffle=shuffle) for shuffle in (False, True)]
    by_seed = []
    for seed in range(4):
        found = [
            flat(diagonal_fisher(model, nn.CrossEntropyLoss(), None, data, max_data=4, seed=seed, batch_size=3))
            for data in forms
        ]
        distances = (subsets - found[0]).abs().amax(1)
        assert distances.min() < 1e-12
        by_seed.append(int(distances.argmin()))
        for other in found[1:]:
            assert_close(other, found[0])
    assert len(set(by_seed)) > 1
    for data in forms:
        assert_close(diagonal_fisher(model, nn.CrossEntropyLoss(), None, data, max_data=7), each.mean(0))


def test_half_precision_is_summed_in_float32() -> None:
    model = mlp().bfloat16()
    data = X.bfloat16(), Y
    found = diagonal_fisher(model, nn.CrossEntropyLoss(), None, data)
    assert all(entries.dtype == torch.float32 for entries in found.values())
    truth = empirical(classes, model.double(), data[0].double(), Y, "position").mean(0)
    assert (flat(found).double() - truth).norm() < 0.03 * truth.norm()


class Broken(nn.Module):
    """Fails when it is called."""

    def forward(self, X: Tensor) -> Tensor:
        raise OSError("broken")


def test_nothing_is_changed_even_by_errors() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, C)).double()
    model.train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True, generator=generator)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), generator.get_state()
    evaluated = diagonal_fisher(model, nn.CrossEntropyLoss(), None, loader, max_data=5)
    assert list(evaluated) == [name for name, p in model.named_parameters() if p.requires_grad]
    model.eval()
    assert_close(diagonal_fisher(model, nn.CrossEntropyLoss(), None, loader, max_data=5), flat(evaluated))
    model.train()
    model[2].eval()
    diagonal_fisher(model, nn.CrossEntropyLoss(), None, loader, kind="mc", max_data=5)
    with pytest.raises(OSError, match="broken"):
        diagonal_fisher(nn.Sequential(model, Broken()), nn.CrossEntropyLoss(), None, loader, kind="true")
    with pytest.raises(ValueError, match="expected class indices"):
        diagonal_fisher(model, nn.CrossEntropyLoss(), None, [(X, Y), (X, Y[:, None])])
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert not model[0].weight.requires_grad and model[0].weight.grad is None
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.requires_grad)
    assert torch.equal(torch.get_rng_state(), states[0]) and torch.equal(generator.get_state(), states[1])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"kind": "exact"}, ValueError, "kind: expected 'empirical', 'true' or 'mc'"),
        ({"terms": "token", "kind": "true"}, ValueError, "terms: expected"),
        ({"kind": "mc", "mc_samples": 0}, ValueError, "mc_samples: expected an integer of at least 1"),
        ({"kind": "true", "mc_samples": 5}, ValueError, "mc_samples: belongs to kind='mc'"),
        ({"output_slice": (0, 2)}, TypeError, r"output_slice: write slice\(0, 2\) or"),
        ({"noise_variance": 0.5}, ValueError, "noise_variance: belongs to the squared error.*CrossEntropyLoss"),
        ({"loss_func": nn.MSELoss(), "noise_variance": -1.0}, ValueError, "noise_variance: expected a positive"),
        ({"loss_func": lambda f, y: f.sum()}, TypeError, "loss_func: expected a loss of torch.nn"),
        ({"loss_func": nn.CrossEntropyLoss(reduction="none")}, TypeError, "loss_func: expected"),
        ({"loss_func": nn.L1Loss(), "data": (X, noise(7, C))}, NotImplementedError, "loss_func: .*L1Loss"),
        ({"loss_func": nn.HuberLoss(), "data": (X, noise(7, C)), "kind": "true"}, NotImplementedError, "HuberLoss"),
        (
            {"loss_func": nn.MSELoss(), "noise_variance": torch.rand(5)},
            ValueError,
            "noise_variance: expected a positive",
        ),
        ({"loss_func": nn.MSELoss(), "noise_variance": True}, ValueError, "noise_variance: expected a positive"),
        ({"seed": None, "max_data": 3}, ValueError, "seed: expected an integer, got None"),
        ({"data": (X.numpy(), Y.numpy())}, TypeError, "torch.from_numpy"),
        ({"max_data": 0}, ValueError, "max_data: expected an integer of at least 1"),
        ({"max_data": 2.0}, ValueError, "max_data: expected an integer"),
        ({"data": (X, Y[:5])}, ValueError, "data: expected as many inputs as targets"),
        ({"data": iter([(X, Y)])}, TypeError, "read again"),
        ({"data": X}, TypeError, "data: expected a DataLoader"),
        (
            {"data": DataLoader(TensorDataset(X, Y), sampler=WeightedRandomSampler([1.0] * 7, 7)), "max_data": 3},
            ValueError,
            "sampler of its own",
        ),
        ({"output_slice": slice(4, 9)}, ValueError, "output_slice: .* chooses none of 4 outputs"),
        ({"output_slice": []}, ValueError, "output_slice: expected a slice or a list of indices"),
        ({"output_slice": slice(0, 2), "data": (X, Y + 2)}, ValueError, "outside of 0..1"),
        ({"model": lambda x: x}, TypeError, "params: None needs a module"),
    ],
)
def test_errors_say_what_was_expected(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"model": mlp(), "loss_func": nn.CrossEntropyLoss(), "params": None, "data": (X, Y)}
    with pytest.raises(error, match=message):
        diagonal_fisher(**given | changed)
