"""KFAC, EKFAC and KFOC against dense truths, on models of every kind of layer."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from curvlinops import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator
from tests.kronecker.cases import (
    FISHERS,
    SAMPLES,
    SEED,
    TABLE,
    build,
    error,
    keywords_of,
    made,
    names_of,
    options_of,
    oracle_of,
    problem_of,
)  # fmt: skip
from tests.kronecker.oracle import Block, KroneckerOracle
from tests.problems import PROBLEMS, Instance
from tests.problems.table import ids, listed, mlp, named, real

NAMES = list(TABLE)
# Without gradients, a parameter that no layer multiplies by its input has no truth in the oracle.
FORWARD = [n for n in NAMES if n not in ("kf-norms", "kf-tied", "kf-lstm")]
# All ways to cut into blocks with the exact columns, two of them with the others.
PAIRS = [("expand", True), ("reduce", False), ("expand", False), ("reduce", True)]
KFAC_CASES = [
    (n, f, *pair)
    for f in FISHERS
    for n in (FORWARD if f == "forward-only" else NAMES)
    for pair in (PAIRS[:2] if f in ("mc", "empirical") else PAIRS)
]
EKFAC_CASES = [
    (n, f, *pair)
    for n in NAMES
    for f, pair in [("type-2", PAIRS[0]), ("type-2", PAIRS[1]), ("mc", PAIRS[2]), ("empirical", PAIRS[3])]
]
KFOC_CASES = [(n, f, s) for n in NAMES for f, s in [("type-2", True), ("mc", True), ("empirical", False)]]


def separately(blocks: list[Block], block: Block) -> str:
    """Name a block in a message."""
    return f"block {blocks.index(block)} of parameters {block.positions}"


def block_of(K: Tensor, block: Block) -> list[Tensor]:
    """Take the matrices of the groups of a block out of the whole."""
    return [K[at[:, None], at] for at in block.index.flatten(1)]


def zero_between(K: Tensor, blocks: list[Block]) -> bool:
    """Return whether a matrix is zero outside of the blocks' groups."""
    K = K.clone()
    for block in blocks:
        for at in block.index.flatten(1):
            K[at[:, None], at] = 0.0
    return not K.any()


@pytest.mark.parametrize(("name", "fisher", "approx", "separate"), KFAC_CASES)
def test_kfac(name: str, fisher: str, approx: str, separate: bool) -> None:
    K = build(KFACLinearOperator, problem_of(name).make(), **keywords_of(fisher, approx, separate))
    expected = oracle_of(name).matrix("kfac", **options_of(fisher, approx, separate))
    assert error(K.to_dense(), expected) < 1e-10


@pytest.mark.parametrize(("name", "fisher", "approx", "separate"), EKFAC_CASES)
def test_ekfac(name: str, fisher: str, approx: str, separate: bool) -> None:
    """Where an eigenvalue is repeated, any basis of its space will do: then what all choices have in common."""
    blocks = oracle_of(name).blocks(**options_of(fisher, approx, separate))
    K = build(EKFACLinearOperator, problem_of(name).make(), **keywords_of(fisher, approx, separate)).to_dense()
    assert zero_between(K, blocks)
    for block in blocks:
        expected, actual = block.matrices("ekfac"), torch.stack(block_of(K, block))
        if block.left is None or block.separation > 1e-6:
            assert error(actual, expected) < 1e-8, separately(blocks, block)
            continue
        size = block.truth.norm()
        assert torch.allclose(
            actual.diagonal(dim1=1, dim2=2).sum(1), expected.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-10
        )
        # The eigenvalues are a diagonal of the truth in the operator's own basis: what is left is orthogonal to it.
        residual = block.truth - actual
        assert abs((residual * actual).sum()) < 1e-10 * size**2
        assert residual.norm() <= (block.matrices("kfac") - block.truth).norm() + 1e-10 * size


def distances(K: Tensor, blocks: list[Block]) -> list[tuple[float, float, float]]:
    """Return the relative distances of each product from the truth and from the nearest one, and the latter's."""
    result = []
    for block in blocks:
        expected, actual = block.matrices("kfoc"), torch.stack(block_of(K, block))
        if block.left is None:
            assert error(actual, expected) < 1e-10, separately(blocks, block)
            continue
        size = block.truth.norm()
        pairs = ((actual, block.truth), (actual, expected), (expected, block.truth))
        result.append(tuple(((p - q).norm() / size).item() for p, q in pairs))
    return result  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "fisher", "separate"), KFOC_CASES)
def test_kfoc(name: str, fisher: str, separate: bool) -> None:
    """Iterated until it stands, it is the best there is."""
    blocks = oracle_of(name).blocks(**options_of(fisher, "expand", separate))
    keywords = keywords_of(fisher, None, separate) | {"rtol": 1e-9, "max_iter": 200}
    K = build(KFOCLinearOperator, problem_of(name).make(), **keywords).to_dense()
    assert zero_between(K, blocks)
    for distance, deviation, best in distances(K, blocks):
        assert distance <= best + 1e-9
        assert deviation < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_kfoc_with_its_default_tolerance(name: str) -> None:
    """The distance is flat around the best, so it is known to the square of the factors' tolerance."""
    blocks = oracle_of(name).blocks()
    K = build(KFOCLinearOperator, problem_of(name).make(), fisher_type="type-2").to_dense()
    for distance, _, best in distances(K, blocks):
        assert distance <= best + 1e-5


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
@pytest.mark.parametrize("name", ["kf-sequence-ce", "kf-hugging-face", "kf-tied", "kf-attention"])
def test_terms_of_a_datum_summed(cls: type, name: str) -> None:
    """The own gradients of a datum's positions are one column."""
    kind = {KFACLinearOperator: "kfac", EKFACLinearOperator: "ekfac", KFOCLinearOperator: "kfoc"}[cls]
    blocks = oracle_of(name).blocks(fisher="empirical", terms="datum")
    keywords = {"rtol": 1e-9, "max_iter": 200} if kind == "kfoc" else {}
    K = build(cls, problem_of(name).make(), fisher_type="empirical", terms="datum", **keywords).to_dense()
    for block in blocks:
        assert block.left is None or block.separation > 1e-6
        assert error(torch.stack(block_of(K, block)), block.matrices(kind)) < (1e-6 if kind == "kfoc" else 1e-8)


# -- the table of all problems: whatever a parameter gets, it is not wrong ---------------------------------------------

# In one of them, how often a datum goes through a layer depends on its mini-batch. Some do without modules.
LEFT_OUT = (
    "ce-",
    "mse-",
    "bce-",
    "weights-",
    "ridge-",
    "vmap-",
    "used-again-in-some-batches",
    "callable-",
    "weight-and-its-slice",
)
OTHERS = [
    n
    for n, p in PROBLEMS.items()
    if not p.tags & {"generic", "no_fisher", "refused"} and (n == "callable-of-x" or not n.startswith(LEFT_OUT))
]
# Parameters whose factors hooks cannot see: attention has none on its projections, nor have plain products.
UNSEEN = ("attn.", "attention.in_proj", "attention.out_proj.weight", "matrix")


@pytest.mark.parametrize(("fisher", "approx"), [("type-2", "expand"), ("empirical", "reduce")])
@pytest.mark.parametrize("name", OTHERS)
def test_each_parameter_gets_a_true_block_or_its_factors(name: str, fisher: str, approx: str) -> None:
    """A use of a weight that is not known must end in the exact diagonal, never in a number that is something else."""
    oracle = oracle_of(name)
    blocks = oracle.blocks(fisher=fisher, approx=approx)
    S = oracle.columns(fisher)
    H = torch.einsum("npd,npm->nmd", oracle.base.jacobian, oracle.base.scale**0.5 * S).flatten(0, 1)
    K = build(KFACLinearOperator, problem_of(name).make(), fisher_type=fisher, kfac_approx=approx).to_dense()
    single = [Block([i], oracle._places(i).reshape(1, -1, 1), torch.empty(0)) for i in range(len(oracle.params))]
    assert zero_between(K, single)
    names = names_of(oracle.instance)
    for one in single:
        if any(part in names[one.positions[0]] for part in UNSEEN):
            continue
        (actual,) = block_of(K, one)
        whole = H[:, one.index.flatten()].T @ H[:, one.index.flatten()]
        accepted = [whole, torch.diag(whole.diagonal())]
        for block in blocks:
            factored = block.positions == one.positions and block.left is not None
            if factored and error(block.columns, H[:, block.index]) < 1e-10:  # else other uses escaped the hooks
                accepted.append(block_of(oracle.assemble([block], "kfac"), one)[0])
        errors = [error(actual, matrix) for matrix in accepted]
        assert min(errors) < 1e-10, f"{names[one.positions[0]]}: {errors}"


# Plain layers must have factors: the exact diagonal everywhere would pass the test above.
FACTORED = [
    "mlp-relu-inplace-mse", "mlp-tanh-ce-dict", "cnn-batchnorm-eval-ce", "segmentation-ce", "embedding-padding-idx",
    "checkpoint-non-reentrant", "custom-function", "layer-used-twice", "transformer-sdpa-ce", "time-major-n-equals-t",
    "flattened-rows-data-first", "flattened-rows-time-first", "positions-flat", "positions-row", "class-token",
    "masked-rows", "conv1d-options", "conv2d-options", "conv2d-depthwise-separable", "conv3d-options",
    "conv-transpose1d-positions", "conv-transpose2d-options", "norms-of-vectors", "layer-under-two-names",
    "hugging-face-conv1d", "subset-shuffled-list", "subset-shuffled-dict", "functional-call", "tuple-input",
    "mapping-input", "tied-embeddings", "hugging-face-bert", "windowed-attention", "detached-part",
]  # fmt: skip


@pytest.mark.parametrize("name", FACTORED)
def test_plain_layers_have_factors(name: str) -> None:
    oracle = oracle_of(name)
    K = build(KFACLinearOperator, problem_of(name).make(), fisher_type="type-2")
    assert error(K.to_dense(), oracle.matrix("kfac")) < 1e-10


# -- what has no factors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "word"), [("kf-tied", "embedding.weight"), ("kf-lstm", "lstm.weight_ih_l0")])
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
def test_unsupported_is_refused_by_name(cls: type, name: str, word: str) -> None:
    with pytest.raises((NotImplementedError, ValueError), match=word):
        build(cls, problem_of(name).make(), fisher_type="type-2", unsupported="error").to_dense()


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
def test_supported_is_not_refused(cls: type) -> None:
    K = build(cls, problem_of("kf-conv1d").make(), fisher_type="empirical", unsupported="error")
    assert error(K.to_dense(), build(cls, problem_of("kf-conv1d").make(), fisher_type="empirical").to_dense()) == 0


class Shifted(nn.Module):
    """A bare vector that is added to the input, of any size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(size))
        self.register_buffer("mix", torch.randn(size, 2))

    def forward(self, X: Tensor) -> Tensor:
        return (X + self.shift).sin() @ self.mix


@pytest.mark.parametrize("size", [1024, 1025])
def test_large_vectors_get_their_diagonal(size: int) -> None:
    def shifted() -> Instance:
        model = Shifted(size).double()
        return Instance(model, nn.MSELoss(), named(model), real(2, size), real(2, 2))

    expected = KroneckerOracle(made(shifted)).base.ggn
    expected = expected if size == 1024 else torch.diag(expected.diagonal())
    assert error(build(KFACLinearOperator, made(shifted), fisher_type="type-2").to_dense(), expected) < 1e-10


def callable_risk(as_module: bool) -> Instance:
    """A callable of bare tensors, and the modules that do the same."""
    weights = [real(4, 3), real(4), real(3, 4)]
    model = mlp(3, 4, 3)
    model[2].bias = None
    with torch.no_grad():
        for p, value in zip(model.parameters(), weights, strict=True):
            p.copy_(value)
    X, y = real(7, 3), ids(3, 7)
    if as_module:
        return Instance(model, nn.CrossEntropyLoss(), listed(model), X, y)
    params = dict(zip("wbv", [w.requires_grad_() for w in weights], strict=True))

    def forward(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return (X @ params["w"].T + params["b"]).tanh() @ params["v"].T

    return Instance(forward, nn.CrossEntropyLoss(), params, X, y, forward=partial(forward, params))


def test_products_with_a_transpose_are_linear_layers() -> None:
    expected = KroneckerOracle(made(partial(callable_risk, True))).matrix("kfac")
    K = build(KFACLinearOperator, made(partial(callable_risk, False), (3, 4)), fisher_type="type-2")
    assert error(K.to_dense(), expected) < 1e-10


# -- other figures of the same matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
@pytest.mark.parametrize("name", ["kf-linear-ce", "kf-conv2d", "kf-embedding-padding", "kf-tied", "kf-hugging-face"])
def test_products_and_figures_are_those_of_the_matrix(cls: type, name: str) -> None:
    K = build(cls, problem_of(name).make(), fisher_type="empirical", separate_weight_and_bias=False)
    dense = K.to_dense()
    V = torch.randn(len(dense), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert error(dense, dense.T) < 1e-14
    assert error(K @ V, dense @ V) < 1e-12
    assert error(K.diagonal(), dense.diagonal()) < 1e-12
    assert float(K.trace()) == pytest.approx(dense.trace().item(), rel=1e-12)
    assert float(K.frobenius_norm()) == pytest.approx(dense.norm().item(), rel=1e-12)
    damped = dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)
    assert float(K.damped(0.1).logdet()) == pytest.approx(damped.logdet().item(), rel=1e-10)


def test_no_gradient_is_needed_forward_only() -> None:
    """A vector beside data, as the gain of a norm is: c Σ_n μ_n T_n times the identity."""
    K = build(KFACLinearOperator, problem_of("kf-norms").make(), fisher_type="forward-only").to_dense()
    oracle = oracle_of("kf-norms")
    names = names_of(oracle.instance)
    for name in ("layer.weight", "layer.bias", "batch.weight", "batch.bias", "shift"):
        at = oracle._places(names.index(name)).flatten()
        expected = oracle.base.scale * len(oracle.instance.y) * torch.eye(4, dtype=torch.float64)
        assert error(K[at[:, None], at], expected) < 1e-12


@pytest.mark.parametrize("cls", [EKFACLinearOperator, KFOCLinearOperator])
def test_forward_only_has_no_gradients_to_correct(cls: type) -> None:
    with pytest.raises((NotImplementedError, ValueError), match="forward"):
        build(cls, problem_of("kf-linear-ce").make(), fisher_type="forward-only").to_dense()


def test_samples_are_those_of_the_seed() -> None:
    """The default seed is the documented one."""
    expected = oracle_of("kf-linear-ce").matrix("kfac", fisher="mc", mc_samples=SAMPLES)
    K = build(KFACLinearOperator, problem_of("kf-linear-ce").make(), mc_samples=SAMPLES)
    other = build(KFACLinearOperator, problem_of("kf-linear-ce").make(), mc_samples=SAMPLES, seed=SEED)
    assert error(K.to_dense(), expected) < 1e-10
    assert error(other.to_dense(), expected) > 1e-3
