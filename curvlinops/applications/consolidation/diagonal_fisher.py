"""The diagonal of the Fisher matrix, as elastic weight consolidation and merging want it: a mean over data, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from curvlinops import EFDiagonalLinearOperator, GGNDiagonalLinearOperator, Space
from curvlinops.applications.checked_numbers import checked_count, checked_number
from curvlinops.applications.consolidation.chosen_data import CountedData, batches_of
from curvlinops.applications.named_tensors import named_tensors

#: What picks outputs from axis 1 of a prediction.
OutputSlice = slice | Tensor | Sequence[int]


def diagonal_fisher(
    model: Callable[..., Any],
    loss_func: Callable[[Tensor, Any], Tensor],
    params: nn.Module | Mapping[str, Tensor] | Sequence[Tensor] | None,
    data: Any,
    *,
    kind: str = "empirical",
    mc_samples: int = 1,
    seed: int = 2147483647,
    max_data: int | None = None,
    noise_variance: float | None = None,
    terms: str = "position",
    output_slice: OutputSlice | None = None,
    batch_size: int = 256,
    check_deterministic: bool = True,
) -> dict[str, Tensor]:
    r"""The diagonal of the Fisher matrix as a mean over data, parameter by parameter.

    With :math:`\ell_n` the negative log-likelihood of datum n, summed over its positions t (one, but for sequences),

    .. math::
        F = \frac{1}{N} \sum_n \sum_t (\nabla_\theta \ell_{nt})^2 \quad \text{("empirical")}, \qquad
        F = \frac{1}{N} \sum_n \mathbb{E}_{y \sim p_\theta(y | x_n)} (\nabla_\theta \ell_n)^2 \quad
        \text{("true", "mc")},

    squared entry by entry: the mean of squares, not the square of the mean gradient. It is the same for any cut of the
    data into mini-batches (samples apart), whether the loss takes means or sums. N counts the data, the rows of X.
    Targets that the loss ignores contribute zero. Class weights and label smoothing are part of the loss:
    ``"empirical"`` squares its gradients, and with them the weights; ``"true"`` and ``"mc"`` are then the diagonal of
    its generalised Gauss-Newton matrix, which the weight of the target enters once.

    The model is evaluated in evaluation mode and put back into its modes; a callable is called as it is.

    **Cost**: ``"empirical"`` a forward and a backward for each position, ``"true"`` a backward for each output,
    ``"mc"`` for each sample, for the data of a mini-batch together; and two forwards and passes over the data that
    check that model and data repeat.

    **Reference**: Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks, arXiv:1612.00796;
    Kunstner, Balles, Hennig (2019), Limitations of the empirical Fisher approximation for natural gradient descent,
    arXiv:1905.12558.

    Args:
        model: Module, or callable as curvature operators take it.
        loss_func: Cross-entropy (classes on axis 1, ``[N, C]`` or ``[N, C, T]``), squared error or binary cross-entropy
            of torch.nn or torch.nn.functional; whether it takes means or sums plays no role. A squared error without
            ``noise_variance`` is :math:`\lVert f - y \rVert^2`, summed over a datum's outputs.
        params: Dict name -> parameter, or a list, whose names are the positions "0", "1", ...; ``None`` or the module
            for all of its parameters that require gradients.
        data: DataLoader or other iterable of mini-batches (X, y), a map-style ``Dataset`` of single data, or a pair
            (X, y) of tensors.
        kind: ``"empirical"`` with the targets of the data; ``"true"`` with the expectation over the model's own, in
            closed form; ``"mc"`` with samples of these, for data in a fixed order.
        mc_samples: Number of samples a datum, for ``"mc"``.
        seed: Seed of the samples and of the choice of data.
        max_data: Number of data to choose at random without replacement, where there are more; of a DataLoader they
            come from its dataset. Other iterables must be sequences.
        noise_variance: σ² of a regression, whose negative log-likelihood is ½ ‖f − y‖² / σ²; needs a squared error.
        terms: For ``"empirical"``, whether each position of a datum is squared on its own (``"position"``), or their
            sum is (``"datum"``). Without effect on the other kinds, since in expectation both are the same.
        output_slice: Slice or indices on axis 1 of the prediction: the head of a task. Targets count from its first.
        batch_size: Data of a mini-batch, for a ``Dataset`` or a pair of tensors.
        check_deterministic: Whether to check that model and data repeat.

    Returns:
        The diagonal, in the shapes of the parameters. For those of half precision it is summed and returned in
        float32, but rounded to their dtype in between, which float16 has no range for: convert the model first.

    Raises:
        TypeError: If loss, parameters or data are of the wrong kind.
        ValueError: If an option is out of range, or does not fit the others.
        NotImplementedError: If the loss is not one of the three.

    >>> from curvlinops import diagonal_fisher
    >>> model = nn.Linear(3, 2)
    >>> data = torch.rand(8, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    >>> fisher = diagonal_fisher(model, nn.CrossEntropyLoss(), None, data)
    >>> {name: list(entries.shape) for name, entries in fisher.items()}
    {'weight': [2, 3], 'bias': [2]}
    """
    _check_options(kind, mc_samples, seed, terms)
    scale = 1.0 if noise_variance is None else _scale_of_squared_error(loss_func, kind, noise_variance)
    if params is None or isinstance(params, nn.Module):
        params = _params_of(model if params is None else params)
    names = list(named_tensors(params, "params"))
    studied, own = (model, params) if output_slice is None else _with_outputs(model, params, output_slice)
    counted = CountedData(batches_of(data, batch_size, max_data, seed))
    arguments = (studied, _summed(loss_func), own, counted, False, check_deterministic)
    with _in_evaluation_mode(model):
        operator: EFDiagonalLinearOperator | GGNDiagonalLinearOperator
        if kind == "empirical":
            operator = EFDiagonalLinearOperator(*arguments, terms=terms)
        else:
            operator = GGNDiagonalLinearOperator(*arguments, mc_samples=mc_samples if kind == "mc" else 0, seed=seed)
        total = operator.diagonal()
    with torch.inference_mode(False):  # whoever calls from within inference mode gets ordinary tensors
        return dict(zip(names, _parts(total, operator.domain, scale / counted.num_data), strict=True))


def _check_options(kind: str, mc_samples: int, seed: int, terms: str) -> None:
    if kind not in ("empirical", "true", "mc"):
        raise ValueError(f"kind: expected 'empirical', 'true' or 'mc', got {kind!r}.")
    if terms not in ("position", "datum"):
        raise ValueError(f"terms: expected 'position' or 'datum', got {terms!r}.")
    checked_count(mc_samples, "mc_samples")
    if kind != "mc" and mc_samples != 1:
        raise ValueError(f"mc_samples: belongs to kind='mc', and the kind is {kind!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed: expected an integer, got {seed!r}.")


def _summed(loss_func: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """The loss with the sum over data as its reduction; their number divides afterwards."""
    if getattr(loss_func, "reduction", None) in ("mean", "sum"):
        result: Any = copy.copy(loss_func)
    elif callable(loss_func) and "reduction" in signature(loss_func).parameters:
        result = partial(cast(Callable[..., Tensor], loss_func), reduction="sum")
    else:
        raise TypeError(
            "loss_func: expected a loss of torch.nn or torch.nn.functional with reduction 'mean' or 'sum', got "
            f"{loss_func!r:.80}."
        )
    if not _is_known(loss_func):
        raise NotImplementedError(
            "loss_func: expected a cross-entropy, squared error or binary cross-entropy of logits of torch.nn or "
            f"torch.nn.functional, which are negative log-likelihoods, got {loss_func!r:.80}."
        )
    result.reduction = "sum"
    return result  # type: ignore[no-any-return]


def _is_known(loss: Callable[[Tensor, Any], Tensor]) -> bool:
    """Whether a loss is a negative log-likelihood, tried out: which these are is none of this room's business."""
    try:
        with torch.inference_mode(False):
            params = {"weight": torch.ones(1, 1, requires_grad=True)}
            EFDiagonalLinearOperator(lambda params, X: X @ params["weight"], loss, params, [], False, False, num_data=1)
    except NotImplementedError:
        return False
    return True


def _scale_of_squared_error(loss_func: Callable[[Tensor, Any], Tensor], kind: str, noise_variance: float) -> float:
    """By what ‖f − y‖² must be multiplied for ½ ‖f − y‖² / σ²: its Hessian once, products of its gradients twice."""
    variance = checked_number(noise_variance, "noise_variance", is_positive=True)
    if not _is_squared_error(_summed(loss_func)):
        raise ValueError(f"noise_variance: belongs to the squared error, and the loss is {type(loss_func).__name__}.")
    factor = 0.5 / variance
    return factor**2 if kind == "empirical" else factor


def _is_squared_error(loss: Callable[[Tensor, Any], Tensor]) -> bool:
    """Whether a loss gives Σ (f − y)², tried out: which classes of loss there are is none of this room's business."""
    prediction, target = torch.tensor([[3.0, 0.5]]), torch.tensor([[1.0, 0.0]])
    try:
        return bool(loss(prediction, target) == 4.25)
    except Exception:
        return False  # a loss that does not take such targets


def _params_of(model: Any) -> dict[str, Tensor]:
    """The parameters of a module that require gradients."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"params: None needs a module as model, got {type(model).__name__}. Pass a dict of parameters.")
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("params: no parameter of the model requires gradients. Pass those to study.")
    return found


def _parts(total: Tensor, space: Space, scale: float) -> list[Tensor]:
    """The parts of a flat diagonal in the shapes of the parameters, scaled, each in memory of its own."""
    if not bool(torch.isfinite(total).all()):
        raise FloatingPointError(
            f"The sum of squares over data is beyond the range of {total.dtype}: convert the model to float32 first."
        )
    wide = total.float() if total.dtype in (torch.bfloat16, torch.float16) else total
    return [scale * part for part in space.shaped(wide)]


@contextmanager
def _in_evaluation_mode(model: Any) -> Iterator[None]:
    """Put the modules of a model into evaluation mode for a while, and each back into its own mode."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


# -- the outputs of one task -------------------------------------------------------------------------------------------


def _with_outputs(
    model: Callable[..., Any], params: Mapping[str, Tensor] | Sequence[Tensor], chosen: OutputSlice
) -> tuple[Callable[..., Any], Mapping[str, Tensor] | Sequence[Tensor]]:
    """The model with some of its outputs, called in the same way, and its parameters as it knows them."""
    if not isinstance(chosen, slice):
        if isinstance(chosen, tuple):
            raise TypeError(f"output_slice: write slice{chosen} or, for single outputs, the list {list(chosen)}.")
        chosen = torch.as_tensor(chosen)
        if chosen.ndim != 1 or chosen.is_floating_point() or chosen.numel() == 0:
            raise ValueError(f"output_slice: expected a slice or a list of indices, got {chosen}.")
    if not isinstance(model, nn.Module):
        return _picking(model, chosen), params
    named = {f"model.{name}": p for name, p in params.items()} if isinstance(params, Mapping) else params
    return _SomeOutputs(model, chosen), named


def _picking(function: Callable[..., Any], chosen: slice | Tensor) -> Callable[..., Tensor]:
    """A function of the same signature that picks from axis 1 of what the other returns."""

    @wraps(function)
    def picked(*args: Any, **kwargs: Any) -> Tensor:
        output = function(*args, **kwargs)
        prediction = getattr(output, "logits", output)
        if not isinstance(prediction, Tensor) or prediction.ndim < 2:
            got = list(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
            raise ValueError(f"output_slice: expected a prediction with outputs on axis 1, got {got}.")
        part = prediction[:, chosen if isinstance(chosen, slice) else chosen.to(prediction.device)]
        if part.shape[1] == 0:
            raise ValueError(f"output_slice: {chosen} chooses none of {prediction.shape[1]} outputs.")
        return part

    return picked


class _SomeOutputs(nn.Module):
    """A module with some of the outputs of another, called with the same arguments."""

    def __init__(self, model: nn.Module, chosen: slice | Tensor) -> None:
        super().__init__()
        self.model, self.chosen = model, chosen

    @property
    def forward(self) -> Callable[..., Tensor]:  # type: ignore[override]
        """The forward of the model, whose signature says how inputs go in."""
        call = wraps(self.model.forward)(lambda *args, **kwargs: self.model(*args, **kwargs))
        return _picking(call, self.chosen)
