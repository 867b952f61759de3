"""Likelihoods: densities, draws and Fisher matrices against torch's distributions and their second derivatives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

from curvlinops.applications.fishleg.likelihoods import (
    BernoulliLikelihood,
    FixedGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
    SoftMaxLikelihood,
)

SIGMA = 0.7


def channels_last(preds: Tensor) -> Tensor:
    return preds.movedim(1, -1)


CASES: dict[str, tuple[Callable[[], Likelihood], Callable[[Tensor], Distribution]]] = {
    "fixed Gaussian": (lambda: FixedGaussianLikelihood(SIGMA), lambda f: Normal(f, SIGMA)),
    "Gaussian": (lambda: GaussianLikelihood(SIGMA).double(), lambda f: Normal(f, SIGMA)),
    "Bernoulli": (BernoulliLikelihood, lambda f: Bernoulli(logits=f)),
    "softmax": (SoftMaxLikelihood, lambda f: Categorical(logits=channels_last(f))),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_densities_and_their_losses(name: str, shape: tuple[int, ...]) -> None:
    likelihood, distribution = CASES[name][0](), CASES[name][1]
    preds = noise(*shape)
    with torch.random.fork_rng():
        observations = distribution(preds).sample()
    expected = -distribution(preds).log_prob(observations).sum() / len(preds)
    torch.testing.assert_close(likelihood.nll(preds, observations), expected.double(), rtol=1e-6, atol=1e-6)

    def density(f: Tensor) -> Tensor:
        return -distribution(f).log_prob(observations).sum()

    truth = hessian(density, preds)
    found = hessian(lambda f: likelihood.loss_scale * likelihood.loss_func(f, observations), preds)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-8)

    half = likelihood.nll(preds.bfloat16(), observations)
    assert half.dtype != torch.bfloat16 and abs(half - expected) < 0.05 * abs(expected)


@pytest.mark.parametrize("name", CASES)
def test_draws(name: str) -> None:
    """Frequencies agree within five standard errors; the state of the draws is the likelihood's own, and is saved."""
    likelihood, distribution = CASES[name][0](), CASES[name][1]
    num_draws, preds = 20_000, noise(1, 3, 2)
    before = torch.get_rng_state()
    draws = likelihood.draw(preds.expand(num_draws, 3, 2))
    assert torch.equal(torch.get_rng_state(), before)
    if name == "softmax":
        shares = torch.nn.functional.one_hot(draws, 3).double().mean(0)
        p = distribution(preds).probs[0]
        assert bool(((shares - p).abs() < 5 * (p * (1 - p) / num_draws).sqrt()).all())
    else:
        found, truth = draws, distribution(preds)
        assert bool(((found.mean(0) - truth.mean[0]).abs() < 5 * (truth.variance[0] / num_draws).sqrt()).all())
        torch.testing.assert_close(found.var(0), truth.variance[0], rtol=0.06, atol=0)
        assert draws.dtype == preds.dtype

    state = likelihood.state_dict()
    expected = likelihood.draw(preds)
    fresh = CASES[name][0]()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.draw(preds), expected)
    ours = [likelihood.draw(preds, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*ours) and not ours[0].requires_grad


def test_fisher_information_of_sigma() -> None:
    """Residuals of size σ and both signs have the moments of the density: there second derivatives are their means."""
    likelihood = GaussianLikelihood(SIGMA).double()
    (sigma,) = likelihood.get_parameters()
    assert sigma is likelihood.sigma
    preds = noise(1, 3).expand(2, 3).clone()
    observations = preds + SIGMA * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)

    def density(s: Tensor, f: Tensor) -> Tensor:
        return -Normal(f, s).log_prob(observations).sum() / 2

    (of_sigma, between), _ = hessian(density, (sigma.detach(), preds[:1].clone()))
    torch.testing.assert_close(likelihood.fisher_diagonal(observations)[0], of_sigma)
    torch.testing.assert_close(of_sigma.item(), 2 * 3 / SIGMA**2)
    assert between.abs().max() < 1e-12

    def by_autograd(s: Tensor) -> Tensor:
        with torch.no_grad():
            likelihood.sigma.copy_(s)
        (first,) = torch.autograd.grad(likelihood.nll(preds, observations + 0.1), likelihood.sigma)
        return first

    step = 1e-6
    central = (density(sigma + step, preds - 0.1) - density(sigma - step, preds - 0.1)) / (2 * step)
    torch.testing.assert_close(by_autograd(sigma.detach().clone()), central.detach(), rtol=1e-6, atol=0)
    # Its sign does not matter: only the square enters.
    value = likelihood.nll(preds, observations)
    with torch.no_grad():
        likelihood.sigma.neg_()
    assert likelihood.nll(preds, observations) == value
    assert likelihood.requires_grad_(False).fisher_diagonal(observations) == []
    for other in (FixedGaussianLikelihood(1.0), BernoulliLikelihood(), SoftMaxLikelihood()):
        assert other.get_parameters() == [] and other.fisher_diagonal(observations) == []


def test_errors() -> None:
    preds = torch.zeros(2, 3)
    for sigma in (0.0, -1.0, float("nan"), "1"):
        for kind in (FixedGaussianLikelihood, GaussianLikelihood):
            with pytest.raises(ValueError, match="sigma: expected a positive number"):
                kind(sigma)
    for likelihood in (FixedGaussianLikelihood(1.0), BernoulliLikelihood()):
        with pytest.raises(ValueError, match=r"in the shape of the predictions, \[2, 3\]"):
            likelihood.nll(preds, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="floating-point"):
        BernoulliLikelihood().nll(preds, torch.ones(2, 3, dtype=torch.long))
    for wrong in (torch.zeros(2), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"class indices \(torch.long\) of shape \[2\]"):
            SoftMaxLikelihood().nll(preds, wrong)
    with pytest.raises(ValueError, match=r"expected classes 0\.\.2, got -100"):
        SoftMaxLikelihood().nll(preds, torch.tensor([0, -100]))
