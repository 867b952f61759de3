"""Closed-form operators as nested dicts of plain tensors, numbers and strings, which files can hold, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from curvlinops import (
    Arrangement,
    BlockDiagonal,
    Diagonal,
    EigenDecomposed,
    Kronecker,
    LinearOperator,
    LowRankLinearOperator,
    Space,
    TensorLinearOperator,
)

State = dict[str, Any]


def to_state(operator: LinearOperator) -> State:
    """What a closed-form operator is made of: dicts and lists of copies of tensors, numbers, strings and None.

    A low-rank matrix is stored by its eigenvectors, so that it comes back equal but for rounding; all others come back
    with the same entries.

    **Cost**: the memory of the tensors; of a low-rank matrix of R columns, R products and a QR decomposition.

    Args:
        operator: Diagonal, dense, Kronecker, low-rank or block-diagonal operator, one with known eigenvalues, or a sum
            of such.

    Raises:
        NotImplementedError: If it, or a part of it, is of another kind.

    >>> state = to_state(Diagonal({"weight": torch.tensor([1.0, 2.0])}))
    >>> state["kind"], state["entries"]
    ('diagonal', {'weight': tensor([1., 2.])})
    >>> from_state(state, torch.device("cpu")).trace().item()
    3.0
    """
    operator = _inner(operator)
    for kind, (known, write, _) in _KINDS.items():
        if isinstance(operator, known):
            return {"kind": kind, **write(operator)}
    if hasattr(operator, "terms"):
        return {"kind": "sum", "terms": [to_state(term) for term in operator.terms]}
    inmost: Any = operator
    while isinstance(getattr(inmost, "operator", None), LinearOperator):
        inmost = inmost.operator  # what the user knows, without the nodes around it
    raise NotImplementedError(
        f"F, {inmost!r}, or a part of it, is known by its products alone, so it cannot be stored. Use a closed form of "
        "its own in its place: F.to_low_rank(), KFACLinearOperator, a diagonal, or TensorLinearOperator(F.to_dense())."
    )


def from_state(state: Mapping[str, Any], device: torch.device) -> LinearOperator:
    """The operator that :func:`to_state` took apart, of copies of its tensors on a device.

    Args:
        state: What :func:`to_state` gave.
        device: Where the operator is to live.

    Raises:
        ValueError: If the state is of an unknown kind.
    """
    kind = state.get("kind")
    if kind == "sum":
        return reduce(add, [from_state(term, device) for term in state["terms"]])
    if kind not in _KINDS:
        raise ValueError(f"Expected the state of an operator, one of {[*_KINDS, 'sum']}, got {kind!r}.")
    _, _, read = _KINDS[kind]
    return read(state, device)


def _inner(operator: LinearOperator) -> LinearOperator:
    """What is within the nodes that a sum puts around terms on flat vectors, its number multiplied in."""
    within = getattr(operator, "operator", None)
    if not isinstance(within, LinearOperator) or within.shape != operator.shape:
        return operator  # a block of a matrix is not that matrix
    factor: float | None = getattr(operator, "factor", None)
    if factor is not None:
        return factor * _inner(within)
    return operator if within.domain.shapes == operator.domain.shapes else _inner(within)


# -- one pair of functions a kind --------------------------------------------------------------------------------------


def _write_diagonal(A: Diagonal) -> State:
    tensors = [part.clone() for part in A.domain.shaped(A.diagonal())]
    names = A.domain.names
    entries = tensors if names is None else dict(zip(names, tensors, strict=True))
    return {"entries": entries, "is_positive": A.POSITIVE_SEMIDEFINITE}


def _read_diagonal(state: Mapping[str, Any], device: torch.device) -> Diagonal:
    entries = state["entries"]
    if isinstance(entries, Mapping):
        result = Diagonal({name: _own(entry, device) for name, entry in entries.items()})
    else:
        result = Diagonal([_own(entry, device) for entry in entries])
    result.POSITIVE_SEMIDEFINITE = state["is_positive"]
    return result


def _write_dense(A: TensorLinearOperator) -> State:
    return {"matrix": A.to_dense(), "is_positive": A.POSITIVE_SEMIDEFINITE}


def _read_dense(state: Mapping[str, Any], device: torch.device) -> TensorLinearOperator:
    result = TensorLinearOperator(_own(state["matrix"], device))
    result.POSITIVE_SEMIDEFINITE = state["is_positive"]
    return result


def _write_kronecker(A: Kronecker) -> State:
    return {
        "left": _entries_of(A.left),
        "right": _entries_of(A.right),
        "shift": A.shift,
        "is_positive": A.POSITIVE_SEMIDEFINITE,
        **_write_places(A),
    }


def _read_kronecker(state: Mapping[str, Any], device: torch.device) -> Kronecker:
    return Kronecker(
        _own(state["left"], device),
        _own(state["right"], device),
        shift=state["shift"],
        is_positive=state["is_positive"],
        **_read_places(state, device),
    )


def _entries_of(factor: Any) -> Tensor:
    """The entries of one side of a Kronecker product; the diagonal alone where that says all."""
    diagonal: Tensor = factor.diagonal()
    is_diagonal = factor.num_groups == 1 and factor.has_entries(diagonal)
    return diagonal.squeeze(0) if is_diagonal else factor.to_dense()


def _write_eigen(A: EigenDecomposed) -> State:
    bases = {"left": A.left_basis, "right": A.right_basis}
    copies = {side: None if basis is None else basis.clone() for side, basis in bases.items()}
    return {"values": A.values.clone(), **copies, **_write_places(A)}


def _read_eigen(state: Mapping[str, Any], device: torch.device) -> EigenDecomposed:
    left, right = (None if state[side] is None else _own(state[side], device) for side in ("left", "right"))
    return EigenDecomposed(_own(state["values"], device), left, right, **_read_places(state, device))


def _write_low_rank(A: LowRankLinearOperator) -> State:
    # With an orthonormal basis Q of the columns, A = Q (QᵀAQ - cI) Qᵀ + cI.
    basis = torch.linalg.qr(_wide(A.U.to_dense())).Q
    product = _wide(A @ basis.to(A.dtype)) - A.c * basis
    core = basis.T @ product
    weights, vectors = torch.linalg.eigh((core + core.T) / 2)
    return {"columns": (basis @ vectors).to(A.dtype), "weights": weights, "c": A.c}


def _read_low_rank(state: Mapping[str, Any], device: torch.device) -> LowRankLinearOperator:
    columns = TensorLinearOperator(_own(state["columns"], device))
    return LowRankLinearOperator(columns, _own(state["weights"], device), state["c"])


def _write_blocks(A: BlockDiagonal) -> State:
    blocks = [to_state(block) for block in A.blocks]
    return {"blocks": blocks, "positions": A.positions, "space": _write_space(A.domain)}


def _read_blocks(state: Mapping[str, Any], device: torch.device) -> BlockDiagonal:
    blocks = [from_state(block, device) for block in state["blocks"]]
    return BlockDiagonal(blocks, positions=state["positions"], space=_read_space(state["space"], device))


# -- what several of them have -----------------------------------------------------------------------------------------


def _write_places(A: Kronecker | EigenDecomposed) -> State:
    return {"arrangement": asdict(A.arrangement), "space": _write_space(A.domain)}


def _read_places(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {"arrangement": Arrangement(**state["arrangement"]), "space": _read_space(state["space"], device)}


def _write_space(space: Space) -> State:
    return {"shapes": space.shapes, "names": space.names, "dtype": str(space.dtype).removeprefix("torch.")}


def _read_space(state: Mapping[str, Any], device: torch.device) -> Space:
    return Space(state["shapes"], getattr(torch, state["dtype"]), device, state["names"])


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device=device, copy=True)


def _wide(tensor: Tensor) -> Tensor:
    """Half precision as float32, which can be decomposed."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


_KINDS: dict[str, tuple[type[LinearOperator], Callable[[Any], State], Callable[..., LinearOperator]]] = {
    "diagonal": (Diagonal, _write_diagonal, _read_diagonal),
    "dense": (TensorLinearOperator, _write_dense, _read_dense),
    "kronecker": (Kronecker, _write_kronecker, _read_kronecker),
    "eigendecomposed": (EigenDecomposed, _write_eigen, _read_eigen),
    "low rank": (LowRankLinearOperator, _write_low_rank, _read_low_rank),
    "blocks": (BlockDiagonal, _write_blocks, _read_blocks),
}
