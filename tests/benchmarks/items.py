"""What is measured: names of networks and items. Imports no torch, so that the parent process stays small."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

NETWORKS: dict[str, tuple[str, int]] = {
    "mlp": ("MLP 784-1024-1024-10 with ReLU", 1024),
    "gpt": ("GPT with 4 layers, width 128, 4 heads, 64 tokens, 96 symbols", 16),
    "resnet18": ("ResNet-18 for 32x32 images, eval mode", 64),
}
"""A network's title and its number of data."""

MATRICES: dict[str, tuple[str, str, str]] = {
    "ggn": ("GGN", "GGNLinearOperator", "auto"),
    "ggn_factors": ("GGN by factors", "GGNLinearOperator", "factors"),
    "hessian": ("Hessian", "HessianLinearOperator", "auto"),
    "ef": ("empirical Fisher", "EFLinearOperator", "auto"),
    "fisher_mc": ("MC-Fisher", "FisherMCLinearOperator", "auto"),
}
"""A matrix's title, its class, and the engine that is asked for where it is linearised."""

DIAGONALS: dict[str, tuple[str, str, dict[str, int]]] = {
    "ggn": ("GGN", "GGNDiagonalLinearOperator", {}),
    "ggn_mc": ("MC-Fisher", "GGNDiagonalLinearOperator", {"mc_samples": 1}),
    "ef": ("empirical Fisher", "EFDiagonalLinearOperator", {}),
}
"""A diagonal's title, its class and the arguments that choose it."""

PUSHES: dict[str, str] = {
    "tape": "tape of tangents (this library)",
    "func_linearize": "``torch.func.linearize``",
    "dual": "dual numbers anew (``torch.func.jvp``)",
    "double_backward": "double backward, retained",
}
"""A way to compute J v again and again, and its title."""

ACTIONS: dict[str, str] = {
    "product": "one product",
    "lean": "one product, lean",
    "kept": "one product, linearised",
    "columns16": "16 columns",
    "columns16_kept": "16 columns, linearised",
    "columns64": "64 columns",
    "construct": "construction",
    "construct_unchecked": "construction, check_deterministic=False",
    "first": "construction and first product",
    "break_even": "first products, streamed and linearised",
    "diagonal": "diagonal",
    "solve": "damped solve",
    "scaling_data": "more data",
    "scaling_columns": "more columns",
    "push": "J v once more",
    "push_first": "J v for the first time",
}
"""An action and its title in the tables."""

NUM_PRODUCTS = 6
"""How many products are followed until linearising has paid off."""
DAMPING = 1e-2
"""Damping of the solves, in multiples of the largest eigenvalue."""
BATCH_SIZE = 1024
"""Size of mini-batches; only the curve over the number of data has more than one."""

_STREAMED = ["ggn", "hessian", "ef", "fisher_mc"]
_WITH_MEMORY = {"product", "lean", "kept", "columns16", "construct", "first", "diagonal", "solve", "push_first"}


@dataclass(frozen=True)
class Item:
    """One figure to measure: an action on a matrix, and where these are not the network's own, its sizes."""

    action: str
    matrix: str
    num_data: int | None = None
    num_columns: int | None = None

    @property
    def title(self) -> str:
        """The matrix in words."""
        if self.action in ("push", "push_first"):
            return PUSHES[self.matrix]
        titles = {name: entry[0] for name, entry in (DIAGONALS if self.action == "diagonal" else MATRICES).items()}
        return titles[self.matrix]

    def entry(self) -> dict[str, Any]:
        """What tells it apart in the results; sizes appear only where they are given."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @staticmethod
    def of(entry: dict[str, Any]) -> Item:
        """The item that an entry of the results belongs to."""
        return Item(entry["action"], entry["matrix"], entry.get("num_data"), entry.get("num_columns"))


GRADIENT = Item("gradient", "default")
GRADIENT_MATH = Item("gradient", "math")


def items_for(network: str, actions: Iterable[str]) -> list[Item]:
    """List the items of a network that belong to ``actions``."""
    return [item for action in actions for item in _items(network, action)]


def _items(network: str, action: str) -> list[Item]:
    with_factors = [*_STREAMED, "ggn_factors"] if network == "mlp" else _STREAMED
    match action:
        case "kept" | "break_even":
            return [Item(action, m) for m in with_factors]
        case "lean" | "columns64":
            return [Item(action, "ggn")]
        case "columns16" | "columns16_kept":
            return [Item(action, m) for m in (["ggn", "fisher_mc"] if network == "resnet18" else _STREAMED)]
        case "diagonal":
            # A datum of the GPT has 6,144 columns.
            found = [Item(action, m) for m in DIAGONALS if (network, m) != ("gpt", "ggn")]
            return found + ([Item(action, "ggn", num_data=64)] if network == "mlp" else [])
        case "solve":
            sizes = [256, None] if network == "mlp" else [None]
            return [Item(action, m, num_data=n) for m in ("ef", "fisher_mc") for n in sizes]
        case "scaling_data":
            sizes = [64, 256, 1024, 2048, 4096, 8192, 16384] if network == "mlp" else []
            return [Item(action, "ggn", num_data=n) for n in sizes]
        case "scaling_columns":
            columns = [1, 2, 4, 8, 16, 32, 64] if network in ("mlp", "gpt") else []
            return [Item(action, "ggn", num_columns=k) for k in columns]
        case "push" | "push_first":
            return [Item(action, way) for way in PUSHES]
    return [Item(action, m) for m in _STREAMED]


def sides(item: Item) -> dict[str, tuple[str, Item]]:
    """What is measured side by side for an item.

    Returns:
        For each label in the results the environment to ask, and what to ask it for.
    """
    peers = replace(item, matrix=item.matrix.removesuffix("_factors"))
    streamed = replace(peers, action="product")
    match item.action:
        case "kept":  # the peer keeps nothing
            return {"ours": ("ours", item), "peer": ("peer", streamed)}
        case "lean" | "columns16_kept" | "push" | "push_first":
            return {"ours": ("ours", item)}
        case "break_even":
            kept = replace(item, action="cumulative_kept")
            return {"kept": ("ours", kept), "streamed": ("ours", replace(peers, action="cumulative_streamed"))}
        case "scaling_data" | "scaling_columns":
            both = {"streamed": ("ours", streamed), "kept": ("ours", replace(item, action="kept"))}
            return both | ({"peer": ("peer", streamed)} if item.action == "scaling_data" else {})
        case "diagonal" if item.matrix == "ggn":  # which the peer does not have
            return {"ours": ("ours", item), "backpack": ("ours", replace(item, action="diagonal_backpack"))}
    return {"ours": ("ours", item), "peer": ("peer", peers)}


def memory_sides(item: Item) -> dict[str, tuple[str, Item]]:
    """Where peak memory says something about the item, what is measured; nothing is measured twice."""
    if item.action not in _WITH_MEMORY and item.action != "columns64":
        return {}
    return {label: side for label, side in sides(item).items() if label != "peer" or side[1] == item}


def has_time(item: Item) -> bool:
    """Whether time is measured: not where the curve over the number of columns says it already."""
    return item.action != "columns64"
