"""The order of the gallery: by the number in a script's name, which is not that of its letters."""

from pathlib import Path


def number_of(filename: str) -> int:
    """The number in ``plot_<number>_<words>.py``."""
    return int(Path(filename).name.split("_")[1])
