"""Merging models by their Fisher matrices: one linear system, of which averages are the plainest case."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from curvlinops import LinearOperator
from curvlinops.applications.checked_numbers import checked_number
from curvlinops.applications.merging.fishers import Fisher, read_fishers
from curvlinops.applications.merging.models import Models
from curvlinops.applications.merging.solve import Solver
from curvlinops.applications.merging.system import Point, System
from curvlinops.applications.named_tensors import named_tensors

#: A model or a point: a module, or tensors by name or by position.
Model = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class MergeInfo:
    """What a merge did.

    Attributes:
        residual: ‖b - A x‖ / ‖b‖ of the linear system that was solved, recomputed; ‖A x‖ where b is zero.
        iterations: Iterations that were made, the most of any block; 0 for closed forms.
        quadratic_forms: δᵀF_t δ with δ = θ - θ_t for each model, without its weight; F_t as normalised and floored.
        predicted_rise: Σ w_t ½ δᵀF_t δ: by how much the weighted sum of the losses rises to second order, where each
            model is at a minimum of its own.
        method: ``"closed form"``, ``"block by block"``, ``"conjugate gradients"``, ``"MINRES"``, or what the
            user's solver calls it, or its class.

    >>> info = merge([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], return_info=True)[1]
    >>> info.method, info.quadratic_forms, info.predicted_rise
    ('closed form', (0.5, 0.5), 0.5)
    """

    residual: float
    iterations: int
    quadratic_forms: tuple[float, ...]
    predicted_rise: float
    method: str


@overload
def merge(
    models: Sequence[Model],
    fishers: Sequence[LinearOperator | Mapping[str, Tensor] | Sequence[Tensor]] | None = None,
    *,
    weights: Iterable[float] | None = None,
    damping: float = 0.0,
    anchor: str | Model = "zero",
    solver: Solver | None = None,
    x0: str | Model = "mean",
    normalize: bool = False,
    floor: float = 0.0,
    unmerged: str = "average",
    return_info: Literal[False] = False,
) -> dict[str, Tensor]: ...
@overload
def merge(
    models: Sequence[Model],
    fishers: Sequence[LinearOperator | Mapping[str, Tensor] | Sequence[Tensor]] | None = None,
    *,
    weights: Iterable[float] | None = None,
    damping: float = 0.0,
    anchor: str | Model = "zero",
    solver: Solver | None = None,
    x0: str | Model = "mean",
    normalize: bool = False,
    floor: float = 0.0,
    unmerged: str = "average",
    return_info: Literal[True],
) -> tuple[dict[str, Tensor], MergeInfo]: ...
def merge(
    models: Sequence[Model],
    fishers: Sequence[LinearOperator | Mapping[str, Tensor] | Sequence[Tensor]] | None = None,
    *,
    weights: Iterable[float] | None = None,
    damping: float = 0.0,
    anchor: str | Model = "zero",
    solver: Solver | None = None,
    x0: str | Model = "mean",
    normalize: bool = False,
    floor: float = 0.0,
    unmerged: str = "average",
    return_info: bool = False,
) -> dict[str, Tensor] | tuple[dict[str, Tensor], MergeInfo]:
    r"""The parameters that lose least, to second order, of what several models have learnt.

    With parameters :math:`\theta_t`, Fisher matrices :math:`F_t`, weights :math:`w_t`, damping λ and anchor a it is the
    minimum of :math:`\sum_t \frac{w_t}{2} (\theta - \theta_t)^\top F_t (\theta - \theta_t) + \frac{\lambda}{2}
    \lVert \theta - a \rVert^2`,

    .. math::
        \theta = a + \bigl(\sum_t w_t F_t + \lambda I\bigr)^{-1} \sum_t w_t F_t (\theta_t - a),

    so that entries and directions which no Fisher matrix sees stay at the anchor. Without Fisher matrices it is the
    (weighted) average; with diagonals it is Fisher merging, with forward-only KFAC of linear layers RegMean, with KFAC
    the merge of MaTS.

    Parameters are those of all models together, by name. One that only some models have, such as a task's head, is
    merged from these; a Fisher matrix that does not cover a parameter counts as zero there. Weights that a module ties
    are one parameter; a dict that has one tensor under two names has two. Each result has the dtype and the device of
    the first model that has the parameter. The system is solved in the widest dtype of the models, float32 at least, on
    the device of the first parameter, to which the others are moved; a surrounding autocast is left out. A model that
    shares no name with any other is refused.

    **Cost**: two products with each Fisher matrix, one more with each that is not known to be positive semi-definite
    (both are to verify), and the solution: O(D) for diagonals, Woodbury's identity for low rank,
    decompositions of the factors for Kronecker products that share one, iterations else, of a product with each Fisher
    matrix; those that are block-diagonal alike are solved block by block.

    **Reference**: Matena, Raffel (2022), Merging models with Fisher-weighted averaging, arXiv:2111.09832; Jin, Ren,
    Preotiuc-Pietro, Cheng (2023), Dataless knowledge fusion by merging weights of language models, arXiv:2212.09849;
    Tam, Bansal, Raffel (2023), Merging by matching models in task parameter subspaces, arXiv:2312.04339.

    Args:
        models: Modules, or dicts or lists of tensors. They are not changed.
        fishers: For each model an operator, positive semi-definite, on all or on some of its parameters, or a diagonal
            as a dict or list of tensors. Operators without names act on all parameters in order; those that
            carry the names of a module need the model as a module or a dict. By default identities.
        weights: A non-negative number for each model; by default ones.
        damping: λ. With λ = 0, closed forms are pseudo-inverses, for which eigenvalues below the rounding of the dtype
            (size times eps times the largest) are zero: small ones that matter need float64 or a damping.
        anchor: a: ``"zero"``, ``"mean"`` (the weighted mean of the models that have the parameter), or tensors. With
            λ = 0, ``"zero"`` means ``"mean"``.
        solver: Makes the inverse of an operator, such as ``lambda A: CGInverseLinearOperator(A, rtol=1e-8)``; it is
            asked for the correction of x0. By default closed forms and, where there is none or rounding spoils it,
            conjugate gradients or MINRES.
        x0: Where iterations begin: ``"mean"``, ``"anchor"``, or tensors. With λ = 0 both words mean the anchor, since
            an iteration never leaves its start in directions that no Fisher matrix sees: with tensors they stay there
            instead. Closed forms, and systems whose right-hand side is zero, do not ask for x0: there they stay at the
            anchor.
        normalize: Whether to divide each Fisher matrix by its Frobenius norm (Matena, Raffel, 2022).
        floor: Least entry of Fisher matrices, which must be diagonals, after they are normalised.
        unmerged: What becomes of parameters that no Fisher matrix covers: ``"average"``, the weighted mean over the
            models that have them, ``"anchor"``, or ``"error"``.
        return_info: Whether to return what was done, too. Cost: a product with each Fisher matrix.

    Returns:
        The parameters by name, as tensors of their own; with ``return_info`` also a :class:`MergeInfo`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If numbers, names, shapes or values do not fit, an option cannot be followed, a Fisher matrix turns
            out not to be positive semi-definite, or the system is not solved.

    >>> models = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([3.0, 3.0])}]
    >>> merge(models)["w"].tolist()
    [2.0, 2.0]
    >>> merge(models, [{"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([1.0, 0.0])}])["w"].tolist()
    [1.5, 2.0]
    """
    with torch.inference_mode(False), torch.no_grad():
        read, values, info = merged_values(
            models,
            fishers,
            weights=weights,
            damping=damping,
            anchor=anchor,
            solver=solver,
            x0=x0,
            normalize=normalize,
            floor=floor,
            unmerged=unmerged,
            return_info=return_info,
        )
        merged = {name: read.written(name, value) for name, value in values.items()}
    return merged if info is None else (merged, info)


def merged_values(
    models: Sequence[Model],
    fishers: Sequence[Any] | None,
    *,
    weights: Iterable[float] | None,
    damping: float,
    anchor: str | Model,
    solver: Solver | None,
    x0: str | Model,
    normalize: bool,
    floor: float,
    unmerged: str,
    return_info: bool,
) -> tuple[Models, dict[str, Tensor], MergeInfo | None]:
    """The models, the merged parameters in the dtype of the system, and what was done; see :func:`merge`."""
    # Nothing of this is for the half precision of a surrounding autocast.
    no_autocast = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    with torch.inference_mode(False), torch.no_grad(), no_autocast[0], no_autocast[1]:
        damping = checked_number(damping, "damping")
        _checked_choice(unmerged, ("average", "anchor", "error"), "unmerged")
        read = Models(models, weights)
        matrices = read_fishers(fishers, read, normalize, floor)
        point = _anchor(anchor, read, damping)
        start = _start(x0, read, damping)
        system = System(read, matrices, point, damping)
        rest = _unmerged(unmerged, [name for name in read.first if name not in system.names])
        found, solution, residual = system.solve(start, solver)
        values = {name: found[name] if name in found else (point if rest else read.mean)(name) for name in read.first}
        _check_finite(values)
        forms = _quadratic_forms(read, matrices, values, system.energy, return_info)
    if not return_info:
        return read, values, None
    rise = sum(weight / 2 * form for weight, form in zip(read.weights, forms, strict=True))
    return read, values, MergeInfo(residual, solution.iterations, forms, rise, solution.method)


def _check_finite(values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"The merged '{name}' is not finite in {value.dtype}. Pass a larger damping, or float64.")


def _quadratic_forms(
    models: Models, fishers: Sequence[Fisher], values: Mapping[str, Tensor], energy: float, with_all: bool
) -> tuple[float, ...]:
    """δᵀF_t δ of each model, or of those alone whose matrix is not known to be positive, since they are checked."""
    forms = []
    for t, (fisher, tensors, weight) in enumerate(zip(fishers, models.tensors, models.weights, strict=True)):
        if with_all or (weight and not fisher.operator.POSITIVE_SEMIDEFINITE):
            delta = {name: values[name] - models.moved(tensors[name]) for name in fisher.names}
            forms.append(fisher.quadratic_form(delta, f"fishers[{t}]", energy / weight if weight else inf))
    return tuple(forms)


def _anchor(anchor: Any, models: Models, damping: float) -> Point:
    given = _point(anchor, ("zero", "mean"), models, "anchor")
    if given is not None:
        return given
    if anchor == "zero" and damping > 0:
        return lambda name: torch.zeros_like(models.moved(models.first[name]))
    return models.mean


def _start(x0: Any, models: Models, damping: float) -> Point | None:
    """Where iterations begin; None for the anchor."""
    given = _point(x0, ("mean", "anchor"), models, "x0")
    if given is not None:
        return given
    return models.mean if x0 == "mean" and damping > 0 else None


def _point(given: Any, words: Sequence[str], models: Models, what: str) -> Point | None:
    """The tensors that stand for a point; None where it is one of the words."""
    if isinstance(given, str):
        _checked_choice(given, words, what)
        return None
    tensors = named_tensors(given, what)
    for name, tensor in tensors.items():
        if name not in models.first or tensor.shape != models.first[name].shape:
            wanted = list(models.first[name].shape) if name in models.first else "no such parameter"
            raise ValueError(f"{what}, '{name}': got {list(tensor.shape)}, the models have {wanted}.")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(f"{what}, '{name}': expected finite real numbers.")

    def value(name: str) -> Tensor:
        if name not in tensors:
            raise ValueError(f"{what}: there is no tensor for the parameter '{name}'.")
        return models.moved(tensors[name])

    return value


def _unmerged(choice: str, names: Sequence[str]) -> bool:
    """Whether parameters that no Fisher matrix covers take the anchor rather than the average."""
    if choice == "error" and names:
        raise ValueError(f"No Fisher matrix covers {list(names)}. Pass unmerged='average' or 'anchor', or cover them.")
    return choice == "anchor"


def _checked_choice(value: Any, words: Sequence[str], what: str) -> None:
    if value in words:
        return
    close = difflib.get_close_matches(str(value), words, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"{what}: expected one of {list(words)}, got {value!r}.{hint}")
