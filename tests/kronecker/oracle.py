"""Dense truths of the Kronecker-factored matrices in float64, computed without the package.

Each datum goes through the model alone, one backward for each entry of its prediction; forward hooks on plain modules
give what went into a layer, and ``torch.autograd.grad`` what came back at its output. Everything after that is the
definition, in plain ``einsum``. A datum that is alone cannot be confused with another, however a model orders its rows.

A weight forms matrices [G, R, S] (groups, rows, columns): ``index`` holds the places of their entries among all
parameters. The gradient of one column of one datum is Σ_t g_t a_tᵀ, or its transpose where inputs count rows.

Shapes: N data, M columns of the loss factor, P entries of a prediction, T positions, D parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss
from torch.nn import functional as F

from tests.oracles import Oracle, math_attention
from tests.problems.table import Instance, narrow

MAX_EXACT = 1024
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_hugging_face(module: nn.Module) -> bool:
    """Return whether a layer is ``x @ W + b``."""
    return type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D"


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer of a known kind."""
    return isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS, *TRANSPOSED)) or is_hugging_face(module)


def patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Cut padded images [B, C, *size] into patches [B, C, K, T], by slicing: one slice an offset in the kernel."""
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    parts = []
    for offset in product(*map(range, kernel)):
        at = tuple(
            slice(o * d, o * d + s * (n - 1) + 1, s) for o, d, s, n in zip(offset, dilation, stride, sizes, strict=True)
        )
        parts.append(x[(slice(None), slice(None), *at)].flatten(2))
    return torch.stack(parts, dim=2)


def padded(module: Any, x: Tensor) -> Tensor:
    """Pad the input of a convolution as its options say, first axis of the image last in torch's list."""
    if module.padding == "valid":
        return x
    both = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            both += [total // 2, total - total // 2]
        else:
            both += [module.padding[axis]] * 2
    return F.pad(x, both, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def patches_of_outputs(module: Any, g: Tensor, inputs: Sequence[int]) -> Tensor:
    """Cut output gradients [B, C, *size] of a transposed convolution into the patch [B, C, K, T] of each input pixel.

    Input p meets offset k at output p · stride − padding + k · dilation; outside of the image there is nothing.
    """
    both = []
    for axis in reversed(range(len(inputs))):
        p, s, d, k = (v[axis] for v in (module.padding, module.stride, module.dilation, module.kernel_size))
        needed = s * (inputs[axis] - 1) + d * (k - 1) + 1
        both += [p, needed - g.shape[2 + axis] - p]
    return patches(F.pad(g, both), module.kernel_size, module.stride, module.dilation)


def grouped(x: Tensor, groups: int) -> Tensor:
    """Turn [B, C, ..., T] into [G, B, T, C/G ...], the features flattened."""
    x = x.unflatten(1, (groups, -1)).movedim(1, 0)
    return x.movedim(-1, 2).flatten(3)


def num_features(module: Any) -> int:
    """Return the number of entries of one output position."""
    for name in ("out_features", "out_channels", "embedding_dim", "nf"):
        if hasattr(module, name):
            return int(getattr(module, name))
    raise AssertionError(module)


def rows_of(module: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs [G, T, S] and output gradients [G, P, T, R] of one call for one datum.

    Args:
        module: The layer.
        x: What it was given.
        g: The gradients [P, *output] at what it gave.
    """
    P = len(g)
    if isinstance(module, nn.Embedding):
        kept = x.reshape(-1) != (-1 if module.padding_idx is None else module.padding_idx)
        a = F.one_hot(x.reshape(-1), module.num_embeddings).to(g.dtype)
        return a[kept][None], g.reshape(P, -1, module.embedding_dim)[None][:, :, kept]
    if isinstance(module, CONVOLUTIONS):
        a = grouped(patches(padded(module, x), module.kernel_size, module.stride, module.dilation), module.groups)
        g = grouped(g.flatten(0, 1).flatten(2), module.groups).unflatten(1, (P, -1))
    elif isinstance(module, TRANSPOSED):
        a = grouped(x.flatten(2), module.groups)
        g = grouped(patches_of_outputs(module, g.flatten(0, 1), x.shape[2:]), module.groups).unflatten(1, (P, -1))
    else:
        return x.reshape(1, -1, x.shape[-1]), g.reshape(1, P, -1, g.shape[-1])
    return a.flatten(1, 2), g.flatten(2, 3)


def arrangement(module: Any, places: Tensor) -> tuple[Tensor, bool]:
    """Return the places [G, R, S] of a weight's entries, and whether its rows are the layer's inputs."""
    if isinstance(module, nn.Embedding):
        return places[None], True
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return places.reshape(module.groups, len(places) // module.groups, -1), isinstance(module, TRANSPOSED)
    return (places.T if is_hugging_face(module) else places)[None], False


def kron(A: Tensor, B: Tensor) -> Tensor:
    """Return A ⊗ B. (``torch.kron`` refuses a pair of which one is stored row by row, the other column by column.)"""
    return torch.einsum("ij,kl->ikjl", A, B).reshape(len(A) * len(B), -1)


@dataclass
class Layer:
    """The uses of one weight, alone or with its bias.

    Attributes:
        module: One of the modules that use it.
        positions: The positions of its parameters.
        index: The places [G, R, S] of its entries among all parameters.
        inputs_first: Whether rows are inputs.
        inputs: The inputs [G, T, S] of each datum (of R in place of S where rows are inputs).
        gradients: The Jacobians [G, P, T, R] of each datum's prediction by the layer's output.
        outputs: The number of output positions of each datum.
    """

    module: Any
    positions: list[int]
    index: Tensor
    inputs_first: bool
    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)


@dataclass
class Block:
    """One block of the matrix: Kronecker factors a group, or what is exact, as a matrix or as its diagonal.

    Attributes:
        positions: The positions of its parameters.
        index: The places [G, R, S] of its entries.
        columns: The gradients [K, G, R, S], such that the true block is Σ_k vec vecᵀ in each group.
        left: The factors [G, R, R] of the rows; ``None`` if the block is exact.
        right: The factors [G, S, S] of the columns.
        diagonal_left: Whether the left factor is diagonal by definition.
        only_diagonal: Whether the true block's diagonal is all there is.
        replaced: What is there in place of the true block.
    """

    positions: list[int]
    index: Tensor
    columns: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    diagonal_left: bool = False
    only_diagonal: bool = False
    replaced: Tensor | None = None

    @cached_property
    def truth(self) -> Tensor:
        """The true blocks [G, R S, R S]."""
        flat = self.columns.flatten(2)
        return torch.einsum("kgi,kgj->gij", flat, flat)

    @cached_property
    def bases(self) -> tuple[Tensor, Tensor]:
        """The eigenbases of both factors; that of a diagonal is the identity."""
        assert self.left is not None and self.right is not None
        left = torch.eye(self.left.shape[1]).to(self.left) if self.diagonal_left else torch.linalg.eigh(self.left)[1]
        return left.expand_as(self.left), torch.linalg.eigh(self.right)[1]

    @cached_property
    def separation(self) -> float:
        """The smallest gap between two eigenvalues of a factor that is not diagonal, relative to the largest."""
        factors = [*(() if self.diagonal_left else self.left), *self.right]  # type: ignore[misc]
        values = [torch.linalg.eigvalsh(f) for f in factors if len(f) > 1]
        return min([(v.diff().min() / v[-1]).item() for v in values], default=1.0)

    def matrices(self, kind: str) -> Tensor:
        """Return the blocks [G, R S, R S] of a matrix of the family: "kfac", "ekfac", "kfoc" or "truth"."""
        if kind == "truth":
            return self.truth
        if self.replaced is not None:
            return self.replaced
        if self.left is None:
            return torch.diag_embed(self.truth.diagonal(dim1=1, dim2=2)) if self.only_diagonal else self.truth
        if kind == "kfac":
            return torch.stack([kron(a, b) for a, b in zip(self.left, self.right, strict=True)])  # type: ignore[arg-type]
        return self._ekfac() if kind == "ekfac" else torch.stack([self._nearest(g)[0] for g in range(len(self.left))])

    def _ekfac(self) -> Tensor:
        Q, U = self.bases
        values = torch.einsum("gri,kgrs,gsj->kgij", Q, self.columns, U).square().sum(0).flatten(1)
        bases = torch.stack([kron(q, u) for q, u in zip(Q, U, strict=True)])
        return torch.einsum("gij,gj,gkj->gik", bases, values, bases)

    def _nearest(self, g: int) -> tuple[Tensor, float]:
        """The nearest Kronecker product to the true block of a group, and σ₂ / σ₁: how sharply it is determined."""
        _, R, S = self.index.shape
        rearranged = self.truth[g].reshape(R, S, R, S).permute(0, 2, 1, 3).reshape(R * R, S * S)
        if self.diagonal_left:
            rearranged = rearranged * torch.eye(R).to(rearranged).reshape(-1, 1)
        U, sigma, V = torch.linalg.svd(rearranged, full_matrices=False)
        ratio = (sigma[1] / sigma[0]).item() if len(sigma) > 1 else 0.0
        return kron(sigma[0] * U[:, 0].reshape(R, R), V[0].reshape(S, S)), ratio

    @property
    def sharpness(self) -> float:
        """The largest σ₂ / σ₁ of the rearranged true blocks."""
        return max(self._nearest(g)[1] for g in range(len(self.index)))


class KroneckerOracle:
    """The dense KFAC, EKFAC and KFOC of one empirical risk, and the matrix that they stand for.

    Args:
        instance: The risk. Layers are looked for in ``instance.forward`` where that is a module, else in the model.
        diagonal: Positions of parameters that get the exact diagonal, whatever their size and layer.
    """

    def __init__(self, instance: Instance, diagonal: Sequence[int] = ()) -> None:
        self.instance, self.diagonal = instance, frozenset(diagonal)
        self.base: Oracle = instance.oracle()
        self.params = self.base.params
        self.offsets = [0, *torch.tensor([p.numel() for p in self.params]).cumsum(0).tolist()]
        self.forward = instance.forward if instance.forward is not None else instance.model
        self.root = next((m for m in (self.forward, instance.model) if isinstance(m, nn.Module)), nn.Identity())
        self.calls = self._calls()

    # -- one datum at a time -------------------------------------------------------------------------------------

    def _position(self, tensor: Any) -> int | None:
        return next((i for i, p in enumerate(self.params) if p is tensor), None)

    def _places(self, position: int) -> Tensor:
        return torch.arange(self.offsets[position], self.offsets[position + 1]).reshape(self.params[position].shape)

    def _calls(self) -> list[list[tuple[Any, Tensor, Tensor]]]:
        """The calls (module, input, Jacobian [P, *output]) of known layers, for each datum."""
        inst = self.instance
        return [self._calls_of(narrow(inst.X, inst.axis, n, 1)) for n in range(len(inst.y))]

    def _calls_of(self, X: Any) -> list[tuple[Any, Tensor, Tensor]]:
        seen: list[tuple[Any, Tensor, Tensor]] = []

        def note(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if output.requires_grad:
                seen.append((module, inputs[0].detach().clone(), output))
            return output.clone()  # what writes into it must not move the place where gradients are taken

        handles = [m.register_forward_hook(note) for m in self.root.modules() if is_layer(m)]
        try:
            with math_attention():
                prediction = self.forward(X).reshape(-1)
        finally:
            for handle in handles:
                handle.remove()
        outputs = [output for _, _, output in seen]
        if not outputs:
            return []
        columns = [
            torch.autograd.grad(f, outputs, retain_graph=True, allow_unused=True, materialize_grads=True)
            for f in prediction
        ]
        return [(m, x, torch.stack(g)) for (m, x, _), g in zip(seen, zip(*columns, strict=True), strict=True)]

    def layers(self, separate: bool) -> list[Layer]:
        """Return the weights that are used by layers of one kind, and by nothing else."""
        modules = {id(m): m for calls in self.calls for m, _, _ in calls}
        found: dict[int, list[Any]] = {}
        for module in modules.values():
            position = self._position(module.weight)
            if position is not None and position not in self.diagonal:
                found.setdefault(position, []).append(module)
        alike = {i: ms for i, ms in found.items() if len({type(m) for m in ms}) == 1}
        return [self._layer(i, ms, separate) for i, ms in alike.items()]

    def _layer(self, position: int, modules: list[Any], separate: bool) -> Layer:
        index, inputs_first = arrangement(modules[0], self._places(position))
        positions, G = [position], len(index)
        biases = {self._position(getattr(m, "bias", None)) for m in modules}
        bias = biases.pop() if len(biases) == 1 else None
        joined = not separate and bias is not None and not inputs_first and bias not in self.diagonal
        if joined and bias is not None:
            positions = [position, bias]
            index = torch.cat([index, self._places(bias).reshape(G, -1, 1)], dim=2)
        layer = Layer(modules[0], positions, index, inputs_first)
        for calls in self.calls:
            calls = [call for call in calls if any(call[0] is own for own in modules)]
            rows = [rows_of(*call) for call in calls]
            if not rows:
                raise AssertionError("a datum that does not meet a layer is not what this oracle is for")
            a, g = torch.cat([a for a, _ in rows], 1), torch.cat([g for _, g in rows], 2)
            layer.inputs.append(torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2) if joined else a)
            layer.gradients.append(g)
            layer.outputs.append(sum(J[0].numel() // num_features(m) for m, _, J in calls))
        return layer

    # -- the loss ------------------------------------------------------------------------------------------------

    @cached_property
    def masses(self) -> Tensor:
        """The masses [N, T C or T] that the loss puts on its terms, example weights included."""
        loss, base = self.base.loss_func, self.base
        if isinstance(loss, CrossEntropyLoss):
            return base.masses
        curvature = base.loss_hessians.diagonal(dim1=1, dim2=2)
        if isinstance(loss, MSELoss):
            return curvature / 2
        assert isinstance(loss, BCEWithLogitsLoss)
        p = base.prediction.flatten(start_dim=1 if base.prediction.ndim > 1 else 0).reshape(curvature.shape).sigmoid()
        return curvature / (p * (1 - p))

    def weights(self, fisher: str) -> Tensor:
        """Return the weights μ [N] of the data."""
        masses = self.masses.square() if fisher == "empirical" else self.masses
        return masses.mean(1)

    def _from_positions(self, rows: Tensor) -> Tensor:
        """Reshape [N, T, C, M] to [N, P, M]."""
        if isinstance(self.base.loss_func, CrossEntropyLoss):
            rows = rows.transpose(1, 2)
        return rows.flatten(1, 2)

    def columns(self, fisher: str, mc_samples: int = 1, seed: int = 2147483647, terms: str = "position") -> Tensor:
        """Return the columns [N, P, M] of the loss factor."""
        base = self.base
        if fisher == "type-2":
            values, vectors = torch.linalg.eigh(base.loss_hessians)
            return vectors * values.clamp_min(0).sqrt()[:, None]
        if fisher == "mc":
            return self._sampled(mc_samples, seed) / mc_samples**0.5
        assert fisher == "empirical"
        if terms == "datum":
            return base.loss_gradients[..., None]
        return base.positions_first(torch.diag_embed(base.loss_gradients)).sum(2).transpose(1, 2)

    def _sampled(self, mc_samples: int, seed: int) -> Tensor:
        """Would-be gradients [N, P, M]: one generator, one draw a mini-batch over all of its positions."""
        base = self.base
        if isinstance(base.loss_func, CrossEntropyLoss):
            labels = F.one_hot(base.draws(mc_samples, seed), base.prediction.shape[1])  # [N, T, M, C]
            rows = base.masses[..., None, None].sqrt() * (base.probabilities[:, :, None] - labels)
            return self._from_positions(rows.transpose(2, 3))
        generator, parts = torch.Generator().manual_seed(seed), []
        means = base.positions_first(base.prediction.reshape(len(base.prediction), -1))
        roots = base.positions_first(self.masses).sqrt()[..., None]
        for f, root in zip(*(t.split([len(o) for o in base.outputs]) for t in (means, roots)), strict=True):
            shape = (*f.shape, mc_samples)
            if isinstance(base.loss_func, MSELoss):
                parts.append(root * 2**0.5 * torch.randn(shape, dtype=f.dtype, generator=generator))
            else:
                p = f.sigmoid()[..., None]
                parts.append(root * (p - torch.bernoulli(p.expand(shape), generator=generator)))
        return self._from_positions(torch.cat(parts))

    # -- blocks --------------------------------------------------------------------------------------------------

    def blocks(
        self,
        fisher: str = "type-2",
        approx: str = "expand",
        separate: bool = True,
        mc_samples: int = 1,
        seed: int = 2147483647,
        terms: str = "position",
    ) -> list[Block]:
        """Return the blocks of the matrix, those of known layers first."""
        layers = self.layers(separate)
        if fisher == "forward-only":
            return self._forward_blocks(layers, approx)
        S = self.columns(fisher, mc_samples, seed, terms)
        blocks = [self._block(layer, S, self.weights(fisher), approx) for layer in layers]
        taken = {i for layer in layers for i in layer.positions}
        H = torch.einsum("npd,npm->nmd", self.base.jacobian, self.base.scale**0.5 * S).flatten(0, 1)
        for i in range(len(self.params)):
            if i not in taken:
                index = self._places(i).reshape(1, -1, 1)
                whole = self.params[i].numel() <= MAX_EXACT and i not in self.diagonal
                blocks.append(Block([i], index, H[:, index], only_diagonal=not whole))
        return blocks

    def _inputs(self, layer: Layer, mu: Tensor, reduce: bool) -> Tensor:
        """The normalised second moment [G, S, S] of a layer's inputs."""
        total, count = 0.0, 0.0
        for a, m in zip(layer.inputs, mu, strict=True):
            a = a.mean(1, keepdim=True) if reduce else a
            total = total + m * torch.einsum("gti,gtj->gij", a, a)
            count = count + m * a.shape[1]
        return total / count

    def _block(self, layer: Layer, S: Tensor, mu: Tensor, approx: str) -> Block:
        reduce = approx == "reduce" and not isinstance(layer.module, nn.Embedding)
        A = self._inputs(layer, mu, reduce)
        B, columns = 0.0, []
        for s, a, jacobian in zip(S, layer.inputs, layer.gradients, strict=True):
            g = torch.einsum("pm,gptr->gmtr", self.base.scale**0.5 * s, jacobian)
            G = torch.einsum("gmti,gto->mgoi" if layer.inputs_first else "gmto,gti->mgoi", g, a)
            columns.append(G)
            g = g.sum(2, keepdim=True) if reduce else g
            B = B + torch.einsum("gmti,gmtj->gij", g, g)
        left, right = (A, B) if layer.inputs_first else (B, A)
        diagonal = isinstance(layer.module, nn.Embedding)
        return Block(layer.positions, layer.index, torch.cat(columns), left, right, diagonal)

    def _forward_blocks(self, layers: list[Layer], approx: str) -> list[Block]:
        """The blocks of layers, and multiples of the identity for the biases beside them."""
        mu, c, blocks = self.weights("forward-only"), self.base.scale, []
        for layer in layers:
            reduce = approx == "reduce" and not isinstance(layer.module, nn.Embedding)
            rows = [a.mean(1, keepdim=True) if reduce else a for a in layer.inputs]
            gram = c * sum(m * torch.einsum("gti,gtj->gij", a, a) for m, a in zip(mu, rows, strict=True))
            G, R, S = layer.index.shape
            identity = torch.eye(S if layer.inputs_first else R).to(gram).expand(G, -1, -1)
            left, right = (gram, identity) if layer.inputs_first else (identity, gram)
            empty = torch.zeros(0, *layer.index.shape, dtype=torch.float64)
            blocks.append(Block(layer.positions, layer.index, empty, left, right))
            bias = self._position(getattr(layer.module, "bias", None))
            if bias is not None and bias not in layer.positions:
                # As the last entry of a joint block: each position counts, or their mean once.
                total = sum(m * (1 if reduce else T) for m, T in zip(mu, layer.outputs, strict=True))
                index = self._places(bias).reshape(1, -1, 1)
                scaled = (c * total * torch.eye(index.numel()).to(gram))[None]
                blocks.append(Block([bias], index, empty[:, :1, :1, :1], replaced=scaled))
        return blocks

    def assemble(self, blocks: Sequence[Block], kind: str) -> Tensor:
        """Return a matrix of the family [D, D] from its blocks, zero between them."""
        result = torch.zeros(self.base.num_params, self.base.num_params, dtype=torch.float64)
        for block in blocks:
            for at, matrix in zip(block.index.flatten(1), block.matrices(kind), strict=True):
                result[at[:, None], at] = matrix
        return result

    def matrix(self, kind: str = "kfac", **options: Any) -> Tensor:
        """Return KFAC, EKFAC, KFOC, or the blocks of the matrix they stand for ("truth"); see :meth:`blocks`."""
        return self.assemble(self.blocks(**options), kind)
