"""Kept Lanczos runs: what is computed once, budgets, interrupts, and resuming with the same bits."""

import contextlib
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlinops import (
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    LinearOperator,
    TensorLinearOperator,
)
from curvlinops.estimators.cached_spectrum import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
)
from curvlinops.estimators.spectrum import lanczos_approximate_log_spectrum, lanczos_approximate_spectrum
from curvlinops.solvers.info import ConvergenceWarning
from tests.solvers.spd_problems import CountingOperator, noise, with_eigenvalues

KINDS = {
    "plain": (LanczosApproximateSpectrumCached, lanczos_approximate_spectrum, "approximate_spectrum"),
    "log": (LanczosApproximateLogSpectrumCached, lanczos_approximate_log_spectrum, "approximate_log_spectrum"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def matrix(size: int = 60) -> Tensor:
    return with_eigenvalues(noise(size, seed=1) ** 3, 2)


def ask(spectrum: Any, kind: str, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    return getattr(spectrum, KINDS[kind][2])(*args, **options)


def ask_in_vain(spectrum: Any, kind: str, *args: Any, **options: Any) -> None:
    """Ask within a budget that does not suffice, or for fewer repeats than that."""
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
        warnings.simplefilter("ignore", ConvergenceWarning)
        ask(spectrum, kind, *args, **options)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- what is kept ------------------------------------------------------------------------------------------------------


@each_kind
def test_cached_equals_uncached_bitwise(kind: str) -> None:
    make, function, _ = KINDS[kind]
    A = TensorLinearOperator(matrix())
    for options in ({}, {"boundaries": (None, 30.0)}, {"boundaries": (1e-3, 30.0), "boundaries_tol": 0.1}):
        direct = function(A, 12, 100, 4, 2.0, margin=0.1, seed=5, chunk_size=3, return_stderr=True, **options)
        spectrum = make(A, 12, seed=5, chunk_size=3, **options)
        assert same(direct, ask(spectrum, kind, 4, 100, 2.0, 0.1, return_stderr=True))


@each_kind
def test_only_what_is_missing_is_computed(kind: str) -> None:
    A = CountingOperator(matrix())
    spectrum = KINDS[kind][0](A, 20, boundaries=(1e-3, 40.0))
    first = ask(spectrum, kind, 3)
    assert A.num_columns == [3] * 20
    A.num_columns.clear()
    assert same(ask(spectrum, kind, 3), first)
    sharper = ask(spectrum, kind, 3, num_points=77, kappa=7.0, margin=0.2)
    assert not A.num_columns and sharper[0].shape == (77,)
    more = ask(spectrum, kind, 5)
    assert A.num_columns == [2] * 20
    assert not torch.equal(more[1], first[1])
    assert same(ask(spectrum, kind, 3), first), "the first repeats are others than before"
    fresh = ask(KINDS[kind][0](CountingOperator(matrix()), 20, boundaries=(1e-3, 40.0)), kind, 5)
    torch.testing.assert_close(more, fresh, rtol=1e-8, atol=1e-10)


@each_kind
def test_boundaries_are_found_once(kind: str) -> None:
    A = CountingOperator(matrix(300))
    spectrum = KINDS[kind][0](A, 4)
    ask(spectrum, kind, 2)
    first, A.num_columns = A.num_columns, []
    assert first[:4] == [2] * 4 and set(first[4:]) == {1}
    ask(spectrum, kind, 3)
    assert A.num_columns == [1] * 4


def test_construction_makes_no_product() -> None:
    A = CountingOperator(matrix())
    LanczosApproximateSpectrumCached(A, 5)
    assert not A.num_columns


# -- budgets and interrupts --------------------------------------------------------------------------------------------


@each_kind
def test_spent_budget_gives_what_is_finished(kind: str) -> None:
    make = KINDS[kind][0]
    A = CountingOperator(matrix())
    spectrum = make(A, 10, chunk_size=2, boundaries=(1e-3, 40.0))
    with pytest.warns(ConvergenceWarning, match="max_matvecs ended .* average of 4 repeats instead of 7"):
        partial = ask(spectrum, kind, 7, max_matvecs=55)
    assert sum(A.num_columns) == 54
    assert same(partial, ask(make(A, 10, chunk_size=2, boundaries=(1e-3, 40.0)), kind, 4))
    A.num_columns.clear()
    whole = ask(spectrum, kind, 7)
    assert A.num_columns == [2] * 3 + [1] * 10
    assert same(whole, ask(make(A, 10, chunk_size=2, boundaries=(1e-3, 40.0)), kind, 7))


@each_kind
@pytest.mark.parametrize("limit", [{"max_matvecs": 11}, {"max_seconds": 1e-9}])
def test_budget_too_small_for_a_density(kind: str, limit: dict[str, Any]) -> None:
    make, function, _ = KINDS[kind]
    A = CountingOperator(matrix())
    with pytest.raises(RuntimeError, match=f"{next(iter(limit))} ended .* 0 of 4 repeats.*goes on from there"):
        function(A, 10, num_repeats=4, **limit)
    spectrum = make(A, 10, chunk_size=4)
    for _ in range(99):
        ask_in_vain(spectrum, kind, 4, max_matvecs=11)
        if spectrum._runs.num_ended == 4:
            break
    found = ask(spectrum, kind, 4)
    assert same(found, ask(make(A, 10, chunk_size=4), kind, 4))


@each_kind
def test_standard_error_needs_two_that_are_finished(kind: str) -> None:
    spectrum = KINDS[kind][0](TensorLinearOperator(matrix()), 10, chunk_size=1, boundaries=(1e-3, 40.0))
    with pytest.raises(RuntimeError, match="1 of 3 repeats"):
        ask(spectrum, kind, 3, max_matvecs=15, return_stderr=True)


class Interrupting(CountingOperator):
    """Raises KeyboardInterrupt at one of its products."""

    at = -1

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        self.at -= 1
        if self.at == 0:
            raise KeyboardInterrupt
        return super()._matmat(X)


@each_kind
@pytest.mark.parametrize("at", [1, 2, 9, 10, 11, 25, 33])
def test_interrupted_runs_go_on(kind: str, at: int) -> None:
    """In the first chunk, between chunks, and where boundaries are sought."""
    make = KINDS[kind][0]
    whole = ask(make(CountingOperator(matrix(200)), 10, chunk_size=2), kind, 5, return_stderr=True)
    A = Interrupting(matrix(200))
    A.at = at
    spectrum = make(A, 10, chunk_size=2)
    with pytest.raises(KeyboardInterrupt):
        ask(spectrum, kind, 5)
    state = spectrum.state_dict()
    assert same(ask(spectrum, kind, 5, return_stderr=True), whole)
    resumed = make(CountingOperator(matrix(200)), 10, chunk_size=2)
    resumed.load_state_dict(state)
    assert same(ask(resumed, kind, 5, return_stderr=True), whole)


# -- saving and resuming -----------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(
    ("ncv", "budget"), [(20, 1), (20, 7), (20, 40), (20, 41), (20, 60), (20, 119), (4, 24), (4, 25), (4, 29), (4, 34)]
)
def test_saved_and_resumed_bitwise(kind: str, ncv: int, budget: int, tmp_path: Path) -> None:
    """In the middle of repeats, and with few steps, where boundaries are sought afterwards."""

    make = KINDS[kind][0]

    def fresh() -> Any:
        return make(CountingOperator(matrix(200)), ncv, chunk_size=2)

    whole = ask(fresh(), kind, 6, return_stderr=True)
    spectrum = fresh()
    ask_in_vain(spectrum, kind, 6, max_matvecs=budget)
    assert 0 <= budget - sum(spectrum._runs._A.num_columns) < 2, "the budget is not used up"
    torch.save(spectrum.state_dict(), tmp_path / "state.pt")
    resumed = fresh()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(ask(resumed, kind, 6, return_stderr=True), whole)
    # Each product is made once: nothing that was saved is computed again, but for one that tells the matrix.
    counts = [sum(s._runs._A.num_columns) for s in (spectrum, resumed)]
    once = fresh()
    ask(once, kind, 6)
    assert sum(counts) - sum(once._runs._A.num_columns) in (0, 1)


def curvature(make: Callable[..., LinearOperator], dtype: torch.dtype = torch.float32) -> LinearOperator:
    """A curvature matrix of a small network with several ragged mini-batches, the same at each call."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    for p in model.parameters():
        p.data = rand(*p.shape) - 0.5
    data = [(rand(n, 5), torch.randint(3, (n,), generator=generator)) for n in (20, 20, 7)]
    return make(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)


CURVATURES = [GGNLinearOperator, HessianLinearOperator, FisherMCLinearOperator]


@each_kind
@pytest.mark.parametrize("make_curvature", CURVATURES)
def test_resuming_on_a_network_is_bitwise(kind: str, make_curvature: Any) -> None:
    """The first product of an operator prepares its mini-batches, which must not show in the bits."""
    make, options = KINDS[kind][0], {"chunk_size": 3, "boundaries_tol": 1e-3}
    whole = ask(make(curvature(make_curvature), 8, **options), kind, 7, return_stderr=True)
    for budget in (3, 10, 30, 45, 55):
        spectrum = make(curvature(make_curvature), 8, **options)
        ask_in_vain(spectrum, kind, 7, max_matvecs=budget)
        resumed = make(curvature(make_curvature), 8, **options)
        resumed.load_state_dict(spectrum.state_dict())
        assert same(ask(resumed, kind, 7, return_stderr=True), whole), budget


def test_resuming_in_another_process(tmp_path: Path) -> None:
    script = """
        import sys, torch
        from curvlinops import GGNLinearOperator
        from curvlinops.estimators.cached_spectrum import LanczosApproximateSpectrumCached
        from tests.estimators.test_spectrum_cached import curvature

        torch.set_num_threads(int(sys.argv[3]))
        spectrum = LanczosApproximateSpectrumCached(curvature(GGNLinearOperator), 8, chunk_size=3)
        spectrum.load_state_dict(torch.load(sys.argv[1], weights_only=True))
        torch.save(spectrum.approximate_spectrum(6), sys.argv[2])
    """
    spectra = [
        LanczosApproximateSpectrumCached(curvature(GGNLinearOperator), 8, chunk_size=3)
        for _ in ("whole", "interrupted")
    ]
    whole = spectra[0].approximate_spectrum(6)
    ask_in_vain(spectra[1], "plain", 6, max_matvecs=20)
    torch.save(spectra[1].state_dict(), tmp_path / "state.pt")
    files = [str(tmp_path / name) for name in ("state.pt", "result.pt")]
    command = [sys.executable, "-c", textwrap.dedent(script), *files, str(torch.get_num_threads())]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=120)
    assert same(torch.load(files[1]), whole)


def test_frozen_by_the_first_run() -> None:
    """What is kept belongs to one matrix, also when the network is trained on meanwhile."""
    A = curvature(GGNLinearOperator)
    reference = LanczosApproximateSpectrumCached(curvature(GGNLinearOperator), 8, chunk_size=2)
    spectrum = LanczosApproximateSpectrumCached(A, 8, chunk_size=2)
    spectrum.approximate_spectrum(2)
    for p in A._params:  # type: ignore[attr-defined]
        p.data.mul_(2.0)
    assert same(spectrum.approximate_spectrum(4), reference.approximate_spectrum(4))


@each_kind
def test_states_of_something_else_are_refused(kind: str) -> None:
    make = KINDS[kind][0]
    A = TensorLinearOperator(matrix(20))
    spectrum = make(A, 8)
    ask(spectrum, kind, 2)
    state = spectrum.state_dict()
    others = {
        "shape": make(TensorLinearOperator(matrix(21)), 8),
        "num_steps": make(A, 9),
        "seed": make(A, 8, seed=1),
        "dtype": make(TensorLinearOperator(matrix(20).float()), 8),
        "boundaries": make(A, 8, boundaries=(None, 100.0)),
        "boundaries_tol": make(A, 8, boundaries_tol=0.1),
        "kind": next(k for name, (k, *_) in KINDS.items() if name != kind)(A, 8),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"The state has {name} "):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="The state has kind None"):
        make(A, 8).load_state_dict({})


@each_kind
def test_resuming_with_a_generator(kind: str) -> None:
    """The seed that was drawn is part of the state; the generator is drawn from once."""
    make = KINDS[kind][0]
    A = TensorLinearOperator(matrix(20))
    spectrum = make(A, 8, generator=torch.Generator().manual_seed(4))
    ask(spectrum, kind, 2)
    resumed = make(A, 8, generator=torch.Generator().manual_seed(5))
    resumed.load_state_dict(spectrum.state_dict())
    assert same(ask(resumed, kind, 3), ask(spectrum, kind, 3))


def test_state_is_a_copy() -> None:
    spectrum = LanczosApproximateSpectrumCached(TensorLinearOperator(matrix(20)), 8)
    first = spectrum.approximate_spectrum(2)
    state = spectrum.state_dict()
    spectrum.approximate_spectrum(5)
    for _ in range(2):
        other = LanczosApproximateSpectrumCached(TensorLinearOperator(matrix(20)), 8)
        other.load_state_dict(state)
        assert same(other.approximate_spectrum(2), first)
        other.approximate_spectrum(4)
