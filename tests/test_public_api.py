"""Names, argument orders and defaults that existing scripts rely on, and the documentation of the public names."""

import dataclasses
import inspect
from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlinops
import curvlinops.examples
from curvlinops import FisherType, KFACType

SEED = 2147483647
#: The common head of all curvature operators; REQUIRED stands for no default.
REQUIRED = inspect.Parameter.empty
HEAD: dict[str, Any] = {
    "model_func": REQUIRED,
    "loss_func": REQUIRED,
    "params": REQUIRED,
    "data": REQUIRED,
    "progressbar": False,
    "check_deterministic": True,
}
SIZES: dict[str, Any] = {"num_data": None, "batch_size_fn": None}
JACOBIAN = {k: v for k, v in (HEAD | SIZES).items() if k != "loss_func"}
FACTORED = HEAD | {"seed": SEED, "fisher_type": FisherType.MC, "mc_samples": 1}
APPROXIMATION: dict[str, Any] = {"kfac_approx": KFACType.EXPAND, "num_per_example_loss_terms": None}
SEPARATE: dict[str, Any] = {"separate_weight_and_bias": True}

CURVATURE: dict[str, dict[str, Any]] = {
    "HessianLinearOperator": HEAD | SIZES,
    "EFLinearOperator": HEAD | SIZES,
    "GGNLinearOperator": HEAD | SIZES | {"mc_samples": 0, "seed": SEED},
    "FisherMCLinearOperator": HEAD | {"seed": SEED, "mc_samples": 1} | SIZES,
    "GGNDiagonalLinearOperator": HEAD | SIZES | {"mc_samples": 0, "seed": SEED},
    "EFDiagonalLinearOperator": HEAD | SIZES,
    "JacobianLinearOperator": JACOBIAN,
    "TransposedJacobianLinearOperator": JACOBIAN,
    "KFACLinearOperator": FACTORED | APPROXIMATION | SEPARATE | SIZES,
    "EKFACLinearOperator": FACTORED | APPROXIMATION | SEPARATE | SIZES,
    "KFOCLinearOperator": FACTORED | SEPARATE | SIZES,
}
#: Of everything that is a Kronecker product, or made of them.
INVERSE: dict[str, Any] = {
    "damping": 0.0,
    "use_heuristic_damping": False,
    "min_damping": 1e-8,
    "use_exact_damping": False,
    "retry_double_precision": True,
}
KRONECKER_FAMILY = ("KFACLinearOperator", "EKFACLinearOperator", "KFOCLinearOperator")
SAMPLED = (
    "LowRankLinearOperator",
    "Diagonal",
    "TensorLinearOperator",
    "BlockDiagonal",
    "Kronecker",
    "EigenDecomposed",
    *KRONECKER_FAMILY,
)
SAMPLE: dict[str, Any] = {"num_samples": REQUIRED, "seed": SEED, "generator": None}
SPECTRUM: dict[str, Any] = {
    "A": REQUIRED,
    "ncv": REQUIRED,
    "num_points": 1024,
    "num_repeats": 1,
    "kappa": 3.0,
    "boundaries": None,
    "margin": 0.05,
    "boundaries_tol": 1e-2,
}
CACHED: dict[str, Any] = {"A": REQUIRED, "ncv": REQUIRED, "boundaries": None, "boundaries_tol": 1e-2}
ESTIMATOR: dict[str, Any] = {"A": REQUIRED, "num_matvecs": REQUIRED, "distribution": "rademacher"}
OTHERS: dict[str, dict[str, Any]] = {
    "CGInverseLinearOperator": {"A": REQUIRED},
    "LowRankLinearOperator": {"U": REQUIRED, "s": None, "c": 0.0},
    "SubmatrixLinearOperator": {"A": REQUIRED, "row_idxs": REQUIRED, "col_idxs": REQUIRED},
    "LSMRInverseLinearOperator": {
        "A": REQUIRED,
        "damp": 0.0,
        "atol": 1e-6,
        "btol": 1e-6,
        "conlim": 1e8,
        "maxiter": None,
        "show": False,
        "x0": None,
    },
    "NeumannInverseLinearOperator": {
        "A": REQUIRED,
        "num_terms": 100,
        "scale": 1.0,
        "check_nan": True,
        "preconditioner": None,
    },
    **dict.fromkeys(("hutchinson_trace", "hutchpp_trace", "xtrace"), ESTIMATOR),
    **dict.fromkeys(("hutchinson_diag", "hutchinson_squared_fro"), ESTIMATOR),
    "lanczos_approximate_spectrum": SPECTRUM,
    "lanczos_approximate_log_spectrum": SPECTRUM | {"kappa": 1.04, "epsilon": 1e-5},
    "LanczosApproximateSpectrumCached": CACHED,
    "LanczosApproximateLogSpectrumCached": CACHED,
    "xdiag": {"A": REQUIRED, "num_matvecs": REQUIRED},
    "examples.IdentityLinearOperator": {"shapes": REQUIRED, "device": ..., "dtype": ...},
    "examples.TensorLinearOperator": {"A": REQUIRED},
    "examples.OuterProductLinearOperator": {"c": REQUIRED, "A": REQUIRED},
    "examples.gradient_and_loss": {
        "model_func": REQUIRED,
        "loss_func": REQUIRED,
        "params": REQUIRED,
        "data": REQUIRED,
        "batch_size_fn": None,
        "num_data": None,
    },
}

#: Of applications: arguments by position, a star, and those by keyword only.
APPLICATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "merge": (
        {"models": REQUIRED, "fishers": None},
        {
            "weights": None,
            "damping": 0.0,
            "anchor": "zero",
            "solver": None,
            "x0": "mean",
            "normalize": False,
            "floor": 0.0,
            "unmerged": "average",
            "return_info": False,
        },
    ),
    "EWC": (
        {"params": REQUIRED},
        {
            "strength": 1.0,
            "mode": "multi",
            "decay": 1.0,
            "decay_in_penalty": True,
            "prior_precision": 0.0,
            "prior_mean": None,
        },
    ),
    "EWC.consolidate": ({"fisher": REQUIRED}, {"anchor": None, "num_data": None, "task": None}),
    "EWC.penalty": ({"params": None}, {}),
    "diagonal_fisher": (
        {"model": REQUIRED, "loss_func": REQUIRED, "params": REQUIRED, "data": REQUIRED},
        {
            "kind": "empirical",
            "mc_samples": 1,
            "seed": SEED,
            "max_data": None,
            "noise_variance": None,
            "terms": "position",
            "output_slice": None,
        },
    ),
    "LearnedInverseLinearOperator": (
        {"params_or_model": REQUIRED},
        {"damping": REQUIRED, "structure": "auto", "scale": None, "seed": 0},
    ),
    "LearnedInverseLinearOperator.update": ({"matvec": REQUIRED, "u": REQUIRED}, {"precondition": False}),
    "FishLeg": (
        {
            "model": REQUIRED,
            "draw": REQUIRED,
            "nll": REQUIRED,
            "aux_dataloader": REQUIRED,
            "likelihood": None,
            "fish_lr": 0.05,
            "damping": 0.5,
            "weight_decay": 1e-5,
            "beta": 0.9,
            "update_aux_every": 10,
            "aux_lr": 1e-4,
            "aux_betas": (0.9, 0.999),
            "aux_eps": 1e-8,
            "num_steps": None,
            "normalization": False,
            "fine_tune": False,
            "module_names": (),
            "skip_names": (),
            "scale": 1.0,
            "warmup": 0,
            "warmup_data": None,
            "warmup_loss": None,
        },
        {},
    ),
    "obs_saliency": ({"params": REQUIRED, "Q": REQUIRED}, {}),
    "prune": ({"params": REQUIRED, "Q": REQUIRED, "sparsity": REQUIRED}, {"compensate": True, "steps": 1}),
}


def public(name: str) -> Any:
    found: Any = curvlinops
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", [*CURVATURE, *OTHERS])
def test_argument_orders_and_defaults(name: str) -> None:
    """The arguments of the list come first, in its order; whatever follows is by keyword and has a default."""
    expected = (CURVATURE | OTHERS)[name]
    parameters = list(inspect.signature(public(name)).parameters.values())
    assert [p.name for p in parameters[: len(expected)]] == list(expected)
    for parameter, (argument, default) in zip(parameters, expected.items(), strict=False):
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, argument
        assert default is ... or parameter.default == default, argument
    for parameter in parameters[len(expected) :]:
        assert parameter.default is not REQUIRED or parameter.kind is parameter.VAR_KEYWORD, parameter.name
        if name in CURVATURE:
            assert parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD), parameter.name


@pytest.mark.parametrize("name", list(APPLICATIONS))
def test_arguments_of_applications(name: str) -> None:
    by_position, by_keyword = APPLICATIONS[name]
    parameters = {n: p for n, p in inspect.signature(public(name)).parameters.items() if n != "self"}
    assert [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == list(by_position)
    for argument, default in (by_position | by_keyword).items():
        assert parameters[argument].default == default, argument
        assert argument in by_position or parameters[argument].kind is inspect.Parameter.KEYWORD_ONLY, argument


@pytest.mark.parametrize(
    ("name", "method", "expected"),
    [
        ("GGNDiagonalLinearOperator", "inverse", {"damping": 0.0}),
        ("EFDiagonalLinearOperator", "inverse", {"damping": 0.0}),
        ("Diagonal", "inverse", {"damping": 0.0}),
        *((name, "inverse", INVERSE) for name in ("BlockDiagonal", "Kronecker", *KRONECKER_FAMILY)),
        ("EigenDecomposed", "inverse", INVERSE | {"use_exact_damping": True}),
        *((name, method, {}) for name in KRONECKER_FAMILY for method in ("trace", "det", "logdet", "frobenius_norm")),
        ("TensorLinearOperator", "inverse", {"damping": 0.0}),
        ("LowRankLinearOperator", "inverse", {"damping": 0.0}),
        *((name, "sample", SAMPLE) for name in SAMPLED),
        ("SubmatrixLinearOperator", "set_submatrix", {"row_idxs": REQUIRED, "col_idxs": REQUIRED}),
        ("LinearOperator", "to_scipy", {"dtype": None}),
        ("LinearOperator", "adjoint", {}),
        ("LinearOperator", "to_dense", {}),
        ("LinearOperator", "damped", {"damping": REQUIRED}),
        ("LinearOperator", "linearize", {"max_memory": None, "engine": "auto"}),
        ("LinearOperator", "frozen", {}),
        ("CurvatureLinearOperator", "_matmat_batch", {"X": REQUIRED, "y": REQUIRED, "M": REQUIRED}),
        ("CurvatureLinearOperator", "gradient_and_loss", {}),
        ("exact_diagonal", "", {"A": REQUIRED}),
        ("exact_trace", "", {"A": REQUIRED}),
    ],
)
def test_methods_and_functions(name: str, method: str, expected: dict[str, Any]) -> None:
    function = getattr(public(name), method) if method else public(name)
    parameters = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.name != "self"}
    assert parameters == expected


@pytest.mark.parametrize(
    "spelling", ["rtol", "tolerance", "max_iter", "preconditioner", "x0", "eps", "max_tridiag_iter"]
)
def test_cg_takes_every_spelling(spelling: str) -> None:
    """They come in by keyword, in the constructor and in the setter."""
    for function in (curvlinops.CGInverseLinearOperator, curvlinops.CGInverseLinearOperator.set_cg_hyperparameters):
        assert inspect.signature(function).parameters[spelling].default is None


def test_public_names() -> None:
    names = curvlinops.__all__
    assert len(set(names)) == len(names)  # the linter keeps them in order
    needed = {*CURVATURE, *(n for n in OTHERS if "." not in n), "IdentityLinearOperator", "TensorLinearOperator"}
    needed |= {
        "LinearOperator",
        "CurvatureLinearOperator",
        "Diagonal",
        "BlockDiagonal",
        "Kronecker",
        "EigenDecomposed",
        "FisherType",
        "KFACType",
        "exact_diagonal",
        "exact_trace",
    }
    assert needed <= set(names)
    for name in names:
        assert not name.startswith("_") and getattr(curvlinops, name) is not None
    exported: dict[str, Any] = {}
    exec("from curvlinops import *", exported)
    assert set(names) <= set(exported)
    for name in curvlinops.examples.__all__:
        assert hasattr(curvlinops.examples, name)


@pytest.mark.parametrize(
    ("kind", "members"),
    [
        (FisherType, {"TYPE2": "type-2", "MC": "mc", "EMPIRICAL": "empirical", "FORWARD_ONLY": "forward-only"}),
        (KFACType, {"EXPAND": "expand", "REDUCE": "reduce"}),
    ],
)
def test_members_equal_their_strings(kind: type[Enum], members: dict[str, str]) -> None:
    assert {name: member.value for name, member in kind.__members__.items()} == members
    for name, string in members.items():
        member = kind[name]
        assert member == string and kind(string) is member and hash(member) == hash(string)
        assert isinstance(member, str) and {string: 1}[member] == 1


# -- documentation -----------------------------------------------------------------------------------------------------

DOCUMENTED = [*curvlinops.__all__, *(f"examples.{name}" for name in curvlinops.examples.__all__)]


def is_exception(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, BaseException)


def is_enum(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, Enum)


def result_fields(found: Any) -> list[str] | None:
    """The fields of a class that results come in; ``None`` for any other."""
    if dataclasses.is_dataclass(found) and found.__eq__ is object.__eq__:
        return [field.name for field in dataclasses.fields(found)]
    return list(found._fields) if inspect.isclass(found) and issubclass(found, tuple) else None


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstrings(name: str) -> None:
    """One sentence first; the arguments by name; a doctest."""
    found = public(name)
    text = found.__doc__ or ""
    assert text.strip(), f"{name} has no docstring of its own"
    first = inspect.cleandoc(text).split("\n\n")[0]
    assert first.endswith((".", ".`")), f"{name}: the first line is no sentence: {first}"
    if is_exception(found):
        return
    if is_enum(found):
        assert all(f"{member}:" in text for member in found.__members__), f"{name} does not document its members"
        return
    fields = result_fields(found)
    if fields is not None:
        assert all(f"{field}:" in text for field in fields), f"{name}: {fields}"
        return
    constructor = found.__init__ if inspect.isclass(found) else found
    for parameter in inspect.signature(constructor).parameters.values():
        if parameter.name == "self" or parameter.kind is parameter.VAR_POSITIONAL:
            continue
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        assert f"{stars}{parameter.name}:" in text, f"{name} does not document {stars}{parameter.name}"
    if not inspect.isabstract(found) and name != "CurvatureLinearOperator":
        assert ">>>" in text, f"{name} has no doctest"


def public_members(cls: type) -> Iterator[tuple[str, Any]]:
    for name, member in inspect.getmembers(cls):
        is_ours = any(name in vars(base) for base in cls.__mro__ if base.__module__.startswith("curvlinops"))
        if not name.startswith("_") and is_ours and (callable(member) or isinstance(member, property)):
            yield name, member


CLASSES = [n for n in DOCUMENTED if inspect.isclass(public(n)) and not (is_exception(public(n)) or is_enum(public(n)))]


@pytest.mark.parametrize("name", CLASSES)
def test_methods_have_docstrings_and_types(name: str) -> None:
    members = list(public_members(public(name)))
    assert members or result_fields(public(name)) is not None
    for member_name, member in members:
        assert inspect.getdoc(member), f"{name}.{member_name} has no docstring"
        function = member.fget if isinstance(member, property) else member
        signature = inspect.signature(function)
        assert signature.return_annotation is not REQUIRED, f"{name}.{member_name} has no return type"
        for parameter in signature.parameters.values():
            is_typed = parameter.name == "self" or parameter.annotation is not REQUIRED
            assert is_typed, f"{name}.{member_name}: {parameter.name} has no type"


# -- what every curvature operator carries -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CURVATURE))
@pytest.mark.parametrize("form", ["list", "dict"])
def test_attributes_of_curvature_operators(name: str, form: str) -> None:
    model, loss = nn.Linear(3, 2), nn.MSELoss()
    data = [(torch.ones(4, 3), torch.ones(4, 2))]
    params: Any = dict(model.named_parameters()) if form == "dict" else list(model.parameters())
    has_loss = "loss_func" in CURVATURE[name]
    A = public(name)(model, *([loss] if has_loss else []), params, data, False, True, num_data=4, batch_size_fn=len)
    assert A._model_func is model
    assert A._loss_func is (loss if has_loss else None)
    assert isinstance(A._params, list)
    assert all(a is b for a, b in zip(A._params, model.parameters(), strict=True))
    assert isinstance(A, curvlinops.LinearOperator) and isinstance(type(A).SELF_ADJOINT, bool)
    assert A.shape == {True: (8, 8), False: A.shape}[has_loss]
    assert A.dtype == torch.float32 and A.device == torch.device("cpu")


def test_matmat_batch_is_the_extension_point() -> None:
    class Threefold(curvlinops.CurvatureLinearOperator):
        """Three times the identity, whatever the data."""

        SELF_ADJOINT = True

        def _matmat_batch(self, X: Any, y: Any, M: list[Tensor]) -> list[Tensor]:
            assert torch.is_grad_enabled() and all(p.requires_grad for p in self._params)
            assert self._loss_func is not None and self._loss_func(self._predict(X), y).ndim == 0
            return [3 * m for m in M]

    model = nn.Linear(3, 2)
    data = [(torch.ones(n, 3), torch.ones(n, 2)) for n in (4, 1)]
    A = Threefold(model, nn.MSELoss(), list(model.parameters()), data)
    torch.testing.assert_close(A @ torch.eye(8), 3 * torch.eye(8))
    with pytest.raises(TypeError, match=r"Empty.*_matmat_batch"):
        type("Empty", (curvlinops.CurvatureLinearOperator,), {})
