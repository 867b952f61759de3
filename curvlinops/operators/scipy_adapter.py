"""A linear operator for SciPy's solvers: the only place where tensors become NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator
from torch import Tensor

from curvlinops.operators.base import LinearOperator


class _ScipyAdapter(ScipyLinearOperator):
    def __init__(self, operator: LinearOperator, dtype: Any) -> None:
        self._operator = operator
        super().__init__(np.dtype(dtype), operator.shape)  # type: ignore[call-arg]

    def _from_numpy(self, X: np.ndarray[Any, Any]) -> Tensor:
        if np.iscomplexobj(X):
            raise TypeError("Expected a real array, got a complex one: curvature matrices are real.")
        # Read-only arrays are copied, which PyTorch would otherwise warn about.
        writable = np.require(X, requirements=["C", "W"])
        return torch.as_tensor(writable, device=self._operator.device).to(self._operator.dtype)

    def _to_numpy(self, X: Tensor) -> np.ndarray[Any, Any]:
        plain = X.float() if X.dtype in (torch.bfloat16, torch.float16) else X
        return plain.cpu().numpy().astype(self.dtype, copy=False)

    def _matvec(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self._to_numpy(self._operator @ self._from_numpy(x).reshape(-1))

    def _matmat(self, X: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self._to_numpy(self._operator @ self._from_numpy(X))

    def _rmatvec(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self._to_numpy(self._operator.H @ self._from_numpy(x).reshape(-1))

    def _rmatmat(self, X: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self._to_numpy(self._operator.H @ self._from_numpy(X))


def to_scipy(operator: LinearOperator, dtype: Any = None) -> ScipyLinearOperator:
    """Wrap an operator for SciPy; see :meth:`LinearOperator.to_scipy`."""
    if dtype is None:
        half = operator.dtype in (torch.bfloat16, torch.float16)
        dtype = np.float32 if half else torch.empty(0, dtype=operator.dtype).numpy().dtype
    return _ScipyAdapter(operator, dtype)
