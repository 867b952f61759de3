"""Columns of F = Jᵀ S from layer notes, datum by datum, against plain reverse mode in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlinops.risk.layers.factors import LayerFactors, LayerNotes
from curvlinops.risk.layers.proofs import Proofs
from curvlinops.risk.layers.recorder import LayerRecorder
from curvlinops.risk.linearization import Engine
from tests.risk.layer_models import ALL, CASES, Case
from tests.risk.small import normal


def columns_of(forward: Callable[[], Tensor], values: Sequence[Tensor], U: Tensor) -> list[Tensor]:
    """The columns ``[N, M, *shape]``: one backward for each datum and column."""
    prediction = forward()
    found = [torch.zeros(prediction.shape[0], len(U), *v.shape, dtype=torch.float64) for v in values]
    for n in range(len(prediction)):
        for m, u in enumerate(U):
            gradients = torch.autograd.grad((prediction[n] * u[n]).sum(), values, retain_graph=True, allow_unused=True)
            for F_i, g in zip(found, gradients, strict=True):
                if g is not None:
                    F_i[n, m] = g
    return found


def factors_of(
    forward: Callable[[], Tensor],
    values: Sequence[Tensor],
    num_columns: int,
    proofs: Proofs | None = None,
    engine: Engine | None = None,
) -> tuple[LayerFactors, Tensor]:
    """The factors, and the loss-factor columns that they are made with."""
    with LayerRecorder(values) as recorder:
        prediction = forward()
    U = normal(num_columns, *prediction.shape, seed=5)
    notes = LayerNotes(recorder, prediction, engine or Engine(), {} if proofs is None else proofs)
    return notes.factors(U), U


def check(factors: LayerFactors, columns: Sequence[Tensor]) -> None:
    """All that the factors offer, against the columns themselves."""
    chosen = factors.positions
    N, M = columns[0].shape[:2]
    flat = {i: columns[i].reshape(N * M, -1) for i in chosen}
    for K in (1, 3):
        V = {i: normal(K, *columns[i].shape[2:], seed=i).movedim(0, -1) for i in chosen}
        Z = normal(N, M, K, seed=K)
        expected = torch.stack([flat[i] @ V[i].reshape(-1, K) for i in chosen]).sum(0).reshape(N, M, K)
        torch.testing.assert_close(factors.rmatmat(V), expected)
        for i, product in factors.matmat(Z).items():
            torch.testing.assert_close(product, (flat[i].T @ Z.reshape(-1, K)).reshape(*columns[i].shape[2:], K))
    for i, squares in factors.squares().items():
        torch.testing.assert_close(squares, columns[i].square().sum((0, 1)))
    for i, gradients in factors.gradients(slice(1, None)).items():
        torch.testing.assert_close(gradients, columns[i][1:])
    gram = torch.stack([f @ f.T for f in flat.values()]).sum(0)
    torch.testing.assert_close(factors.gram(), gram)
    torch.testing.assert_close(factors.gram(positions=chosen[-1:]), flat[chosen[-1]] @ flat[chosen[-1]].T)
    torch.testing.assert_close(factors.column_squares(), gram.diagonal().reshape(N, M))
    assert any(t.numel() for t in factors.tensors())


@pytest.mark.parametrize("num_columns", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_columns(case: Case, num_columns: int) -> None:
    names, values, forward = case.build()
    factors, U = factors_of(forward, values, num_columns)
    covered = {names[i] for i in factors.positions}
    assert covered == (set(names) if case.covered is ALL else case.covered)
    if covered:
        check(factors, columns_of(forward, values, U))


def linear_pair(num_data: int, seed: int) -> tuple[LayerFactors, list[Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)).double()
    X, values = normal(num_data, 2, 4, seed=seed), list(model.parameters())
    factors, U = factors_of(lambda: model(X), values, 2)
    return factors, columns_of(lambda: model(X), values, U)


def test_gram_with_another_mini_batch_and_another_task() -> None:
    (one, columns), (other, others) = linear_pair(4, 0), linear_pair(3, 1)
    expected = torch.stack([a.flatten(2).flatten(0, 1) @ b.flatten(2).flatten(0, 1).T for a, b in zip(columns, others)])
    torch.testing.assert_close(one.gram(other), expected.sum(0))
    torch.testing.assert_close(one.gram(other, [1, 2]), expected[[1, 2]].sum(0))


def test_gram_by_both_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner products of positions and per-datum gradients, in few and in many chunks."""
    from curvlinops.risk.layers import convolution, dense, parts

    factors, columns = linear_pair(5, 0)
    flat = torch.cat([c.flatten(2) for c in columns], 2).flatten(0, 1)
    for cheaper in (True, False):
        for chunk in (1, 2**26):
            for module in (dense, convolution):
                monkeypatch.setattr(module, "positions_are_cheaper", lambda *_, c=cheaper: c)
            monkeypatch.setattr(parts, "CHUNK_NUMEL", chunk)
            monkeypatch.setattr(parts, "_CACHED_NUMEL", max(chunk, 4))
            torch.testing.assert_close(factors.gram(), flat @ flat.T)
            torch.testing.assert_close(factors.column_squares().flatten(), flat.square().sum(1))
            for i, squares in factors.squares().items():
                torch.testing.assert_close(squares, columns[i].square().sum((0, 1)))


def test_proofs_are_kept_and_a_new_shape_is_measured() -> None:
    """With as many positions as data, or one datum, a layout says nothing about other shapes."""

    class TimeMajor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, X: Tensor) -> Tensor:
            return self.linear(X.transpose(0, 1)).tanh().sum(0)

    model, proofs = TimeMajor(), {}  # type: ignore[var-annotated]
    values = list(model.parameters())
    for num_known, (N, T) in enumerate([(4, 4), (1, 4), (3, 4), (4, 2), (4, 4)]):
        X = normal(N, T, 3, seed=1)
        factors, U = factors_of(lambda X=X: model(X), values, 2, proofs)  # type: ignore[misc]
        assert factors.positions == [0, 1]
        check(factors, columns_of(lambda X=X: model(X), values, U))  # type: ignore[misc]
        assert len(proofs) == min(num_known + 1, 4)


class Routed(nn.Module):
    """A layer that sees some positions only, in one list of rows for all data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, X: tuple[Tensor, Tensor]) -> Tensor:
        rows, chosen = X
        hidden = torch.zeros(*rows.shape, dtype=rows.dtype)
        hidden[chosen] = self.linear(rows[chosen]).tanh()
        return hidden.sum(1)


class Ragged(Routed):
    """Sequences of different lengths, one after the other."""

    def forward(self, X: tuple[Tensor, list[int]]) -> Tensor:  # type: ignore[override]
        rows, lengths = X
        parts = self.linear(rows).tanh().split(lengths)
        return torch.stack([part.sum(0) for part in parts])


MASKS = [torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0]]) > 0, torch.tensor([[0, 1, 0, 0], [1, 1, 1, 0]]) > 0]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Routed(), [(normal(2, 4, 3), mask) for mask in MASKS]),
        (Ragged(), [(normal(4, 3), lengths) for lengths in ([2, 2], [1, 3], [2, 2])]),
    ],
)
def test_rows_that_depend_on_the_data(model: nn.Module, inputs: list[Any]) -> None:
    """As many rows as before, but of other data: what was measured before does not count."""
    proofs: Proofs = {}
    values, covered = list(model.parameters()), []
    for X in inputs:
        factors, U = factors_of(lambda X=X: model(X), values, 2, proofs)  # type: ignore[misc]
        covered.append(bool(factors.positions))
        if factors.positions:
            check(factors, columns_of(lambda X=X: model(X), values, U))  # type: ignore[misc]
    assert covered == [True, False, True][: len(inputs)]


def test_a_gradient_of_zero_proves_nothing() -> None:
    """Its columns are zero in any layout, but the next mini-batch may tell, so nothing is kept."""
    model, proofs = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).double(), {}  # type: ignore[var-annotated]
    nn.init.constant_(model[0].bias, -100.0)
    X, values = normal(4, 3), list(model.parameters())
    factors, U = factors_of(lambda: model(X), values, 1, proofs)
    assert (factors.positions, proofs) == ([0, 1], {})
    check(factors, columns_of(lambda: model(X), values, U))


def test_a_single_row_with_a_gradient() -> None:
    """It fits several layouts, which do not differ on it."""
    torch.manual_seed(0)
    model, proofs = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).double(), {}  # type: ignore[var-annotated]
    nn.init.constant_(model[0].bias, -100.0)
    X, values = normal(2, 3, 3), list(model.parameters())
    X[0, 0] = 1e3 * model[0].weight[0].detach()
    factors, U = factors_of(lambda: model(X), values, 1, proofs)
    assert (factors.positions, proofs) == ([0, 1], {})
    check(factors, columns_of(lambda: model(X), values, U))


def test_columns_one_by_one_where_vmap_fails() -> None:
    class Wilful(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * g * float(g.isfinite().all())

    model, engine = nn.Linear(3, 2, dtype=torch.float64), Engine()
    X, values = normal(4, 3), list(model.parameters())
    forward = lambda: Wilful.apply(model(X))  # type: ignore[no-untyped-call]  # noqa: E731
    factors, U = factors_of(forward, values, 3, engine=engine)
    assert not engine.vmap
    check(factors, columns_of(forward, values, U))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    """Statistics of half precision are in float32."""
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.LayerNorm(3), nn.Flatten(), nn.Linear(12, 3)).to(dtype)
    X, values = normal(6, 2, 4).to(dtype), list(model.parameters())
    with LayerRecorder(values) as recorder:
        prediction = model(X)
    U = normal(2, 6, 3).to(dtype)
    factors = LayerNotes(recorder, prediction, Engine(), {}).factors(U)
    assert factors.positions == list(range(6))
    exact = model.double()
    columns = columns_of(lambda: exact(X.double()), list(exact.parameters()), U.double())
    allowed = 1e-4 if dtype == torch.float32 else 0.1
    for i, squares in factors.squares().items():
        assert squares.dtype == torch.float32
        expected = columns[i].square().sum((0, 1))
        assert (squares - expected).norm() < allowed * expected.norm()
    assert factors.gram().dtype == torch.float32
    V = {i: torch.ones(*v.shape, 2, dtype=dtype) for i, v in enumerate(values)}
    assert factors.rmatmat(V).dtype == dtype
    assert all(p.dtype == dtype for p in factors.matmat(factors.rmatmat(V)).values())


def test_attention_gives_the_same() -> None:
    """Its decomposition gives what the original gives, with every mask."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, dtype=torch.float64)
    X, values = normal(5, 3, 4), list(attention.parameters())
    padding = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]], dtype=torch.bool)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    each = normal(6, 5, 5, seed=3)
    for mask in (None, causal, causal.isinf(), each):
        for key_padding in (None, padding, normal(3, 5, seed=4)):
            for need_weights, average in ((True, True), (True, False), (False, True)):
                options: dict[str, Any] = {
                    "attn_mask": mask,
                    "key_padding_mask": key_padding,
                    "need_weights": need_weights,
                    "average_attn_weights": average,
                    "is_causal": mask is causal or mask is each,
                }
                expected, expected_weights = attention(X, X, X, **options)
                with LayerRecorder(values) as recorder:
                    output, weights = attention(X, X, X, **options)
                assert recorder.notes
                torch.testing.assert_close(output, expected)
                if need_weights:
                    torch.testing.assert_close(weights, expected_weights)
                else:
                    assert weights is None
