"""What estimators share: chunks, seeds and generators, precisions, formats of the answer, refusals."""

import itertools
from collections.abc import Callable
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlinops import (
    Diagonal,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    LinearOperator,
    Space,
    TensorLinearOperator,
    exact_trace,
)
from curvlinops.estimators import probes as probes_module
from curvlinops.estimators.blocks import block_traces
from curvlinops.estimators.estimate import Estimate, EstimateWithError
from curvlinops.estimators.hutchinson import hutchinson_diag, hutchinson_squared_fro, hutchinson_trace
from curvlinops.estimators.hutchpp import hutchpp_trace
from curvlinops.estimators.leave_one_out import xdiag, xnystrace, xtrace
from curvlinops.solvers.random_vectors import DISTRIBUTIONS, draw_columns
from tests.solvers.spd_problems import CountingOperator, noise, spd_matrix, with_eigenvalues

Estimator = Callable[..., Any]
TRACES: list[Estimator] = [hutchinson_trace, hutchpp_trace, xtrace, xnystrace]
DIAGONALS: list[Estimator] = [hutchinson_diag, xdiag]
ALL: list[Estimator] = [*TRACES, *DIAGONALS, hutchinson_squared_fro, block_traces]
each = pytest.mark.parametrize("estimator", ALL, ids=lambda f: f.__name__)


def decaying(size: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    M = with_eigenvalues(0.8 ** torch.arange(size).double()).to(dtype)
    return (M + M.T) / 2


def flat(answer: Any) -> Tensor:
    """Everything that an estimator answered, in one tensor."""
    if isinstance(answer, Tensor):
        return answer.flatten()
    entries = answer.values() if isinstance(answer, dict) else answer
    return torch.cat([flat(entry) for entry in entries])


# -- chunks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@each
def test_chunks_do_not_matter(estimator: Estimator, distribution: str) -> None:
    A = CountingOperator(decaying())
    chosen = () if estimator is xdiag else (distribution,)
    whole = flat(estimator(A, 20, *chosen, return_stderr=True))
    for chunk_size in (1, 3, 7, 100):
        A.num_columns.clear()
        answer = estimator(A, 20, *chosen, return_stderr=True, chunk_size=chunk_size)
        assert max(A.num_columns) <= chunk_size and sum(A.num_columns) == 20
        torch.testing.assert_close(flat(answer), whole, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("numel", [1, 5, 16, 33])
def test_probes_do_not_depend_on_chunks(numel: int, distribution: str, dtype: torch.dtype) -> None:
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    whole = draw_columns(numel, distribution, repeat(generators[0], 9), dtype)
    parts = [draw_columns(numel, distribution, repeat(generators[1], k), dtype) for k in (1, 2, 6)]
    assert torch.equal(torch.cat(parts, 1), whole) and whole.dtype == dtype


@each
def test_default_chunk_bounds_what_is_held(estimator: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    A = CountingOperator(decaying())
    estimator(A, 20)
    # As few products as can be: those of the second sketch, or of the rest, wait for the first.
    assert len(A.num_columns) <= 3 and sum(A.num_columns) == 20
    for numel, widest in ((40 * 4 + 39, 4), (1, 1)):
        A.num_columns.clear()
        monkeypatch.setattr(probes_module, "_CHUNK_NUMEL", numel)
        estimator(A, 20)
        assert max(A.num_columns) == widest


# -- random numbers ----------------------------------------------------------------------------------------------------


@each
def test_seeds_and_generators(estimator: Estimator) -> None:
    A = decaying()
    assert torch.equal(flat(estimator(A, 6)), flat(estimator(A, 6, seed=2147483647)))
    assert torch.equal(flat(estimator(A, 6, seed=1)), flat(estimator(A, 6, seed=1)))
    assert not torch.equal(flat(estimator(A, 6, seed=1)), flat(estimator(A, 6, seed=2)))
    generator = torch.Generator().manual_seed(1)
    first, second = flat(estimator(A, 6, generator=generator)), flat(estimator(A, 6, generator=generator))
    assert torch.equal(first, flat(estimator(A, 6, seed=1))) and not torch.equal(first, second)


@each
def test_global_random_state_stays(estimator: Estimator) -> None:
    before = torch.get_rng_state()
    estimator(decaying(), 6)
    assert torch.equal(torch.get_rng_state(), before)


def test_successive_draws_are_independent() -> None:
    A, generator = decaying(), torch.Generator().manual_seed(0)
    values = torch.stack([hutchinson_trace(A, 4, generator=generator) for _ in range(1000)])
    correlation = torch.corrcoef(torch.stack([values[0::2], values[1::2]]))[0, 1]
    assert correlation.abs() < 4 / 500**0.5


# -- precision and form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "dtype", "rtol"),
    [
        *((f, torch.float32, 1e-5) for f in ALL),
        # Rounded to bfloat16 the matrix is indefinite, which counts in float64: see the next test.
        *((f, torch.bfloat16, 0.05) for f in ALL if f is not xnystrace),
    ],
)
def test_low_precision(estimator: Estimator, dtype: torch.dtype, rtol: float) -> None:
    """The signs are the same numbers in every precision, so that the answers are the same but for rounding."""
    A = decaying(40, dtype)
    for num_matvecs in (8, 20, 60):
        value = flat(estimator(A, num_matvecs))
        expected = flat(estimator(A.double(), num_matvecs))
        assert value.dtype == dtype
        assert (value.double() - expected).norm() <= rtol * expected.norm()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("estimator", TRACES, ids=lambda f: f.__name__)
def test_low_precision_of_all_distributions(
    estimator: Estimator, dtype: torch.dtype, rtol: float, distribution: str
) -> None:
    A = decaying(40, dtype)
    truth = A.double().trace()
    for seed in range(5):
        value, error = (float(x) for x in estimator(A, 30, distribution, seed=seed, return_stderr=True))
        assert abs(value - truth) <= 6 * error + rtol * truth


@pytest.mark.parametrize("estimator", TRACES[1:], ids=lambda f: f.__name__)
def test_float32_keeps_what_is_small_beside_the_largest_eigenvalue(estimator: Estimator) -> None:
    """A single eigenvalue of 1e5 beside a thousand that are one: the tail has its share in the trace."""
    eigenvalues = torch.ones(600, dtype=torch.float64)
    eigenvalues[0] = 1e5
    A = with_eigenvalues(eigenvalues).float()
    values = torch.stack([estimator(A, 60, "normal", seed=seed).double() for seed in range(5)])
    assert ((values - 100_599).abs() < 60).all(), values


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
@each
def test_scale_does_not_matter(estimator: Estimator, scale: float) -> None:
    A = decaying()
    power = 2 if estimator is hutchinson_squared_fro else 1
    answer = flat(estimator(scale * A, 8)) / scale**power
    torch.testing.assert_close(answer, flat(estimator(A, 8)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@each
def test_scale_does_not_matter_in_float32(estimator: Estimator, scale: float) -> None:
    """Squares of such numbers are out of range."""
    A = decaying(40, torch.float32)
    if estimator is hutchinson_squared_fro and scale > 1:
        with pytest.raises(FloatingPointError, match=r"not finite in torch\.float32"):
            estimator(scale * A, 8)
        return
    power = 2 if estimator is hutchinson_squared_fro else 1
    answer = flat(estimator(scale * A, 8, return_stderr=True)).double()
    expected = flat(estimator(A, 8, return_stderr=True)).double() * scale**power
    torch.testing.assert_close(answer, expected, rtol=1e-3, atol=1e-4 * scale)


@each
def test_forms_of_the_answer(estimator: Estimator) -> None:
    A = decaying()
    shape = (40,) if estimator in DIAGONALS else ()
    value, pair = estimator(A, 8), estimator(A, 8, return_stderr=True)
    if estimator is block_traces:
        (value,), (pair,) = value, pair
    assert isinstance(value, Tensor) and value.shape == shape and value.dtype == A.dtype and not value.requires_grad
    independent = estimator in (hutchinson_trace, hutchinson_diag, hutchinson_squared_fro, block_traces)
    assert isinstance(pair, Estimate if independent else EstimateWithError)
    error = pair.stderr if isinstance(pair, Estimate) else pair.error_estimate
    assert torch.equal(pair.value, value) and error.shape == shape and error.dtype == A.dtype and (error > 0).all()


@each
def test_dense_tensor_is_an_operator(estimator: Estimator) -> None:
    A = decaying()
    expected = flat(estimator(TensorLinearOperator(A), 8))
    assert torch.equal(flat(estimator(A, 8)), expected)
    assert torch.equal(flat(estimator(A.clone().requires_grad_(), 8)), expected)
    with torch.inference_mode():
        assert torch.equal(flat(estimator(A, 8)), expected)


def test_progressbar(capsys: pytest.CaptureFixture[str]) -> None:
    for estimator in ALL:
        estimator(decaying(), 8)
        assert capsys.readouterr().err == ""
        estimator(decaying(), 8, progressbar=True, chunk_size=2)
        assert f"{estimator.__name__}: products" in capsys.readouterr().err


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_matvecs", [0, -2])
@each
def test_too_few_products(estimator: Estimator, num_matvecs: int) -> None:
    with pytest.raises(ValueError, match=rf"{estimator.__name__}: num_matvecs.*of at least \d, got {num_matvecs}"):
        estimator(decaying(), num_matvecs)


@pytest.mark.parametrize("num_matvecs", [4.0, True, "8", None])
@each
def test_counts_that_are_none(estimator: Estimator, num_matvecs: Any) -> None:
    with pytest.raises(TypeError, match=rf"{estimator.__name__}: num_matvecs.*integer"):
        estimator(decaying(), num_matvecs)


@pytest.mark.parametrize(
    ("estimator", "num_matvecs", "message"),
    [
        (xtrace, 2, "even integer of at least 4, got 2"),
        (xtrace, 7, "even integer of at least 4, got 7"),
        (xdiag, 2, "even integer of at least 4, got 2"),
        (xdiag, 5, "even integer of at least 4, got 5"),
        (hutchpp_trace, 2, "at least 3, got 2"),
        (xnystrace, 1, "at least 2, got 1"),
    ],
)
def test_counts_that_do_not_fit(estimator: Estimator, num_matvecs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimator(decaying(), num_matvecs)


@pytest.mark.parametrize(
    ("estimator", "num_matvecs"),
    [(hutchinson_trace, 1), (hutchinson_diag, 1), (hutchinson_squared_fro, 1), (block_traces, 1), (hutchpp_trace, 3)],
)
def test_errors_need_two_samples(estimator: Estimator, num_matvecs: int) -> None:
    estimator(decaying(), num_matvecs)
    with pytest.raises(ValueError, match=r"return_stderr=True needs two"):
        estimator(decaying(), num_matvecs, return_stderr=True)


@pytest.mark.parametrize("estimator", [f for f in ALL if f is not xdiag], ids=lambda f: f.__name__)
def test_unknown_distribution(estimator: Estimator) -> None:
    with pytest.raises(ValueError, match=r"'rademacher', 'normal', 'sphere', got 'gaussian'"):
        estimator(decaying(), 8, "gaussian")


@each
def test_matrices_that_do_not_fit(estimator: Estimator) -> None:
    if estimator is not hutchinson_squared_fro:
        with pytest.raises(ValueError, match=r"square matrix, got shape \(4, 6\)"):
            estimator(torch.ones(4, 6), 4)
    with pytest.raises(ValueError, match="at least one row"):
        estimator(torch.ones(0, 0), 4)
    with pytest.raises(ValueError, match=r"\[4\]"):
        estimator(torch.ones(4), 4)
    for wrong in (torch.ones(4, 4).int(), torch.ones(4, 4).cfloat()):
        with pytest.raises(TypeError, match="real floating point"):
            estimator(wrong, 4)
    with pytest.raises(TypeError, match="linear operator or a matrix as a tensor, got list"):
        estimator([[1.0]], 4)


@each
def test_other_arguments(estimator: Estimator) -> None:
    A = decaying()
    for chunk_size, kind in ((0, ValueError), (-1, ValueError), (2.5, TypeError)):
        with pytest.raises(kind, match=rf"{estimator.__name__}: chunk_size"):
            estimator(A, 8, chunk_size=chunk_size)
    with pytest.raises(TypeError, match=r"torch\.Generator, got int"):
        estimator(A, 8, generator=3)
    with pytest.raises(ValueError, match=r"generator: expected one on meta, where A is, got one on cpu"):
        estimator(OnMeta(), 8, generator=torch.Generator())


class OnMeta(LinearOperator):
    """An operator on another device than the CPU, which every machine has."""

    SELF_ADJOINT = True

    def __init__(self) -> None:
        space = Space.flat(40, torch.float64, torch.device("meta"))
        super().__init__(space, space)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        raise AssertionError("no product is needed to refuse the generator")


@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
@each
def test_products_that_are_not_finite(estimator: Estimator, entry: float) -> None:
    A = decaying()
    A[3, 3] = entry
    for num_matvecs in (8, 60):
        with pytest.raises(FloatingPointError, match="not finite"):
            estimator(CountingOperator(A), num_matvecs)


def test_overflow_of_the_answer() -> None:
    A = torch.full((20, 20), 100.0, dtype=torch.float16)
    with pytest.raises(FloatingPointError, match=r"4\.0e\+06, is not finite in torch.float16.*higher precision"):
        hutchinson_squared_fro(torch.diag(A.diagonal()).repeat(20, 1), 4)


def test_xnystrace_refuses_what_is_not_positive() -> None:
    with pytest.raises(ValueError, match=r"symmetric matrix. Use xtrace"):
        xnystrace(noise(10, 10), 4)
    with pytest.raises(ValueError, match=r"positive semi-definite.*eigenvalue -.*Use xtrace"):
        xnystrace(-decaying(), 8)
    with pytest.raises(ValueError, match="positive semi-definite"):
        xnystrace(with_eigenvalues(torch.linspace(-1, 1, 40, dtype=torch.float64)), 12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 5, 12, 60])
def test_xnystrace_takes_rounding_for_positive(dtype: torch.dtype, rank: int) -> None:
    """Matrices whose eigenvalues of zero are negative by rounding."""
    G = noise(60, rank, seed=rank)
    M = (G @ G.T).to(dtype)
    for seed, distribution in itertools.product(range(10), DISTRIBUTIONS):
        assert xnystrace((M + M.T) / 2, 20, distribution, seed=seed) > 0


# -- curvature of a network --------------------------------------------------------------------------------------------


def network() -> tuple[list[Any], Any]:
    layers = [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    for seed, p in enumerate(model.parameters()):
        p.data = noise(*p.shape, seed=seed) / 2
    data = [(noise(n, 5, seed=n), torch.arange(n) % 3) for n in (9, 6)]
    params = dict(model.named_parameters())
    return [model, nn.CrossEntropyLoss(), params, data], params


def test_traces_and_diagonals_of_a_ggn() -> None:
    arguments, _ = network()
    A = GGNLinearOperator(*arguments)
    dense = A.to_dense()
    torch.testing.assert_close(exact_trace(A), dense.trace())
    for estimator in TRACES:
        # Fifteen data with three classes: the rank is at most 30, and that of the Nyström approximation 60.
        value, error = estimator(A, 66, return_stderr=True)
        assert abs(value - dense.trace()) <= max(4 * error, 1e-3 * dense.trace()), estimator
    for estimator in DIAGONALS:
        value, error = estimator(A, 66, return_stderr=True)
        assert ((value - dense.diagonal()).abs() <= 5 * error + 1e-8).all(), estimator
    assert abs(xtrace(A, 66) - dense.trace()) <= 1e-9 * dense.trace()
    assert abs(xnystrace(A, 40) - dense.trace()) <= 1e-9 * dense.trace()
    torch.testing.assert_close(xdiag(A, 66), dense.diagonal(), rtol=1e-8, atol=1e-10)
    J = JacobianLinearOperator(arguments[0], *arguments[2:])
    value, error = hutchinson_squared_fro(J, 200, return_stderr=True)
    assert abs(value - J.to_dense().square().sum()) <= 4 * error


def test_indefinite_hessian() -> None:
    arguments, _ = network()
    A = HessianLinearOperator(*arguments)
    truth = A.to_dense().trace()
    for estimator in (hutchinson_trace, hutchpp_trace, xtrace):
        value, error = estimator(A, 40, "normal", return_stderr=True)
        assert abs(value - truth) <= 5 * error
    with pytest.raises(ValueError, match="positive semi-definite"):
        xnystrace(A, 40)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_block_traces_of_a_ggn(distribution: str) -> None:
    arguments, params = network()
    A = GGNLinearOperator(*arguments)
    blocks = block_traces(A, 30, distribution)
    assert isinstance(blocks, dict) and list(blocks) == list(params)
    torch.testing.assert_close(sum(blocks.values()), hutchinson_trace(A, 30, distribution))
    truth = [part.sum() for part in A.to_dense().diagonal().split([p.numel() for p in params.values()])]
    found = block_traces(A, 400, distribution, return_stderr=True)
    assert isinstance(found, dict)
    for (value, stderr), expected in zip(found.values(), truth, strict=True):
        assert value.shape == () and 0 < stderr < 0.3 * expected and abs(value - expected) <= 4 * stderr


def test_block_traces_are_unbiased_and_take_no_more_products() -> None:
    M = spd_matrix(10, 100.0, 8)
    zero = Diagonal({"w": torch.zeros(3, 2).double(), "b": torch.zeros(4).double()})
    A = CountingOperator(M)
    runs = [block_traces(A + zero, 3, seed=seed) for seed in range(400)]
    assert sum(A.num_columns) == 1200
    for name, truth in zip(("w", "b"), M.diagonal().split([6, 4]), strict=True):
        values = torch.stack([run[name] for run in runs])  # type: ignore[call-overload]
        assert (values.mean() - truth.sum()).abs() <= 4 * values.std() / 20


def test_block_traces_without_names() -> None:
    M = spd_matrix(10, 100.0, 8)
    A = TensorLinearOperator(M) + IdentityLinearOperator([(3, 2), (4,)], torch.device("cpu"), torch.float64)
    blocks = block_traces(A, 400)
    assert isinstance(blocks, list)
    truth = [part.sum() + len(part) for part in M.diagonal().split([6, 4])]
    torch.testing.assert_close(blocks, truth, rtol=0.1, atol=0)


def test_block_traces_need_one_space() -> None:
    class Moved(LinearOperator):
        """From a space to another one of its size."""

        def __init__(self) -> None:
            shapes = [((2, 3), (4,)), ((4,), (6,))]
            spaces = [Space(s, torch.float64, torch.device("cpu")) for s in shapes]
            super().__init__(*spaces)

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return X

    with pytest.raises(ValueError, match=r"block_traces: the spaces differ"):
        block_traces(Moved(), 4)
