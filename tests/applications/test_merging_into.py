"""Merging into a module: what is written, what is kept, and that nothing is where something is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlinops import merge, merge_into


class Tied(nn.Module):
    """An embedding that is also the head, with normalised features between."""

    def __init__(self, scale: float, head: str | None = None) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.out.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(3)
        for i, p in enumerate(self.parameters()):
            p.data.fill_(scale * (i + 1))
        if head is not None:
            self.register_parameter(head, nn.Parameter(torch.full((2,), scale)))
        assert self.norm.running_mean is not None and self.norm.num_batches_tracked is not None
        self.norm.running_mean.fill_(10 * scale)
        self.norm.num_batches_tracked.fill_(int(scale))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_parameters_are_written_in_place() -> None:
    models, target = [Tied(1.0), Tied(4.0)], Tied(0.0)
    target.norm.weight.requires_grad_(False)
    target.out.bias.data = target.out.bias.data.double()
    target.out.bias.grad = torch.ones(5, dtype=torch.float64)
    parameters, state = dict(target.named_parameters()), torch.get_rng_state()
    before = [snapshot(model) for model in models]
    fishers = [{"out.bias": torch.full((5,), weight)} for weight in (1.0, 3.0)]
    info = merge_into(target, models, fishers, buffers="keep", weights=iter([1.0, 2.0]))
    assert info.method == "closed form" and len(info.quadratic_forms) == 2
    assert all(dict(target.named_parameters())[name] is p for name, p in parameters.items())
    assert target.out.weight is target.embedding.weight and bool((target.out.weight == 3).all()), "tied, averaged"
    merged_bias = 2 * (1 * 1.0 + 2 * 3 * 4.0) / 7  # the second parameter, weights times Fisher diagonals
    torch.testing.assert_close(target.out.bias, torch.full((5,), merged_bias).double(), rtol=1e-6, atol=0)
    assert target.out.bias.dtype == torch.float64 and bool((target.out.bias.grad == 1).all())
    assert not target.norm.weight.requires_grad and target.out.bias.requires_grad
    assert target.norm.running_mean is not None and bool((target.norm.running_mean == 0).all())
    assert torch.equal(state, torch.get_rng_state())
    for model, own in zip(models, before):
        assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("buffers", "mean", "count"),
    [
        ("keep", 0.0, 0),
        ("first", 10.0, 1),
        ("average", 30.0, 4),
        ({"norm.running_mean": torch.full((3,), 7.0)}, 7.0, 0),
    ],
    ids=["keep", "first", "average", "tensors"],
)
def test_buffers(buffers: Any, mean: float, count: int) -> None:
    target = Tied(0.0)
    merge_into(target, [Tied(1.0), Tied(4.0)], weights=[1.0, 2.0], buffers=buffers)
    assert target.norm.running_mean is not None and target.norm.num_batches_tracked is not None
    torch.testing.assert_close(target.norm.running_mean, torch.full((3,), mean))
    assert int(target.norm.num_batches_tracked) == count and target.norm.num_batches_tracked.dtype == torch.int64


def test_buffers_that_agree_need_no_choice_and_a_model_may_be_the_target() -> None:
    models = [Tied(2.0), Tied(2.0)]
    models[1].embedding.weight.data.fill_(8.0)
    merge_into(models[0], models)
    assert bool((models[0].embedding.weight == 5).all()) and bool((models[1].embedding.weight == 8).all())


def test_heads_of_other_tasks() -> None:
    target, models = Tied(0.0, "head_b"), [Tied(1.0, "head_a"), Tied(3.0, "head_b")]
    tied_once = ["head_a", "embedding.weight", "out.bias", "norm.weight", "norm.bias", "head_b"]
    assert list(merge(models)) == tied_once
    weight = models[0].out.weight
    assert len(merge([{"out": weight, "embedding": weight}])) == 2, "a dict is taken as it is"
    with pytest.raises(ValueError, match=r"that the module lacks: \['head_a'\]"):
        merge_into(target, models, buffers="keep")
    merge_into(target, models, buffers="keep", strict=False)
    assert target.get_parameter("head_b").tolist() == [3.0, 3.0] and bool((target.out.weight == 2).all())


def test_nothing_is_written_where_something_is_refused() -> None:
    target = Tied(0.0)
    pair = [Tied(1.0), Tied(4.0)]
    flags = [copy.deepcopy(model) for model in pair]
    for number, model in enumerate([target, *flags]):
        model.register_buffer("mask", torch.tensor([number == 1, True]))
    wide = Tied(1.0)
    wide.out.bias = nn.Parameter(torch.ones(6))
    named = dict(pair[0].named_parameters())
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (pair, {}, ValueError, "differs from the module's. Say what becomes"),
        (pair, {"buffers": "averages"}, ValueError, "expected 'keep', 'first', 'average'"),
        (pair, {"buffers": {"norm.mean": torch.ones(3)}}, ValueError, r"no buffers \['norm.mean'\]"),
        (pair, {"buffers": {"norm.running_mean": torch.ones(4)}}, ValueError, "the result"),
        ([named, named], {"buffers": "first"}, ValueError, "the first model has none"),
        (flags, {"buffers": "average"}, ValueError, "'mask' holds torch.bool that differ"),
        (pair, {"buffers": "keep", "damping": -1.0}, ValueError, "damping"),
        ([wide, wide], {"buffers": "keep"}, ValueError, r"'out.bias': the module has shape \[5\]"),
        (pair, {"buffers": {"norm.running_mean": [1, 2, 3]}}, TypeError, "expected a tensor, got list"),
        (pair, {"buffers": {"norm.num_batches_tracked": torch.tensor(2.5)}}, ValueError, "torch.int64, which cannot"),
        ([{"out.bias": torch.ones(5)}], {"buffers": "keep"}, ValueError, "that none of the models has"),
    ]
    before = snapshot(target)
    for models, options, error, message in cases:
        with pytest.raises(error, match=message):
            merge_into(target, models, **options)
        assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items()), message
    with pytest.raises(TypeError, match="expected a module, got dict"):
        merge_into(named, pair)  # type: ignore[arg-type]


def test_values_are_rounded_once_to_the_modules_dtype() -> None:
    """A half module does not become infinite, and a float32 module does not get what half precision left over."""
    half = nn.Linear(1, 1, bias=False).half()
    before = half.weight.clone()
    with pytest.raises(ValueError, match=r"'weight': the result is beyond torch.float16"):
        merge_into(half, [{"weight": torch.tensor([[1e6]])}])
    assert torch.equal(half.weight, before)
    target, value = nn.Linear(1, 1, bias=False), 1.0001
    merge_into(target, [{"weight": torch.ones(1, 1).half()}, {"weight": torch.full((1, 1), 2 * value - 1)}])
    torch.testing.assert_close(target.weight.detach(), torch.full((1, 1), value), rtol=1e-6, atol=0)
    target.register_buffer("mask", torch.zeros(2))
    merge_into(target, [target], buffers={"mask": torch.tensor([0.0, -torch.inf])})
    assert target.get_buffer("mask").tolist() == [0.0, -torch.inf]
