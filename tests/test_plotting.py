"""Figures draw the numbers they are given, have labels, refuse what they cannot draw, leave matplotlib as it is."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from curvlinops import (
    CGInverseLinearOperator,
    Diagonal,
    Estimate,
    EstimateWithError,
    InverseLinearOperator,
    LSMRInverseLinearOperator,
    Space,
    TensorLinearOperator,
    block_traces,
    damping_path,
    hutchinson_trace,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
)
from curvlinops.plotting import (
    plot_block_traces,
    plot_convergence,
    plot_estimates,
    plot_matrix,
    plot_spectral_density,
)

GRID = torch.linspace(-1, 3, 9, dtype=torch.float64)
DENSITY = torch.tensor([0.0, 0.1, 0.4, 0.2, 0.0, 0.0, 0.05, 0.1, 0.0], dtype=torch.float64)
LOG_GRID = torch.logspace(-3, 1, 9, dtype=torch.float64)
WEIGHTS = Space(((2, 3), (2,)), torch.float64, torch.device("cpu"), ("weight", "bias"))


def solved(K: int = 1, **options: Any) -> Any:
    inverse = CGInverseLinearOperator(Diagonal(torch.arange(1.0, 21.0, dtype=torch.float64)), **options)
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inverse @ torch.randn(20, K, dtype=torch.float64, generator=generator)
    return inverse.info


#: Every function with arguments that it draws.
FIGURES: dict[str, Callable[[Axes | None], Axes]] = {
    "density": lambda ax: plot_spectral_density(GRID, DENSITY, 0.1 * DENSITY, eigenvalues=GRID[:3], label="a", ax=ax),
    "log density": lambda ax: plot_spectral_density(LOG_GRID, torch.stack([DENSITY, DENSITY]), ax=ax),
    "convergence": lambda ax: plot_convergence(solved(3), rtol=1e-8, ax=ax),
    "estimates": lambda ax: plot_estimates([4, 8], {"a": [1.0, 2.0], "b": [2.0, 1.5]}, truth=1.7, ax=ax),
    "block traces": lambda ax: plot_block_traces({"weight": torch.tensor(6.0), "bias": torch.tensor(-2.0)}, ax=ax),
    "matrix": lambda ax: plot_matrix(torch.eye(8), WEIGHTS, ax=ax),
}


@pytest.fixture(autouse=True)
def no_figures_left() -> Iterator[None]:
    plt.close("all")  # those of doctests
    yield
    plt.close("all")


def curve(ax: Axes, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(ax.lines[index].get_xdata()), np.asarray(ax.lines[index].get_ydata())


def floats(values: Any) -> np.ndarray:
    """What error bars keep as objects."""
    return np.asarray(values, dtype=float)


def legend_of(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_draws_into_given_axes_and_changes_nothing_else(name: str) -> None:
    figure, (left, right) = plt.subplots(1, 2)
    current = plt.figure()
    before, state = dict(matplotlib.rcParams), torch.random.get_rng_state()
    assert FIGURES[name](right) is right
    assert dict(matplotlib.rcParams) == before
    assert plt.gcf() is current and plt.get_fignums() == [figure.number, current.number]
    assert not left.has_data() and right.has_data() and not current.axes
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", FIGURES)
def test_new_figure_leaves_the_old_one_alone(name: str) -> None:
    old = plt.figure()
    ax = FIGURES[name](None)
    assert not old.axes and ax.figure is not old and plt.gcf() is ax.figure


@pytest.mark.parametrize("name", FIGURES)
def test_has_labels_and_renders(name: str) -> None:
    ax = FIGURES[name](None)
    assert ax.get_xlabel() and (ax.get_ylabel() or len(ax.get_yticklabels()) == 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.canvas.draw()


@pytest.mark.parametrize("name", FIGURES)
def test_refuses_what_is_no_axes(name: str) -> None:
    with pytest.raises(TypeError, match="expected matplotlib Axes"):
        FIGURES[name](plt.figure())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FIGURES)
def test_may_be_called_twice_with_the_same_axes(name: str) -> None:
    ax = FIGURES[name](FIGURES[name](None))
    ax.figure.canvas.draw()
    assert all(np.isfinite(ax.get_ylim())) and ax.has_data()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "curvlinops.plotting"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install curvlinops\[plot\]"):
        importlib.import_module("curvlinops.plotting")


# -- spectral densities ------------------------------------------------------------------------------------------------


def test_density_on_a_linear_axis_is_the_density() -> None:
    ax = plot_spectral_density(GRID, DENSITY, 0.1 * DENSITY, num_errors=3.0, log_y=False)
    x, y = curve(ax)
    np.testing.assert_allclose(x, GRID)
    np.testing.assert_allclose(y, DENSITY)
    assert ax.get_xscale() == ax.get_yscale() == "linear"
    (band,) = ax.collections
    vertices = band.get_paths()[0].vertices
    assert vertices[:, 1].max() == pytest.approx(1.3 * 0.4)
    at_peak = vertices[vertices[:, 0] == GRID[2].item(), 1]
    assert at_peak.min() == pytest.approx(0.7 * 0.4)


def test_density_on_a_logarithmic_axis_is_that_of_the_logarithm() -> None:
    grid, density = lanczos_approximate_log_spectrum(Diagonal(torch.logspace(-2, 2, 30)), ncv=20, num_points=400)
    ax = plot_spectral_density(grid, density)
    assert ax.get_xscale() == "log"
    x, y = curve(ax)
    # Equal areas are equal numbers of eigenvalues: the integral over ln x is that of the density over x.
    assert np.trapezoid(y, np.log(x)) == pytest.approx(torch.trapezoid(density, grid).item(), rel=1e-3)
    linear = plot_spectral_density(grid, density, log_x=False)
    np.testing.assert_allclose(curve(linear)[1], density)
    assert linear.get_xscale() == "linear"


def test_signs_become_two_curves() -> None:
    A = Diagonal(torch.tensor([-4.0, -2.0, 1.0, 2.0, 8.0]))
    grid, parts, stderr = lanczos_approximate_log_spectrum(
        A, ncv=5, num_repeats=3, split_signs=True, return_stderr=True
    )
    ax = plot_spectral_density(grid, parts, stderr, eigenvalues=torch.tensor([-4.0, 8.0]), label="A")
    for row, part in enumerate(parts):
        np.testing.assert_allclose(curve(ax, row)[1], part * grid, rtol=1e-6)
    assert legend_of(ax) == ["A, $\\lambda < 0$", "A, $\\lambda \\geq 0$"]
    negative, positive = ax.lines[2:]
    assert list(negative.get_xdata()) == [4.0] and list(positive.get_xdata()) == [8.0]
    assert [to_hex(line.get_color()) for line in (negative, positive)] == [
        to_hex(line.get_color()) for line in ax.lines[:2]
    ]
    assert negative.get_marker() != positive.get_marker()


def test_a_logarithmic_density_axis_ends_below_the_lowest_peak() -> None:
    ax = plot_spectral_density(GRID, DENSITY)
    bottom, top = ax.get_ylim()
    assert ax.get_yscale() == "log" and 0.001 < bottom < 0.1 and 0.4 < top < 4
    # A second curve with lower peaks makes the axis longer, one with higher peaks does not make it shorter.
    plot_spectral_density(GRID, DENSITY / 100, ax=ax)
    assert ax.get_ylim()[0] == pytest.approx(bottom / 100) and ax.get_ylim()[1] == pytest.approx(top)


def test_stems_are_at_the_eigenvalues() -> None:
    ax = plot_spectral_density(GRID, DENSITY, eigenvalues=torch.tensor([0.5, -0.25]))
    (stems,) = ax.collections
    assert sorted(segment[0, 0] for segment in stems.get_segments()) == [-0.25, 0.5]
    assert sorted(ax.lines[1].get_xdata()) == [-0.25, 0.5]


def test_curves_on_the_same_axes_differ_in_colour_and_style() -> None:
    ax = plot_spectral_density(GRID, DENSITY, label="first")
    plot_spectral_density(GRID, 2 * DENSITY, label="second", ax=ax)
    one, two = ax.lines
    assert one.get_color() != two.get_color() and one.get_linestyle() != two.get_linestyle()
    assert legend_of(ax) == ["first", "second"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((GRID, DENSITY[:-1]), {}, r"density: expected the shape \[9\]"),
        ((GRID, DENSITY, DENSITY[1:]), {}, r"stderr: expected the shape \[9\]"),
        ((GRID, torch.stack([DENSITY, DENSITY]), DENSITY), {}, "stderr: expected a tensor with 2 axes"),
        ((GRID, torch.stack([DENSITY] * 3)), {}, r"density: expected the shape \[2, 9\]"),
        ((GRID, -DENSITY), {}, "not negative"),
        ((GRID, DENSITY / 0), {}, "finite numbers"),
        ((GRID[:0], DENSITY[:0]), {}, "at least one"),
        ((GRID, 0 * DENSITY), {}, "log_y=False"),
        ((GRID, DENSITY), {"log_x": True}, "positive grid"),
        ((LOG_GRID, DENSITY), {"eigenvalues": torch.tensor([0.0, 1.0])}, "no place for zero"),
        ((GRID, DENSITY), {"eigenvalues": torch.ones(2, 2)}, "eigenvalues: expected a tensor with 1 axes"),
        ((GRID, DENSITY), {"num_errors": -1.0}, "num_errors"),
    ],
)
def test_bad_densities_are_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_spectral_density(*arguments, **options)
    assert not plt.get_fignums()


def test_half_precision_and_graphs_are_read() -> None:
    result = lanczos_approximate_spectrum(Diagonal(torch.arange(6.0, dtype=torch.bfloat16)), 6, num_points=50)
    ax = plot_spectral_density(result[0], result[1].clone().requires_grad_())
    np.testing.assert_allclose(curve(ax)[1], result[1])


# -- convergence -------------------------------------------------------------------------------------------------------


def test_residuals_up_to_the_last_iteration_of_each_column() -> None:
    inverse = CGInverseLinearOperator(Diagonal(torch.arange(1.0, 21.0, dtype=torch.float64)))
    b = torch.ones(20, 2, dtype=torch.float64)
    b[1:, 1] = 0  # an eigenvector: one iteration
    inverse @ b
    info = inverse.info
    assert info is not None and info.num_iterations[1] == 1 < info.num_iterations[0]
    ax = plot_convergence(info, rtol=1e-8)
    assert ax.get_yscale() == "log" and legend_of(ax) == ["column 0", "column 1", "tolerance 1e-08", "attainable"]
    labelled = {str(line.get_label()): line for line in ax.lines}
    for k in range(2):
        line, end = labelled[f"column {k}"], int(info.num_iterations[k])
        np.testing.assert_array_equal(line.get_xdata(), range(end + 1))
        np.testing.assert_array_equal(line.get_ydata(), info.history[: end + 1, k])
        (marker,) = [x for x in ax.lines if len(x.get_xdata()) == 1 and x.get_color() == line.get_color()]
        assert (marker.get_xdata()[0], marker.get_ydata()[0]) == (end, info.residual_norm[k])
        floors = [x for x in ax.lines if x.get_linestyle() == ":" and x.get_color() == line.get_color()]
        assert [x.get_ydata()[0] for x in floors] == [pytest.approx(info.attainable[k].item())]
    assert list(labelled["tolerance 1e-08"].get_ydata()) == [1e-8, 1e-8]


def test_what_did_not_converge_is_crossed() -> None:
    markers = {}
    for name, info in {"no": solved(max_iter=3), "yes": solved()}.items():
        ax = plot_convergence(info, attainable=False)
        markers[name] = ax.lines[1].get_marker()
        assert len(ax.lines) == 2
    assert markers == {"no": "x", "yes": "o"}


def test_solves_are_compared_by_name() -> None:
    ax = plot_convergence({"good": solved(), "poor": solved(rtol=1e-2)})
    assert legend_of(ax) == ["good", "poor", "attainable"]


def test_many_columns_share_a_name() -> None:
    info = solved(9)
    ax = plot_convergence(info, attainable=False)
    assert legend_of(ax) == ["9 columns"] and len(ax.lines) == 18
    assert len({line.get_color() for line in ax.lines}) == 1


def test_least_squares_show_the_normal_residual() -> None:
    matrix = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(matrix))
    inverse @ torch.ones(12, dtype=torch.float64)
    info = inverse.info
    assert info is not None
    ax = plot_convergence(info)
    np.testing.assert_array_equal(curve(ax)[1], info.history[: int(info.num_iterations[0]) + 1, 0])
    assert "A^\\top" in ax.get_ylabel()
    with pytest.raises(ValueError, match="different things"):
        plot_convergence({"a": info, "b": solved()})


def test_solves_without_a_history_have_an_end() -> None:
    A = Diagonal(torch.arange(1.0, 21.0, dtype=torch.float64))
    path = damping_path(A, torch.ones(20, dtype=torch.float64), [0.1, 1.0])
    ax = plot_convergence({"a": path.info[0], "b": path.info[1]}, attainable=False)
    ends = {line.get_xdata()[0] for line in ax.lines if line.get_marker() != "None"}
    assert ends == {int(info.num_iterations[0]) for info in path.info}
    closed = InverseLinearOperator(A)
    closed @ torch.ones(20, dtype=torch.float64)
    assert closed.info is not None
    assert plot_convergence(closed.info).has_data()


@pytest.mark.parametrize(
    ("info", "error", "message"),
    [
        (None, TypeError, "after a product"),
        ({}, ValueError, "at least one"),
        ({"a": 3}, TypeError, r"info\['a'\]"),
    ],
)
def test_bad_infos_are_refused(info: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plot_convergence(info)


# -- estimates and blocks ----------------------------------------------------------------------------------------------


def test_estimates_with_their_errors_against_the_truth() -> None:
    counts = [4, 16, 64]
    A = torch.ones(5, 5, dtype=torch.float64)
    found = [hutchinson_trace(A, n, return_stderr=True) for n in counts]
    shared = [EstimateWithError(torch.tensor(4.0), torch.tensor(0.5)) for _ in counts]
    ax = plot_estimates(counts, {"one": found, "two": shared, "bare": [5.0, 5.0, 5.0]}, truth=torch.tensor(5.0))
    assert legend_of(ax) == ["exact", "one", "two", "bare"]
    assert list(ax.lines[0].get_ydata()) == [5.0, 5.0]
    points = {container.get_label(): container for container in ax.containers}
    line, _, (bars,) = points["one"]
    np.testing.assert_allclose(floats(line.get_ydata()), [float(value) for value, _ in found])
    np.testing.assert_allclose(floats(line.get_xdata()), counts, rtol=0.06)
    lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
    np.testing.assert_allclose(lengths, [4 * float(error) for _, error in found], rtol=1e-6)
    assert not points["bare"].has_yerr and points["two"].has_yerr
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "16", "64"]
    np.testing.assert_allclose(
        floats(points["two"][0].get_xdata()), counts
    )  # the one in the middle is where it should be
    assert ax.get_xscale() == "log" and "2 errors" in ax.get_ylabel()


@pytest.mark.parametrize(
    ("counts", "estimates", "error", "message"),
    [
        ([1, 2], {"a": [1.0]}, ValueError, "expected 2 estimates"),
        ([0, 2], {"a": [1.0, 2.0]}, ValueError, "positive"),
        ([1, 2], {}, TypeError, "expected a dict"),
        ([1, 2], [1.0, 2.0], TypeError, "expected a dict"),
        ([1, 2], {"a": Estimate(torch.tensor(1.0), torch.tensor(1.0))}, TypeError, "one estimate for each cost"),
        ([1], {"a": [float("nan")]}, ValueError, "finite"),
        ([1], {"a": ["one"]}, TypeError, "expected a tensor"),
    ],
)
def test_bad_estimates_are_refused(counts: Any, estimates: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plot_estimates(counts, estimates)
    assert not plt.get_fignums()


def test_block_traces_are_bars_with_shares() -> None:
    A = Diagonal({"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, 1.0]), "other": torch.tensor([92.0])})
    ax = plot_block_traces(block_traces(A, 2, return_stderr=True))
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(ends, [6.0, 2.0, 92.0])
    assert ax.get_xscale() == "log" and ax.get_xlim()[0] < 2.0
    assert [text.get_text() for text in ax.texts] == ["6.0 %", "2.0 %", "92 %"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["weight", "bias", "other"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # from the top
    assert not ax.containers[1:]  # exact for a diagonal matrix: no error bars


def test_block_traces_with_errors_and_signs() -> None:
    traces = [Estimate(torch.tensor(4.0), torch.tensor(0.5)), Estimate(torch.tensor(-1.0), torch.tensor(0.0))]
    ax = plot_block_traces(traces, num_errors=1.0)
    positive, negative = (bar for container in ax.containers for bar in getattr(container, "patches", []))
    assert positive.get_x() + positive.get_width() == pytest.approx(4.0)
    assert negative.get_x() + negative.get_width() == pytest.approx(1.0)
    assert negative.get_hatch() and negative.get_facecolor() != positive.get_facecolor()
    assert legend_of(ax) == ["negative"]
    assert [text.get_text() for text in ax.texts] == ["80 %", "-20 %"]
    (bars,) = next(container[2] for container in ax.containers if hasattr(container, "has_xerr"))
    (segment,) = bars.get_segments()
    np.testing.assert_allclose(segment[:, 0], [3.5, 4.5])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["block 0", "block 1"]


@pytest.mark.parametrize(
    ("traces", "error", "message"),
    [
        ({}, ValueError, "at least one"),
        ({"a": torch.tensor(0.0)}, ValueError, "all are zero"),
        ({"a": torch.ones(2)}, ValueError, r"traces\['a'\]: expected a tensor with 0 axes"),
        ({"a": torch.tensor(float("inf"))}, ValueError, "finite"),
        (torch.ones(3), TypeError, "a dict or a list"),
        (Estimate(torch.tensor(1.0), torch.tensor(1.0)), TypeError, "a dict or a list"),
    ],
)
def test_bad_traces_are_refused(traces: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plot_block_traces(traces)


# -- matrices ----------------------------------------------------------------------------------------------------------


def test_matrix_shows_entries_with_signs() -> None:
    entries = torch.tensor([[1.0, -10.0, 0.0], [1e-3, 100.0, -100.0]], dtype=torch.float64)
    ax = plot_matrix(entries)
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array(), entries)
    assert (image.norm.vmin, image.norm.vmax) == (-100.0, 100.0) and image.norm.linthresh == pytest.approx(0.01)
    # White in the middle of a diverging map stands for zero, and a sign for a side of it.
    assert image.norm(0.0) == pytest.approx(0.5)
    assert image.norm(-10.0) + image.norm(10.0) == pytest.approx(1.0)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("column", "row") and not ax.lines


def separators(ax: Axes) -> tuple[list[float], list[float]]:
    """Places of the horizontal and of the vertical lines."""
    horizontal = [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    vertical = [line.get_xdata()[0] for line in ax.lines if list(line.get_ydata()) == [0, 1]]
    return horizontal, vertical


def test_lines_separate_the_blocks_of_a_space() -> None:
    ax = plot_matrix(torch.rand(8, 8), WEIGHTS)
    assert separators(ax) == ([5.5], [5.5])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["weight", "bias"]
    assert list(ax.get_yticks()) == [2.5, 6.5]
    assert separators(plot_matrix(torch.rand(3, 8), WEIGHTS)) == ([], [5.5])
    assert separators(plot_matrix(torch.rand(8, 3), WEIGHTS)) == ([5.5], [])


def test_an_operator_brings_its_own_space() -> None:
    A = Diagonal({"weight": torch.ones(2, 3), "bias": torch.tensor([-1.0, 2.0])})
    ax = plot_matrix(A)
    np.testing.assert_array_equal(ax.images[0].get_array(), torch.diag(torch.tensor([1.0] * 6 + [-1.0, 2.0])))
    assert separators(ax) == ([5.5], [5.5])


@pytest.mark.parametrize("colorbar", [True, False])
def test_colour_bar(colorbar: bool) -> None:
    figure, ax = plt.subplots()
    plot_matrix(torch.eye(3), colorbar=colorbar, ax=ax)
    assert len(figure.axes) == 1 + colorbar and figure.gca() is ax
    if colorbar:
        ticks = [round(tick, 9) for tick in figure.axes[1].get_yticks()]
        assert ticks == sorted(ticks) == [-tick for tick in reversed(ticks)] and 0.0 in ticks and 1.0 in ticks


def test_a_matrix_of_zeros_is_white() -> None:
    ax = plot_matrix(torch.zeros(2, 2))
    assert ax.images[0].norm(0.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("A", "options", "error", "message"),
    [
        (torch.ones(3), {}, ValueError, "2 axes"),
        (torch.full((2, 2), float("nan")), {}, ValueError, "4 that are not"),
        ("matrix", {}, TypeError, "expected a tensor"),
        (torch.eye(3), {"space": WEIGHTS}, ValueError, r"fit neither axis of the shape \[3, 3\]"),
        (torch.eye(8), {"space": "weights"}, TypeError, "expected a Space"),
        (Diagonal(torch.ones(8)), {"space": WEIGHTS}, ValueError, "knows its own"),
        (Diagonal(torch.ones(5000)), {}, ValueError, "at most"),
        (torch.eye(3), {"decades": 0}, ValueError, "decades"),
    ],
)
def test_bad_matrices_are_refused(A: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plot_matrix(A, **options)
    assert not plt.get_fignums()


def test_colours_differ_for_those_who_see_fewer() -> None:
    """Luminances of neighbouring curves differ, or their line styles do: never the colour alone."""
    ax = None
    for _ in range(6):
        ax = plot_spectral_density(GRID, DENSITY, ax=ax)
    assert ax is not None
    looks: list[tuple[str, str]] = [(str(line.get_color()), str(line._dash_pattern)) for line in ax.lines]
    assert len({colour for colour, _ in looks}) == len({dashes for _, dashes in looks}) == 6


def test_more_curves_than_colours() -> None:
    ax = plt.subplots()[1]
    for _ in range(8):
        plot_spectral_density(GRID, DENSITY, ax=ax)
    assert len(ax.lines) == 8
