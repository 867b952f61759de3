"""Compiled models work in every engine, and the product made of `torch.func` compiles as one graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from curvlinops import (
    CGInverseLinearOperator,
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
)

COMPILE = {"backend": "aot_eager", "fullgraph": True}


def model_and_data() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.rand(n, 3).double(), torch.randint(2, (n,))) for n in (4, 2)]
    return model, data


def forms() -> dict[str, Callable[[nn.Module], Any]]:
    def compiled_callable(model: nn.Module) -> Any:
        return torch.compile(lambda params, X: functional_call(model, params, (X,)), **COMPILE)

    return {"module": lambda model: torch.compile(model, **COMPILE), "callable": compiled_callable}


MATRICES = [GGNLinearOperator, FisherMCLinearOperator, EFLinearOperator, HessianLinearOperator]
ENGINES = ["streamed", "lean", "tangents", "factors"]


def by(engine: str, A: Any) -> Any:
    if engine == "streamed":
        return A
    return A.linearize(max_memory=0) if engine == "lean" else A.linearize(engine=engine)


@pytest.mark.parametrize("form", list(forms()))
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", MATRICES)
def test_compiled_models(kind: Any, engine: str, form: str) -> None:
    if kind is HessianLinearOperator and engine == "factors":
        pytest.skip("a Hessian has no factors")
    model, data = model_and_data()
    params = dict(model.named_parameters())
    compiled = forms()[form](model)
    compiled(params, data[0][0]) if form == "callable" else compiled(data[0][0])
    expected = kind(model, nn.CrossEntropyLoss(), params, data)
    A = by(engine, kind(compiled, nn.CrossEntropyLoss(), params, data))
    torch.testing.assert_close(A.to_dense(), expected.to_dense(), rtol=1e-10, atol=1e-12)


def test_solvers_and_closed_forms_of_compiled_models() -> None:
    model, data = model_and_data()
    args = (torch.compile(model, **COMPILE), nn.CrossEntropyLoss(), list(model.parameters()), data)
    G = GGNLinearOperator(*args)
    dense = G.to_dense()
    b = torch.ones(G.shape[0]).double()
    exact = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense)).double(), b)
    torch.testing.assert_close(CGInverseLinearOperator(G.damped(0.1), rtol=1e-12) @ b, exact)
    torch.testing.assert_close(G.to_low_rank().damped(0.1).inverse() @ b, exact)
    torch.testing.assert_close(GGNDiagonalLinearOperator(*args).diagonal(), dense.diagonal())


def test_the_product_of_torch_func_is_one_graph() -> None:
    """What users get who write the product themselves; the figures are in the benchmarks."""
    model, data = model_and_data()
    X, y = data[0]
    params = {name: p.detach() for name, p in model.named_parameters()}

    def product(params: dict[str, Tensor], v: dict[str, Tensor]) -> dict[str, Tensor]:
        def predict(p: dict[str, Tensor]) -> Tensor:
            return functional_call(model, p, (X,))

        output, tangent = jvp(predict, (params,), (v,))
        p = output.softmax(1)
        U = (p * tangent - p * (p * tangent).sum(1, keepdim=True)) / len(X)
        pulled: dict[str, Tensor] = vjp(predict, params)[1](U)[0]
        return pulled

    v = {name: torch.rand_like(p) for name, p in params.items()}
    G = GGNLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, y)])
    found, expected = torch.compile(product, **COMPILE)(params, v), G @ v
    for name in params:
        torch.testing.assert_close(found[name], expected[name])
