"""Factors by the names of modules: what laplace-torch reads, and what it would misread, which is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlinops import FisherType, KFACLinearOperator
from curvlinops.curvature.kronecker.module_factors import FactorsByModule

N = 6


class Multiplied(nn.Module):
    """A layer whose weight has outputs as its columns."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(num_in, num_out))
        self.bias = nn.Parameter(torch.rand(num_out))

    def forward(self, X: Tensor) -> Tensor:
        return X @ self.weight + self.bias


class Offset(nn.Module):
    """A layer, and a parameter of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.rand(3))
        self.layer = nn.Linear(3, 3)

    def forward(self, X: Tensor) -> Tensor:
        return self.layer(X + self.offset)


class Attention(nn.Module):
    """Attention over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, X: Tensor) -> Tensor:
        return self.attention(X, X, X, need_weights=False)[0].mean(1)


def tied() -> nn.Module:
    """Two layers with one weight."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 3, bias=False)))


def pairs(*shape: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs of a shape, in float64, and three classes; in two mini-batches of unequal size."""
    generator = torch.Generator().manual_seed(1)
    X = torch.rand(N, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (N,), generator=generator)
    return [(X[:4], y[:4]), (X[4:], y[4:])]


def kfac(model: Any, params: Any, data: Iterable[Any], **options: Any) -> KFACLinearOperator:
    options = {"fisher_type": FisherType.TYPE2, "check_deterministic": False, **options}
    return KFACLinearOperator(model, nn.CrossEntropyLoss(reduction="sum"), params, data, **options)


def as_list(model: nn.Module) -> list[Tensor]:
    return list(model.parameters())


def as_dict(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def as_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_kfac_can_be_read_by_module() -> None:
    assert issubclass(KFACLinearOperator, FactorsByModule)


@pytest.mark.parametrize("form", [as_list, as_dict, as_values])
def test_factors_are_those_of_the_weights(form: Callable[[nn.Module], Any]) -> None:
    model = seeded(mlp)
    K = kfac(model, form(model), pairs(3))
    K.compute_kronecker_factors()
    assert list(K._mapping) == list(K._input_covariances) == list(K._gradient_covariances) == ["0", "1.1"]
    dense, start = K.to_dense(), 0
    for module, size, skipped in [("0", 12, 4), ("1.1", 12, 0)]:
        A, B = K._input_covariances[module], K._gradient_covariances[module]
        block = dense[start : start + size, start : start + size]
        torch.testing.assert_close(torch.kron(B, A), block, rtol=1e-12, atol=1e-12)
        start += size + skipped
    own = K.factors("0.weight")
    assert torch.equal(K._input_covariances["0"], own["input_covariance"])
    assert torch.equal(K._gradient_covariances["0"], own["gradient_covariance"])


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))], ids=["bare", "in a module"])
def test_scales_are_a_mean_and_a_sum(model: nn.Module) -> None:
    """Of one layer, both factors are known from the data: the mean of a aᵀ, and the sum of the loss's Hessians."""
    model = model.double()
    data = pairs(3)
    K = kfac(model, as_list(model), data)
    (name,) = K._mapping
    assert name == ("" if isinstance(model, nn.Linear) else "0")
    X = torch.cat([X for X, _ in data])
    p = model(X).detach().softmax(1)
    hessians = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    torch.testing.assert_close(K._input_covariances[name], X.T @ X / N, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(K._gradient_covariances[name], hessians.sum(0), rtol=1e-12, atol=1e-12)


def test_names_are_those_of_the_model_as_it_was_passed() -> None:
    """A wrapper's modules have longer names, and a client looks for those."""
    model = seeded(mlp)
    K = kfac(nn.DataParallel(model), as_list(model), pairs(3))
    K.compute_kronecker_factors()
    assert list(K._mapping) == ["module.0", "module.1.1"]
    assert torch.equal(K._input_covariances["module.0"], kfac(model, as_list(model), pairs(3))._input_covariances["0"])


def test_convolution_with_flattened_axes() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, (3, 2)), nn.Flatten(), nn.Linear(18, 3)))
    K = kfac(model, as_list(model), pairs(2, 4, 4))
    assert K._input_covariances["0"].shape == (12, 12)
    assert K._gradient_covariances["0"].shape == (3, 3)


def test_what_is_read_is_a_copy() -> None:
    model = seeded(mlp)
    K = kfac(model, as_list(model), pairs(3))
    before = K.to_dense()
    for module in K._mapping:
        K._input_covariances[module].mul_(2)
        K._gradient_covariances[module].zero_()
    assert torch.equal(K.to_dense(), before)
    assert torch.equal(
        torch.kron(K._gradient_covariances["0"], K._input_covariances["0"]), K.block("0.weight").to_dense()
    )


def test_it_computes_now() -> None:
    """Later changes of the parameters do not change the factors."""
    model = seeded(mlp)
    expected = kfac(model, as_list(model), pairs(3)).to_dense()
    K = kfac(model, as_list(model), pairs(3))
    K.compute_kronecker_factors()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert torch.equal(K.to_dense(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_the_parameters(dtype: torch.dtype) -> None:
    model = seeded(mlp)
    exact = kfac(model, as_list(model), pairs(3))
    expected = exact._input_covariances["0"]
    model = model.to(dtype)
    K = kfac(model, as_list(model), [(X.to(dtype), y) for X, y in pairs(3)])
    A = K._input_covariances["0"]
    assert A.dtype == dtype
    torch.testing.assert_close(
        A.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0.01 * torch.finfo(dtype).eps
    )


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "normalisation": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), (3,), "'1.weight'"),
    "groups": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(8, 3)),
        (2, 3),
        "'0.weight'",
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 2, 1), nn.Flatten(), nn.Linear(6, 3)),
        (2, 3),
        "'0.weight'",
    ),
    "outputs as columns": (lambda: nn.Sequential(Multiplied(3, 3), nn.Linear(3, 3)), (3,), "'0.weight'"),
    "attention": (lambda: nn.Sequential(Attention(), nn.Linear(4, 3)), (5, 4), "'0.attention.in_proj_weight'"),
    "bare parameter": (Offset, (3,), "'offset'"),
    "tied": (tied, (3,), "'0.weight' is the weight or the bias of 2 modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_by_module_is_refused(case: str) -> None:
    make, shape, named = REFUSED[case]
    model = seeded(make)
    K = kfac(model, as_list(model), pairs(*shape))
    with pytest.raises(NotImplementedError, match=named.replace(".", r"\.")):
        K.compute_kronecker_factors()
    with pytest.raises(NotImplementedError, match=named.replace(".", r"\.")):
        [(K._gradient_covariances[name], K._input_covariances[name]) for name in K._mapping]


def test_an_embedding_is_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3)))
    data = [(torch.tensor([[0, 1], [4, 2]]), torch.tensor([0, 2]))]
    with pytest.raises(NotImplementedError, match=r"'0\.weight' has no two dense factors"):
        kfac(model, as_list(model), data).compute_kronecker_factors()


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        (["0.weight"], "'0.weight' is in params, but the bias of its module '0' is not"),
        (["0.bias"], "'0.bias' is in params, but the weight of its module '0' is not"),
        (["0.bias", "0.weight"], "'0.weight' is number 1 of params, but number 0"),
        (["1.1.weight", "0.weight", "0.bias"], "'0.weight' is number 1 of params, but number 0"),
    ],
)
def test_a_choice_of_parameters_that_a_client_would_misread(chosen: list[str], named: str) -> None:
    model = seeded(mlp)
    own = as_dict(model)
    with pytest.raises(NotImplementedError, match=named.replace(".", r"\.")):
        kfac(model, [own[name] for name in chosen], pairs(3)).compute_kronecker_factors()


def test_a_part_of_the_modules() -> None:
    model = seeded(mlp)
    K = kfac(model, [model[1][1].weight], pairs(3))
    K.compute_kronecker_factors()
    assert list(K._mapping) == ["1.1"]
    whole = kfac(model, as_list(model), pairs(3))
    torch.testing.assert_close(K._gradient_covariances["1.1"], whole._gradient_covariances["1.1"])


def test_joint_weight_and_bias_is_refused() -> None:
    model = seeded(mlp)
    K = kfac(model, as_list(model), pairs(3), separate_weight_and_bias=False)
    with pytest.raises(NotImplementedError, match=r"'0\.weight' has no two dense factors"):
        K.compute_kronecker_factors()


def test_without_gradients_there_is_one_factor_only() -> None:
    model = seeded(mlp)
    K = kfac(model, as_list(model), pairs(3), fisher_type=FisherType.FORWARD_ONLY)
    with pytest.raises(NotImplementedError, match=r"'0\.weight' has no two dense factors"):
        K.compute_kronecker_factors()


def test_a_callable_has_no_modules() -> None:
    model = seeded(mlp)

    def predict(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (X,))

    with pytest.raises(TypeError, match="if the model is a module, got function"):
        kfac(predict, as_dict(model), pairs(3)).compute_kronecker_factors()
