"""Which parameters of a model form a matrix together: the weight and the bias of each layer, found by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
#: The kinds of layers, by the classes of their modules; the first that fits counts.
_KINDS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("linear", (nn.Linear,)),
    ("bilinear", (nn.Bilinear,)),
    ("convolution", (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    ("transposed convolution", _TRANSPOSED),
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("recurrent", (nn.RNNBase, nn.RNNCellBase)),
    ("attention", (nn.MultiheadAttention,)),
    ("norm", (*_BATCH_NORMS, *_INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)),
)


@dataclass(frozen=True, eq=False)
class NamedLayer:
    """The parameters of one layer, by their names in the model.

    Args:
        kind: ``"linear"``, ``"bilinear"``, ``"convolution"``, ``"transposed convolution"``, ``"embedding"``,
            ``"recurrent"``, ``"attention"``, ``"norm"``, or ``"other"`` for modules that are not known.
        weight: Name of the weight.
        bias: Name of the bias that has one entry for each output of the weight, or of one whose weight is not trained.
        other: Name of a parameter that is neither.
        is_transposed: Whether the outputs are on the weight's second axis: of transposed convolutions, and of the layer
            ``Conv1D`` of Hugging Face.
        groups: Number of groups of a convolution.

    >>> NamedLayer("linear", weight="fc.weight", bias="fc.bias").parameters
    ('fc.weight', 'fc.bias')
    """

    kind: str
    weight: str | None = None
    bias: str | None = None
    other: str | None = None
    is_transposed: bool = False
    groups: int = 1

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters, the weight first."""
        return tuple(name for name in (self.weight, self.bias, self.other) if name is not None)

    @property
    def has_matrix(self) -> bool:
        """Whether its weight is known to be applied as a matrix: that of norms and of unknown modules is not."""
        return self.weight is not None and self.kind not in ("norm", "other")


def named_layers(model: nn.Module) -> dict[str, NamedLayer]:
    """The layers of a model, each trainable parameter in exactly one of them.

    Weights are paired with biases by their names, ``weight`` with ``bias``, ``weight_ih_l0`` with ``bias_ih_l0``,
    ``in_proj_weight`` with ``in_proj_bias``, where the bias has one entry for each output of the weight. Frozen
    parameters are left out, tied ones belong to the layer that comes first, and what has no partner is a layer of its
    own.

    **Cost**: none; no tensor is read.

    Args:
        model: The module.

    Returns:
        Layers by name: the name of the module (``""`` for the model itself) where its weight is called ``weight``, else
        the name of the weight or of the only parameter.

    Raises:
        TypeError: If it is no module.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    >>> {name: (layer.kind, layer.parameters) for name, layer in named_layers(model).items()}
    {'0': ('linear', ('0.weight', '0.bias')), '1': ('norm', ('1.weight', '1.bias'))}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}.")
    seen: set[int] = set()
    found: dict[str, NamedLayer] = {}
    for module_name, module in model.named_modules():
        own = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) not in seen
        }
        seen.update(map(id, own.values()))
        found.update(_layers_of(module, f"{module_name}." if module_name else "", own))
    return found


def _layers_of(module: nn.Module, prefix: str, own: Mapping[str, Tensor]) -> Iterator[tuple[str, NamedLayer]]:
    """The layers that a module's own parameters form, by name."""
    kind, is_transposed = _kind(module)
    groups = int(getattr(module, "groups", 1)) if "convolution" in kind else 1
    partners = {name: name.replace("weight", "bias") for name in own if "weight" in name}
    paired = {
        name: bias
        for name, bias in partners.items()
        if bias in own and tuple(own[bias].shape) == (_num_outputs(own[name], is_transposed, groups),)
    }
    for name in own:
        full = prefix + name
        if name in partners:
            bias = prefix + paired[name] if name in paired else None
            key = prefix.removesuffix(".") if name == "weight" else full
            yield key, NamedLayer(kind, full, bias, is_transposed=is_transposed, groups=groups)
        elif "bias" in name and name not in paired.values():
            yield full, NamedLayer(kind, bias=full)
        elif name not in paired.values():
            yield full, NamedLayer(kind, other=full)


def _kind(module: nn.Module) -> tuple[str, bool]:
    """The kind of a module, and whether its weight has the outputs on its second axis."""
    for kind, classes in _KINDS:
        if isinstance(module, classes):
            return kind, isinstance(module, _TRANSPOSED)
    # Known by its name and the attribute that holds its number of outputs, so that nothing need be imported.
    if any(parent.__name__ == "Conv1D" for parent in type(module).__mro__) and hasattr(module, "nf"):
        return "linear", True
    return "other", False


def _num_outputs(weight: Tensor, is_transposed: bool, groups: int) -> int:
    return weight.shape[1] * groups if is_transposed else weight.shape[0]
