"""Wrong input is refused, and the message says what was expected, what came and where."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlinops import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from curvlinops.risk.batches import read_batch
from tests.risk.small import (
    FISHERS,
    KINDS,
    SQUARE,
    STACKED,
    build,
    classes,
    cut,
    inputs,
    labels,
    mlp,
    numbers,
    relative_error,
    reverse_hessian,
    targets,
    vector,
)

SUM = nn.MSELoss(reduction="sum")


def product(A: Any) -> Tensor:
    """A product with a random vector."""
    result: Tensor = A @ vector(A)
    return result


# -- parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GGN", "Jacobian", "EFDiagonal"])
def test_parameter_that_is_not_in_the_model(kind: str) -> None:
    stranger = nn.Parameter(torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"number 1 of shape \[2, 5\] is not a parameter of the model.*0\.weight"):
        build(kind, model := mlp(), classes(), params=[next(model.parameters()), stranger])


def test_parameter_that_is_not_in_the_model_by_name() -> None:
    with pytest.raises(ValueError, match=r"'layer.weight' is not a parameter of the model"):
        build("GGN", mlp(), classes(), params={"layer.weight": nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))})


def test_foreign_tensor_of_another_shape() -> None:
    foreign = {"0.weight": torch.zeros(4, 5, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"'0.weight': expected shape \[4, 3\] as in the model, got \[4, 5\]"):
        build("GGN", mlp(), classes(), params=foreign)


def test_name_of_another_parameter() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"'2.bias' is the model's '0.bias'"):
        build("GGN", model, classes(), params={"2.bias": model[0].bias})


def test_not_a_leaf() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"'0.weight' is not a leaf"):
        build("GGN", model, classes(), params={"0.weight": model[0].weight * 1.0})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
def test_not_a_real_floating_point_tensor(dtype: torch.dtype) -> None:
    wrong = torch.zeros(4, 3, dtype=dtype)
    with pytest.raises(ValueError, match=rf"'0.weight': expected a real floating-point tensor, got {dtype}"):
        build("GGN", mlp(), classes(), params={"0.weight": wrong})


def test_not_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"number 1: expected a tensor, got str"):
        build("GGN", model := mlp(), classes(), params=[model[0].weight, "0.bias"])


def test_the_same_parameter_twice() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="number 0 and number 2 are the same tensor"):
        build("GGN", model, classes(), params=[model[0].weight, model[0].bias, model[0].weight])
    with pytest.raises(ValueError, match="'a' and 'b' are the same tensor"):
        build("GGN", model, classes(), params={"a": model[0].weight, "b": model[0].weight})


@pytest.mark.parametrize("kind", KINDS)
def test_generator_of_parameters(kind: str) -> None:
    with pytest.raises(TypeError, match=r"got generator.*wrap it in list"):
        build(kind, model := mlp(), classes(), params=model.parameters())


def test_one_tensor_as_parameters() -> None:
    with pytest.raises(TypeError, match="list of parameters or a dict"):
        build("GGN", model := mlp(), classes(), params=model[0].weight)


@pytest.mark.parametrize("params", [[], {}])
def test_no_parameters(params: Any) -> None:
    with pytest.raises(ValueError, match="at least one parameter"):
        build("GGN", mlp(), classes(), params=params)


def test_mixed_dtypes_are_named() -> None:
    model = mlp()
    model[2].float()
    with pytest.raises(ValueError, match=r"'0.weight' is torch.float64 on cpu, '2.weight' is torch.float32 on cpu"):
        build("GGN", model, classes(), params=dict(model.named_parameters()))


def test_mixed_devices_are_named() -> None:
    model = mlp()
    model[2].to("meta")
    with pytest.raises(ValueError, match=r"'0.weight' is torch.float64 on cpu, '2.weight' is torch.float64 on meta"):
        build("GGN", model, classes(), params=dict(model.named_parameters()))


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(ValueError, match="number 0 was made in inference mode"):
        build("GGN", model, classes())


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_empty_data(kind: str) -> None:
    with pytest.raises(ValueError, match="data are empty"):
        build(kind, mlp(), [])
    A = build(kind, mlp(), [], check_deterministic=False)
    with pytest.raises(ValueError, match="data are empty"):
        A @ torch.zeros(A.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("one_shot", [iter, lambda data: (item for item in data), enumerate])
def test_one_shot_iterators(kind: str, one_shot: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"one-shot iterator.*Pass a list or a DataLoader"):
        build(kind, mlp(), one_shot(classes()), check_deterministic=False)


@pytest.mark.parametrize(("data", "match"), [(3, "got int"), (torch.zeros(3, 2), "got a tensor")])
def test_data_of_a_wrong_kind(data: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        build("GGN", mlp(), data)


@pytest.mark.parametrize("kind", ["GGN", "Jacobian"])
def test_items_of_three(kind: str) -> None:
    X, y = inputs(), labels()
    with pytest.raises(ValueError, match=r"Mini-batch 1: expected a pair.*got tuple of 3"):
        build(kind, mlp(), [(X, y), (X, y, y)])


def test_items_that_are_tensors() -> None:
    with pytest.raises(ValueError, match=r"Mini-batch 0: expected a pair.*got Tensor"):
        build("GGN", mlp(), [inputs()])


def test_mapping_without_labels() -> None:
    with pytest.raises(ValueError, match=r"Mini-batch 0 is a mapping without 'labels' \(its keys: \['input'\]\)"):
        build("GGN", mlp(), [{"input": inputs()}])


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_num_data(kind: str) -> None:
    with pytest.raises(ValueError, match=r"num_data=8, but the mini-batches hold 7 data"):
        build(kind, mlp(), classes(), num_data=8)
    A = build(kind, mlp(), classes(), num_data=8, check_deterministic=False)
    with pytest.raises(ValueError, match=r"num_data=8, but the mini-batches hold 7 data"):
        product(A)


def test_right_num_data() -> None:
    A, B = (build("GGN", mlp(), classes(), num_data=n) for n in (7, None))
    assert torch.equal(product(A), product(B))


class Bag(nn.Module):
    """A model of a pair (values, offsets), in which the number of data cannot be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, X: tuple[Tensor, Tensor]) -> Tensor:
        """The mean of the rows that belong to each datum."""
        values, owner = X
        num_data = int(owner.max()) + 1
        sums = torch.zeros(num_data, 3, dtype=values.dtype).index_add(0, owner, values)
        return self.linear(sums / owner.bincount().unsqueeze(-1)).tanh()


def huber(f: Tensor, y: Tensor) -> Tensor:
    """A loss that the package does not know, averaged over everything."""
    return F.huber_loss(f, y)


def bags() -> list[Any]:
    """Two mini-batches of two data and of one."""
    X = inputs(9)
    y = targets(9)[:, :2]
    return [((X[:5], torch.tensor([0, 0, 1, 1, 1])), y[:2]), ((X[5:], torch.zeros(4, dtype=torch.long)), y[2:3])]


@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
def test_invisible_size_with_a_generic_loss(kind: str) -> None:
    model = Bag()
    A = build(kind, model, bags(), huber, check_deterministic=False)
    with pytest.raises(ValueError, match=r"cannot be seen.*batch_size_fn"):
        product(A)
    A = build(kind, model, bags(), huber, batch_size_fn=lambda X: int(X[1].max()) + 1, num_data=3)
    assert relative_error(A.to_dense(), dense_of_bags(model, kind)) < 1e-10


def dense_of_bags(model: Bag, kind: str) -> Tensor:
    """Hessian, or GGN by linearising the model, of the mean over all three data at once."""
    params = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in params])

    def at(theta: Tensor) -> Tensor:
        values = {n: t.reshape(p.shape) for (n, p), t in zip(model.named_parameters(), theta.split([6, 2]))}
        return torch.cat([torch.func.functional_call(model, values, (X,)) for X, _ in bags()])

    y = torch.cat([y for _, y in bags()])
    if kind == "Hessian":
        return torch.autograd.functional.hessian(lambda t: huber(at(t), y), flat)
    J = torch.autograd.functional.jacobian(at, flat).reshape(6, 8)
    H = torch.autograd.functional.hessian(lambda f: huber(f, y), at(flat)).reshape(6, 6)
    return J.T @ H @ J


def test_invisible_size_does_not_matter_to_a_known_loss() -> None:
    model = Bag()
    A = build("Hessian", model, bags(), SUM)
    truth = reverse_hessian(model, list(model.parameters()), bags())
    assert relative_error(A.to_dense(), truth) < 1e-10


def test_prediction_with_another_number_of_rows() -> None:
    model = nn.Sequential(nn.Linear(3, 2, dtype=torch.float64), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"Axis 0 of a prediction is the datum.*\[14\].*7 data"):
        product(build("Hessian", model, [(inputs(), targets())], lambda f, y: f.square().mean()))


def test_an_empty_minibatch_adds_nothing() -> None:
    model, (X, y) = mlp(), (inputs(), targets())
    A = build("Hessian", model, [(X[:0], y[:0]), (X, y)], SUM)
    assert relative_error(A.to_dense(), reverse_hessian(model, list(model.parameters()), [(X, y)])) < 1e-10


def test_packed_sequences_keep_their_sizes_on_the_cpu() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    moved = read_batch(0, (packed, torch.zeros(2)), torch.device("meta"))
    assert moved.X.data.device.type == "meta"
    assert moved.X.batch_sizes.device.type == "cpu"


# -- what is multiplied ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def G() -> Any:
    """A GGN with named parameters."""
    model = mlp()
    return build("GGN", model, classes(), params=dict(model.named_parameters()))


def test_flat_of_a_wrong_shape(G: Any) -> None:
    for shape in ((30,), (30, 2), (2, 31), (31, 2, 1), ()):
        with pytest.raises(ValueError, match=r"\[31\] or \[31, K\]"):
            G @ torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\[31\] or \[K, 31\], got \[31, 2\]"):
        torch.zeros(31, 2, dtype=torch.float64) @ G


def test_list_of_wrong_shapes(G: Any) -> None:
    good = [torch.zeros(shape, dtype=torch.float64) for shape in G.domain.shapes]
    with pytest.raises(ValueError, match=r"'2.weight': expected \[3, 4\], got \[4, 3\]"):
        G @ [*good[:2], good[2].T, good[3]]
    with pytest.raises(ValueError, match=r"Expected 4 tensors \(0\.weight\[4, 3\].*got 3"):
        G @ good[:3]
    with pytest.raises(ValueError, match="one K"):
        G @ [t.unsqueeze(-1).expand(*t.shape, 1 + (i == 2)) for i, t in enumerate(good)]


def test_dict_of_wrong_names(G: Any) -> None:
    good = {n: torch.zeros(s, dtype=torch.float64) for n, s in zip(G.domain.names, G.domain.shapes, strict=True)}
    with pytest.raises(ValueError, match=r"missing \['0\.bias'\], unknown \['zero\.bias'\]"):
        G @ {("zero.bias" if n == "0.bias" else n): t for n, t in good.items()}


def test_wrong_dtype_or_device(G: Any) -> None:
    with pytest.raises(ValueError, match=r"expected torch.float64 on cpu, got torch.float32 on cpu"):
        G @ torch.zeros(31)
    with pytest.raises(ValueError, match=r"expected torch.float64 on cpu, got torch.float64 on meta"):
        G @ torch.zeros(31, dtype=torch.float64, device="meta")
    wrong = [torch.zeros(shape, dtype=torch.float64) for shape in G.domain.shapes]
    wrong[1] = wrong[1].float()
    with pytest.raises(ValueError, match=r"'0.bias': expected torch.float64 on cpu, got torch.float32 on cpu"):
        G @ wrong


@pytest.mark.parametrize("M", ["v", 3j, None, object(), {1, 2}])
def test_wrong_format(G: Any, M: Any) -> None:
    with pytest.raises(TypeError):
        G @ M


def test_numpy_array(G: Any) -> None:
    with pytest.raises(TypeError, match="to_scipy"):
        G @ torch.zeros(31, dtype=torch.float64).numpy()


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SQUARE)
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.HuberLoss])
def test_reduction_none(kind: str, loss: type[nn.Module]) -> None:
    with pytest.raises(NotImplementedError, match=r"reduction='none'.*'mean' and 'sum'"):
        build(kind, mlp(), numbers(), loss(reduction="none"))


@pytest.mark.parametrize("kind", FISHERS)
def test_fishers_of_unknown_losses(kind: str) -> None:
    with pytest.raises(NotImplementedError, match=r"huber is not one|HuberLoss is not one"):
        build(kind, mlp(), numbers(), huber)
    with pytest.raises(NotImplementedError, match=r"HuberLoss is not one"):
        build(kind, mlp(), numbers(), nn.HuberLoss())


@pytest.mark.parametrize("cls", [GGNLinearOperator, GGNDiagonalLinearOperator])
def test_samples_of_unknown_losses(cls: type) -> None:
    model = mlp()
    with pytest.raises(NotImplementedError, match="huber is not one"):
        cls(model, huber, list(model.parameters()), numbers(), mc_samples=1)


def test_loss_that_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="got str"):
        build("GGN", mlp(), classes(), "cross_entropy")


def test_loss_that_is_not_a_scalar() -> None:
    with pytest.raises(ValueError, match=r"expected a scalar, got \[3, 3\]"):
        product(build("GGN", mlp(), numbers(), lambda f, y: (f - y).square()))


@dataclasses.dataclass
class Huber:
    """A loss with a parameter, which has no hash."""

    delta: float
    reduction: str = "sum"

    def __call__(self, f: Tensor, y: Tensor) -> Tensor:
        """The loss of a mini-batch."""
        return F.huber_loss(f, y, delta=self.delta, reduction=self.reduction)


def test_loss_without_a_hash() -> None:
    model = mlp()
    A, B = (build("Hessian", model, numbers(), loss) for loss in (Huber(0.7), nn.HuberLoss("sum", 0.7)))
    assert torch.equal(product(A), product(B))


def test_reduction_of_a_partial_is_not_ignored() -> None:
    model = mlp()
    loss = functools.partial(F.mse_loss, reduction="sum")
    truth = reverse_hessian(model, list(model.parameters()), numbers())
    A = build("Hessian", model, numbers(), loss)
    assert relative_error(A.to_dense(), truth) < 1e-10, "reduction='sum' was taken for 'mean'"
    fishers = [build("EF", model, numbers(), same) for same in (loss, nn.MSELoss(reduction="sum"))]
    assert torch.equal(*(product(F) for F in fishers)), "a partial of a known function is known"


@pytest.mark.parametrize("option", ["weight", "pos_weight"])
def test_bce_weight_of_each_datum(option: str) -> None:
    y = targets().sigmoid()
    for shape in ((7, 3), (7, 1)):
        loss = nn.BCEWithLogitsLoss(**{option: torch.ones(shape, dtype=torch.float64)})
        with pytest.raises(NotImplementedError, match=rf"{option} of shape .* differs from datum to datum.*weight_fn"):
            product(build("GGN", mlp(), [(inputs(), y)], loss))


def test_bce_weight_of_a_wrong_size() -> None:
    loss = nn.BCEWithLogitsLoss(weight=torch.ones(2))
    with pytest.raises(ValueError, match=r"weight of shape \[2\] does not fit predictions of shape \[7, 3\]"):
        product(build("GGN", mlp(), [(inputs(), targets().sigmoid())], loss))


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)), labels()),
        (nn.CrossEntropyLoss(), -targets().softmax(1)),
        (nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)), targets().sigmoid()),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, -3.0, 1.0], dtype=torch.float64)), torch.ones(7, 3)),
    ],
    ids=["class weight", "soft targets", "weight", "pos_weight"],
)
@pytest.mark.parametrize("kind", ["GGN", "MC", "GGNDiagonal"])
def test_negative_mass(kind: str, loss: nn.Module, y: Tensor) -> None:
    with pytest.raises(ValueError, match="negative mass"):
        product(build(kind, mlp(), [(inputs(), y)], loss))


@pytest.mark.parametrize("kind", SQUARE)
@pytest.mark.parametrize("wrong", [3, -1])
def test_class_index_out_of_range(kind: str, wrong: int) -> None:
    y = labels()
    y[4] = wrong
    with pytest.raises(ValueError, match=rf"class index {wrong} is outside of 0\.\.2 and is not ignore_index=-100"):
        product(build(kind, mlp(), cut(inputs(), y)))


def test_class_weight_of_a_wrong_size() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.ones(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"weight has shape \[5\], the prediction 3 classes"):
        product(build("GGN", mlp(), classes(), loss))


@pytest.mark.parametrize("kind", SQUARE)
@pytest.mark.parametrize("y", [targets()[:, 0], targets()[:, :1], targets()[:1]])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_target_that_would_broadcast(kind: str, y: Tensor, loss: nn.Module) -> None:
    y = y.sigmoid()
    with pytest.raises(ValueError, match=rf"prediction's shape \[7, 3\], got \[{', '.join(map(str, y.shape))}\]"):
        product(build(kind, mlp(), [(inputs(), y)], loss))


def test_cross_entropy_targets_of_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"class indices of shape \[7\].*got \[7, 1\]"):
        product(build("GGN", mlp(), [(inputs(), labels().unsqueeze(1))]))
    with pytest.raises(ValueError, match=r"class probabilities of shape \[7, 3\].*got \[7, 2\]"):
        product(build("GGN", mlp(), [(inputs(), targets()[:, :2])]))


@pytest.mark.parametrize("kind", SQUARE)
def test_all_targets_ignored(kind: str) -> None:
    data = [(X, torch.full_like(y, -100)) for X, y in classes()]
    with pytest.raises(ValueError, match="every target is ignored"):
        product(build(kind, mlp(), data))
    A = build(kind, mlp(), data, nn.CrossEntropyLoss(reduction="sum"))
    assert torch.equal(product(A), torch.zeros(31, dtype=torch.float64))


# -- numbers that are not finite ---------------------------------------------------------------------------------------


def spoilt(value: float) -> list[tuple[Tensor, Tensor]]:
    """Mini-batches, the second of which has an input that is not finite."""
    X = inputs()
    X[4, 1] = value
    return cut(X, labels())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_prediction_that_is_not_finite(kind: str, value: float) -> None:
    model = mlp()
    if value == float("inf"):  # tanh would hide it
        model[1] = nn.Softplus()
    with pytest.raises(FloatingPointError, match=r"mini-batch 1 is not finite"):
        build(kind, model, spoilt(value))
    with pytest.raises(FloatingPointError, match=r"mini-batch 1"):
        product(build(kind, model, spoilt(value), check_deterministic=False))


def test_loss_that_is_not_finite() -> None:
    y = targets()
    y[6, 0] = float("inf")
    for kind in ("Hessian", "EF"):
        A = build(kind, mlp(), cut(inputs(), y), SUM, check_deterministic=False)
        with pytest.raises(FloatingPointError, match="mini-batch 2 gives numbers that are not finite"):
            A.gradient_and_loss()
    with pytest.raises(FloatingPointError, match="mini-batch 2 gives numbers that are not finite"):
        product(A)


@pytest.mark.parametrize("kind", [*SQUARE, *STACKED])
def test_vector_that_is_not_finite(kind: str) -> None:
    A = build(kind, mlp(), classes())
    v = vector(A)
    v[2] = float("nan")
    if "Diagonal" in kind:  # an entry of its own, that spoils no other
        assert (A @ v).isnan().tolist() == v.isnan().tolist()
    else:
        with pytest.raises(FloatingPointError, match="mini-batch 0"):
            A @ v


@pytest.mark.parametrize("kind", KINDS)
def test_large_numbers_are_finite(kind: str) -> None:
    """The square of the result would overflow, but not the result."""
    A = build(kind, mlp(torch.float32), classes(dtype=torch.float32))
    v = vector(A)
    assert relative_error((A @ (2.0**80 * v)) / 2.0**80, A @ v) < 1e-5


# -- models ------------------------------------------------------------------------------------------------------------


class Centered(nn.Module):
    """Subtracts the mean over the mini-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, X: Tensor) -> Tensor:
        """Linear, then centered."""
        f: Tensor = self.linear(X)
        return f - f.mean(0)


@pytest.mark.parametrize("kind", KINDS)
def test_model_whose_output_depends_on_the_batch(kind: str) -> None:
    with pytest.raises(RuntimeError, match=r"mini-batch 0.*depends on the rest of the mini-batch"):
        build(kind, Centered(), classes())


@pytest.mark.parametrize("kind", KINDS)
def test_model_that_returns_a_tuple(kind: str) -> None:
    class Pair(nn.Linear):
        def forward(self, X: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(X), X

    model = Pair(3, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"return a tensor.*got tuple.*functional_call"):
        build(kind, model, classes())
    with pytest.raises(TypeError, match="got tuple"):
        product(build(kind, model, classes(), check_deterministic=False))


def test_model_that_returns_a_scalar() -> None:
    class Total(nn.Linear):
        def forward(self, X: Tensor) -> Tensor:
            return super().forward(X).sum()

    with pytest.raises(ValueError, match="got a scalar"):
        build("GGN", Total(3, 3, dtype=torch.float64), classes())


def test_model_that_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="got str"):
        build("GGN", "model", classes(), params=[torch.zeros(2)])


def test_model_with_three_arguments() -> None:
    with pytest.raises(TypeError, match="3 required positional arguments"):
        build("GGN", lambda a, b, c: a, classes(), params={"w": torch.zeros(2)})


def test_two_arguments_and_a_list() -> None:
    with pytest.raises(TypeError, match="needs params as a dict"):
        build("GGN", lambda p, X: X, classes(), params=[torch.zeros(2)])


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (lambda X, y: torch.ones(len(y), 1), r"\[N\] with one weight a datum, got \[7, 1\]"),
        (lambda X, y: 2.0, r"\[N\] with one weight a datum, got float"),
        (lambda X, y: torch.ones(3), "3 weights for 7 data"),
        (lambda X, y: -torch.ones(len(y)), "finite weights of at least zero"),
        (lambda X, y: torch.full((len(y),), float("nan")), "finite weights of at least zero"),
    ],
    ids=["matrix", "number", "too few", "negative", "nan"],
)
@pytest.mark.parametrize("kind", SQUARE)
def test_weight_fn_of_a_wrong_kind(kind: str, weights: Callable[..., Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        product(build(kind, mlp(), [(inputs(), labels())], weight_fn=weights))


def test_weight_fn_with_a_generic_loss() -> None:
    with pytest.raises(NotImplementedError, match=r"weight_fn needs a loss whose terms are known; huber is not one"):
        build("Hessian", mlp(), numbers(), huber, weight_fn=lambda X, y: torch.ones(len(y)))


@pytest.mark.parametrize("kind", STACKED)
def test_weight_fn_with_a_jacobian(kind: str) -> None:
    with pytest.raises(NotImplementedError, match="weight_fn is not supported"):
        build(kind, mlp(), classes(), weight_fn=lambda X, y: torch.ones(len(y)))


@pytest.mark.parametrize("kind", STACKED)
def test_process_group_with_a_jacobian(kind: str) -> None:
    with pytest.raises(NotImplementedError, match=r"JacobianLinearOperator.*process_group is not supported"):
        build(kind, mlp(), classes(), process_group=object())


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_keywords(kind: str) -> None:
    with pytest.raises(TypeError, match=r"unknown argument 'progresbar'. Did you mean 'progressbar'\?"):
        build(kind, mlp(), classes(), progresbar=True)
    with pytest.raises(TypeError, match=r"unknown argument 'xyzzy'. Known: .*num_data"):
        build(kind, mlp(), classes(), xyzzy=True)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, "all", True, None])
def test_wrong_chunk_size(chunk_size: Any) -> None:
    with pytest.raises(ValueError, match="chunk_size: expected 'auto' or a positive number"):
        build("GGN", mlp(), classes(), chunk_size=chunk_size)


@pytest.mark.parametrize("samples", [-1, 1.0, True])
def test_wrong_number_of_samples(samples: Any) -> None:
    for cls in (GGNLinearOperator, FisherMCLinearOperator, GGNDiagonalLinearOperator):
        with pytest.raises(ValueError, match="mc_samples"):
            model = mlp()
            cls(model, nn.CrossEntropyLoss(), list(model.parameters()), classes(), mc_samples=samples)


def test_no_samples_of_the_monte_carlo_fisher() -> None:
    with pytest.raises(ValueError, match="GGNLinearOperator is the exact matrix"):
        build("MC", mlp(), classes(), mc_samples=0)


@pytest.mark.parametrize("kind", ["EF", "EFDiagonal"])
def test_unknown_terms(kind: str) -> None:
    with pytest.raises(ValueError, match="'position' or 'datum', got 'token'"):
        build(kind, mlp(), classes(), terms="token")


def test_no_gradient_without_a_loss() -> None:
    model = mlp()
    with pytest.raises(NotImplementedError, match="has no loss"):
        JacobianLinearOperator(model, list(model.parameters()), classes()).gradient_and_loss()


# -- autocast ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_refused(kind: str) -> None:
    model = mlp(torch.float32)
    data = classes(dtype=torch.float32)
    A = build(kind, model, data, check_deterministic=False)
    v = torch.zeros(A.shape[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(NotImplementedError, match="autocast is active for cpu"):
            A @ v
        with pytest.raises(NotImplementedError, match="autocast is active for cpu"):
            build(kind, model, data)
        if kind in SQUARE:
            with pytest.raises(NotImplementedError, match="autocast is active for cpu"):
                A.gradient_and_loss()
    assert (A @ v).isfinite().all()


@pytest.mark.parametrize("cls", [GGNLinearOperator, HessianLinearOperator, EFLinearOperator])
def test_autocast_inside_of_the_model(cls: type) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(torch.float32)

        def forward(self, X: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                f: Tensor = self.inner(X)
            return f.float()

    model = Cast()
    data = classes(dtype=torch.float32)
    A, B = (cls(m, nn.CrossEntropyLoss(), list(model.parameters()), data) for m in (model, model.inner))
    for columns in ((), (3,)):
        V = vector(B, *columns)
        try:
            result = A @ V
        except NotImplementedError:
            continue
        assert relative_error(result, B @ V) < 0.05
