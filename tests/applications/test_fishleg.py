"""FishLeg: its curvature against dense Fisher matrices, its steps against the formula, and what it leaves alone."""

import copy
import io
import random
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from curvlinops.applications.fishleg.curvature import DrawnHessian, GaussNewton
from curvlinops.applications.fishleg.likelihoods import (
    BernoulliLikelihood,
    FixedGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
    SoftMaxLikelihood,
)
from curvlinops.applications.fishleg.optimizer import FishLeg
from curvlinops.applications.learned_inverse.operator import LearnedInverseLinearOperator

Draw = Callable[[nn.Module, Any], tuple[Any, Any]]
SIGMA = 0.625


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(num_inputs: int = 2, num_outputs: int = 3, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(num_inputs, 3), nn.Tanh(), nn.Linear(3, num_outputs)).double()


def nll_of(likelihood: Likelihood) -> Callable[..., Tensor]:
    return lambda model, batch: likelihood.nll(model(batch[0]), batch[1])


def draw_of(likelihood: Likelihood) -> Draw:
    return lambda model, X: (X, likelihood.draw(model(X)))


LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "fixed Gaussian": lambda: FixedGaussianLikelihood(SIGMA),
    "Gaussian": lambda: GaussianLikelihood(SIGMA).double(),
    "Bernoulli": BernoulliLikelihood,
    "softmax": SoftMaxLikelihood,
}


def dense_fisher(model: nn.Module, likelihood: Likelihood, X: Tensor) -> Tensor:
    """Mean over data of Jᵀ F J, datum by datum from its definition, in the order of the parameters."""
    params = dict(model.named_parameters())
    total = torch.zeros(())
    for x in X:
        J = torch.autograd.functional.jacobian(
            lambda *values, x=x: functional_call(model, dict(zip(params, values)), (x[None],))[0],
            tuple(params.values()),
        )
        f = model(x[None])[0].detach()
        J = torch.cat([part.reshape(len(f), -1) for part in J], 1)
        if isinstance(likelihood, SoftMaxLikelihood):
            p = f.softmax(0)
            in_prediction = p.diag() - torch.outer(p, p)
        elif isinstance(likelihood, BernoulliLikelihood):
            in_prediction = (f.sigmoid() * (1 - f.sigmoid())).diag()
        else:
            in_prediction = torch.eye(len(f), dtype=f.dtype) / SIGMA**2
        total = total + J.T @ in_prediction @ J / len(X)
    return total


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def vector_like(model: nn.Module, seed: int = 7) -> dict[str, Tensor]:
    return {name: noise(*p.shape, seed=seed + k) for k, (name, p) in enumerate(model.named_parameters())}


# -- curvature ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_curvature_is_the_mean_fisher_matrix_for_any_batch_size(name: str) -> None:
    model, likelihood = network(), LIKELIHOODS[name]()
    curvature = GaussNewton(model, likelihood, dict(model.named_parameters()))
    v = vector_like(model)
    for N in (1, 3, 8):
        X = noise(N, 2, seed=N)
        found = curvature.on(X, likelihood.draw(model(X)), 0)(v)
        torch.testing.assert_close(flat(found), dense_fisher(model, likelihood, X) @ flat(v), rtol=1e-9, atol=1e-12)


def test_drawn_hessian_has_the_fisher_matrix_as_expectation() -> None:
    """Labels of classes can be enumerated, so that the expectation is exact; others are drawn."""
    v = vector_like(network())
    for N in (1, 2, 3):
        model, likelihood, X = network(), SoftMaxLikelihood(), noise(N, 2, seed=N)
        curvature = DrawnHessian(model, nll_of(likelihood), dict(model.named_parameters()))
        log_p = model(X).log_softmax(1).detach()
        mean = torch.zeros(len(flat(v)), dtype=torch.float64)
        for labels in product(range(3), repeat=N):
            y = torch.tensor(labels)
            Bv = flat(curvature.on(X, y, 0)({name: entry.clone() for name, entry in v.items()}))
            mean += log_p.gather(1, y[:, None]).sum().exp() * Bv
        torch.testing.assert_close(mean, dense_fisher(model, likelihood, X) @ flat(v), rtol=1e-8, atol=1e-10)

    model, gaussian, X = network(), FixedGaussianLikelihood(SIGMA), noise(4, 2)
    curvature = DrawnHessian(model, nll_of(gaussian), dict(model.named_parameters()))
    products = torch.stack([flat(curvature.on(X, gaussian.draw(model(X)), 0)(v)) for _ in range(400)])
    truth = dense_fisher(model, gaussian, X) @ flat(v)
    assert products.std(0).max() > 0.1
    assert bool(((products.mean(0) - truth).abs() <= 4 * products.std(0) / 20 + 1e-9).all())


@pytest.mark.parametrize("normalization", [False, True])
@pytest.mark.parametrize("with_likelihood", [True, False])
def test_an_auxiliary_step_is_one_of_q_with_the_dense_matrix(with_likelihood: bool, normalization: bool) -> None:
    """With labels in both directions of equal size, the residuals' part of the Hessian is the one thing left out."""
    model, likelihood = network(), FixedGaussianLikelihood(SIGMA)
    X, labels = noise(5, 2), noise(5, 3, seed=3)

    def draw(model: nn.Module, X: Tensor) -> tuple[Tensor, Tensor]:
        return X, model(X) if not with_likelihood else labels

    opt = FishLeg(
        model,
        draw,
        nll_of(likelihood),
        [X],
        likelihood if with_likelihood else None,
        damping=0.3,
        scale=2.0,
        aux_lr=1e-2,
        normalization=normalization,
        seed=3,
    )
    nll_of(likelihood)(model, (X, labels)).backward()
    twin = LearnedInverseLinearOperator(model, damping=0.3, scale=2.0, seed=3, lr=1e-2)
    F, u = dense_fisher(model, likelihood, X), {name: p.grad.clone() for name, p in model.named_parameters()}
    if normalization:
        u = {name: entry / flat(u).norm() for name, entry in u.items()}
    split = [p.numel() for p in model.parameters()]
    for _ in range(3):
        expected = twin.update(
            lambda v: {n: part.reshape(v[n].shape) for n, part in zip(v, (F @ flat(v)).split(split))},
            u,
            precondition=True,
        )
        assert abs(opt.update_aux() - expected) < 1e-9 * max(1.0, abs(expected))
    torch.testing.assert_close(opt.Q.to_dense(), twin.to_dense(), rtol=1e-8, atol=1e-10)
    assert (opt.Q.to_dense() - 2 * torch.eye(sum(split), dtype=torch.float64)).abs().max() > 1e-3


def test_negative_curvature_is_skipped_and_counted() -> None:
    model = nn.Linear(2, 1, bias=False)
    opt = FishLeg(
        model, lambda model, X: (X, None), lambda model, batch: -model(batch[0]).square().mean(), [torch.eye(2)]
    )
    model.weight.grad = torch.ones(1, 2)
    before = opt.state_dict()["fishleg"]["Q"]["factors"]
    assert opt.update_aux() is None and opt.num_skipped == 1 and opt.Q.num_updates == 0
    opt.step()
    assert opt.num_skipped == 2
    assert str(opt.state_dict()["fishleg"]["Q"]["factors"]) == str(before)


# -- steps -------------------------------------------------------------------------------------------------------------


def simple(model: nn.Module, **options: Any) -> FishLeg:
    """FishLeg with no auxiliary steps, unless asked for."""
    likelihood = FixedGaussianLikelihood(1.0)
    options = {"update_aux_every": 0, "weight_decay": 0.0, "beta": 0.0} | options
    return FishLeg(model, draw_of(likelihood), nll_of(likelihood), [noise(4, 2)], likelihood, **options)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_without_momentum_is_sgd_to_the_bit(weight_decay: float, dtype: torch.dtype) -> None:
    ours, theirs = network().to(dtype), network().to(dtype)
    X, y = noise(16, 2).to(dtype), noise(16, 3, seed=1).to(dtype)
    optimizers = [
        simple(ours, fish_lr=0.1, weight_decay=weight_decay),
        torch.optim.SGD(theirs.parameters(), lr=0.1, weight_decay=weight_decay),
    ]
    schedulers = [
        [torch.optim.lr_scheduler.StepLR(opt, 5, 0.5), torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)]
        for opt in optimizers
    ]
    for _ in range(20):
        for model, opt, chain in zip((ours, theirs), optimizers, schedulers):

            def closure(model: nn.Module = model, opt: torch.optim.Optimizer = opt) -> Tensor:
                opt.zero_grad()
                loss = (model(X) - y).square().mean()
                loss.backward()
                return loss

            assert opt.step(closure) >= 0
            for scheduler in chain:
                scheduler.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))
    assert not torch.equal(next(ours.parameters()), next(network().to(dtype).parameters()))


@pytest.mark.parametrize("fine_tune", [False, True])
def test_steps_follow_the_formula(fine_tune: bool) -> None:
    """θ ← θ − lr (m + wd·θ), m ← βm + (1−β)Qg with a Q that is no multiple of the identity; one-cycle schedule."""
    model = network()
    opt = simple(model, fish_lr=0.1, weight_decay=0.2, beta=0.7, fine_tune=fine_tune, update_aux_every=2, aux_lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.3, total_steps=10, cycle_momentum=False)
    theta = start = flat(dict(model.named_parameters())).detach().clone()
    m = torch.zeros_like(theta)
    num_updates = []
    for step in range(6):
        for k, p in enumerate(model.parameters()):
            p.grad = noise(*p.shape, seed=10 * step + k)
        lr, g = opt.param_groups[0]["lr"], flat({name: p.grad for name, p in model.named_parameters()})
        opt.step()
        num_updates.append(opt.Q.num_updates)
        m = 0.7 * m + 0.3 * opt.Q.to_dense() @ g
        theta = theta - lr * (m + 0.2 * (theta - start if fine_tune else theta))
        torch.testing.assert_close(flat(dict(model.named_parameters())), theta, rtol=1e-9, atol=1e-12)
        scheduler.step()
    assert num_updates == [1, 1, 2, 2, 3, 3]
    assert len({group["lr"] for group in opt.param_groups}) == 1 and opt.param_groups[0]["lr"] != 0.1


def test_what_has_no_gradient_keeps_still() -> None:
    model = network()
    opt = simple(model, weight_decay=0.5, beta=0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    before = copy.deepcopy(model.state_dict())
    model[0].bias.grad = None
    opt.step()
    moved = [name for name, p in model.state_dict().items() if not torch.equal(p, before[name])]
    assert moved == ["0.weight", "2.weight", "2.bias"]
    opt.zero_grad()
    before = copy.deepcopy(model.state_dict())
    opt.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_when_auxiliary_steps_are_made() -> None:
    """Every n steps, n in a step, none; until the cosine ends; warm-up first, on data and loss of its own."""
    seen: list[str] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return model(noise(2, 2)).square().sum()

    for options, expected in [
        ({"update_aux_every": 3}, [1, 1, 1, 2, 2]),
        ({"update_aux_every": -2}, [2, 4, 6, 8, 10]),
        ({"update_aux_every": 1, "num_steps": 3}, [1, 2, 3, 3, 3]),
        ({"warmup": 5, "warmup_data": ["a", "b"], "warmup_loss": loss}, [5, 5, 5, 5, 5]),
    ]:
        model, counts, rates = network(), [], []
        opt = simple(model, **options)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        for _ in range(5):
            opt.step()
            counts.append(opt.Q.num_updates)
            rates.append(opt.Q.learning_rate)
        assert counts == expected
        if "num_steps" in options:
            np.testing.assert_allclose(rates[:3], [1e-4 * (1 + np.cos(np.pi * t / 3)) / 2 for t in range(3)])
    assert seen == ["a", "b", "a", "b", "a"]
    values = opt.pretrain_fish([1], loss, 60, aux_lr=3e-2)
    assert len(values) == 60 and opt.Q.num_updates == 65 and values[-1] < values[0] - 0.1


def test_learned_inverse_and_learned_sigma() -> None:
    """σ has a Q of its own, which comes near 1 / (2C/σ² + γ), and training brings it to the size of the noise."""
    torch.manual_seed(0)
    X = noise(200, 2)
    y = X @ noise(2, 3, seed=1) + 0.3 * noise(200, 3, seed=2)
    model, likelihood = nn.Linear(2, 3).double(), GaussianLikelihood(1.0).double()
    loader = [(X, y)]
    nll = nll_of(likelihood)
    opt = FishLeg(
        model,
        draw_of(likelihood),
        nll,
        loader,
        likelihood,
        fish_lr=0.3,
        damping=0.1,
        weight_decay=0.0,
        aux_lr=2e-2,
        aux_betas=(0.5, 0.9),
        update_aux_every=5,
    )
    (sigma,) = likelihood.get_parameters()
    assert any(p is sigma for p in opt.param_groups[0]["params"])
    assert opt.Q.shape == (9, 9)
    for aux_lr in (5e-2, 1e-2):
        opt.pretrain_fish(loader, nll, 100, aux_lr=aux_lr)
    assert opt.likelihood_Q is not None
    torch.testing.assert_close(opt.likelihood_Q.to_dense().item(), 1 / (2 * 3 / 1.0**2 + 0.1), rtol=1e-4, atol=0)
    assert opt.Q.num_updates == opt.likelihood_Q.num_updates == 200
    for _ in range(200):
        opt.zero_grad()
        nll(model, loader[0]).backward()
        opt.step()
    residual = (y - model(X)).square().mean().sqrt().item()
    assert abs(abs(sigma.item()) - residual) < 0.01 and residual < 0.31


# -- what is left alone ------------------------------------------------------------------------------------------------


def odd_model() -> nn.Sequential:
    """With buffers that a forward changes, and random numbers in it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3)).double()


def odd_optimizer(
    model: nn.Module, with_likelihood: bool = True, fails: list[str] | None = None, **options: Any
) -> FishLeg:
    likelihood, fails = SoftMaxLikelihood(), [] if fails is None else fails

    def draw(model: nn.Module, X: Tensor) -> tuple[Tensor, Tensor]:
        if fails:
            model(X)
            raise KeyError(fails[0])
        np.random.rand(), random.random()
        return X, torch.multinomial(model(X).softmax(1), 1).squeeze(1)

    data = TensorDataset(noise(24, 2), torch.arange(24) % 3)
    loader = DataLoader(data, batch_size=5, shuffle=True)
    options = {"update_aux_every": 1, "aux_lr": 1e-2, "beta": 0.8} | options
    return FishLeg(model, draw, nll_of(likelihood), loader, likelihood if with_likelihood else None, **options)


def surroundings(model: nn.Module) -> list[Any]:
    """All that an auxiliary step must not change, as text."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    names = [sorted(vars(m)) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    identities = [id(tensor) for tensor in [*model.parameters(), *model.buffers()]]
    states = [torch.get_rng_state().sum(), np.random.get_state()[2], random.getstate()]
    return [str(part) for part in (state, flags, hooks, names, modes, identities, states)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_likelihood", [True, False])
def test_auxiliary_steps_change_nothing_but_q(with_likelihood: bool, training: bool) -> None:
    model, fails = odd_model().train(training), []
    model[0].weight.requires_grad_(False)
    opt = odd_optimizer(model, with_likelihood, fails)
    model(noise(6, 2)).square().sum().backward()
    before = surroundings(model)
    for _ in range(7):  # more than the batches of a pass
        opt.update_aux()
    opt.pretrain_fish(opt._problem.aux_dataloader, nll_of(SoftMaxLikelihood()), 2)
    assert opt.Q.num_updates + opt.num_skipped == 9 and opt.Q.num_updates > 2
    assert surroundings(model) == before
    fails.append("the user's own error")
    with pytest.raises(KeyError, match="own error"):
        opt.update_aux()
    assert surroundings(model) == before
    assert "0.weight" not in (opt.Q.domain.names or ())


@pytest.mark.parametrize("with_likelihood", [True, False])
def test_resumes_to_the_bit(with_likelihood: bool) -> None:
    X, y = noise(20, 2), torch.arange(20) % 3

    def run(model: nn.Module, opt: FishLeg, num_steps: int) -> None:
        for _ in range(num_steps):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(X), y).backward()
            opt.step()

    options = {"fine_tune": True, "warmup": 2, "num_steps": 40}
    torch.manual_seed(0)
    model = odd_model()
    opt = odd_optimizer(model, with_likelihood, **options)
    run(model, opt, 7)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "random": torch.get_rng_state()}, file)
    kept = opt.state_dict()
    run(model, opt, 7)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert str(kept) == str(saved["opt"])  # later steps do not reach into what was handed out

    fresh = odd_model()
    fresh.load_state_dict(saved["model"])
    resumed = odd_optimizer(fresh, with_likelihood, **options)
    torch.set_rng_state(saved["random"])
    resumed.load_state_dict(saved["opt"])
    run(fresh, resumed, 7)
    assert str(resumed.state_dict()) == str(opt.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values()))
    assert torch.equal(resumed.Q.to_dense(), opt.Q.to_dense())
    assert resumed.num_skipped == opt.num_skipped and resumed.Q.num_updates + resumed.num_skipped == 16

    with pytest.raises(ValueError, match="no entry 'fishleg'"):
        resumed.load_state_dict(torch.optim.SGD(fresh.parameters(), lr=0.1).state_dict())


def test_half_precision() -> None:
    """Momentum is summed in float32, also after loading."""
    model = network().bfloat16()
    opt = simple(model, beta=0.9, fish_lr=0.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    for _ in range(100):
        opt.step()
    fresh = simple(model)
    fresh.load_state_dict(opt.state_dict())
    momentum = fresh.state[model[0].weight]["momentum"]
    assert momentum.dtype == torch.float32
    truth = (1 - 0.9**100) * model[0].weight.grad.float()
    torch.testing.assert_close(momentum, truth, rtol=1e-5, atol=0)


# -- choice of layers, errors ------------------------------------------------------------------------------------------


def test_modules_are_chosen_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            self.decoder = nn.Linear(2, 1)
            self.shift = nn.Parameter(torch.zeros(1))

        def forward(self, X: Tensor) -> Tensor:
            return self.decoder(self.encoder(X)) + self.shift

    def learned(**options: Any) -> list[str]:
        model = Two().double()
        opt = simple(model, update_aux_every=1, scale=2.0, aux_lr=1e-2, **options)
        model(noise(5, 2)).square().mean().backward()
        opt.step()
        dense, start, found = opt.Q.to_dense(), 0, []
        for name, p in model.named_parameters():
            block = dense[start : start + p.numel(), start : start + p.numel()]
            start += p.numel()
            if not torch.equal(block, 2 * torch.eye(p.numel(), dtype=p.dtype)):
                found.append(name)
        return found

    first, second = ["encoder.0.weight", "encoder.0.bias"], ["encoder.1.weight", "encoder.1.bias"]
    assert set(learned()) == {*first, *second, "decoder.weight", "decoder.bias", "shift"}
    assert set(learned(module_names=["encoder"])) == set(learned(module_names="encoder")) == {*first, *second}
    assert set(learned(module_names=["*.0", "shift"])) == {*first, "shift"}
    assert set(learned(skip_names=["encoder", "s*"], structure="diagonal")) == {"decoder.weight", "decoder.bias"}
    chosen = {"module_names": ["encoder"], "skip_names": ["*.1"], "structure": {"encoder.0": "full"}}
    assert set(learned(**chosen)) == set(first)
    for options, message in [
        ({"module_names": ["head"]}, r"module_names: \['head'\] match no module"),
        ({"skip_names": "head"}, r"skip_names: \['head'\] match no module"),
        ({"skip_names": ["*"]}, "leave no layer to learn"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            simple(Two().double(), **options)


def test_parameters_that_are_frozen_or_freed_later_keep_still() -> None:
    model, likelihood = network(), GaussianLikelihood(0.5).double()
    nll = nll_of(likelihood)
    batch = (noise(6, 2), noise(6, 3, seed=1))
    opt = FishLeg(model, draw_of(likelihood), nll, [batch], likelihood, update_aux_every=1, aux_lr=1e-2)
    for frozen in ([], [model[0].weight], [model[0].weight, likelihood.sigma], [likelihood.sigma]):
        for p in (*model.parameters(), likelihood.sigma):
            p.requires_grad_(not any(p is q for q in frozen))
        before = [p.detach().clone() for p in (*model.parameters(), likelihood.sigma)]
        opt.zero_grad()
        nll(model, batch).backward()
        opt.step()
        opt.pretrain_fish([batch], nll, 1)
        for p, old in zip((*model.parameters(), likelihood.sigma), before, strict=True):
            assert torch.equal(p, old) == any(p is q for q in frozen)


def test_loaders_of_the_user_are_not_disturbed() -> None:
    """One loader for training and for auxiliary steps: with persistent workers, and with a generator of its own."""
    data = TensorDataset(noise(12, 2), noise(12, 3, seed=1))

    def order(every: int, **options: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(data, 4, shuffle=True, generator=generator, **options)
        model, likelihood = network(), FixedGaussianLikelihood(1.0)
        nll = nll_of(likelihood)
        opt = FishLeg(model, draw_of(likelihood), nll, loader, likelihood, update_aux_every=every)
        seen = []
        for _ in range(2):
            for number, batch in enumerate(loader):
                assert number < 3, "the epoch does not end"
                seen.append(batch[0])
                opt.zero_grad()
                nll(model, batch).backward()
                opt.step()
        return seen

    for options in ({}, {"num_workers": 1, "persistent_workers": True}):
        assert all(torch.equal(a, b) for a, b in zip(order(0, **options), order(1, **options), strict=True)), options


def test_what_is_odd_is_left_out_or_refused() -> None:
    X = noise(5, 2)
    norms = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 3)).double()
    structure = simple(norms, structure="kronecker", skip_names=["2"]).Q.structure
    assert structure == {"0": "kronecker", "1": "diagonal", "2": "identity"}
    with pytest.raises(ValueError, match="'full' is one factor for all layers"):
        simple(norms, structure="full", skip_names=["2"])
    opt = simple(network(), structure="identity", update_aux_every=1)
    opt.step()  # no gradient: nothing is due
    opt._problem.model(X).sum().backward()
    opt.step()
    assert opt.Q.num_updates == 0
    with pytest.raises(TypeError, match="save its state_dict"):
        copy.deepcopy(opt)

    diverged = simple(network(), update_aux_every=1, aux_lr=1e4, scale=1e3)
    model = diverged._problem.model
    model(X).square().sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="Q has diverged"):
        for _ in range(3):
            diverged.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    tuned, other = simple(network(), fine_tune=True), simple(network(), fish_lr=0.5, damping=0.3)
    for state, message in [(other.state_dict(), "damping"), (simple(network()).state_dict(), "fine_tune")]:
        with pytest.raises(ValueError, match=message):
            tuned.load_state_dict(state)
        assert tuned.param_groups[0]["lr"] == 0.05

    with_none = network()
    with_none.register_buffer("seen", None)
    with_none.register_forward_pre_hook(lambda module, inputs: setattr(module, "seen", inputs[0]))
    opt = simple(with_none, update_aux_every=1)
    for p in with_none.parameters():
        p.grad = torch.ones_like(p)
    dense = simple(network(), update_aux_every=1)
    for p in dense._problem.model.parameters():
        p.grad = torch.ones_like(p)
    dense.step()
    with torch.autocast("cpu"):
        opt.step()
    assert with_none.seen is None
    assert torch.equal(opt.Q.to_dense(), dense.Q.to_dense())


def test_errors() -> None:
    model = network()
    for options, message in [
        ({"fish_lr": -1.0}, "fish_lr: expected a finite number of at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"beta": 1.0}, "beta: expected a number from 0"),
        ({"aux_lr": -1e-3}, "aux_lr"),
        ({"damping": -1.0}, "damping"),
        ({"scale": 0.0}, "scale"),
        ({"num_steps": 0}, "num_steps: expected an integer of at least 1"),
        ({"warmup": -1}, "warmup"),
        ({"update_aux_every": 0.5}, "update_aux_every"),
    ]:
        with pytest.raises(ValueError, match=message):
            simple(model, **options)
    likelihood = FixedGaussianLikelihood(1.0)
    draw, nll = draw_of(likelihood), nll_of(likelihood)
    for arguments, message in [
        ((list(model.parameters()), draw, nll, []), "model: expected a module"),
        ((model, None, nll, []), "draw: expected a function"),
        ((model, draw, "nll", []), "nll: expected a function"),
        ((model, draw, nll, torch.zeros(3)), "Expected a loader or list of batches, got Tensor"),
        ((model, draw, nll, (torch.zeros(3), torch.zeros(3))), r"got a tuple of tensors. Write \[\(X, y\)\]"),
        ((model, draw, nll, [], nn.MSELoss()), "likelihood: expected"),
        ((model, draw, nll, [], FixedGaussianLikelihood), "likelihood: expected an instance"),
    ]:
        with pytest.raises(TypeError, match=message):
            FishLeg(*arguments)
    with pytest.raises(ValueError, match="nothing to optimise"):
        simple(network().requires_grad_(False))
    both = nn.ModuleDict({"net": network(), "likelihood": GaussianLikelihood(1.0).double()})
    with pytest.raises(ValueError, match="Keep the likelihood outside"):
        FishLeg(both, draw, nll, [], both["likelihood"])

    batch, other = (noise(3, 2), noise(3, 1)), copy.deepcopy(model)
    for foreign, error, message in [
        (lambda _, data: (other(data[0]) - data[1]).square().mean(), ValueError, "does not depend on the parameters"),
        (lambda m, data: (m(data[0]) - data[1]).square(), TypeError, "nll: expected a tensor of one number"),
        (lambda m, data: (m(data[0]) - data[1]).square().mean().item(), TypeError, "nll: .* got float"),
    ]:
        opt = FishLeg(model, lambda m, X: (X, m(X).detach()), foreign, [batch], update_aux_every=1)
        model(batch[0]).sum().backward()
        with pytest.raises(error, match=message):
            opt.step()
        opt.zero_grad()

    opt = simple(model, update_aux_every=1)
    with pytest.raises(NotImplementedError, match="one parameter group"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        opt.update_aux()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    model[2].bias.grad[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"\['2.bias'\] are not finite"):
        opt.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and opt.Q.num_updates == 0
    model[2].bias.grad[0] = 0.0
    with pytest.raises(TypeError, match=r"draw: expected it to return \(data_x, data_y\), got Tensor"):
        FishLeg(model, lambda model, X: X, nll, [noise(4, 2)], likelihood).step()
    for batches in ([], iter([noise(4, 2)])):
        opt = FishLeg(model, draw, nll, batches, likelihood, update_aux_every=-2)
        with pytest.raises(ValueError, match="There are no batches"):
            opt.step()
