"""Figures of spectra, solves, estimates and matrices; needs matplotlib, ``pip install curvlinops[plot]``.

Each function draws into the axes it is given, or into those of a new figure, and returns them. Colours are told apart
by those who do not see all of them, and lines by style or marker in grey print. Nothing global is changed, except that
a new figure becomes the current one of pyplot, as with ``plt.subplots``.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("curvlinops.plotting needs matplotlib: pip install curvlinops[plot]") from error

from curvlinops.plotting.blocks import plot_block_traces
from curvlinops.plotting.convergence import plot_convergence
from curvlinops.plotting.density import plot_spectral_density
from curvlinops.plotting.estimates import plot_estimates
from curvlinops.plotting.matrix import plot_matrix

__all__ = ["plot_block_traces", "plot_convergence", "plot_estimates", "plot_matrix", "plot_spectral_density"]
