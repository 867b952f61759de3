"""Which parameters form a layer, against lists written by hand."""

import pytest
import torch
from torch import Tensor, nn

from curvlinops.applications.learned_inverse.layers import named_layers


class Conv1D(nn.Module):
    """A linear layer with the outputs on the second axis, as Hugging Face has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.ones(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Zoo(nn.Module):
    """Layers of all kinds, nested, frozen, tied, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2), "norm": nn.GroupNorm(2, 6)})
        self.up = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.lstm = nn.LSTM(3, 2, bidirectional=True)
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True)
        self.plain_attention = nn.MultiheadAttention(4, 2)
        self.pair = nn.Bilinear(2, 3, 4)
        self.hidden = nn.Linear(4, 4, bias=False)
        self.gpt = Conv1D(6, 4)
        self.wide_norm = nn.LayerNorm((2, 3))
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.frozen_weight = nn.Linear(2, 3)
        self.frozen_weight.weight.requires_grad_(False)
        self.frozen = nn.Linear(2, 3).requires_grad_(False)
        self.slope = nn.PReLU()
        self.again = self.hidden


def test_every_kind_of_layer() -> None:
    model = Zoo()
    found = named_layers(model)
    rows = {name: (layer.kind, layer.parameters) for name, layer in found.items()}
    recurrent = {
        f"lstm.weight_{kind}_l0{way}": ("recurrent", (f"lstm.weight_{kind}_l0{way}", f"lstm.bias_{kind}_l0{way}"))
        for kind in ("ih", "hh")
        for way in ("", "_reverse")
    }
    split = {
        f"attention.{name}_proj_weight": ("attention", (f"attention.{name}_proj_weight",)) for name in ("q", "k", "v")
    }
    single = {
        "attention.in_proj_bias": ("attention", ("attention.in_proj_bias",)),
        "attention.bias_k": ("attention", ("attention.bias_k",)),
        "attention.bias_v": ("attention", ("attention.bias_v",)),
        "scale": ("other", ("scale",)),
        "head.bias": ("linear", ("head.bias",)),
        "frozen_weight.bias": ("linear", ("frozen_weight.bias",)),
        "wide_norm.bias": ("norm", ("wide_norm.bias",)),
    }
    assert rows == {
        "embedding": ("embedding", ("embedding.weight",)),
        "body.conv": ("convolution", ("body.conv.weight", "body.conv.bias")),
        "body.norm": ("norm", ("body.norm.weight", "body.norm.bias")),
        "up": ("transposed convolution", ("up.weight", "up.bias")),
        "attention.out_proj": ("linear", ("attention.out_proj.weight", "attention.out_proj.bias")),
        "plain_attention.in_proj_weight": (
            "attention",
            ("plain_attention.in_proj_weight", "plain_attention.in_proj_bias"),
        ),
        "plain_attention.out_proj": ("linear", ("plain_attention.out_proj.weight", "plain_attention.out_proj.bias")),
        "pair": ("bilinear", ("pair.weight", "pair.bias")),
        "hidden": ("linear", ("hidden.weight",)),
        "gpt": ("linear", ("gpt.weight", "gpt.bias")),
        "wide_norm": ("norm", ("wide_norm.weight",)),
        "slope": ("other", ("slope.weight",)),
        **recurrent,
        **split,
        **single,
    }
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    listed = [name for layer in found.values() for name in layer.parameters]
    assert sorted(listed) == sorted(trainable), "each trainable parameter once"
    flipped = {name for name, layer in found.items() if layer.is_transposed}
    assert flipped == {"up", "gpt"}
    assert {name: layer.groups for name, layer in found.items() if layer.groups > 1} == {"body.conv": 2, "up": 2}
    assert not any(found[name].has_matrix for name in [*single, "wide_norm", "body.norm", "slope"])
    assert found["scale"].other == "scale" and found["head.bias"].bias == "head.bias"


def test_the_layer_of_hugging_face_itself() -> None:
    from transformers.pytorch_utils import Conv1D as Original

    layer = named_layers(Original(6, 4))[""]
    assert (layer.kind, layer.parameters, layer.is_transposed) == ("linear", ("weight", "bias"), True)


def test_a_model_is_expected() -> None:
    with pytest.raises(TypeError, match="expected a module, got dict"):
        named_layers({})  # type: ignore[arg-type]
    assert named_layers(nn.Linear(2, 2).requires_grad_(False)) == {}
