"""Two ranks with uneven shards: every square operator is that of the union, and errors do not hang."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvlinops import CurvatureLinearOperator
from tests.distributed.ranks import TIMEOUT, Found, needs_gloo, run_both
from tests.risk.small import SQUARE, build, classes, mlp, relative_error, targets, vector

pytestmark = needs_gloo

BATCHES = classes((3, 1, 2, 4))
#: Rank 0 has one mini-batch, rank 1 the three others.
SHARDS = [BATCHES[:1], BATCHES[1:]]


def losses() -> dict[str, nn.Module]:
    """Losses under which shards have other denominators than their number of data."""
    weight = torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64)
    return {
        "mean": nn.CrossEntropyLoss(weight=weight, ignore_index=1),
        "sum": nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"),
    }


class Own(CurvatureLinearOperator):
    """A user's own operator: the gradient's outer product with itself, of each mini-batch."""

    def _matmat_batch(self, X: Any, y: Any, M: list[Tensor]) -> list[Tensor]:
        gradients = torch.autograd.grad(self._loss_func(self._predict(X), y), self._params)
        inner = sum(torch.tensordot(g, m, g.ndim) for g, m in zip(gradients, M, strict=True))
        return [g.unsqueeze(-1) * inner for g in gradients]


def operators(data: Any, loss: nn.Module, **options: Any) -> dict[str, Any]:
    """Every square operator."""
    model = mlp()
    found = {kind: build(kind, model, data, loss, **options) for kind in SQUARE}
    found["GGN with l2"] = build("GGN", model, data, loss, l2=0.7, **options)
    found["EF by datum"] = build("EF", model, data, loss, terms="datum", **options)
    found["sampled GGN"] = build("GGN", model, data, loss, mc_samples=3, seed=5, **options)
    found["sampled diagonal"] = build("GGNDiagonal", model, data, loss, mc_samples=3, seed=5, **options)
    found["own"] = Own(model, loss, list(model.parameters()), data, **options)
    return found


def is_sampled(name: str) -> bool:
    """Whether the operator draws numbers."""
    return name == "MC" or name.startswith("sampled")


def products(A: Any, all_reduces: list[int]) -> Found:
    """What an operator gives, with the number of all-reduces of each."""

    def counted(action: Callable[[], Any]) -> tuple[Any, int]:
        before = len(all_reduces)
        return action(), len(all_reduces) - before

    found: Found = {
        "vector": counted(lambda: A @ vector(A)),
        "matrix": counted(lambda: A @ vector(A, 11)),
        "gradient and loss": counted(A.gradient_and_loss),
    }
    if hasattr(A, "diagonal"):
        found["diagonal"] = counted(A.diagonal)
    return found


def of_union(rank: int, group: Any) -> Found:
    """Everything of both reductions."""
    all_reduces: list[int] = []
    real = dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        all_reduces.append(1)
        return real(*args, **kwargs)

    dist.all_reduce = counting
    try:
        return {
            f"{name}, {reduction}": products(A, all_reduces)
            for reduction, loss in losses().items()
            for name, A in operators(SHARDS[rank], loss, process_group=group).items()
        }
    finally:
        dist.all_reduce = real


def generic_loss(f: Tensor, y: Tensor) -> Tensor:
    """A mean that the package does not know."""
    return nn.functional.huber_loss(f, y)


def other_data(rank: int, group: Any) -> Found:
    """Generic losses, example weights, a shard that is ignored, shards of unequal order."""
    model = mlp()
    X, y = torch.cat([X for X, _ in BATCHES]), targets(10)
    part = slice(0, 3) if rank == 0 else slice(3, 10)
    ignored = [(X, torch.full_like(y, -100)) for X, y in SHARDS[0]]
    A = {
        "generic": build("Hessian", model, [(X[part], y[part])], generic_loss, process_group=group),
        "weights": build("GGN", model, SHARDS[rank], weight_fn=lambda X, y: X[:, 0].abs(), process_group=group),
        "ignored": build("EF", model, ignored if rank == 0 else SHARDS[1], process_group=group),
        "no check": build("GGN", model, SHARDS[rank], process_group=group, check_deterministic=False),
    }
    return {name: B @ vector(B, 2) for name, B in A.items()}


class Spoiling(nn.Module):
    """A network that raises where an input is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, X: Tensor) -> Tensor:
        """The network, or an exception."""
        if bool((X > 50).any()):
            raise ZeroDivisionError("marked")
        f: Tensor = self.inner(X)
        return f


def raised(action: Callable[[], Any]) -> tuple[str, str, float]:
    """Which exception an action ended in, and after how long."""
    start = time.monotonic()
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "nothing", "", time.monotonic() - start


def failures(rank: int, group: Any) -> Found:
    """Errors on one rank; each is followed by a product that works, for nothing may be out of step."""
    model = Spoiling()
    marked = [*SHARDS[1][:2], (SHARDS[1][2][0] + 100.0, SHARDS[1][2][1])]
    spoilt = [(X * torch.nan if i == 2 else X, y) for i, (X, y) in enumerate(SHARDS[1])]
    label = [(X, y + 17 if i == 1 else y) for i, (X, y) in enumerate(SHARDS[1])]
    found: Found = {}
    for name, shard in (("raises", marked), ("not finite", spoilt), ("label", label), ("empty", [])):
        data = SHARDS[0] if rank == 0 else shard
        found[f"{name}: check"] = raised(lambda d=data: build("GGN", model, d, process_group=group))
        for kind in SQUARE:
            A = build(kind, model, data, process_group=group, check_deterministic=False)
            found[f"{name}: {kind}, product"] = raised(lambda A=A: A @ vector(A, 2))
            found[f"{name}: {kind}, gradient"] = raised(A.gradient_and_loss)
    all_ignored = [(X, torch.full_like(y, -100)) for X, y in SHARDS[rank]]
    A = build("GGN", model, all_ignored, process_group=group)
    found["ignored everywhere"] = raised(lambda: A @ vector(A))
    A = build("GGN", model, SHARDS[rank], process_group=group)
    found["works"] = A @ vector(A, 2)
    return found


class Gated(nn.Module):
    """Forward and reverse mode disagree, but only for marked inputs; others may have no forward mode at all."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.middle = mlp(), middle

    def forward(self, X: Tensor) -> Tensor:
        """The network and something behind."""
        return self.middle(self.inner(X))


class NoTangents(torch.autograd.Function):
    """The sine, without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The sine."""
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The cosine."""
        (x,) = ctx.saved_tensors
        return g * x.cos()


class WrongTangents(NoTangents):
    """The sine, with a wrong forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The sine."""
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        """Not the cosine."""
        return tangents[0] * 3.0


MIDDLES: dict[str, Callable[[Tensor], Tensor]] = {
    "sine": torch.sin,
    "wrong tangents": lambda f: WrongTangents.apply(f),  # type: ignore[no-untyped-call]
    "no tangents": lambda f: NoTangents.apply(f),  # type: ignore[no-untyped-call]
}


#: What each of the two ranks has.
PAIRS = [("sine", "wrong tangents"), ("no tangents", "sine"), ("no tangents", "wrong tangents")]


def engines(pair: tuple[str, str], rank: int, group: Any) -> Found:
    """The ways through the network are not the same on both ranks."""
    found: Found = {}
    A = build("GGN", Gated(MIDDLES[pair[rank]]), SHARDS[rank], process_group=group)
    for columns in ((), (2,)):
        try:
            found[str(columns)] = A @ vector(A, *columns)
        except Exception as error:
            found[str(columns)] = f"{type(error).__name__}: {error}"
    return found


PARTS: dict[str, Callable[[int, Any], Found]] = {
    "of_union": of_union,
    "other_data": other_data,
    "failures": failures,
    **{f"engines {i}": partial(engines, pair) for i, pair in enumerate(PAIRS)},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Found]]:
    """One run of both processes; what may break the connection comes last."""
    return run_both(tmp_path_factory.mktemp("ranks"), PARTS)


def flat(value: Any) -> Tensor:
    """One vector of a nested result."""
    return value.flatten() if isinstance(value, Tensor) else torch.cat([flat(v) for v in value])


def test_products_of_the_union(ranks: dict[str, list[Found]]) -> None:
    """Exact operators are those of all data; sampled ones the sum of the shards' with their seeds."""
    problems = []
    assert "of_union" in ranks, "a rank broke down"
    for reduction, loss in losses().items():
        whole = operators(BATCHES, loss)
        for name, A in whole.items():
            expected = products(A, [])
            if is_sampled(name):
                expected = {**expected, **sampled_union(name, loss)}
            for rank, found in enumerate(ranks["of_union"]):
                for what, (value, count) in found[f"{name}, {reduction}"].items():
                    where = f"{name}, {reduction}, rank {rank}, {what}"
                    truth = expected[what][0]
                    if relative_error(flat(value), flat(truth)) > 1e-10:
                        problems.append(f"{where}: wrong by {relative_error(flat(value), flat(truth)):.1e}")
                    once = "diagonal" in name.lower() and what in ("matrix", "diagonal")
                    if count != (0 if once else 1):
                        problems.append(f"{where}: {count} all-reduces")
    assert not problems, "\n".join(problems)


def sampled_union(name: str, loss: nn.Module) -> Found:
    """The products of a sampled operator, put together from the shards': rank r draws from seed + r."""
    model = mlp()
    kind = {"MC": "MC", "sampled GGN": "GGN", "sampled diagonal": "GGNDiagonal"}[name]
    options = {"MC": {"seed": 2147483647}}.get(name, {"mc_samples": 3, "seed": 5})
    parts, masses = [], []
    for rank, shard in enumerate(SHARDS):
        parts.append(build(kind, model, shard, loss, **{**options, "seed": options["seed"] + rank}))
        weights = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)  # of class 1 every target is ignored
        y = torch.cat([y for _, y in shard])
        masses.append(weights[y].sum() if loss.reduction == "mean" else torch.tensor(1.0, dtype=torch.float64))
    total = sum(masses) if loss.reduction == "mean" else 1.0

    def union(action: Callable[[Any], Tensor]) -> tuple[Tensor, int]:
        return torch.stack([m * action(A) / total for m, A in zip(masses, parts, strict=True)]).sum(0), 0

    found = {"vector": union(lambda A: A @ vector(A)), "matrix": union(lambda A: A @ vector(A, 11))}
    if name == "sampled diagonal":
        found["diagonal"] = union(lambda A: A.diagonal())
    return found


def test_other_losses_and_data(ranks: dict[str, list[Found]]) -> None:
    """Against one process with all data."""
    model = mlp()
    X = torch.cat([X for X, _ in BATCHES])
    A = {
        "generic": build("Hessian", model, [(X, targets(10))], generic_loss),
        "weights": build("GGN", model, BATCHES, weight_fn=lambda X, y: X[:, 0].abs()),
        "ignored": build("EF", model, SHARDS[1]),
        "no check": build("GGN", model, BATCHES),
    }
    for name, B in A.items():
        for rank, found in enumerate(ranks["other_data"]):
            assert relative_error(found[name], B @ vector(B, 2)) < 1e-10, f"{name}, rank {rank}"


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=[" and ".join(pair) for pair in PAIRS])
def test_ways_through_the_network_that_differ_between_ranks(ranks: dict[str, list[Found]], number: int) -> None:
    """All of these models are the sine, which double backward can do on every rank."""
    assert f"engines {number}" in ranks, "the ranks are out of step"
    A = build("GGN", Gated(torch.sin), BATCHES)
    for found in ranks[f"engines {number}"]:
        for columns in ((), (2,)):
            value = found[str(columns)]
            assert isinstance(value, Tensor), value
            assert relative_error(value, A @ vector(A, *columns)) < 1e-10


def test_errors_on_one_rank_are_raised_on_both(ranks: dict[str, list[Found]]) -> None:
    """On the rank where it happens in its own words, on the other one as a hint to look there."""
    assert "failures" in ranks, "a rank broke down"
    own = {
        "raises": ("ZeroDivisionError", "marked"),
        "not finite": ("FloatingPointError", "mini-batch 2"),
        "label": ("ValueError", "class index"),
        "empty": ("ValueError", "data are empty"),
    }
    problems = []
    for rank, found in enumerate(ranks["failures"]):
        for case, (error, message, seconds) in ((name, value) for name, value in found.items() if ":" in name):
            kind, words = own[case.split(":")[0]]
            expected = error == kind and words in message
            if rank == 0:
                expected = (error == "RuntimeError" and "Another rank" in message) or error == kind
            if not expected:
                problems.append(f"{case}, rank {rank}: {error}: {message}")
            if seconds > TIMEOUT.total_seconds() / 2:
                problems.append(f"{case}, rank {rank}: after {seconds:.0f} seconds")
    assert not problems, "\n".join(problems)


def test_nothing_is_out_of_step_after_errors(ranks: dict[str, list[Found]]) -> None:
    A = build("GGN", Spoiling(), BATCHES)
    for found in ranks["failures"]:
        assert "every target is ignored" in found["ignored everywhere"][1]
        assert relative_error(found["works"], A @ vector(A, 2)) < 1e-10


def test_the_shards_are_uneven() -> None:
    """Otherwise a mean of means would be right, too."""
    counts = [sum(len(y) for _, y in shard) for shard in SHARDS]
    assert counts == [3, 7]
