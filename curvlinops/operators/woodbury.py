"""The small matrices behind U C Uᵀ + c I, with C symmetric and small: its spectrum, its functions, its inverse.

They need the Gram matrix G = UᵀU only and are all computed in float64. C, the core, is given as its diagonal ``[R]``
or as a matrix ``[R, R]``, and is taken apart as C = J Σ Jᵀ with signs Σ; then J is of one axis where C is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


class Spectrum(NamedTuple):
    """The eigenvalues of U C Uᵀ, and U T as unscaled eigenvectors: U C Uᵀ = U T diag(weights) Tᵀ Uᵀ.

    Attributes:
        values: The eigenvalues ``[k]``, k = min(R, D) or less where C has both signs; the others are zero.
        vectors: T, ``[R, k]``; the columns of U T are eigenvectors of squared length values / weights.
        weights: The weights ``[k]``.
    """

    values: Tensor
    vectors: Tensor
    weights: Tensor

    def core(self, quotient: Tensor) -> Tensor:
        """The core C_f with f(U C Uᵀ + c I) = U C_f Uᵀ + f(c) I.

        Args:
            quotient: (f(θ + c) - f(c)) / θ for each eigenvalue θ.
        """
        return self.vectors * (self.weights * quotient) @ self.vectors.T


def times(core: Tensor, M: Tensor) -> Tensor:
    """C M."""
    return core.unsqueeze(-1) * M if core.ndim == 1 else core @ M


def as_matrix(core: Tensor) -> Tensor:
    """The core with two axes."""
    return torch.diag(core) if core.ndim == 1 else core


def _congruence(J: Tensor, M: Tensor) -> Tensor:
    """J M Jᵀ."""
    return (J.unsqueeze(-1) * M).mul_(J) if J.ndim == 1 else J @ M @ J.T


def root(core: Tensor) -> tuple[Tensor, Tensor]:
    """J and the signs with C = J diag(signs) Jᵀ.

    Zero takes the sign of the others where these have one sign: a core of one sign is the better-behaved case. What
    rounding leaves of a zero eigenvalue is zero.
    """
    values, vectors = (core, None) if core.ndim == 1 else torch.linalg.eigh(core)
    if vectors is not None and values.numel():
        values = torch.where(values.abs() > len(values) * EPS * values.abs().max(), values, 0.0)
    zero_sign = -1.0 if bool((values < 0).any()) and not bool((values > 0).any()) else 1.0
    signs = torch.where(values == 0, zero_sign, values.sign())
    roots = values.abs().sqrt()
    return roots if vectors is None else vectors * roots, signs


def spectrum(core: Tensor, G: Tensor, size: int) -> Spectrum:
    """The spectrum of U C Uᵀ.

    With S = JᵀGJ = W Θ Wᵀ, the columns of E = U J W Θ^(-1/2) are orthonormal. For a C of one sign σ they are
    eigenvectors, with values σΘ; else those of the small matrix Eᵀ U C Uᵀ E = Θ^(1/2) Wᵀ Σ W Θ^(1/2) turn them.

    Args:
        core: The core.
        G: The Gram matrix ``[R, R]``.
        size: D, the number of rows of U.
    """
    J, signs = root(core)
    squares, W = torch.linalg.eigh(_congruence(J, G) if J.ndim == 1 else J.T @ G @ J)
    num_zeros = max(len(squares) - size, 0)
    squares, W = squares[num_zeros:].clamp(min=0.0), W[:, num_zeros:]
    if bool((signs == signs[:1]).all()):
        return Spectrum(signs[0] * squares if len(signs) else squares, times(J, W), signs[num_zeros:])
    is_used = squares > len(squares) * EPS * squares.max()
    lengths = squares[is_used].sqrt()
    W = W[:, is_used]
    inner = lengths.unsqueeze(-1) * (W.T * signs @ W) * lengths
    values, turn = torch.linalg.eigh(inner)
    return Spectrum(values, times(J, (W / lengths) @ turn), values)


class InverseCore:
    """The core C' with (U C Uᵀ + c I)⁻¹ = U C' Uᵀ + I / c, as a product with it; only algebra asks for its numbers.

    Woodbury's identity with signs: C' = -J K⁻¹ Jᵀ / c with K = c Σ + JᵀGJ divides neither by a small C nor by a small
    G.

    Args:
        J: The root of the core.
        solve: M -> K⁻¹ M.
        scale: -1 / c, or a multiple of it.
    """

    def __init__(self, J: Tensor, solve: Callable[[Tensor], Tensor], scale: float) -> None:
        self._J, self._solve, self._scale = J, solve, scale

    def times(self, M: Tensor) -> Tensor:
        """C' M."""
        return self._scale * times(self._J, self._solve(times(self._J.mT if self._J.ndim == 2 else self._J, M)))

    def scaled(self, factor: float) -> InverseCore:
        """A multiple of it."""
        return InverseCore(self._J, self._solve, self._scale * factor)

    def to_dense(self) -> Tensor:
        """The matrix C'."""
        identity = torch.eye(self._J.shape[-1], dtype=self._J.dtype, device=self._J.device)
        dense = self._scale * _congruence(self._J, self._solve(identity))
        return (dense + dense.T) / 2


def inverse_core(core: Tensor, G: Tensor, c: float, eps: float) -> InverseCore | None:
    """The core of (U C Uᵀ + c I)⁻¹, or None where that matrix is singular.

    Args:
        core: The core.
        G: The Gram matrix ``[R, R]``.
        c: The multiple of the identity, not zero.
        eps: Relative accuracy of G.
    """
    J, signs = root(core)
    K = _congruence(J, G) if J.ndim == 1 else J.T @ G @ J
    K.diagonal().add_(c * signs)
    is_definite = c > 0 and bool((signs > 0).all())
    if is_definite:
        L, failed = torch.linalg.cholesky_ex(K)
        if not failed:
            return InverseCore(J, partial(_solve_by_cholesky, L), -1.0 / c)
    values, W = torch.linalg.eigh(K)
    if is_definite:  # G has eigenvalues below -c by rounding only
        values = values.clamp(min=c)
    elif len(values) and not values.abs().min() > eps * (values.abs().max() + abs(c)):
        return None
    return InverseCore(J, partial(_solve_by_eigenvectors, values, W), -1.0 / c)


def _solve_by_cholesky(L: Tensor, M: Tensor) -> Tensor:
    return torch.cholesky_solve(M, L)


def _solve_by_eigenvectors(values: Tensor, W: Tensor, M: Tensor) -> Tensor:
    return W @ ((W.T @ M) / values.unsqueeze(-1))
