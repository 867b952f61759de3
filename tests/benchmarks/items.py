"""What is measured: names of networks and items. Imports no torch, so that the parent process stays small."""

from __future__ import annotations

from dataclasses import dataclass

NETWORKS: dict[str, tuple[str, int]] = {
    "mlp": ("MLP 784-1024-1024-10 with ReLU", 1024),
    "gpt": ("GPT with 4 layers, width 128, 4 heads, 64 tokens, 96 symbols", 16),
    "resnet18": ("ResNet-18 for 32x32 images, eval mode", 64),
}
"""A network's title and its number of data."""

MATRICES: dict[str, tuple[str, str]] = {
    "ggn": ("GGN", "GGNLinearOperator"),
    "hessian": ("Hessian", "HessianLinearOperator"),
    "ef": ("empirical Fisher", "EFLinearOperator"),
    "fisher_mc": ("MC-Fisher", "FisherMCLinearOperator"),
}
"""A matrix's title and its class."""

DIAGONALS: dict[str, tuple[str, str, dict[str, int]]] = {
    "ggn": ("GGN", "GGNDiagonalLinearOperator", {}),
    "ggn_mc": ("MC-Fisher", "GGNDiagonalLinearOperator", {"mc_samples": 1}),
    "ef": ("empirical Fisher", "EFDiagonalLinearOperator", {}),
}
"""A diagonal's title, its class and the arguments that choose it."""

ACTIONS: dict[str, str] = {
    "product": "one product",
    "columns16": "16 columns",
    "construct": "construction",
    "construct_unchecked": "construction, check_deterministic=False",
    "first": "construction and first product",
    "diagonal": "diagonal",
}
"""An action and its title in the table."""

NUM_COLUMNS = 16


@dataclass(frozen=True)
class Item:
    """One figure to measure: an action on a matrix."""

    action: str
    matrix: str

    @property
    def title(self) -> str:
        """The matrix in words."""
        titles = {name: entry[0] for name, entry in (DIAGONALS if self.action == "diagonal" else MATRICES).items()}
        return titles[self.matrix]


GRADIENT = Item("gradient", "default")
GRADIENT_MATH = Item("gradient", "math")


def items_for(network: str, actions: list[str]) -> list[Item]:
    """List the items of a network that belong to ``actions``.

    The exact diagonal of the GGN is left out for the GPT, where a datum has 6,144 columns.
    """
    chosen = [Item(a, m) for a in actions if a != "diagonal" for m in MATRICES]
    if "diagonal" in actions:
        chosen += [Item("diagonal", m) for m in DIAGONALS if (network, m) != ("gpt", "ggn")]
    return chosen


def has_memory(item: Item) -> bool:
    """Whether peak memory says something about the item."""
    return item.action != "construct_unchecked"
