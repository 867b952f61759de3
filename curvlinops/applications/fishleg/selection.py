"""Which layers of a model an inverse is learned for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Selection:
    """Layers in modules that match a pattern, and in none that match one to skip.

    Args:
        module_names: Patterns with shell wildcards; none for all layers.
        skip_names: Patterns to leave out.
    """

    module_names: tuple[str, ...]
    skip_names: tuple[str, ...]

    def of(self, layers: Iterable[str]) -> list[str]:
        """The names of the layers that are chosen.

        Args:
            layers: The names of all layers.

        Raises:
            ValueError: If a pattern matches nothing, or nothing is left.
        """
        layers = list(layers)
        for what, patterns in (("module_names", self.module_names), ("skip_names", self.skip_names)):
            idle = [pattern for pattern in patterns if not any(_matches(name, (pattern,)) for name in layers)]
            if idle:
                raise ValueError(f"{what}: {idle} match no module with parameters; the layers are {layers}.")
        is_chosen = [not self.module_names or _matches(name, self.module_names) for name in layers]
        found = [name for name, chosen in zip(layers, is_chosen) if chosen and not _matches(name, self.skip_names)]
        if not found:
            raise ValueError(f"module_names and skip_names leave no layer to learn; the layers are {layers}.")
        return found


def patterns_of(names: str | Iterable[str]) -> tuple[str, ...]:
    """The patterns of an argument; a string is one of them."""
    return (names,) if isinstance(names, str) else tuple(names)


def _matches(layer: str, patterns: Iterable[str]) -> bool:
    """Whether a layer, or a module that it is in, matches one of the patterns."""
    parts = layer.split(".")
    around = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(fnmatchcase(name, pattern) for name in around for pattern in patterns)
