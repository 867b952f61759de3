"""laplace-torch with this package as its `curvlinops`: the same posteriors as with its other backends.

Runs in an environment of its own, by ``make laplace``; elsewhere the module is skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

pytest.importorskip("laplace", reason="laplace-torch has an environment of its own: make laplace")

from laplace import Laplace
from laplace.curvature import AsdlEF, AsdlGGN, BackPackEF, BackPackGGN, CurvlinopsEF, CurvlinopsGGN, CurvlinopsHessian

import curvlinops
from curvlinops import FisherType, GGNDiagonalLinearOperator, KFACLinearOperator, TransposedJacobianLinearOperator

N, BATCH_SIZE, NUM_OUTPUTS = 11, 4, 3

pytestmark = pytest.mark.filterwarnings("ignore")  # the other backends' hooks warn


@pytest.fixture(autouse=True)
def float64_and_random_state() -> Iterator[None]:
    """laplace makes its identity matrix in torch's default dtype, and its other backends draw from the global state."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(default)


class Named(nn.Module):
    """Modules within modules, and a weight without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 1))
        self.head = nn.Linear(1, NUM_OUTPUTS)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.body(X))


VECTORS = {
    "one layer": lambda: nn.Linear(4, NUM_OUTPUTS),
    "linear": lambda: nn.Sequential(nn.Linear(4, NUM_OUTPUTS)),
    "MLP": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, NUM_OUTPUTS)),
    "no bias": lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, NUM_OUTPUTS)),
}
IMAGES = {
    "convolution": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12, NUM_OUTPUTS)
    ),
    "two convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 2, bias=False), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, NUM_OUTPUTS)
    ),
}
MODELS = VECTORS | IMAGES | {"named": Named}
LIKELIHOODS = ["classification", "regression"]
GGN_BACKENDS = [BackPackGGN, AsdlGGN]
EF_BACKENDS = [BackPackEF, AsdlEF]


def inputs(name: str, count: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, *([2, 4, 4] if name in IMAGES else [4]), generator=generator)


def loader(name: str, likelihood: str, batch_size: int = BATCH_SIZE, repeats: int = 1) -> DataLoader[Any]:
    X = inputs(name).repeat_interleave(repeats, 0)
    generator = torch.Generator().manual_seed(2)
    if likelihood == "classification":
        y = torch.randint(NUM_OUTPUTS, (N,), generator=generator)
    else:
        y = torch.randn(N, NUM_OUTPUTS, generator=generator)
    return DataLoader(TensorDataset(X, y.repeat_interleave(repeats, 0)), batch_size=batch_size)


def loss_of(likelihood: str) -> tuple[nn.Module, float]:
    """The loss that laplace-torch passes on, and what it multiplies curvature with."""
    return (
        (nn.MSELoss(reduction="sum"), 0.5)
        if likelihood == "regression"
        else (nn.CrossEntropyLoss(reduction="sum"), 1.0)
    )


def network(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]()


def fitted(
    model: nn.Module, likelihood: str, structure: str, backend: type, data: DataLoader[Any], **options: Any
) -> Any:
    """A Laplace approximation of a copy of the model: backends leave hooks behind that do not go together."""
    noise = {"sigma_noise": 0.7} if likelihood == "regression" else {}
    options = {"subset_of_weights": "all", "prior_precision": 0.3, **noise, **options}
    result = Laplace(copy.deepcopy(model), likelihood, hessian_structure=structure, backend=backend, **options)
    result.fit(data)
    return result


def curvature(posterior: Any) -> Tensor:
    """The curvature without prior: the matrix of a full or Kronecker approximation, the vector of a diagonal one."""
    facs = getattr(posterior, "H_facs", None)
    return posterior.H if facs is None else facs.to_matrix()


def assert_close(actual: Any, expected: Any, what: str, rtol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol, msg=lambda m: f"{what}: {m}")


def assert_same_posterior(actual: Any, expected: Any, X: Tensor, rtol: float = 1e-9) -> None:
    assert curvature(expected).norm() > 1e-3
    assert_close(curvature(actual), curvature(expected), "curvature", rtol)
    assert_close(actual.loss, expected.loss, "loss", rtol)
    precisions = [p.posterior_precision for p in (actual, expected)]
    if hasattr(precisions[0], "to_matrix"):
        precisions = [p.to_matrix() for p in precisions]
    assert_close(*precisions, "posterior precision", rtol)
    for quantity in ("log_det_posterior_precision", "log_det_ratio"):
        assert_close(getattr(actual, quantity), getattr(expected, quantity), quantity, rtol)
    assert_close(actual.log_marginal_likelihood(), expected.log_marginal_likelihood(), "evidence", rtol)
    assert_close(actual(X), expected(X), "predictive", rtol)


def test_the_package_is_ours() -> None:
    assert "site-packages" not in str(curvlinops.__file__)


# ----------------------------------------------------------------- full and diagonal


@pytest.mark.parametrize("other", GGN_BACKENDS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", VECTORS | IMAGES)
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_ggn_full_and_diagonal(structure: str, name: str, likelihood: str, other: type) -> None:
    model, data = network(name), loader(name, likelihood)
    ours = fitted(model, likelihood, structure, CurvlinopsGGN, data)
    assert_same_posterior(ours, fitted(model, likelihood, structure, other, data), inputs(name, 5))


@pytest.mark.parametrize("other", EF_BACKENDS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", VECTORS | IMAGES)
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_empirical_fisher_full_and_diagonal(structure: str, name: str, likelihood: str, other: type) -> None:
    model, data = network(name), loader(name, likelihood)
    ours = fitted(model, likelihood, structure, CurvlinopsEF, data)
    assert_same_posterior(ours, fitted(model, likelihood, structure, other, data), inputs(name, 5))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_diagonal_equals_the_operator_of_the_diagonal(likelihood: str) -> None:
    model, data = network("MLP"), loader("MLP", likelihood)
    theirs = fitted(model, likelihood, "diag", BackPackGGN, data)
    loss, factor = loss_of(likelihood)
    ours = GGNDiagonalLinearOperator(model, loss, list(model.parameters()), data)
    assert_close(factor * ours.diagonal(), theirs.H, "diagonal", 1e-9)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_full_hessian(likelihood: str) -> None:
    model, data = network("MLP"), loader("MLP", likelihood)
    ours = fitted(model, likelihood, "full", CurvlinopsHessian, data)
    loss, factor = loss_of(likelihood)
    X, y = data.dataset.tensors

    def risk(flat: Tensor) -> Tensor:
        values = flat.split([p.numel() for p in model.parameters()])
        params = {n: v.view(p.shape) for (n, p), v in zip(model.named_parameters(), values)}
        return factor * loss(torch.func.functional_call(model, params, X), y)

    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert_close(ours.H, torch.autograd.functional.hessian(risk, theta), "Hessian", 1e-9)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["full", "kron"])
def test_stochastic_has_the_expectation_of_the_exact_one(structure: str, likelihood: str) -> None:
    repeats = 400  # each datum as many times, and each time with a target of its own
    model, data = network("MLP"), loader("MLP", likelihood, N * repeats, repeats)
    exact = fitted(model, likelihood, structure, CurvlinopsGGN, data)
    sampled = fitted(model, likelihood, structure, CurvlinopsGGN, data, backend_kwargs={"stochastic": True})
    error = (curvature(sampled) - curvature(exact)).norm() / curvature(exact).norm()
    assert 1e-4 < error < 0.1, f"relative error {error:.1e}"
    assert_close(sampled(inputs("MLP", 5)), exact(inputs("MLP", 5)), "predictive", 0.05)


# -------------------------------------------------------------------------- Kronecker


@pytest.mark.parametrize("batch_size", [BATCH_SIZE, N])
@pytest.mark.parametrize("other", GGN_BACKENDS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", VECTORS)
def test_ggn_kronecker(name: str, likelihood: str, other: type, batch_size: int) -> None:
    model, data = network(name), loader(name, likelihood, batch_size)
    ours = fitted(model, likelihood, "kron", CurvlinopsGGN, data)
    assert_same_posterior(ours, fitted(model, likelihood, "kron", other, data), inputs(name, 5))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", IMAGES)
def test_ggn_kronecker_of_convolutions(name: str, likelihood: str) -> None:
    """The other backends differ by the number of positions; asdl's factors are those of KFAC-expand."""
    model, data = network(name), loader(name, likelihood)
    ours = fitted(model, likelihood, "kron", CurvlinopsGGN, data)
    assert_same_posterior(ours, fitted(model, likelihood, "kron", AsdlGGN, data), inputs(name, 5))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", VECTORS | IMAGES)
def test_empirical_fisher_kronecker(name: str, likelihood: str) -> None:
    model, data = network(name), loader(name, likelihood)
    ours = fitted(model, likelihood, "kron", CurvlinopsEF, data)
    assert_same_posterior(ours, fitted(model, likelihood, "kron", AsdlEF, data), inputs(name, 5))


def operator_of(model: nn.Module, likelihood: str, backend: type, data: DataLoader[Any]) -> Any:
    """The operator over all data that a Kronecker approximation should amount to."""
    kind = FisherType.TYPE2 if backend is CurvlinopsGGN else FisherType.EMPIRICAL
    loss, factor = loss_of(likelihood)
    params = [p for p in model.parameters() if p.requires_grad]
    return factor * KFACLinearOperator(model, loss, params, data, fisher_type=kind)


@pytest.mark.parametrize("batch_size", [BATCH_SIZE, N])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("backend", [CurvlinopsGGN, CurvlinopsEF])
@pytest.mark.parametrize("name", [*VECTORS, "named"])
def test_kronecker_is_the_matrix_of_one_operator_over_all_data(
    name: str, backend: type, likelihood: str, batch_size: int
) -> None:
    model, data = network(name), loader(name, likelihood, batch_size)
    posterior = fitted(model, likelihood, "kron", backend, data)
    K = operator_of(model, likelihood, backend, data)
    assert_close(curvature(posterior), K.to_dense(), "matrix", 1e-9)


def test_closed_forms_of_the_operator_are_the_posterior() -> None:
    """Precision, log-determinant and predictive covariance, as the page on Laplace approximations computes them."""
    model, data = network("MLP"), loader("MLP", "classification")
    posterior = fitted(model, "classification", "kron", CurvlinopsGGN, data)
    precision = operator_of(model, "classification", CurvlinopsGGN, data).damped(0.3)
    assert_close(precision.to_dense(), posterior.posterior_precision.to_matrix(), "precision", 1e-9)
    assert_close(precision.logdet(), posterior.log_det_posterior_precision, "log-determinant", 1e-9)
    Jt = TransposedJacobianLinearOperator(model, list(model.parameters()), [(inputs("MLP", 5), None)]).to_dense()
    J = Jt.T.reshape(5, NUM_OUTPUTS, -1)
    expected = posterior.functional_variance(J)
    ours = torch.einsum("ncd,nkd->nck", J, (precision.inverse() @ Jt).T.reshape(J.shape))
    assert_close(ours, expected, "predictive covariance", 1e-9)


def test_a_frozen_normalisation_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, NUM_OUTPUTS))
    model[1].requires_grad_(False)
    data = loader("MLP", "classification")
    posterior = fitted(model, "classification", "kron", CurvlinopsGGN, data)
    K = operator_of(model, "classification", CurvlinopsGGN, data)
    assert_close(curvature(posterior), K.to_dense(), "matrix", 1e-9)
    assert K.shape[0] == 4 * 5 + 5 + 5 * NUM_OUTPUTS + NUM_OUTPUTS


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("name", ["MLP", "convolution"])
def test_last_layer(name: str, structure: str, likelihood: str) -> None:
    model, data = network(name), loader(name, likelihood)
    options = {"subset_of_weights": "last_layer"}
    ours = fitted(model, likelihood, structure, CurvlinopsGGN, data, **options)
    theirs = fitted(model, likelihood, structure, BackPackGGN, data, **options)
    assert_same_posterior(ours, theirs, inputs(name, 5))


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_only_parameters_that_require_gradients(structure: str) -> None:
    """A frozen first layer: what is left is a network of the second layer on the first one's features."""
    model, data = network("MLP"), loader("MLP", "classification", N)
    model[0].requires_grad_(False)
    ours = fitted(model, "classification", structure, CurvlinopsGGN, data)
    with torch.no_grad():
        features = model[:2](data.dataset.tensors[0])
    on_features = DataLoader(TensorDataset(features, data.dataset.tensors[1]), batch_size=N)
    theirs = fitted(nn.Sequential(model[2]), "classification", structure, AsdlGGN, on_features)
    assert_close(curvature(ours), curvature(theirs), "curvature", 1e-9)
    assert_close(ours.log_det_posterior_precision, theirs.log_det_posterior_precision, "log-determinant", 1e-9)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["full", "kron"])
def test_float32(structure: str, likelihood: str) -> None:
    model, data = network("MLP"), loader("MLP", likelihood)
    exact = fitted(model, likelihood, structure, CurvlinopsGGN, data)
    torch.set_default_dtype(torch.float32)
    data = DataLoader(
        TensorDataset(*(t.float() if t.is_floating_point() else t for t in data.dataset.tensors)), batch_size=BATCH_SIZE
    )
    ours = fitted(model.float(), likelihood, structure, CurvlinopsGGN, data)
    theirs = fitted(model.float(), likelihood, structure, BackPackGGN, data)
    assert curvature(ours).dtype == torch.float32
    assert_same_posterior(ours, theirs, inputs("MLP", 5).float(), rtol=2e-5)
    assert_close(curvature(ours).double(), curvature(exact), "curvature", 2e-5)


def test_kronecker_takes_options_of_the_operator() -> None:
    """laplace passes on ``asdl_fisher_kwargs``: here KFAC-reduce, which is exact for a mean over positions."""
    torch.manual_seed(4)
    model = Pooled()
    X, y = torch.rand(N, 6, 4), torch.randn(N, NUM_OUTPUTS)
    data = DataLoader(TensorDataset(X, y), batch_size=N)
    full = fitted(model, "regression", "full", CurvlinopsGGN, data)
    reduced = fitted(model, "regression", "kron", CurvlinopsGGN, data, asdl_fisher_kwargs={"kfac_approx": "reduce"})
    expanded = fitted(model, "regression", "kron", CurvlinopsGGN, data)
    weight = slice(0, model.layer.weight.numel())
    assert_close(curvature(reduced)[weight, weight], full.H[weight, weight], "block of the weight", 1e-9)
    assert not torch.allclose(curvature(expanded)[weight, weight], full.H[weight, weight], rtol=1e-3)


class Pooled(nn.Module):
    """A linear layer at each position, and the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, NUM_OUTPUTS)

    def forward(self, X: Tensor) -> Tensor:
        return self.layer(X).mean(1)


class Mapped(nn.Module):
    """A model of a mapping, the form in which laplace passes on the batches of Hugging Face loaders."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.layers(batch["input_ids"])


class Mappings(Dataset[dict[str, Tensor]]):
    """The same data as mappings."""

    def __init__(self, X: Tensor, y: Tensor) -> None:
        self.X, self.y = X, y

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.X[index], "labels": self.y[index]}


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_mappings(structure: str) -> None:
    model, data = network("MLP"), loader("MLP", "classification")
    mappings = DataLoader(Mappings(*data.dataset.tensors), batch_size=BATCH_SIZE)
    ours = fitted(Mapped(model), "classification", structure, CurvlinopsGGN, mappings)
    theirs = fitted(model, "classification", structure, BackPackGGN, data)
    assert_close(curvature(ours), curvature(theirs), "curvature", 1e-9)


# ---------------------------------------------------- what cannot be said by module name


def test_what_laplace_would_misread_is_refused() -> None:
    """laplace pairs factors and parameters with a zip that is not strict: a parameter without factors would vanish."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, NUM_OUTPUTS))
    with pytest.raises(NotImplementedError, match=r"'1\.weight'"):
        fitted(model, "classification", "kron", CurvlinopsGGN, loader("MLP", "classification"))


def test_a_frozen_bias_is_refused() -> None:
    model = network("MLP")
    model[2].bias.requires_grad_(False)
    with pytest.raises(NotImplementedError, match="the bias of its module '2' is not"):
        fitted(model, "classification", "kron", CurvlinopsGGN, loader("MLP", "classification"))
