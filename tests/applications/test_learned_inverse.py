"""The learned inverse: its dense matrix in float64, its gradient by autograd, and what it learns."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from curvlinops import (
    CGInverseLinearOperator,
    GGNLinearOperator,
    IdentityLinearOperator,
    InverseLinearOperator,
    TensorLinearOperator,
)
from curvlinops.applications.learned_inverse.operator import LearnedInverseLinearOperator
from tests.applications.test_named_layers import Conv1D

F64 = torch.float64


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def spd(size: int, seed: int = 0) -> Tensor:
    root = noise(size, size, seed=seed)
    return root @ root.T / size


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(noise(size, size, seed=seed))[0]


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


# -- the dense truth: entry by entry from the factors, and from where each layer's matrix has its weights --------------


def places_of(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Which parameter stands in each entry [output, input] of a layer's matrix; the bias in the last column."""
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        inputs, outputs = weight.shape[0] // module.groups, weight.shape[1]
        matrix = torch.stack(
            [
                weight[group * inputs : (group + 1) * inputs, output].flatten()
                for group in range(module.groups)
                for output in range(outputs)
            ]
        )
    else:
        matrix = weight.T if isinstance(module, Conv1D) else weight.reshape(len(weight), -1)
    return matrix if bias is None else torch.cat([matrix, bias[:, None]], 1)


def all_places(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor, bool]]:
    """Layer by layer, the places of its parameters in a flat vector, and whether it has a Kronecker product."""
    params, start, place = dict(model.named_parameters()), 0, {}
    for name in names:
        place[name] = torch.arange(start, start + params[name].numel()).reshape(params[name].shape)
        start += params[name].numel()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        own = {n: place[prefix + n] for n, _ in module.named_parameters(recurse=False) if prefix + n in place}
        if "weight" in own and not isinstance(module, (nn.LayerNorm, nn.BatchNorm1d, nn.GroupNorm)):
            yield name, places_of(module, own["weight"], own.get("bias")), True
        elif own:
            yield (
                name if "weight" in own else f"{prefix}bias",
                torch.cat([entry.flatten() for entry in own.values()])[:, None],
                False,
            )


def triangular(raw: Tensor) -> Tensor:
    return torch.tril(raw, -1) + torch.diag(raw.diagonal().exp())


def dense_block(raw: dict[str, Tensor], shape: torch.Size, scale: float) -> Tensor:
    """Q[(o, i), (p, j)] = s D_oi D_pj (L Lᵀ)_op (R Rᵀ)_ij."""
    rows, columns = shape
    D = raw["D"].exp() if "D" in raw else torch.ones(shape, dtype=F64)
    L = triangular(raw["L"]) if "L" in raw else torch.eye(rows, dtype=F64)
    R = triangular(raw["R"]) if "R" in raw else torch.eye(columns, dtype=F64)
    entries = torch.einsum("oi,pj,ok,pk,il,jl->oipj", D, D, L, L, R, R)
    return scale * entries.reshape(rows * columns, rows * columns)


def dense_truth(model: nn.Module, Q: LearnedInverseLinearOperator, factors: dict[str, Any] | None = None) -> Tensor:
    factors = Q.state_dict()["factors"] if factors is None else factors
    truth = torch.zeros(Q.shape, dtype=F64)
    for name, places, is_kronecker in all_places(model, Q.domain.names):
        raw = factors[name]
        assert sorted(raw) == (["D", "L", "R"] if is_kronecker else ["D"]), name
        flat = places.flatten()
        truth = truth.index_put((flat[:, None], flat[None]), dense_block(raw, places.shape, Q.scale))
    return truth


def frozen_and_nested() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(2, 3), nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))}), nn.Linear(2, 2)
    )
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 4),
    "linear without bias": lambda: nn.Linear(3, 4, bias=False),
    "conv1d, groups": lambda: nn.Conv1d(4, 6, 2, groups=2),
    "conv2d without bias": lambda: nn.Conv2d(2, 3, 2, bias=False),
    "conv2d, a group a channel": lambda: nn.Conv2d(3, 3, 2, groups=3),
    "conv3d": lambda: nn.Conv3d(1, 2, (1, 2, 3)),
    "transposed conv1d, groups": lambda: nn.ConvTranspose1d(4, 6, 2, groups=2),
    "transposed conv2d without bias": lambda: nn.ConvTranspose2d(2, 3, 2, bias=False),
    "embedding": lambda: nn.Embedding(5, 3),
    "outputs second": lambda: Conv1D(3, 4),
    "norms": lambda: nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(2), nn.GroupNorm(1, 2, affine=True)),
    "norm without bias": lambda: nn.LayerNorm(3, bias=False),
    "frozen and nested": frozen_and_nested,
}


def taught(source: Any, num_steps: int = 3, **options: Any) -> LearnedInverseLinearOperator:
    """A learned inverse some large steps away from where it began."""
    Q = LearnedInverseLinearOperator(source, **{"damping": 0.1, "lr": 0.2, **options})
    A = spd(Q.shape[0]).to(Q.dtype)
    for step in range(num_steps):
        Q.update(lambda v: A @ v, noise(Q.shape[0], seed=step).to(Q.dtype))
    return Q


@pytest.mark.parametrize("kind", MODELS)
def test_quantities_equal_those_of_the_dense_matrix(kind: str) -> None:
    model = MODELS[kind]().double()
    Q = taught(model, scale=0.7)
    truth = dense_truth(model, Q)
    assert float((truth - 0.7 * torch.eye(len(truth), dtype=F64)).norm()) > 0.5, "it is away from where it began"
    assert float(torch.linalg.eigvalsh(truth).min()) > 0
    assert_close(Q.to_dense(), truth)
    assert_close(Q.diagonal(), truth.diagonal())
    by_layers = Q.to_block_diagonal()
    assert len(by_layers.blocks) == len(Q.layers) and by_layers.domain == Q.domain
    assert_close(by_layers.to_dense(), truth)
    assert_close(by_layers.diagonal(), truth.diagonal())
    assert_close(Q.logdet(), torch.logdet(truth))
    # Samples are S z of known z, so that S Sᵀ is seen without sampling error.
    D = len(truth)
    root = torch.linalg.solve(IdentityLinearOperator(Q.domain).sample(D, seed=3).T, Q.sample(D, seed=3).T).T
    assert_close(root @ root.T, truth, 1e-8)
    v = noise(D)
    split = dict(zip(Q.domain.names, Q.domain.split(v[:, None]), strict=True))
    answer = Q @ {name: part.squeeze(-1) for name, part in split.items()}
    assert_close(torch.cat([part.flatten() for part in answer.values()]), truth @ v)
    assert (
        Q.SELF_ADJOINT
        and Q.POSITIVE_SEMIDEFINITE
        and Q.domain.names == tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    )


def test_every_parameter_of_other_layers_has_its_place() -> None:
    model = nn.ModuleList([nn.LSTM(2, 2), nn.MultiheadAttention(2, 1), nn.Bilinear(2, 2, 2), nn.PReLU()]).double()
    Q = taught(model)
    dense = Q.to_dense()
    assert_close(dense, dense.T)
    assert float(torch.linalg.eigvalsh(dense).min()) > 0
    assert_close(Q.diagonal(), dense.diagonal())
    assert_close(Q.logdet(), torch.logdet(dense))
    assert Q.structure["0.weight_hh_l0"] == Q.structure["1.in_proj_weight"] == "kronecker"
    assert Q.structure["3"] == "diagonal"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_outputs_change_nothing() -> None:
    linear = nn.Linear(3, 2)
    empty = [nn.Linear(3, 0), nn.ConvTranspose1d(4, 0, 2, groups=2)]
    Q = taught(nn.Sequential(linear, *empty).double())
    assert list(Q.structure.values()) == ["kronecker"] * 3
    alone = taught(linear)
    assert torch.equal(Q.to_dense(), alone.to_dense()) and torch.equal(Q.diagonal(), alone.diagonal())
    assert torch.equal(Q.logdet(), alone.logdet())


# -- structures --------------------------------------------------------------------------------------------------------


def test_tensors_without_a_model() -> None:
    tensors = {"a.weight": noise(2, 3), "a.bias": noise(2), "b": noise(3, 2), "c.weight": noise(2), "d.bias": noise(3)}
    Q = taught(tensors)
    assert Q.structure == {"a": "kronecker", "b": "kronecker", "c": "diagonal", "d.bias": "diagonal"}
    assert Q.layers["a"].parameters == ("a.weight", "a.bias")
    raw = Q.state_dict()["factors"]["a"]
    places = torch.cat([torch.arange(6).reshape(2, 3), torch.arange(6, 8)[:, None]], 1).flatten()
    assert_close(Q.to_dense()[places][:, places], dense_block(raw, torch.Size((2, 4)), Q.scale))
    assert LearnedInverseLinearOperator(list(tensors.values()), damping=1.0).structure == {
        "0": "kronecker",
        "1": "diagonal",
        "2": "kronecker",
        "3": "diagonal",
        "4": "diagonal",
    }
    assert LearnedInverseLinearOperator({"w": noise(2), "w.weight": noise(3)}, damping=1.0).structure == {
        "w": "diagonal",
        "w.weight": "diagonal",
    }


def test_structures_by_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2), nn.Linear(2, 2)).double()
    Q = taught(model, structure={"0": "identity", "2": "full", "3": "diagonal"}, scale=2.0)
    assert Q.structure == {"0": "identity", "1": "diagonal", "2": "full", "3": "diagonal"}
    dense = Q.to_dense()
    assert torch.equal(dense[:9, :9], 2 * torch.eye(9, dtype=F64))
    full = dense_block(Q.state_dict()["factors"]["2"], torch.Size((8, 1)), 2.0)
    assert_close(dense[15:23, 15:23], full)
    assert int((full == 0).sum()) == 0
    assert_close(Q.diagonal(), dense.diagonal())
    assert_close(Q.logdet(), torch.logdet(dense))
    assert set(taught(model, structure="kronecker").structure.values()) == {"kronecker", "diagonal"}


def test_no_factor_is_much_larger_than_its_weight() -> None:
    """Unless it is asked for: a factor has at most 1024 rows, or 5000 and 16 times the entries of the weight."""
    weights = {"words": (4900, 16), "most": (5000, 313), "more": (5001, 313), "one output": (1, 1024)}
    wide = {"wide": (65, 1040), "wider": (64, 1040)}
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in (weights | wide).items()}
    chosen = {n: LearnedInverseLinearOperator({n: t}, damping=1.0).structure[n] for n, t in tensors.items()}
    assert [name for name, kind in chosen.items() if kind == "diagonal"] == ["words", "more", "wider"]
    asked = LearnedInverseLinearOperator({"wider": tensors["wider"]}, damping=1.0, structure="kronecker")
    assert asked.structure == {"wider": "kronecker"}


def test_one_factor_for_all() -> None:
    Q = taught([noise(2, 2), noise(3)], structure="full")
    assert Q.structure == {"full": "full"}
    assert_close(Q.to_dense(), dense_block(Q.state_dict()["factors"]["full"], torch.Size((7, 1)), Q.scale))


@pytest.mark.parametrize("structure", ["auto", "full", "diagonal", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_at_a_multiple_of_the_identity(structure: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 2, 2)).to(dtype)
    v = noise(sum(p.numel() for p in model.parameters())).to(dtype)
    Q = LearnedInverseLinearOperator(model, damping=0.5, structure=structure, scale=1.0)
    assert torch.equal(Q @ v, v)
    assert_close(LearnedInverseLinearOperator(model, damping=0.5, structure=structure) @ v, 2 * v, 1e-6)


def test_half_precision_works_in_float32() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    Q = LearnedInverseLinearOperator(model, damping=1.0, lr=1e-3)
    for _ in range(5):  # steps too small for bfloat16
        Q.update(lambda v: v, torch.ones(8, dtype=torch.bfloat16))
    raw = Q.state_dict()["factors"][""]
    assert raw["D"].dtype == torch.float32 and float(raw["D"].max()) < -4e-3
    assert (Q @ torch.ones(8, dtype=torch.bfloat16)).dtype == Q.diagonal().dtype == torch.bfloat16
    assert Q.sample(2).dtype == torch.bfloat16


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("num_columns", [1, 3])
def test_the_gradient_is_that_of_the_dense_loss(precondition: bool, num_columns: int) -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.LayerNorm(3), nn.ConvTranspose1d(4, 2, 2)).double()
    Q = taught(model, scale=0.7, betas=(0.0, 0.999))
    A, u, products = spd(Q.shape[0], seed=5), noise(Q.shape[0], num_columns, seed=6), []

    def matvec(v: Tensor) -> Tensor:
        products.append(v.clone())
        product = A @ v
        v.zero_()  # what it gets is its own
        return product

    factors = {name: {k: r.requires_grad_() for k, r in raw.items()} for name, raw in Q.state_dict()["factors"].items()}
    dense = dense_truth(model, Q, factors)
    v = dense @ u
    loss = (0.5 * (v * (A @ v + 0.1 * v)).sum() - (u * v).sum()) / num_columns
    if precondition:
        d = (A @ v + 0.1 * v - u).detach()
        v.backward(dense.detach() @ d / num_columns)
    else:
        loss.backward()
    value = Q.update(matvec, u if num_columns > 1 else u.squeeze(1), precondition=precondition)
    assert value == pytest.approx(loss.item(), rel=1e-10)
    assert len(products) == 1, "one product"
    assert_close(products[0].reshape(v.shape), v.detach())
    # With betas (0, ...), Adam's first moment is the gradient.
    moments = [entry["exp_avg"] for entry in Q.state_dict()["adam"]["state"].values()]
    gradients = [raw.grad for letters in factors.values() for raw in letters.values()]
    for moment, gradient in zip(moments, gradients, strict=True):
        assert gradient is not None
        assert_close(moment, gradient, 1e-9)


def relative_error(Q: LearnedInverseLinearOperator, A: Tensor, damping: float) -> float:
    truth = torch.linalg.inv(A + damping * torch.eye(len(A), dtype=F64))
    return float((Q.to_dense() - truth).norm() / truth.norm())


def test_a_kronecker_product_is_learned() -> None:
    eigenvalues = 1 / torch.arange(1, 11, dtype=F64) ** 2
    U, V = orthogonal(10, 1), orthogonal(10, 2)
    A = torch.kron(U * eigenvalues @ U.T, V * eigenvalues @ V.T)
    Q = LearnedInverseLinearOperator([torch.zeros(10, 10, dtype=F64)], damping=1e-3, lr=1e-2)
    assert Q.scale == 1e3
    before = relative_error(Q, A, 1e-3)
    Q.fit(lambda v: A @ v, 1000, precondition=True)
    after = relative_error(Q, A, 1e-3)
    assert before > 0.5 and after < 0.25, (before, after)


def test_a_full_triangular_factor_is_learned() -> None:
    U = orthogonal(100, 3)
    A = U / torch.arange(1, 101, dtype=F64) ** 2 @ U.T
    Q = LearnedInverseLinearOperator([torch.zeros(100, dtype=F64)], damping=1e-3, structure="full", lr=1e-2)
    errors = [relative_error(Q, A, 1e-3)]
    for _ in range(4):
        Q.fit(lambda v: A @ v, 100, num_directions=16, precondition=True)
        errors.append(relative_error(Q, A, 1e-3))
    print("relative errors of a full factor, every 100 steps:", errors)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.4 * errors[0], errors


@pytest.fixture(scope="module")
def regression() -> tuple[nn.Module, GGNLinearOperator]:
    digits = load_digits()
    data = [(torch.tensor(digits.data[:500]) / 16, torch.tensor(digits.target[:500]))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(64, 10).double()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        adam.zero_grad()
        nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
        adam.step()
    adam.zero_grad()
    return model, GGNLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)


def test_it_preconditions_conjugate_gradients(regression: tuple[nn.Module, GGNLinearOperator]) -> None:
    model, G = regression
    dense = G.to_dense()
    Q = LearnedInverseLinearOperator(model, damping=1e-4)
    for rate, num_steps in ((1e-2, 250), (2e-3, 100)):
        Q.learning_rate = rate
        Q.fit(lambda v: dense @ v, num_steps, num_directions=8)
    gradient = torch.cat([g.flatten() for g in G.gradient_and_loss()[0]])
    iterations = []
    for preconditioner in (None, Q):
        solver = CGInverseLinearOperator(G.damped(1e-4), preconditioner=preconditioner)
        solver @ torch.stack([gradient, noise(len(gradient))], 1)
        assert bool(solver.info.converged.all())
        iterations.append(solver.info.num_iterations)
    print("iterations without and with the learned inverse:", iterations)
    assert bool((iterations[1] < 0.8 * iterations[0]).all()), iterations


def test_directions(regression: tuple[nn.Module, GGNLinearOperator]) -> None:
    """Along the gradient it learns the inverse where it is used; an operator's gradient is its own."""
    model, G = regression
    gradient = torch.cat([g.flatten() for g in G.gradient_and_loss()[0]])
    state = torch.get_rng_state()
    own = LearnedInverseLinearOperator(model, damping=0.1, lr=1e-2)
    losses = own.fit(G, 60, "gradient")
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    calls = []

    def draw() -> list[Tensor]:
        calls.append(None)
        return [5 * g for g in G.gradient_and_loss()[0]]

    given = LearnedInverseLinearOperator(model, damping=0.1, lr=1e-2)
    assert given.fit(G, 60, "gradient", gradient=draw) == pytest.approx(losses, rel=1e-9) and len(calls) == 60
    solution = torch.linalg.solve(G.to_dense() + 0.1 * torch.eye(len(gradient), dtype=F64), gradient)
    errors = [
        float((P @ gradient - solution).norm() / solution.norm()) for P in (10 * IdentityLinearOperator(G.domain), own)
    ]
    assert errors[1] < 0.3 * errors[0], errors
    assert losses[-1] < losses[0]


# -- state -------------------------------------------------------------------------------------------------------------


def test_a_saved_state_goes_on_to_the_bit() -> None:
    model, A = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), spd(12).float()
    first = LearnedInverseLinearOperator(model, damping=0.1, lr=1e-2, seed=4)
    first.fit(lambda v: A @ v, 5)
    first.learning_rate = 5e-3
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    saved = first.to_dense()
    losses = first.fit(lambda v: A @ v, 5)
    file.seek(0)
    second = LearnedInverseLinearOperator(model, damping=0.1)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(second.to_dense(), saved) and second.num_updates == 5 and second.learning_rate == 5e-3
    assert second.fit(lambda v: A @ v, 5) == losses
    assert torch.equal(second.to_dense(), first.to_dense())


def test_live_and_frozen() -> None:
    A = spd(8)
    Q = taught(nn.Linear(3, 2).double())
    frozen, sum_of_frozen, live = Q.frozen(), (Q + 2 * Q).frozen(), Q + 2 * Q
    before = Q.to_dense()
    Q.update(lambda v: A @ v, noise(8))
    assert not torch.equal(Q.to_dense(), before)
    assert torch.equal(frozen.to_dense(), before) and frozen.frozen() is frozen
    assert_close(sum_of_frozen.to_dense(), 3 * before)
    assert_close(live.to_dense(), 3 * Q.to_dense())
    assert torch.equal(Q.linearize().to_dense(), Q.to_dense())
    assert InverseLinearOperator(Q).method == "conjugate gradients", "known to be positive definite"
    for call in (
        lambda: frozen.update(A.mv, noise(8)),
        frozen.state_dict,
        lambda: frozen.load_state_dict(Q.state_dict()),
    ):
        with pytest.raises(ValueError, match="frozen copy"):
            call()


def test_nothing_changes_where_an_update_fails() -> None:
    model = nn.Linear(3, 2).double()
    Q = taught(model)
    before, mine = copy.deepcopy(Q.state_dict()), {n: p.detach().clone() for n, p in model.named_parameters()}

    def fails(v: Tensor) -> Tensor:
        raise KeyError("no product")

    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (fails, noise(8), KeyError, "no product"),
        (lambda v: v * torch.nan, noise(8), FloatingPointError, "not finite"),
        (lambda v: v, noise(8) * torch.inf, FloatingPointError, "not finite"),
        (lambda v: v[:, None].expand(8, 2), noise(8), ValueError, "expected 1 columns"),
        (lambda v: v[:3], noise(8), ValueError, r"\[8\]"),
        (TensorLinearOperator(spd(7)), noise(8), ValueError, "spaces differ"),
        (spd(8), noise(8), TypeError, "expected an operator or a function"),
        (lambda v: v, noise(7), ValueError, r"\[8\]"),
    ]
    for matvec, u, error, message in cases:
        with pytest.raises(error, match=message):
            Q.update(matvec, u)
    after = Q.state_dict()
    assert all(torch.equal(after["factors"][""][k], raw) for k, raw in before["factors"][""].items())
    assert all(
        torch.equal(after["adam"]["state"][i]["exp_avg"], e["exp_avg"]) for i, e in before["adam"]["state"].items()
    )
    assert after["num_updates"] == before["num_updates"] == 3
    assert all(torch.equal(p, mine[n]) and p.grad is None and p.requires_grad for n, p in model.named_parameters())


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_it_learns_without_gradients_around_it(around: Callable[[], Any]) -> None:
    model = nn.Linear(3, 2).double()
    with around():
        Q = taught(model)
    assert_close(Q.to_dense(), taught(model).to_dense())
    again = LearnedInverseLinearOperator(model, damping=0.1)
    with around():
        again.load_state_dict(Q.state_dict())
        copies = [Q.frozen(), Q.to_block_diagonal()]
        assert all(torch.equal(copied @ noise(8), Q @ noise(8)) for copied in copies)
    assert all(torch.equal(copied.to_dense(), Q.to_dense()) for copied in copies)
    assert again.fit(lambda v: v, 2) == Q.fit(lambda v: v, 2)
    assert torch.equal(again.to_dense(), Q.to_dense())
    broken = Q.state_dict() | {"adam": {"state": {}, "param_groups": []}}
    before = again.state_dict()["generator"]
    with pytest.raises(ValueError):
        again.load_state_dict(broken | {"generator": torch.Generator().manual_seed(7).get_state()})
    assert torch.equal(again.state_dict()["generator"], before)


def test_errors() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).double()

    def build(**options: Any) -> LearnedInverseLinearOperator:
        return LearnedInverseLinearOperator(options.pop("source", model), **{"damping": 0.1, **options})

    Q = build()
    state = Q.state_dict()
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: build(source=3), TypeError, "expected a module, or a dict or list of tensors, got int"),
        (lambda: build(source=nn.ReLU()), ValueError, "no parameter that requires a gradient"),
        (lambda: build(source=[noise(2), noise(2).float()]), ValueError, "one dtype"),
        (lambda: build(damping=-1.0), ValueError, "damping: expected"),
        (lambda: build(damping=0.0), ValueError, "pass the scale"),
        (lambda: build(scale=0.0), ValueError, "scale: expected a positive"),
        (lambda: build(source=nn.Linear(2, 2), scale=1e-50), ValueError, "as torch.float32 has them, got 1e-50"),
        (lambda: build(source=nn.Linear(2, 2), damping=1e300), ValueError, "got 1e-300; by default it is 1 / damping"),
        (lambda: build(lr=-1.0), ValueError, "learning rate"),
        (lambda: build(structure="kroneker"), ValueError, "expected one of auto, kronecker"),
        (lambda: build(structure={"2": "full"}), ValueError, r"no layers \['2'\]"),
        (lambda: build(structure={"1": "kronecker"}), ValueError, "no weight of two or more axes"),
        (lambda: build(strukture="full"), TypeError, "Did you mean 'structure'"),
        (lambda: setattr(Q, "learning_rate", -1.0), ValueError, "learning_rate: expected"),
        (lambda: build(structure="identity").fit(lambda v: v, 1), ValueError, "does not learn"),
        (lambda: Q.fit(lambda v: v, -1), ValueError, "num_steps: expected"),
        (lambda: Q.fit(lambda v: v, 1, "normal"), ValueError, "directions: expected"),
        (lambda: Q.fit(lambda v: v, 1, gradient=lambda: noise(12)), ValueError, "no effect"),
        (lambda: Q.fit(lambda v: v, 1, num_directions=0), ValueError, "num_directions: expected"),
        (lambda: Q.fit(lambda v: v, 1, "gradient"), TypeError, "no gradient of its own"),
        (
            lambda: Q.fit(lambda v: v, 1, "gradient", gradient=lambda: noise(12), num_directions=2),
            ValueError,
            "one gradient in each step",
        ),
        (lambda: Q.fit(lambda v: v, 1, "gradient", gradient=lambda: 0 * noise(12)), FloatingPointError, "got length 0"),
        (lambda: Q.fit(lambda v: v, 1, "gradient", gradient=lambda: noise(12, 2)), ValueError, "expected one vector"),
        (lambda: Q.load_state_dict({}), ValueError, "are missing"),
        (lambda: build(scale=1.0).load_state_dict(state), ValueError, "it has scale 10.0"),
        (lambda: build(source=nn.Linear(3, 2).double()).load_state_dict(state), ValueError, "it has structure"),
        (
            lambda: build(source=nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).double()).load_state_dict(state),
            ValueError,
            "factor D of layer '0'",
        ),
        (
            lambda: Q.load_state_dict({**state, "factors": {"0": state["factors"]["0"], "2": {"L": noise(2, 2)}}}),
            ValueError,
            r"""\["D of '1'"\] are missing, and \["L of '2'"\] not known""",
        ),
        (lambda: Q.sample(0), ValueError, "num_samples"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    assert all(torch.equal(raw, state["factors"]["0"][k]) for k, raw in Q.state_dict()["factors"]["0"].items())
