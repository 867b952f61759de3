"""The oracle of the Kronecker family, checked by routes that share neither hooks nor factors with it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.kronecker.cases import APPROXIMATIONS, SAMPLES, SEED, TABLE, error, made, oracle_of
from tests.kronecker.oracle import KroneckerOracle, padded, patches
from tests.oracles import math_attention
from tests.problems import Instance
from tests.problems.table import named, real

CURVATURES = ("type-2", "mc", "empirical")
NAMES = list(TABLE)
# The other oracle samples labels of cross-entropy only.
KNOWN_ELSEWHERE = [(n, f) for n, p in TABLE.items() for f in CURVATURES if f != "mc" or "classes" in p.tags]
FACTORED = [n for n in NAMES if n not in ("kf-tied", "kf-lstm")]


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_layer_gradients_are_those_of_the_jacobian(name: str, separate: bool) -> None:
    """Σ_t g_t a_tᵀ from the hooks, against Jᵀ s from reverse mode on the whole network, at the places of the index."""
    oracle = oracle_of(name)
    S = oracle.columns("type-2")
    J = oracle.base.scale**0.5 * torch.einsum("npd,npm->nmd", oracle.base.jacobian, S).flatten(0, 1)
    for block in oracle.blocks(separate=separate):
        assert error(block.columns, J[:, block.index]) < 1e-12


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("kf-attention")])
def test_networks_by_hand_are_those_they_stand_for(name: str) -> None:
    """The modules that hooks can see give what torch's own attention gives, and use the same parameters."""
    instance = TABLE[name].make()
    with torch.no_grad(), math_attention():
        assert error(instance.forward(instance.X), instance.model(instance.X)) < 1e-12
    own, hands = (list(m.parameters()) for m in (instance.model, instance.forward))
    assert {id(p) for p in own} == {id(p) for p in hands}


@pytest.mark.parametrize("name", NAMES)
def test_blocks_cover_each_parameter_once(name: str) -> None:
    """No entry is left out, none is in two blocks, none is in the block of another parameter."""
    oracle = oracle_of(name)
    for separate in (True, False):
        blocks = oracle.blocks(separate=separate)
        places = torch.cat([block.index.reshape(-1) for block in blocks])
        assert places.sort()[0].tolist() == list(range(oracle.base.num_params))
        for block in blocks:
            own = torch.cat([oracle._places(i).reshape(-1) for i in block.positions])
            assert sorted(block.index.reshape(-1).tolist()) == sorted(own.tolist())


@pytest.mark.parametrize(("name", "fisher"), KNOWN_ELSEWHERE)
def test_true_blocks_are_those_of_the_matrix(name: str, fisher: str) -> None:
    """The blocks that are approximated are those of GGN, Monte-Carlo and empirical Fisher of the other oracles."""
    oracle, base = oracle_of(name), oracle_of(name).base
    if fisher == "type-2":
        whole = base.ggn
    elif fisher == "empirical":
        whole = base.empirical_fisher()
    else:
        whole = base.monte_carlo_fisher(SAMPLES, SEED)
    for block in oracle.blocks(fisher=fisher, mc_samples=SAMPLES, seed=SEED):
        for at, matrix in zip(block.index.flatten(1), block.truth, strict=True):
            assert error(matrix, whole[at[:, None], at]) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_empirical_fisher_of_data(name: str) -> None:
    """With a datum's positions summed first."""
    oracle = oracle_of(name)
    whole = oracle.base.empirical_fisher("datum")
    for block in oracle.blocks(fisher="empirical", terms="datum"):
        for at, matrix in zip(block.index.flatten(1), block.truth, strict=True):
            assert error(matrix, whole[at[:, None], at]) < 1e-12


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum")])
def test_samples_have_the_hessian_as_expectation(loss: nn.Module) -> None:
    """Within five standard errors of many samples."""

    def build() -> Instance:
        model = nn.Linear(2, 2).double()
        return Instance(model, loss, named(model), real(3, 2), torch.rand(3, 2).double())

    oracle, M = KroneckerOracle(made(build)), 20000
    s = oracle.columns("mc", M, 0) * M**0.5
    outer = torch.einsum("npm,nqm->npqm", s, s)
    deviation = (outer.mean(-1) - oracle.base.loss_hessians).abs()
    assert (deviation <= 5 * outer.std(-1) / M**0.5 + 1e-12).all()


def test_patches_are_those_of_unfold() -> None:
    """In two dimensions torch has a function for it."""
    module = nn.Conv2d(2, 2, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)).double()
    x = torch.randn(3, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = patches(padded(module, x), module.kernel_size, module.stride, module.dilation).flatten(1, 2)
    assert torch.equal(ours, F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 2), stride=(2, 1)))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()])
@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_one_layer_and_one_datum_are_exact(loss: nn.Module, approx: str) -> None:
    """The GGN of one datum through one linear layer is ∇²ℓ ⊗ a aᵀ: joint with the bias, and each alone."""

    def build() -> Instance:
        model = nn.Linear(3, 4).double()
        y = torch.tensor([2]) if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(1, 4).double()
        return Instance(model, loss, named(model), real(1, 3), y)

    oracle = KroneckerOracle(made(build))
    a = torch.cat([oracle.instance.X[0], torch.ones(1)])
    H = oracle.base.scale * oracle.base.loss_hessians[0]
    whole = torch.einsum("oq,i,j->oiqj", H, a, a)  # [R, S + 1, R, S + 1]
    kfac = oracle.matrix("kfac", approx=approx, separate=False)
    assert error(kfac, oracle.base.ggn) < 1e-12
    assert error(kfac[:12, :12], whole[:, :3, :, :3].reshape(12, 12)) < 1e-12
    assert error(kfac[12:, :12], whole[:, 3, :, :3].reshape(4, 12)) < 1e-12
    assert error(oracle.matrix("kfac", approx=approx)[12:, 12:], H) < 1e-12


@pytest.mark.parametrize("fisher", CURVATURES)
@pytest.mark.parametrize("name", FACTORED)
def test_corrections_never_lose(name: str, fisher: str) -> None:
    """Eigenvalue correction and the nearest Kronecker product are at least as near to the truth as KFAC."""
    for approx in APPROXIMATIONS:
        for block in oracle_of(name).blocks(fisher=fisher, approx=approx, mc_samples=SAMPLES, seed=SEED):
            size = block.truth.norm()
            kfac, ekfac, kfoc = ((block.matrices(kind) - block.truth).norm() for kind in ("kfac", "ekfac", "kfoc"))
            assert ekfac <= kfac + 1e-12 * size
            assert kfoc <= kfac + 1e-12 * size


@pytest.mark.parametrize("name", NAMES)
def test_eigenvalue_correction_keeps_the_trace(name: str) -> None:
    """The trace of the truth, whatever the bases are."""
    for block in oracle_of(name).blocks():
        if block.left is not None:
            trace = block.truth.diagonal(dim1=1, dim2=2).sum(1)
            assert torch.allclose(block.matrices("ekfac").diagonal(dim1=1, dim2=2).sum(1), trace, rtol=1e-12)


def test_forward_only_is_the_gram_matrix_of_inputs() -> None:
    """c Σ a aᵀ for each output, as a plain product of the inputs of the first layer."""
    oracle = oracle_of("kf-mlp-mse")
    X = oracle.instance.X
    expected = oracle.base.scale * torch.block_diag(*[X.T @ X] * 4)
    assert error(oracle.matrix("kfac", fisher="forward-only")[:12, :12], expected) < 1e-12
