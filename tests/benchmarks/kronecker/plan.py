"""What is measured, and how much of it. Imports no torch, so that the parent process stays small."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

NETWORKS: dict[str, tuple[str, int]] = {
    "mlp": ("MLP", 1024),
    "gpt": ("GPT", 16),
    "resnet18": ("ResNet-18", 64),
}
"""A network's title and its number of data."""

QUICK_DATA = {"mlp": 64, "gpt": 2, "resnet18": 2}
EIGEN_DATA = {"resnet18": 4}
"""Data of what decomposes all factors, where that is fewer."""

CHECKED_DATA = 16
"""Data of the ResNet-18 where construction checks that all repeats."""

PARTS: dict[str, str] = {
    "factors": "KFAC's factors",
    "products": "products and inverses of KFAC",
    "ekfac": "EKFAC",
    "kfoc": "KFOC",
    "memory": "peak memory",
    "agreement": "whether both compute the same",
}

TITLES: dict[str, str] = {
    "kfac": "KFAC, construction (unchecked) and factors",
    "kfac_first": "KFAC, construction and first product",
    "product": "K @ v",
    "invert": "inverse and its first product",
    "inverse": "inverse @ v",
    "invert_exact": "inverse with exact damping and its first product",
    "inverse_exact": "inverse with exact damping @ v",
    "ekfac": "EKFAC, construction and first product",
    "ekfac_product": "EKFAC @ v",
    "ekfac_invert": "inverse of EKFAC and its first product",
    "ekfac_inverse": "inverse of EKFAC @ v",
    "kfoc": "KFOC, construction and first product",
}
"""An action and its title in the tables."""

ACTIONS: dict[str, list[str]] = {
    "factors": ["kfac", "kfac_first"],
    "products": ["product", "invert", "inverse", "invert_exact", "inverse_exact"],
    "ekfac": ["ekfac", "ekfac_product", "ekfac_invert", "ekfac_inverse"],
    "kfoc": ["kfoc"],
}
WITH_ALL = {"kfac", "ekfac", "kfoc"}
"""Actions that are measured for all parameters as well, ours only."""
WITHOUT_PEER = {"kfoc"}
WITH_MEMORY = ["kfac", "ekfac"]

LARGEST_EIGEN_FACTOR = 2304
DAMPING = 1e-2
TOLERANCE = 1e-4
"""Relative difference of both packages' products in float32, beyond which the benchmark fails."""


@dataclass(frozen=True)
class Item:
    """One figure.

    Attributes:
        network: Where.
        action: What.
        selection: The parameters: ``covered`` by the peer, which are weights and biases of linear layers and
            convolutions; of these those whose factors have at most 2304 rows, ``small``; or ``all``.
        num_data: Number of data.
    """

    network: str
    action: str
    selection: str
    num_data: int

    def entry(self) -> dict[str, Any]:
        """What tells it apart in the results, and what a worker is asked."""
        return asdict(self)

    @property
    def unit(self) -> Item:
        """The gradient that it is measured against: of the same parameters, over the same data."""
        return Item(self.network, "gradient", self.selection, self.num_data)


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        pythons: An interpreter for each environment, ``ours`` and, where it is measured, ``peer``.
        networks: Those that are measured.
        repeats: Measured rounds at most.
        seconds: Time after which no further round of an item starts.
        is_quick: Whether sizes are tiny.
    """

    pythons: dict[str, str]
    networks: list[str]
    repeats: int
    seconds: float
    is_quick: bool

    def items(self, part: str, network: str) -> list[Item]:
        """The items of a part on a network, first those that the peer has as well."""
        found = [self.item(network, action) for action in ACTIONS[part]]
        with_all = [self.item(network, action, "all") for action in ACTIONS[part] if action in WITH_ALL]
        # All parameters of the ResNet-18 have factors whose decomposition takes minutes.
        return found + [item for item in with_all if network != "resnet18" or item.action == "kfac"]

    def memory_items(self, network: str) -> list[Item]:
        """The items whose peak memory is measured: with their gradients."""
        found = [self.item(network, action) for action in WITH_MEMORY]
        return list(dict.fromkeys([*(item.unit for item in found), *found]))

    def item(self, network: str, action: str, selection: str = "covered") -> Item:
        """An item with its sizes."""
        num_data = (QUICK_DATA if self.is_quick else {name: n for name, (_, n) in NETWORKS.items()})[network]
        if network == "resnet18" and selection == "covered" and decomposes(action):
            return Item(network, action, "small", min(num_data, EIGEN_DATA[network]))
        if network == "resnet18" and action == "kfac_first":
            num_data = min(num_data, CHECKED_DATA)
        return Item(network, action, selection, num_data)


def decomposes(action: str) -> bool:
    """Whether an action takes eigendecompositions of factors."""
    return action.endswith("_exact") or action.startswith("ekfac") or action == "kfoc"
