"""The check that model and data repeat: what it finds, what it says, what it costs, and that it can be left out."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from curvlinops import DeterminismError, GGNDiagonalLinearOperator, GGNLinearOperator
from tests.risk.small import (
    KINDS,
    ORDERED,
    Batches,
    Counted,
    CountedData,
    build,
    classes,
    inputs,
    labels,
    mlp,
    normal,
    relative_error,
    targets,
    vector,
)

ORDER_FREE = [kind for kind in KINDS if kind not in ORDERED]


def with_layer(layer: nn.Module) -> nn.Sequential:
    """A network with a layer in the middle, in training mode."""
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 3)).double().train()


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_dropout(kind: str) -> None:
    with pytest.raises(DeterminismError, match=r"mini-batch 0.*differ by.*Dropout '1'; call model\.eval\(\)"):
        build(kind, with_layer(nn.Dropout(0.5)), classes())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_dropout_in_small_batches(size: int) -> None:
    with pytest.raises(DeterminismError, match="Dropout"):
        build("GGN", with_layer(nn.Dropout(0.5)), classes((size, size, size)))


@pytest.mark.parametrize("layer", [nn.RReLU(), nn.AlphaDropout(0.3)], ids=repr)
def test_other_random_layers(layer: nn.Module) -> None:
    with pytest.raises(DeterminismError, match="mini-batch 0"):
        build("GGN", with_layer(layer), classes())


@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), np.random.rand, random.random])
def test_random_models(draw: Callable[[], float]) -> None:
    class Noisy(nn.Linear):
        def forward(self, X: Tensor) -> Tensor:
            return super().forward(X) * (1 + draw())

    with pytest.raises(DeterminismError, match=r"mini-batch 0.*the model is random"):
        build("GGN", Noisy(3, 3).double(), classes())


def test_random_models_in_a_later_batch() -> None:
    class Noisy(nn.Linear):
        def forward(self, X: Tensor) -> Tensor:
            f = super().forward(X)
            return f * torch.rand(()) if (marked == X).all(1).any() else f

    data = classes()
    marked = data[2][0][0]
    with pytest.raises(DeterminismError, match="mini-batch 2"):
        build("GGN", Noisy(3, 3).double(), data)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm(kind: str, size: int) -> None:
    with pytest.raises(DeterminismError, match="BatchNorm1d '1'"):
        build(kind, with_layer(nn.BatchNorm1d(4)), classes((size, size)))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batch_norm_of_images(size: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    data = [(normal(size, 1, 3, 3, seed=s), labels(size)) for s in range(2)]
    with pytest.raises(DeterminismError, match="BatchNorm2d '1'"):
        build("GGN", model, data)
    build("GGN", model.eval(), data)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("form", ["callable of X", "callable of params and X"])
def test_batch_norm_in_a_callable(form: str, size: int) -> None:
    """Nothing says that the callable has a batch norm inside, and half a mini-batch may be too small for it."""
    model = with_layer(nn.BatchNorm1d(4))
    data = classes((size, size))
    with pytest.raises(DeterminismError):
        if form == "callable of X":
            build("GGN", lambda X: model(X), data, params=list(model.parameters()))
        else:
            build("GGN", lambda p, X: functional_call(model, p, (X,)), data, params=dict(model.named_parameters()))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_batch_norm_that_keeps_no_statistics(size: int) -> None:
    """It normalises by the mini-batch in eval mode, too."""
    model = with_layer(nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(DeterminismError):
        build("GGN", model, classes((size, size)))


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.BatchNorm1d(4).eval(), nn.LayerNorm(4)], ids=repr
)
def test_layers_that_repeat(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 3)).double()
    model.training = True
    for kind in ("GGN", "Jacobian"):
        build(kind, model, classes((1, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_is_no_randomness(dtype: torch.dtype) -> None:
    """Halves of a mini-batch may go through other kernels than the whole."""
    model = nn.Sequential(nn.Linear(200, 300), nn.GELU(), nn.Linear(300, 3)).to(dtype)
    data = [(normal(33, 200, seed=1, dtype=dtype), labels(33))]
    for kind in ("GGN", "Jacobian"):
        build(kind, model, data)


class TimeMajor(nn.Module):
    """An LSTM whose input has the time first, and whose prediction is its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3)

    def forward(self, X: Tensor) -> Tensor:
        """The state ``[N, 3]`` after the last step."""
        last: Tensor = self.lstm(X)[1][0][0]
        return last


@pytest.mark.parametrize("num_steps", [4, 5])
def test_time_first_with_as_many_steps_as_data(num_steps: int) -> None:
    """Halving X halves the time: that is no sign of randomness."""
    model = TimeMajor().double()
    data = [(normal(num_steps, 4, 2, seed=s), targets(4)) for s in (1, 2)]
    for kind in KINDS:
        A = build(kind, model, data, nn.MSELoss())
        assert (A @ vector(A)).isfinite().all()


def test_a_sequence_with_time_first_and_as_many_steps_as_data() -> None:
    class AllSteps(TimeMajor):
        def forward(self, X: Tensor) -> Tensor:
            return self.lstm(X)[0].transpose(0, 1)

    data = [(normal(4, 4, 2, seed=1), normal(4, 4, 3, seed=2))]
    A = build("GGN", AllSteps().double(), data, nn.MSELoss())
    assert (A @ vector(A)).isfinite().all()


# -- the data ----------------------------------------------------------------------------------------------------------


def loader(shuffle: bool = True, drop_last: bool = False, generator: torch.Generator | None = None) -> DataLoader[Any]:
    """A loader over nine data in mini-batches of four."""
    dataset = TensorDataset(inputs(9), labels(9))
    return DataLoader(dataset, batch_size=4, shuffle=shuffle, drop_last=drop_last, generator=generator)


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("kind", ORDER_FREE)
def test_shuffled_data_and_order_free_matrices(kind: str, own_generator: bool) -> None:
    generator = torch.Generator().manual_seed(1) if own_generator else None
    model, data = mlp(), loader(generator=generator)
    A = build(kind, model, data)
    first = A @ vector(A)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        orders = [[y.tolist() for _, y in data] for _ in range(2)]
        assert orders[0] != orders[1], "the loader does not shuffle"
        B = build(kind, model, data)  # a diagonal is computed only once
        assert relative_error(B @ vector(B), first) < 1e-12
    ordered = build(kind, model, loader(shuffle=False))
    assert relative_error(ordered @ vector(A), first) < 1e-12


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("kind", ORDERED)
def test_shuffled_data_and_ordered_matrices(kind: str, own_generator: bool) -> None:
    generator = torch.Generator().manual_seed(1) if own_generator else None
    with pytest.raises(DeterminismError, match=r"different order, first in mini-batch 0.*shuffle=False"):
        build(kind, mlp(), loader(generator=generator))


@pytest.mark.parametrize("cls", [GGNLinearOperator, GGNDiagonalLinearOperator])
def test_samples_of_shuffled_data(cls: type) -> None:
    model = mlp()
    arguments = model, nn.CrossEntropyLoss(), list(model.parameters()), loader()
    with pytest.raises(DeterminismError, match="different order"):
        cls(*arguments, mc_samples=1)
    cls(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_drop_last_with_shuffle(kind: str) -> None:
    with pytest.raises(DeterminismError, match=r"different data, first in mini-batch 0.*drop_last=True"):
        build(kind, mlp(), loader(drop_last=True))


def test_drop_last_without_shuffle() -> None:
    build("Jacobian", mlp(), loader(shuffle=False, drop_last=True))


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Data of which some are augmented at random."""

    def __init__(self, draw: Callable[[], float], augmented: range) -> None:
        self.draw, self.augmented = draw, augmented

    def __len__(self) -> int:
        """Seven."""
        return 7

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """A datum."""
        if index >= 7:
            raise IndexError
        noise = self.draw() if index in self.augmented else 0.0
        return inputs()[index] + noise, labels()[index]


DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.randn(())),
    "numpy": np.random.randn,
    "python": random.random,
}


@pytest.mark.parametrize("augmented", [range(7), range(3, 4), range(6, 7)], ids=["all", "number 3", "the last"])
@pytest.mark.parametrize("source", DRAWS)
@pytest.mark.parametrize("kind", ["GGN", "MC", "Jacobian", "EFDiagonal"])
def test_random_augmentation(kind: str, source: str, augmented: range) -> None:
    """Of all data, or of one in a later mini-batch."""
    data = DataLoader(Augmented(DRAWS[source], augmented), batch_size=2)
    with pytest.raises(DeterminismError, match=f"data, first in mini-batch {augmented.start // 2}: random augment"):
        build(kind, mlp(), data)


def test_random_targets() -> None:
    """Noise on the target alone, as of label smoothing by hand."""

    class Noisy:
        def __iter__(self) -> Iterator[Any]:
            yield inputs(), targets()
            yield inputs(), targets() + torch.randn(7, 3)

    with pytest.raises(DeterminismError, match="different data, first in mini-batch 1"):
        build("Hessian", mlp(), Noisy(), nn.MSELoss())


def test_another_number_of_batches() -> None:
    class Growing:
        def __init__(self) -> None:
            self.length = 1

        def __iter__(self) -> Iterator[Any]:
            self.length += 1
            yield from classes((3, 3, 3, 3, 3))[: self.length]

    with pytest.raises(DeterminismError, match="first in mini-batch 2"):
        build("GGN", mlp(), Growing())


def test_other_batches_of_the_same_data() -> None:
    """Cutting them anew does not matter where the order does not."""

    class Recut:
        def __init__(self) -> None:
            self.sizes = [(3, 4), (4, 3)]

        def __iter__(self) -> Iterator[Any]:
            self.sizes.reverse()
            yield from classes(self.sizes[0])

    model = mlp()
    A = build("GGN", model, Recut())
    B = build("GGN", model, classes((3, 4)))
    assert relative_error(A @ vector(A), B @ vector(A)) < 1e-12
    with pytest.raises(DeterminismError, match="order"):
        build("MC", model, Recut())


def masked_loss(f: Tensor, y: Tensor) -> Tensor:
    """Squared error where there is a target."""
    known = ~y.isnan()
    return ((f - torch.where(known, y, 0.0)).square() * known).sum(1).mean()


def test_targets_that_mark_missing_values_by_nan() -> None:
    y = targets()
    y[2, 1] = float("nan")
    A = build("Hessian", mlp(), [(inputs(), y)], masked_loss)
    assert (A @ vector(A)).isfinite().all()


def test_inputs_that_mask_by_infinity() -> None:
    """Masks of attention are often added to its logits."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, X: dict[str, Tensor]) -> Tensor:
            f: Tensor = self.linear((X["input"] + X["mask"]).softmax(1))
            return f

    mask = torch.zeros(7, 3, dtype=torch.float64)
    mask[::2, 1] = -torch.inf
    A = build("GGN", Masked(), [({"input": inputs(), "mask": mask}, labels())])
    assert (A @ vector(A)).isfinite().all()


# -- what it costs, and leaving it out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cost_of_the_check(kind: str) -> None:
    """Two forwards and two passes over the data; the forwards of the second are on halves."""
    model, data = Counted(mlp()), CountedData(classes((3, 4)))
    build(kind, model, data)
    assert data.passes == 2
    assert sum(model.calls) == 14
    assert sorted(model.calls) == [1, 2, 2, 2, 3, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_check(kind: str) -> None:
    model, data = Counted(mlp()), CountedData(classes((3, 4)))
    A = build(kind, model, data, check_deterministic=False)
    assert (data.passes, model.calls) == (0, [])
    if kind not in ("Jacobian", "TransposedJacobian"):  # whose shape depends on the data
        assert A.shape == (31, 31)
        assert "31" in repr(A)
        assert (data.passes, model.calls) == (0, [])


@pytest.mark.parametrize("kind", KINDS)
def test_random_models_and_data_without_the_check(kind: str) -> None:
    """Whoever asks for it gets it; each product then meets the same random numbers again."""
    data = DataLoader(Augmented(DRAWS["torch"], range(7)), batch_size=4, shuffle=True)
    A = build(kind, with_layer(nn.Dropout(0.5)), data, check_deterministic=False)
    try:
        first = A @ vector(A)
    except NotImplementedError:
        return  # the two ways through the network saw different models
    assert torch.equal(A @ vector(A), first)


def test_batch_norm_without_the_check() -> None:
    """In training mode the mini-batch is one function of the parameters, and its GGN that of that function."""
    model = with_layer(nn.BatchNorm1d(4))
    data: Batches = [(inputs(4), targets(4))]
    A = build("GGN", model, data, nn.MSELoss(reduction="sum"), check_deterministic=False)
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def at(theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in shapes])
        values = {n: t.reshape(s) for n, t, s in zip(names, parts, shapes, strict=True)}
        return functional_call(model, {**values, **{n: b.clone() for n, b in buffers.items()}}, (inputs(4),)).flatten()

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    J = torch.autograd.functional.jacobian(at, flat)
    assert relative_error(A.to_dense(), 2 * J.T @ J) < 1e-9


def test_the_loss_of_all_data_at_once() -> None:
    """A loss that couples the data of a mini-batch has no meaning when they are cut otherwise."""

    def contrast(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f @ f.T, torch.arange(len(f)))

    with pytest.raises(NotImplementedError, match="contrast of mini-batch 0"):
        build("Hessian", mlp(), classes(), contrast)
    build("Hessian", mlp(), [(inputs(), labels())], contrast)
