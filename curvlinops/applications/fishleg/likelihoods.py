"""What a network's predictions say of the observations: densities, draws, and the loss whose Hessian is the Fisher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import isfinite, log, pi

import torch
from torch import Generator, Tensor, nn


class Likelihood(nn.Module, ABC):
    r"""A density :math:`p(y \mid f)` of the observations of a datum given the prediction f, a datum a row.

    A module, so that what it learns moves and is saved like a network: ``.to(...)``, ``state_dict()``. The state holds
    the random generator of :meth:`draw` too.

    Args:
        seed: Seed of the draws.

    Attributes:
        loss_func: The torch loss, summed over all, that is this negative log-likelihood times a number and up to
            constants. With it, ``GGNLinearOperator`` is the Fisher matrix of the sum over data.
    """

    loss_func: nn.Module

    def __init__(self, *, seed: int = 2147483647) -> None:
        super().__init__()
        self._generator = Generator().manual_seed(seed)

    def nll(self, preds: Tensor, observations: Tensor) -> Tensor:
        """The negative log-likelihood of a datum, a sum over its components, averaged over the data (axis 0).

        It is that of the normalised density, with all constants, and is differentiable in the predictions and in what
        :meth:`get_parameters` returns. Half precision is worked in float32.

        Args:
            preds: Predictions ``[N, ...]``.
            observations: What was observed.

        Returns:
            A tensor without axes.

        Raises:
            ValueError: If the observations do not fit the predictions.
        """
        self._check(preds, observations)
        preds = _at_least_float32(preds)
        if observations.is_floating_point():
            observations = observations.to(preds.dtype)
        total: Tensor = self.loss_scale * self.loss_func(preds, observations)
        return total / len(preds) + self._constant(preds)

    @property
    def loss_scale(self) -> Tensor | float:
        """The number that makes ``loss_func`` the negative log-likelihood of all data, summed."""
        return 1.0

    def _constant(self, preds: Tensor) -> Tensor | float:
        """What the negative log-likelihood of a datum has beside the scaled loss."""
        return 0.0

    def draw(self, preds: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Observations drawn from the density at the predictions.

        Args:
            preds: Predictions ``[N, ...]``.
            generator: Random state, on any device; by default the likelihood's own.

        Returns:
            One draw of each datum, without a graph.
        """
        with torch.no_grad():
            return self._sample(preds.detach(), self._generator if generator is None else generator)

    def get_parameters(self) -> list[Tensor]:
        """The tensors of the likelihood that are learnt; none by default."""
        return [p for p in self.parameters() if p.requires_grad]

    def fisher_diagonal(self, observations: Tensor) -> list[Tensor]:
        """The Fisher information in each of :meth:`get_parameters` of one datum, the mean over data.

        There is none between these and the prediction.

        Args:
            observations: Observations ``[N, ...]``; only their shape matters.
        """
        return []

    def get_extra_state(self) -> Tensor:
        """The state of the random generator, for ``state_dict``."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Set the random generator, for ``load_state_dict``."""
        self._generator.set_state(state.cpu())

    def _check(self, preds: Tensor, observations: Tensor) -> None:
        if preds.ndim == 0 or observations.shape != preds.shape:
            raise ValueError(
                f"{type(self).__name__}: expected observations in the shape of the predictions, {list(preds.shape)}, "
                f"a datum a row, got {list(observations.shape)}."
            )

    @abstractmethod
    def _sample(self, preds: Tensor, generator: Generator) -> Tensor: ...


class FixedGaussianLikelihood(Likelihood):
    r"""Independent normal components of known width, :math:`y \sim \mathcal{N}(f, \sigma^2 I)`.

    The negative log-likelihood of a datum is :math:`\sum_c \tfrac12 (y_c - f_c)^2 / \sigma^2 + \tfrac12 \log 2 \pi
    \sigma^2`, and its Fisher in the prediction :math:`I / \sigma^2`.

    Args:
        sigma: The standard deviation σ > 0.
        seed: Seed of the draws.

    Raises:
        ValueError: If σ is not positive.

    >>> likelihood = FixedGaussianLikelihood(2.0)
    >>> round(likelihood.nll(torch.zeros(1, 1), torch.full((1, 1), 2.0)).item(), 4)  # ½ + log 2 + ½ log 2π
    2.1121
    """

    def __init__(self, sigma: float, *, seed: int = 2147483647) -> None:
        super().__init__(seed=seed)
        _check_sigma(sigma)
        self.loss_func = nn.MSELoss(reduction="sum")
        self.sigma: float | Tensor = sigma

    @property
    def loss_scale(self) -> Tensor | float:
        """½ / σ²."""
        return 0.5 / self.sigma**2

    def _constant(self, preds: Tensor) -> Tensor | float:
        return preds[0].numel() * (0.5 * log(2 * pi) + self._log_sigma)

    @property
    def _log_sigma(self) -> Tensor | float:
        return log(self.sigma)

    def _sample(self, preds: Tensor, generator: Generator) -> Tensor:
        work = _at_least_float32(preds)
        noise = torch.randn(preds.shape, dtype=work.dtype, device=generator.device, generator=generator)
        return (work + self.sigma * noise.to(preds.device)).to(preds.dtype)


class GaussianLikelihood(FixedGaussianLikelihood):
    r"""Independent normal components of one learnable width, :math:`y \sim \mathcal{N}(f, \sigma^2 I)`.

    The learnable parameter is σ itself. It enters by its square alone, so that its sign does not matter. The Fisher
    information of a datum of C components is :math:`2 C / \sigma^2` in σ, :math:`I / \sigma^2` in the prediction and
    nothing between them.

    Args:
        sigma: Where the standard deviation σ > 0 starts.
        seed: Seed of the draws.

    Attributes:
        sigma: The parameter, a number in float32; ``likelihood.to(model's dtype and device)`` changes that.

    Raises:
        ValueError: If σ is not positive.

    >>> likelihood = GaussianLikelihood(0.5)
    >>> likelihood.fisher_diagonal(torch.zeros(10, 3))[0].item()  # 2 · 3 / 0.25
    24.0
    """

    def __init__(self, sigma: float, *, seed: int = 2147483647) -> None:
        super().__init__(sigma, seed=seed)
        del self.sigma
        self.sigma = nn.Parameter(torch.tensor(float(sigma)))

    @property
    def _log_sigma(self) -> Tensor | float:
        return 0.5 * torch.as_tensor(self.sigma).square().log()

    def fisher_diagonal(self, observations: Tensor) -> list[Tensor]:
        """The Fisher information in σ of one datum, 2C / σ²; none where σ does not require gradients.

        Args:
            observations: Observations ``[N, ...]``, of C components each.
        """
        return [2 * observations[0].numel() / sigma.detach().square() for sigma in self.get_parameters()]


class BernoulliLikelihood(Likelihood):
    r"""Independent binary components of probability :math:`p = \operatorname{sigmoid}(f)`.

    Predictions are logits, observations 0 or 1 in the same shape, or numbers between them: then it is a cross-entropy.
    The Fisher in the prediction is diag p (1 - p).

    Args:
        seed: Seed of the draws.

    >>> likelihood = BernoulliLikelihood()
    >>> round(likelihood.nll(torch.zeros(5, 2), torch.ones(5, 2)).item(), 4)  # 2 log 2
    1.3863
    """

    def __init__(self, *, seed: int = 2147483647) -> None:
        super().__init__(seed=seed)
        self.loss_func = nn.BCEWithLogitsLoss(reduction="sum")

    def _check(self, preds: Tensor, observations: Tensor) -> None:
        super()._check(preds, observations)
        if not observations.is_floating_point():
            raise ValueError(
                f"BernoulliLikelihood: expected observations as floating-point numbers, got {observations.dtype}. "
                "Convert them with .to(preds.dtype)."
            )

    def _sample(self, preds: Tensor, generator: Generator) -> Tensor:
        p = _at_least_float32(preds).sigmoid()
        uniform = torch.rand(preds.shape, dtype=p.dtype, device=generator.device, generator=generator)
        return (uniform.to(preds.device) < p).to(preds.dtype)


class SoftMaxLikelihood(Likelihood):
    r"""One of C classes, of probabilities :math:`p = \operatorname{softmax}(f)`.

    Predictions are logits ``[N, C]`` or ``[N, C, d...]``, observations class indices ``[N]`` or ``[N, d...]``; the
    positions of a datum are summed. The Fisher in the prediction of a position is diag p - p pᵀ.

    Args:
        seed: Seed of the draws.

    >>> likelihood = SoftMaxLikelihood()
    >>> round(likelihood.nll(torch.zeros(5, 4), torch.tensor([0, 1, 2, 3, 0])).item(), 4)  # log 4
    1.3863
    """

    def __init__(self, *, seed: int = 2147483647) -> None:
        super().__init__(seed=seed)
        self.loss_func = nn.CrossEntropyLoss(reduction="sum")

    def _check(self, preds: Tensor, observations: Tensor) -> None:
        expected = preds.shape[:1] + preds.shape[2:]
        if preds.ndim < 2 or observations.shape != expected or observations.dtype != torch.long:
            raise ValueError(
                f"SoftMaxLikelihood: expected class indices (torch.long) of shape {list(expected)} for predictions "
                f"[N, C, ...], got {list(observations.shape)} ({observations.dtype}) for {list(preds.shape)}."
            )
        if bool((observations < 0).any()):
            raise ValueError(
                f"SoftMaxLikelihood: expected classes 0..{preds.shape[1] - 1}, got {int(observations.min())}. An index "
                "that is ignored has no likelihood: leave such positions out."
            )

    def _sample(self, preds: Tensor, generator: Generator) -> Tensor:
        # Of exponential clocks with rates p, clock c rings first with probability p_c.
        work = _at_least_float32(preds)
        times = torch.empty(preds.shape, dtype=work.dtype, device=generator.device).exponential_(generator=generator)
        return (work - times.to(preds.device).log()).argmax(1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_sigma(sigma: float) -> None:
    if not (isinstance(sigma, (int, float)) and isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma: expected a positive number, got {sigma!r}.")
