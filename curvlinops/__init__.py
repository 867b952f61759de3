"""Matrix-free linear operators for the curvature matrices of neural networks in PyTorch."""

from curvlinops.curvature.base import CurvatureLinearOperator
from curvlinops.curvature.diagonals import EFDiagonalLinearOperator, GGNDiagonalLinearOperator
from curvlinops.curvature.fisher import FisherMCLinearOperator
from curvlinops.curvature.ggn import GGNLinearOperator
from curvlinops.curvature.gradient_moments import EFLinearOperator
from curvlinops.curvature.hessian import HessianLinearOperator
from curvlinops.curvature.jacobian import JacobianLinearOperator, TransposedJacobianLinearOperator
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.dense import TensorLinearOperator
from curvlinops.operators.exact import exact_diagonal, exact_trace
from curvlinops.operators.low_rank import LowRankLinearOperator
from curvlinops.operators.parts import SubmatrixLinearOperator
from curvlinops.operators.space import Space
from curvlinops.operators.structured import BlockDiagonal, Diagonal, IdentityLinearOperator
from curvlinops.risk.determinism import DeterminismError
from curvlinops.solvers.inverse import CGInverseLinearOperator, ConvergenceWarning

__all__ = [
    "BlockDiagonal",
    "CGInverseLinearOperator",
    "ConvergenceWarning",
    "CurvatureLinearOperator",
    "DeterminismError",
    "Diagonal",
    "EFDiagonalLinearOperator",
    "EFLinearOperator",
    "FisherMCLinearOperator",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "IdentityLinearOperator",
    "JacobianLinearOperator",
    "LinearOperator",
    "LowRankLinearOperator",
    "Space",
    "SubmatrixLinearOperator",
    "TensorLinearOperator",
    "TransposedJacobianLinearOperator",
    "exact_diagonal",
    "exact_trace",
]
