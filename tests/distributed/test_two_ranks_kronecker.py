"""Two ranks with uneven shards: KFAC, EKFAC and KFOC are those of the union, and errors do not hang."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlinops import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator
from curvlinops.curvature.kronecker.decomposition import owners
from tests.distributed.ranks import TIMEOUT, Found, needs_gloo, run_both
from tests.risk.small import Batches, Failing, classes, mlp, normal, relative_error

BATCHES = classes((3, 1, 2, 4))
#: Rank 0 has one mini-batch, rank 1 the three others.
SHARDS = [BATCHES[:1], BATCHES[1:]]

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "KFAC, type-2": (KFACLinearOperator, {"fisher_type": "type-2"}),
    "KFAC, type-2, reduce": (KFACLinearOperator, {"fisher_type": "type-2", "kfac_approx": "reduce"}),
    "KFAC, type-2, joined": (KFACLinearOperator, {"fisher_type": "type-2", "separate_weight_and_bias": False}),
    "KFAC, empirical": (KFACLinearOperator, {"fisher_type": "empirical"}),
    "KFAC, forward-only": (KFACLinearOperator, {"fisher_type": "forward-only"}),
    "EKFAC, type-2": (EKFACLinearOperator, {"fisher_type": "type-2"}),
    "EKFAC, empirical": (EKFACLinearOperator, {"fisher_type": "empirical", "separate_weight_and_bias": False}),
    "KFOC, type-2": (KFOCLinearOperator, {"fisher_type": "type-2", "max_iter": 3, "rtol": 1e-12}),
    "KFOC, empirical": (KFOCLinearOperator, {"fisher_type": "empirical", "max_iter": 3, "rtol": 1e-12}),
}
EACH = ["KFAC, type-2", "EKFAC, type-2", "KFOC, type-2"]
SEED = 5


def make(kind: str, data: Any, model: Any = None, loss: Any = None, **options: Any) -> Any:
    """An operator of all parameters of a network."""
    cls, own = KINDS[kind]
    model, loss = mlp() if model is None else model, nn.CrossEntropyLoss() if loss is None else loss
    options = {"check_deterministic": False, **own, **options}
    return cls(model, loss, dict(model.named_parameters()), data, **options)


def losses() -> dict[str, nn.Module]:
    """Losses under which shards have other denominators than their number of data."""
    weight = torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64)
    return {
        "mean": nn.CrossEntropyLoss(weight=weight, ignore_index=1),
        "sum": nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"),
    }


def wide() -> nn.Sequential:
    """A network with factors of several sizes, which are shared out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def of_union(rank: int, group: Any) -> Found:
    """All kinds with both losses, as dense matrices."""
    return {
        f"{kind}, {reduction}": make(kind, SHARDS[rank], loss=loss, process_group=group).to_dense()
        for kind in KINDS
        for reduction, loss in losses().items()
    }


def other_types(rank: int, group: Any) -> Found:
    """Models in less precision, with the types of what was computed."""
    found: Found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS:
            A = make(kind, classes((3, 1, 2, 4), dtype)[slice(0, 1) if rank == 0 else slice(1, 4)],
                     mlp(dtype), process_group=group)  # fmt: skip
            types = {n: t.dtype for n, t in A.compute().state_dict().items()}
            found[f"{kind}, {dtype}"] = A.to_dense(), types
    return found


def sampled(rank: int, group: Any) -> Found:
    """Monte-Carlo matrices, with the factors of each layer."""
    found: Found = {}
    for cls in (KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator):
        model = mlp()
        A = cls(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), SHARDS[rank],
                fisher_type="mc", seed=SEED, process_group=group)  # fmt: skip
        found[cls.__name__] = A.to_dense(), {n: A.factors(n) for n in dict(model.named_parameters())}
    return found


def bases(rank: int, group: Any) -> Found:
    """What every rank keeps."""
    return {k: make(k, SHARDS[rank], wide(), process_group=group).compute().state_dict() for k in EACH}


class Hidden(nn.Module):
    """A layer whose weight is used in an unknown way where an input is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, _, self.last = mlp()

    def forward(self, X: Tensor) -> Tensor:
        """Predictions ``[N, 3]``."""
        h = X @ (1.0 * self.first.weight).T + self.first.bias if bool((X > 5).any()) else self.first(X)
        f: Tensor = self.last(h.tanh())
        return f


def marked(batch: int) -> Batches:
    """All mini-batches, one of them with a mark; 0 is all that rank 0 has, 1 the first of rank 1."""
    return [(X.clone().index_fill_(0, torch.tensor([0]), 6.0) if i == batch else X, y)
            for i, (X, y) in enumerate(BATCHES)]  # fmt: skip


def shard(data: Any, rank: int) -> Any:
    """The rank's own mini-batches."""
    return data[:1] if rank == 0 else data[1:]


def uncovered(rank: int, group: Any) -> Found:
    """A layer that notes do not cover on one rank only, sooner or later."""
    found: Found = {}
    for batch in range(4):
        for kind in EACH:
            A = make(kind, shard(marked(batch), rank), Hidden(), process_group=group)
            found[f"{kind}, {batch}"] = A.to_dense(), [(row.parameters, row.kind) for row in A.blocks]
    return found


def raised(action: Callable[[], Any]) -> tuple[str, str, float]:
    """Which exception an action ended in, and after how long."""
    start = time.monotonic()
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "nothing", "", time.monotonic() - start


def failures(rank: int, group: Any) -> Found:
    """Errors on one rank; where the cause goes away, the same operator is right afterwards."""
    found: Found = {}
    for kind in EACH:
        for at in (1, 2, 3):
            model = Failing(mlp(), ZeroDivisionError("marked"), at if rank == 1 else 10**9)
            A = make(kind, SHARDS[rank], model, process_group=group)
            found[f"{kind}, raises at {at}"] = raised(A.compute)
            model.remaining[0] = 10**9
            found[f"{kind}, works after {at}"] = A.to_dense()
    spoilt = [(X * torch.nan if i == 3 else X, y) for i, (X, y) in enumerate(BATCHES)]
    found["not finite"] = raised(make("KFAC, type-2", shard(spoilt, rank), process_group=group).compute)
    found["empty"] = raised(make("EKFAC, type-2", SHARDS[0] if rank == 0 else [], process_group=group).compute)
    for batch in (0, 1, 3):
        A = make("KFAC, type-2", shard(marked(batch), rank), Hidden(), process_group=group, unsupported="error")
        found[f"unsupported {batch}"] = raised(A.compute)
    A = make("KFAC, type-2", SHARDS[rank], process_group=group, num_data=11)
    found["num_data"] = raised(A.compute)
    found["afterwards"] = make("EKFAC, type-2", SHARDS[rank], process_group=group).to_dense()
    return found


def in_parts(rank: int, group: Any) -> Found:
    """Each rank saves and loads its own, after every mini-batch; all ranks compute, save and load in step."""
    found: Found = {}
    for kind in [*EACH, "KFAC, forward-only"]:
        A = make(kind, SHARDS[rank], process_group=group)
        for _ in range(40):
            A.compute(num_batches=1)
            torch.distributed.barrier(group=group)
            B = make(kind, SHARDS[rank], process_group=group)
            B.load_state_dict(A.state_dict())
            A = B
        found[kind] = A.state_dict(), make(kind, SHARDS[rank], process_group=group).compute().state_dict()
    return found


PARTS: dict[str, Callable[[int, Any], Found]] = {
    "of_union": of_union,
    "other_types": other_types,
    "sampled": sampled,
    "bases": bases,
    "failures": failures,
    "uncovered": uncovered,
    "in_parts": in_parts,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Found]]:
    """One run of both processes; what may break the connection comes last."""
    return run_both(tmp_path_factory.mktemp("ranks"), PARTS)


@needs_gloo
def test_matrices_of_the_union(ranks: dict[str, list[Found]]) -> None:
    assert "of_union" in ranks, "a rank broke down"
    for reduction, loss in losses().items():
        for kind in KINDS:
            expected = make(kind, BATCHES, loss=loss).to_dense()
            assert expected.norm() > 0
            for found in ranks["of_union"]:
                # A projection onto eigenvectors is as accurate as they are separated.
                allowed = 1e-10 if "EKFAC" not in kind else 1e-9
                assert relative_error(found[f"{kind}, {reduction}"], expected) < allowed, f"{kind}, {reduction}"


@needs_gloo
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_less_precision(ranks: dict[str, list[Found]], dtype: torch.dtype) -> None:
    """Sums have the types that they have in one process."""
    assert "other_types" in ranks, "a rank broke down"
    for kind in KINDS:
        A = make(kind, classes((3, 1, 2, 4), dtype), mlp(dtype))
        types = {n: t.dtype for n, t in A.compute().state_dict().items()}
        for found in ranks["other_types"]:
            dense, theirs = found[f"{kind}, {dtype}"]
            assert relative_error(dense, A.to_dense()) < (1e-4 if dtype == torch.float32 else 2e-2), kind
            assert {n: theirs[n] for n in types} == types, kind


@needs_gloo
def test_each_rank_draws_its_own_samples(ranks: dict[str, list[Found]]) -> None:
    """Rank r draws from seed + r, so that factors are means of the shards' own."""
    assert "sampled" in ranks, "a rank broke down"
    params = dict(mlp().named_parameters())
    models = [mlp() for _ in SHARDS]
    parts = [
        KFACLinearOperator(m, nn.CrossEntropyLoss(), params_of(m), data, fisher_type="mc", seed=SEED + rank)
        for rank, (m, data) in enumerate(zip(models, SHARDS, strict=True))
    ]
    sizes = [sum(len(y) for _, y in shard) for shard in SHARDS]
    for name in params:
        of_parts = [A.factors(name) for A in parts]
        for found in ranks["sampled"]:
            for what, value in found["KFACLinearOperator"][1][name].items():
                mean = sum(n * f[what] for n, f in zip(sizes, of_parts, strict=True)) / sum(sizes)
                assert relative_error(value, mean) < 1e-12, f"{name}, {what}"
    for first, second in [(f[0] for f in both) for both in zip(*(r.values() for r in ranks["sampled"]), strict=True)]:
        assert torch.equal(first, second)


def params_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters by name."""
    return dict(model.named_parameters())


@needs_gloo
def test_every_rank_has_the_same_bits(ranks: dict[str, list[Found]]) -> None:
    """Of eigenbases in particular, each of which one rank has computed; they are orthogonal, and all are there."""
    assert "bases" in ranks, "a rank broke down"
    first, second = ranks["bases"]
    for kind in EACH:
        names = [n for n in first[kind] if n.startswith("block.")]
        assert names and all(torch.equal(first[kind][n], second[kind][n]) for n in names), kind
    alone = make("EKFAC, type-2", BATCHES, wide())
    for name in ("0.weight", "2.weight", "4.weight"):
        for side in ("gradient_basis", "input_basis"):
            Q = alone.factors(name)[side]
            torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q)).double(), rtol=0, atol=1e-12)
    found = [t for n, t in first["EKFAC, type-2"].items() if n.endswith("_basis")]
    assert len(found) == 6
    for Q in found:
        torch.testing.assert_close(Q.mT @ Q, torch.eye(Q.shape[-1]).double().expand(Q.shape), rtol=0, atol=1e-12)


@needs_gloo
@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("batch", range(4))
def test_layers_that_one_rank_does_not_know(ranks: dict[str, list[Found]], batch: int, kind: str) -> None:
    """Both ranks give them the same kind of block, that of all data in one process."""
    assert "uncovered" in ranks, "a rank broke down"
    expected = make(kind, marked(batch), Hidden())
    kinds = [(row.parameters, row.kind) for row in expected.blocks]
    assert (("first.weight",), "diagonal") in kinds
    for found in ranks["uncovered"]:
        dense, theirs = found[f"{kind}, {batch}"]
        assert theirs == kinds
        assert relative_error(dense, expected.to_dense()) < 1e-9


@needs_gloo
def test_errors_on_one_rank_are_raised_on_both(ranks: dict[str, list[Found]]) -> None:
    """On the rank where it happens in its own words, on the other one as a hint to look there."""
    assert "failures" in ranks, "a rank broke down"
    first, second = ranks["failures"]
    own = {
        **{f"{kind}, raises at {at}": ("ZeroDivisionError", "marked", 1) for kind in EACH for at in (1, 2, 3)},
        "not finite": ("FloatingPointError", "mini-batch 2", 1),
        "empty": ("ValueError", "data are empty", 1),
        "unsupported 0": ("NotImplementedError", "first.weight", 0),
        "unsupported 1": ("NotImplementedError", "first.weight", 1),
    }
    for name, (kind, words, rank) in own.items():
        mine, other = (second, first) if rank == 1 else (first, second)
        assert mine[name][0] == kind and words in mine[name][1], f"{name}: {mine[name]}"
        assert other[name][0] != "nothing", f"{name}: {other[name]}"
        assert max(mine[name][2], other[name][2]) < TIMEOUT.total_seconds() / 2, f"{name} waited"
    assert first["num_data"][0] == second["num_data"][0] == "ValueError", f"{first['num_data']}, {second['num_data']}"
    late = first["unsupported 3"], second["unsupported 3"]  # both begin anew, so either can be first to refuse
    assert "nothing" not in (late[0][0], late[1][0]), late
    assert any(kind == "NotImplementedError" and "first.weight" in words for kind, words, _ in late), late
    for kind in EACH:
        expected = make(kind, BATCHES).to_dense()
        for at in (1, 2, 3):
            for found in (first, second):
                assert relative_error(found[f"{kind}, works after {at}"], expected) < 1e-9, f"{kind}, after {at}"
    for found in (first, second):
        assert relative_error(found["afterwards"], make("EKFAC, type-2", BATCHES).to_dense()) < 1e-9


@needs_gloo
def test_parts_of_a_computation(ranks: dict[str, list[Found]]) -> None:
    """Stopped, saved and loaded after every mini-batch, with barriers in between, the bits are the same."""
    assert "in_parts" in ranks, "a rank broke down"
    for found in ranks["in_parts"]:
        for kind in [*EACH, "KFAC, forward-only"]:
            parts, whole = found[kind]
            assert parts.keys() == whole.keys()
            assert [n for n in whole if not torch.equal(parts[n], whole[n])] == [], kind


def test_unfinished_states_of_other_ranks_are_refused() -> None:
    """A state of one process alone is no share of two processes' sums, but a finished one is anybody's."""
    A = make("KFAC, type-2", BATCHES).compute(2)
    state = A.state_dict()
    for name in ("rank", "num_ranks"):
        assert name in state
        other = make("KFAC, type-2", BATCHES)
        with pytest.raises(ValueError, match=name):
            other.load_state_dict({**state, name: state[name] + 1})
    finished = A.compute().state_dict()
    assert not {"rank", "num_ranks"} & finished.keys()


# -- who decomposes what -----------------------------------------------------------------------------------------------


def loads(costs: list[float], num_ranks: int) -> list[float]:
    """What each rank has to do."""
    found = owners(costs, num_ranks)
    assert len(found) == len(costs) and set(found) <= set(range(num_ranks))
    return [sum(c for c, rank in zip(costs, found, strict=True) if rank == r) for r in range(num_ranks)]


def test_owners_by_numbers() -> None:
    """The dearest first, each to the rank that has least to do, the first of those."""
    assert owners([], 2) == []
    assert owners([5.0], 3) == [0]
    assert owners([1.0, 1.0, 1.0, 1.0], 2) == [0, 1, 0, 1]
    assert owners([1.0, 8.0, 2.0, 3.0, 2.0], 2) == [1, 0, 1, 1, 1]
    assert owners([4.0, 3.0, 3.0, 2.0], 2) == [0, 1, 1, 0]
    assert owners([3.0, 1.0], 1) == [0, 0]


def test_owners_are_balanced() -> None:
    """No rank has more than the mean and all but one m-th of a task, whatever the costs are (Graham 1966)."""
    for seed in range(20):
        costs = (normal(30, seed=seed).abs() * 40).ceil().pow(3).tolist()
        for num_ranks in (1, 2, 3, 8):
            bound = sum(costs) / num_ranks + (1 - 1 / num_ranks) * max(costs)
            assert max(loads(costs, num_ranks)) <= bound * (1 + 1e-12)
            assert sum(loads(costs, num_ranks)) == pytest.approx(sum(costs))


def test_owners_share_out_layers_of_one_size() -> None:
    """Twelve layers of a transformer on four ranks: three each."""
    assert loads([64.0] * 12, 4) == [192.0] * 4
    assert max(loads([768.0**3, 3072.0**3] * 12, 4)) == 3 * (768.0**3 + 3072.0**3)
