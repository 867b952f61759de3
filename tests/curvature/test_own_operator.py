"""Writing a curvature matrix of one's own: what a subclass sees, and what it may return."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvlinops import CurvatureLinearOperator, GGNLinearOperator, HessianLinearOperator
from tests.risk.small import build, classes, mlp, numbers, relative_error, targets, vector

MEAN, SUM = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")


class OwnHessian(CurvatureLinearOperator):
    """The Hessian by two backwards, as a user would write it."""

    SELF_ADJOINT = True

    def _matmat_batch(self, X: Any, y: Any, M: list[Tensor]) -> list[Tensor]:
        """The Hessian of the mini-batch's loss times M."""
        assert isinstance(self._params, list)
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert all(p.requires_grad for p in self._params)
        loss = self._loss_func(self._predict(X), y)
        gradients = torch.autograd.grad(loss, self._params, create_graph=True)
        columns = [
            torch.autograd.grad(gradients, self._params, [m[..., k] for m in M], retain_graph=True)
            for k in range(M[0].shape[-1])
        ]
        return [torch.stack(parts, -1) for parts in zip(*columns, strict=True)]


def closure(model: nn.Module) -> Any:
    """The model closed over."""
    return lambda X: model(X)


def of_dict(model: nn.Module) -> Any:
    """The model as a function of a dict of parameters."""
    return lambda params, X: functional_call(model, params, (X,))


@pytest.mark.parametrize("loss", [MEAN, SUM], ids=["mean", "sum"])
@pytest.mark.parametrize("form", ["list", "dict", "closure", "params and X", "frozen", "foreign"])
def test_the_same_as_ours(form: str, loss: nn.Module) -> None:
    """With uneven mini-batches, whatever form the model and the parameters come in."""
    model, data = mlp(), classes((4, 1, 2))
    func: Any = {"closure": closure, "params and X": of_dict}.get(form, lambda m: m)(model)
    params: Any = dict(model.named_parameters())
    if form in ("list", "closure"):
        params = list(params.values())
    if form == "frozen":
        model.requires_grad_(False)
    if form == "foreign":
        params = {n: p.detach() + 0.1 for n, p in params.items()}
    A = OwnHessian(func, loss, params, data)
    B = HessianLinearOperator(func, loss, params, data)
    assert A._model_func is func
    assert A._loss_func is loss
    for columns in ((), (3,)):
        assert relative_error(A @ vector(A, *columns), B @ vector(B, *columns)) < 1e-10
    if isinstance(params, dict):
        answer = A @ {n: torch.ones_like(p) for n, p in params.items()}
        assert list(answer) == list(params)
    assert [p.requires_grad for p in model.parameters()] == [form != "frozen"] * 4
    (gradients, value), (others, other) = A.gradient_and_loss(), B.gradient_and_loss()
    assert torch.equal(value, other)
    assert all(torch.equal(g, o) for g, o in zip(gradients, others, strict=True))


def test_under_no_grad_and_inference_mode() -> None:
    A = OwnHessian(model := mlp(), MEAN, list(model.parameters()), classes())
    expected = A @ vector(A)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(A @ vector(A), expected)


def test_a_batch_without_mass_is_left_out() -> None:
    """Its own mean loss is NaN."""
    data = classes((3, 2))
    ignored = (data[0][0], torch.full_like(data[0][1], -100))
    A = OwnHessian(model := mlp(), MEAN, list(model.parameters()), [*data, ignored])
    B = OwnHessian(model, MEAN, list(model.parameters()), data)
    assert torch.equal(A @ vector(A), B @ vector(B))


def test_generic_losses_are_weighed_by_batch_size() -> None:
    model = mlp()

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return nn.functional.huber_loss(f, y)

    params = list(model.parameters())
    A = OwnHessian(model, loss, params, numbers((4, 1, 2)))
    B = OwnHessian(model, loss, params, numbers((7,)))
    assert relative_error(A @ vector(A, 2), B @ vector(B, 2)) < 1e-10


class Doubled(GGNLinearOperator):
    """Extends one of ours."""

    def _matmat_batch(self, X: Any, y: Any, M: list[Tensor]) -> list[Tensor]:
        return [2 * r for r in super()._matmat_batch(X, y, M)]


@pytest.mark.parametrize("loss", [MEAN, SUM], ids=["mean", "sum"])
@pytest.mark.parametrize("samples", [0, 2])
def test_extending_ours(samples: int, loss: nn.Module) -> None:
    model, data = mlp(), classes((4, 1, 2))
    params = list(model.parameters())
    A = Doubled(model, loss, params, data, mc_samples=samples)
    B = GGNLinearOperator(model, loss, params, data, mc_samples=samples)
    for columns in ((), (12,)):
        V = vector(A, *columns)
        assert relative_error(A @ V, 2 * (B @ V)) < 1e-12


def test_missing_product() -> None:
    with pytest.raises(TypeError, match="Lazy must implement _matmat_batch"):

        class Lazy(CurvatureLinearOperator):
            """Nothing at all."""


def test_inherited_product_is_enough() -> None:
    class Renamed(OwnHessian):
        """The same under another name."""

    A = Renamed(model := mlp(), MEAN, list(model.parameters()), classes())
    assert "Renamed" in repr(A)
    assert (A @ vector(A)).isfinite().all()


def test_example_weights_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"OwnHessian implements _matmat_batch.*weight_fn is not supported"):
        OwnHessian(model := mlp(), MEAN, list(model.parameters()), classes(), weight_fn=lambda X, y: torch.ones(len(y)))


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda M: M[:-1], r"Mini-batch 0: expected tensors of shapes \[\[4, 3, 2\].*got \[\[4, 3, 2\]"),
        (lambda M: [m[..., 0] for m in M], r"Mini-batch 0: expected tensors of shapes.*got \[\[4, 3\], \[4\]"),
        (lambda M: [m.movedim(-1, 0) for m in M], r"Mini-batch 0: expected.*got \[\[2, 4, 3\]"),
    ],
    ids=["too few", "no columns", "columns first"],
)
def test_wrong_shapes(answer: Any, match: str) -> None:
    class Wrong(CurvatureLinearOperator):
        def _matmat_batch(self, X: Any, y: Any, M: list[Tensor]) -> list[Tensor]:
            result: list[Tensor] = answer(M)
            return result

    A = Wrong(model := mlp(), MEAN, list(model.parameters()), classes())
    with pytest.raises(ValueError, match=match):
        A @ vector(A, 2)


def test_numbers_that_are_not_finite() -> None:
    class Wrong(CurvatureLinearOperator):
        def _matmat_batch(self, X: Any, y: Any, M: list[Tensor]) -> list[Tensor]:
            return [m / (len(y) - 2) for m in M]

    A = Wrong(model := mlp(), MEAN, list(model.parameters()), classes((3, 3, 2)))
    with pytest.raises(FloatingPointError, match="Wrong: mini-batch 2"):
        A @ vector(A)


def test_attributes_of_ours() -> None:
    """What scripts read."""
    model, data = mlp(), classes()
    for kind in ("Hessian", "GGN", "MC", "EF", "GGNDiagonal", "EFDiagonal"):
        A = build(kind, model, data, MEAN)
        assert A._model_func is model
        assert A._loss_func is MEAN
        assert all(a is b for a, b in zip(A._params, model.parameters(), strict=True))
        X, y = data[0]
        with torch.enable_grad():
            M = [torch.ones(*p.shape, 2, dtype=p.dtype) for p in A._params]
            parts = A._matmat_batch(X, y, M)
        alone = build(kind, model, data[:1], MEAN) @ M
        assert all(relative_error(p.detach(), a) < 1e-10 for p, a in zip(parts, alone, strict=True)), kind
    for kind in ("Jacobian", "TransposedJacobian"):
        A = build(kind, model, data)
        assert A._model_func is model
        assert A._loss_func is None
        assert all(a is b for a, b in zip(A._params, model.parameters(), strict=True))


def test_predictions_keep_their_graph() -> None:
    """A subclass can differentiate through ``_predict``, also where the loss needs real targets."""

    class Gradient(CurvatureLinearOperator):
        def _matmat_batch(self, X: Any, y: Any, M: list[Tensor]) -> list[Tensor]:
            f = self._predict(X)
            gradients = torch.autograd.grad((f * y).sum() / len(y), self._params)
            return [g.unsqueeze(-1) * m for g, m in zip(gradients, M, strict=True)]

    model = mlp()
    A = Gradient(model, nn.MSELoss(), list(model.parameters()), numbers((3, 4)))
    expected = torch.autograd.grad((model(numbers((7,))[0][0]) * targets()).sum() / 7, list(model.parameters()))
    result = A @ torch.ones(31, dtype=torch.float64)
    assert relative_error(result, torch.cat([e.flatten() for e in expected])) < 1e-10
