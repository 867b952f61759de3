"""Moments of inputs and output gradients, of which Kronecker factors are made."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from curvlinops.risk.layers.convolution import ConvolutionPart
from curvlinops.risk.layers.dense import DirectPart, LinearPart, LookupPart
from curvlinops.risk.layers.parts import SYMMETRIC_ROWS, Part, Rows, inner_products, slices, summed_gradients
from curvlinops.risk.layers.patches import UNFOLDED_NUMEL, PatchMoment
from curvlinops.risk.losses.base import at_least_float32


class Moments:
    """Second moments XᵀX, each computed once where several layers share an input, or a bias its layer's gradients.

    It lives as long as a mini-batch: what it is asked about must not change meanwhile.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def of(self, features: Tensor) -> Tensor:
        """The moment ``[F, F]`` of vectors in the columns of ``[F, rows]``."""
        key = features.data_ptr(), features.shape, features.stride(), features.dtype
        if key not in self._known:
            # The features are held, too, lest other numbers come to lie where they are.
            self._known[key] = features, second_moment(features)
        return self._known[key][1]


def second_moment(features: Tensor) -> Tensor:
    """X Xᵀ ``[..., F, F]`` of features ``[..., F, rows]``, in at least float32, and symmetric to the bit."""
    features = at_least_float32(features)
    if features.ndim == 3 and len(features) == 1:
        return second_moment(features[0]).unsqueeze(0)
    if features.ndim == 2 and len(features) > SYMMETRIC_ROWS:
        return inner_products(features, features)
    moment = features @ features.mT
    return (moment + moment.mT).div_(2)


def with_border(moment: Tensor, sums: Tensor, count: Tensor) -> Tensor:
    """The moment ``[G, S + 1, S + 1]`` of inputs with a last one that is always one.

    Args:
        moment: That of the inputs ``[G, S, S]``.
        sums: Their sum ``[G, S]``.
        count: How many they are.
    """
    size = moment.shape[1]
    result = moment.new_empty(len(moment), size + 1, size + 1)
    result[:, :size, :size] = moment
    result[:, :size, size] = result[:, size, :size] = sums
    result[:, size, size] = count
    return result


class WeightColumns:
    """The columns of F for a weight, or a weight and its bias, as matrices Σ_t g_mnt a_ntᵀ ``[G, R, S]``.

    Positions of all uses of the weight stand side by side. A bias is the weight of a last input that is always one.

    Args:
        parts: What the uses of the weight contribute.
        has_bias: Whether the bias is joined.
        moments: Moments that are known of this mini-batch.
    """

    def __init__(self, parts: Sequence[Part], has_bias: bool, moments: Moments) -> None:
        self._parts = [part for part in parts if isinstance(part, (LinearPart, ConvolutionPart))]
        assert len(self._parts) == len(parts), "Weights that meet inputs have rows."
        self._has_bias = has_bias
        self._moments = moments
        self._num_data = parts[0].num_data

    def _slices(self) -> Iterator[slice]:
        """A few data at a time where their rows take much memory."""
        step = self._num_data
        if isinstance(self._parts[0], ConvolutionPart):
            numel = sum(part.numel_of_rows() for part in self._parts if isinstance(part, ConvolutionPart))
            step = max(1, UNFOLDED_NUMEL // max(1, numel))
        return slices(self._num_data, step)

    def _pieces(self) -> Iterator[tuple[slice, Rows]]:
        for data in self._slices():
            rows = [part.rows(data) for part in self._parts]
            yield (
                data,
                rows[0]
                if len(rows) == 1
                else Rows(torch.cat([r.a for r in rows], -1), torch.cat([r.g for r in rows], -1)),
            )

    def _output_pieces(self) -> Iterator[Tensor]:
        for data in self._slices():
            rows = [part.output_rows(data) for part in self._parts]
            yield rows[0] if len(rows) == 1 else torch.cat(rows, -1)

    def _moment_of(self, features: Tensor) -> Tensor:
        """The moment ``[G, F, F]`` of ``[G, F, ...]``; remembered where it is one of tensors that exist anyway."""
        flat = features.flatten(2)
        is_view = len(flat) == 1 and all(isinstance(part, LinearPart) for part in self._parts)
        return self._moments.of(flat[0]).unsqueeze(0) if is_view else second_moment(flat)

    # ------------------------------------------------------------------------ first moments

    def input_moment(self, weight: Tensor | None, averaged: bool) -> tuple[Tensor, Tensor]:
        """Σ_n w_n Σ_t a aᵀ ``[G, S, S]``, and the sum of the weights of all positions.

        Args:
            weight: Weight of each datum ``[N]``, ``None`` for one.
            averaged: Whether the inputs of a datum are averaged over its positions before.
        """
        part = self._parts[0]
        is_one = len(self._parts) == 1 and not averaged and (weight is None or not self._has_bias)
        if is_one and isinstance(part, ConvolutionPart) and PatchMoment.applies(part):
            return self._moment_of_patches(part, weight)
        moments, counts = zip(*(self._input_moment(data, rows.a, weight, averaged) for data, rows in self._pieces()))
        return _total(moments), _total(counts)

    def _moment_of_patches(self, part: ConvolutionPart, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        found = PatchMoment(part, None if weight is None else weight.sqrt())
        moment, positions = found.moment(), part.g.shape[2] * part.g.shape[4:].numel()
        number = moment.new_tensor(float(part.num_data)) if weight is None else weight.sum().to(moment)
        count = number * positions
        return (with_border(moment, found.sums(), count) if self._has_bias else moment), count

    def _input_moment(self, data: slice, a: Tensor, weight: Tensor | None, averaged: bool) -> tuple[Tensor, Tensor]:
        ones = a.new_ones(a.shape[2], dtype=at_least_float32(a).dtype)
        weight = ones if (is_plain := weight is None) else weight[data].to(ones)
        if averaged:
            a = at_least_float32(a).mean(3, keepdim=True)
        roots = weight.sqrt().unsqueeze(1).expand(-1, a.shape[3])
        weighted = a if is_plain else at_least_float32(a) * roots
        moment, count = self._moment_of(weighted), weight.sum() * a.shape[3]
        if not self._has_bias:
            return moment, count
        return with_border(moment, at_least_float32(weighted).flatten(2) @ roots.flatten(), count), count

    def gradient_moment(self, summed: bool) -> Tensor:
        """Σ_nm Σ_t g gᵀ ``[G, R, R]``; of Σ_t g where the positions of a datum are summed before."""
        return _total(self._moment_of(at_least_float32(g).sum(4) if summed else g) for g in self._output_pieces())

    # ------------------------------------------------------- with the columns as matrices

    def rotated_squares(self, left: Tensor, right: Tensor) -> Tensor:
        """Σ_nm (Lᵀ G_nm R)² ``[G, R, S]`` entry by entry, for bases L ``[G, R, R]`` and R ``[G, S, S]``."""
        return _total(sum_of_rotated_squares(g, a, left, right) for g, a in self._matrices())

    def contraction(self, middle: Tensor, of_inputs: bool) -> Tensor:
        """Σ_nm G R Gᵀ ``[G, R, R]`` for a symmetric R ``[G, S, S]``; of inputs, Σ_nm Gᵀ L G ``[G, S, S]``."""
        return _total(contraction(g, a, middle, of_inputs) for g, a in self._matrices())

    def _matrices(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Output gradients ``[G, R, M, n, T]`` and inputs ``[G, S, n, T]`` in at least float32, the last input one."""
        for _, rows in self._pieces():
            a, g = at_least_float32(rows.a), at_least_float32(rows.g)
            if self._has_bias:
                a = torch.cat([a, a.new_ones(len(a), 1, *a.shape[2:])], 1)
            yield g, a


#: Numbers of per-datum gradients that are worked on at a time.
_GRADIENTS_NUMEL = 2**20


def gradients_of_data(g: Tensor, a: Tensor) -> Iterator[Tensor]:
    """Matrices Σ_t g_mnt a_ntᵀ ``[n, G, M, R, S]``, of a few data at a time.

    Args:
        g: Output gradients ``[G, R, M, N, T]``.
        a: Inputs ``[G, S, N, T]``.
    """
    groups, R, M, num_data, _ = g.shape
    S = a.shape[1]
    for data in slices(num_data, max(1, _GRADIENTS_NUMEL // (groups * M * R * S))):
        left = g[:, :, :, data].permute(3, 0, 2, 1, 4).flatten(2, 3)
        yield (left @ a[:, :, data].permute(2, 0, 3, 1)).unflatten(2, (M, R))


def sum_of_rotated_squares(g: Tensor, a: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ_nm (Lᵀ Σ_t g_mnt a_ntᵀ R)² ``[G, R, S]``; each side is rotated before or after the sum, as is cheaper."""
    groups, R, M, _, T = g.shape
    S = a.shape[1]
    if T == 1:  # the square of a product is the product of squares
        rotated = [(left.mT @ g.flatten(2)).square_().reshape(g.shape), (right.mT @ a.flatten(2)).square_()]
        return rotated[0].sum(2).flatten(2) @ rotated[1].mT
    early_left, early_right = T <= S, T <= M * R
    if early_left:
        g = (left.mT @ g.flatten(2)).reshape(g.shape)
    if early_right:
        a = (right.mT @ a.flatten(2)).reshape(a.shape)
    total = g.new_zeros(groups, R, S)
    for G in gradients_of_data(g, a):
        if not early_right:
            G = G @ right.unsqueeze(1)
        if not early_left:
            G = left.mT.unsqueeze(1) @ G
        if len(G) == M == 1:
            total.addcmul_(G[0, :, 0], G[0, :, 0])
        else:
            total += G.square_().sum((0, 2))
    return total


def contraction(g: Tensor, a: Tensor, middle: Tensor, of_inputs: bool) -> Tensor:
    """Σ_nm G R Gᵀ with G = Σ_t g_mnt a_ntᵀ and R the middle; of inputs, Σ_nm Gᵀ L G with L the middle."""
    if a.shape[3] == 1:
        g, a = g.squeeze(4), a.squeeze(3)
        if of_inputs:
            norms = ((middle @ g.flatten(2)).reshape(g.shape) * g).sum((1, 2))
            return (a * norms.unsqueeze(1)) @ a.mT
        norms = ((middle @ a) * a).sum(1)
        return (g * norms[:, None, None, :]).flatten(2) @ g.flatten(2).mT
    total = torch.zeros(len(a), *2 * [a.shape[1] if of_inputs else g.shape[1]], dtype=a.dtype, device=a.device)
    for G in gradients_of_data(g, a):
        G = G.mT if of_inputs else G
        rows, products = (x.permute(1, 3, 0, 2, 4).flatten(2) for x in (G, G @ middle.unsqueeze(1)))
        total += products @ rows.mT
    return total


def _total(terms: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    total: Tensor | None = None
    for count, term in enumerate(terms):
        # The first may be remembered elsewhere, so it is not written to.
        total = term if total is None else (total + term if count == 1 else total.add_(term))
    assert total is not None
    return total


# ------------------------------------------------------------------------- embeddings


class TableColumns:
    """The columns of F for the table of an embedding: row r gets Σ_t [index r] g_mnt."""

    def __init__(self, part: LookupPart) -> None:
        self._part = part

    def counts(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """How often each row is looked up, with the weight of the datum, ``[rows]``; and the sum. Padding is not."""
        part = self._part
        work = at_least_float32(part.g).dtype
        counted = torch.ones(part.indices.shape, dtype=work, device=part.g.device)
        if weight is not None:
            counted = counted * weight.to(work).unsqueeze(1)
        if part.padding_idx is not None:
            counted = counted.masked_fill(part.indices == part.padding_idx, 0.0)
        counts = counted.new_zeros(part.shape[0]).index_add_(0, part.indices.flatten(), counted.flatten())
        return counts, counted.sum()

    def gradient_moment(self) -> Tensor:
        """Σ_nmt g gᵀ ``[width, width]``."""
        return second_moment(self._part.g.permute(3, 1, 0, 2).flatten(1))

    def rotated_squares(self, right: Tensor) -> Tensor:
        """Σ_nm (G_nm R)² ``[rows, width]`` for a basis R ``[width, width]``."""
        part = self._part
        return LookupPart(part.shape, part.indices, at_least_float32(part.g) @ right).squares()

    def contraction(self, middle: Tensor, of_inputs: bool) -> Tensor:
        """Σ_nm Gᵀ D G ``[width, width]`` for a diagonal D ``[rows]``; of inputs, the diagonal of Σ_nm G R Gᵀ."""
        indices, num_rows = self._part.indices, self._part.shape[0]
        data = torch.arange(len(indices), device=indices.device).unsqueeze(1)
        table, inverse = torch.unique(data * num_rows + indices, return_inverse=True)
        rows = table % num_rows
        total = middle.new_zeros([num_rows] if of_inputs else [self._part.shape[1]] * 2)
        for g in at_least_float32(self._part.g).unbind(1):
            sums = g.new_zeros(len(table), g.shape[-1]).index_add_(0, inverse.flatten(), g.flatten(0, 1))
            if of_inputs:
                total.index_add_(0, rows, ((sums @ middle) * sums).sum(1))
            else:
                total += (sums * middle[rows].unsqueeze(1)).T @ sums
        return total


def table_of(parts: Sequence[Part]) -> LookupPart | None:
    """The columns of F for the table of an embedding, if that is what these are."""
    found = [part.as_lookup() if isinstance(part, DirectPart) else part for part in parts]
    return found[0] if len(found) == 1 and isinstance(found[0], LookupPart) else None


def moment_of_entries(parts: Sequence[Part], moments: Moments) -> Tensor:
    """Σ_nm h hᵀ ``[D, D]`` of a parameter that is broadcast along the data."""
    part = parts[0]
    if len(parts) > 1 or not isinstance(part, DirectPart):
        return second_moment(summed_gradients(list(parts), slice(0, part.num_data)).flatten(2).flatten(0, 1).T)
    moment = moments.of(part.h.permute(2, 1, 0).flatten(1))
    if part.index is None:
        return moment
    whole = moment.new_zeros(part.shape.numel(), part.shape.numel())
    whole[part.index.unsqueeze(1), part.index] = moment
    return whole
