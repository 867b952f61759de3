"""Matrix-free linear operators for the curvature matrices of neural networks in PyTorch."""

from curvlinops.curvature.base import CurvatureLinearOperator
from curvlinops.curvature.diagonals import EFDiagonalLinearOperator, GGNDiagonalLinearOperator
from curvlinops.curvature.fisher import FisherMCLinearOperator
from curvlinops.curvature.ggn import GGNLinearOperator
from curvlinops.curvature.gradient_moments import EFLinearOperator
from curvlinops.curvature.hessian import HessianLinearOperator
from curvlinops.curvature.jacobian import JacobianLinearOperator, TransposedJacobianLinearOperator
from curvlinops.curvature.kronecker.ekfac import EKFACLinearOperator
from curvlinops.curvature.kronecker.kfac import KFACLinearOperator
from curvlinops.curvature.kronecker.kfoc import KFOCLinearOperator
from curvlinops.curvature.kronecker.types import FisherType, KFACType
from curvlinops.estimators.blocks import block_traces
from curvlinops.estimators.cached_spectrum import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
)
from curvlinops.estimators.estimate import Estimate, EstimateWithError
from curvlinops.estimators.hutchinson import hutchinson_diag, hutchinson_squared_fro, hutchinson_trace
from curvlinops.estimators.hutchpp import hutchpp_trace
from curvlinops.estimators.leave_one_out import xdiag, xnystrace, xtrace
from curvlinops.estimators.spectrum import lanczos_approximate_log_spectrum, lanczos_approximate_spectrum
from curvlinops.operators.arrangement import Arrangement
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.block_diagonal import BlockDiagonal
from curvlinops.operators.dense import TensorLinearOperator
from curvlinops.operators.eigen_decomposed import EigenDecomposed
from curvlinops.operators.exact import exact_diagonal, exact_trace
from curvlinops.operators.kronecker import Kronecker
from curvlinops.operators.low_rank import LowRankLinearOperator
from curvlinops.operators.parts import SubmatrixLinearOperator
from curvlinops.operators.space import Space
from curvlinops.operators.structured import Diagonal, IdentityLinearOperator
from curvlinops.risk.determinism import DeterminismError
from curvlinops.solvers.automatic import InverseLinearOperator
from curvlinops.solvers.damping_path import DampingPath, damping_path
from curvlinops.solvers.eigen import Eigenpairs, eigsh
from curvlinops.solvers.functions import FunctionTrace, logdet, trace_of_function
from curvlinops.solvers.info import ConvergenceWarning, LeastSquaresInfo, SolveInfo
from curvlinops.solvers.inverse import CGInverseLinearOperator, MINRESInverseLinearOperator
from curvlinops.solvers.least_squares import LSMRInverseLinearOperator
from curvlinops.solvers.neumann import NeumannInverseLinearOperator
from curvlinops.solvers.preconditioners import NystromPreconditioner, jacobi_preconditioner
from curvlinops.solvers.roots import RootInfo, inverse_sqrt_matvec, sqrt_matvec
from curvlinops.solvers.singular import SingularTriplets, svds

# The applications stand on the names above, so they come after them.
# isort: split
from curvlinops.applications.consolidation.diagonal_fisher import diagonal_fisher
from curvlinops.applications.consolidation.ewc import EWC
from curvlinops.applications.fishleg.likelihoods import (
    BernoulliLikelihood,
    FixedGaussianLikelihood,
    GaussianLikelihood,
    SoftMaxLikelihood,
)
from curvlinops.applications.fishleg.optimizer import FishLeg
from curvlinops.applications.learned_inverse.layers import NamedLayer, named_layers
from curvlinops.applications.learned_inverse.operator import LearnedInverseLinearOperator
from curvlinops.applications.merging.into import merge_into
from curvlinops.applications.merging.merge import MergeInfo, merge
from curvlinops.applications.merging.regmean import shrink_off_diagonal
from curvlinops.applications.pruning.surgeon import PruneInfo, obs_saliency, prune

__all__ = [
    "EWC",
    "Arrangement",
    "BernoulliLikelihood",
    "BlockDiagonal",
    "CGInverseLinearOperator",
    "ConvergenceWarning",
    "CurvatureLinearOperator",
    "DampingPath",
    "DeterminismError",
    "Diagonal",
    "EFDiagonalLinearOperator",
    "EFLinearOperator",
    "EKFACLinearOperator",
    "EigenDecomposed",
    "Eigenpairs",
    "Estimate",
    "EstimateWithError",
    "FishLeg",
    "FisherMCLinearOperator",
    "FisherType",
    "FixedGaussianLikelihood",
    "FunctionTrace",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "GaussianLikelihood",
    "HessianLinearOperator",
    "IdentityLinearOperator",
    "InverseLinearOperator",
    "JacobianLinearOperator",
    "KFACLinearOperator",
    "KFACType",
    "KFOCLinearOperator",
    "Kronecker",
    "LSMRInverseLinearOperator",
    "LanczosApproximateLogSpectrumCached",
    "LanczosApproximateSpectrumCached",
    "LearnedInverseLinearOperator",
    "LeastSquaresInfo",
    "LinearOperator",
    "LowRankLinearOperator",
    "MINRESInverseLinearOperator",
    "MergeInfo",
    "NamedLayer",
    "NeumannInverseLinearOperator",
    "NystromPreconditioner",
    "PruneInfo",
    "RootInfo",
    "SingularTriplets",
    "SoftMaxLikelihood",
    "SolveInfo",
    "Space",
    "SubmatrixLinearOperator",
    "TensorLinearOperator",
    "TransposedJacobianLinearOperator",
    "block_traces",
    "damping_path",
    "diagonal_fisher",
    "eigsh",
    "exact_diagonal",
    "exact_trace",
    "hutchinson_diag",
    "hutchinson_squared_fro",
    "hutchinson_trace",
    "hutchpp_trace",
    "inverse_sqrt_matvec",
    "jacobi_preconditioner",
    "lanczos_approximate_log_spectrum",
    "lanczos_approximate_spectrum",
    "logdet",
    "merge",
    "merge_into",
    "named_layers",
    "obs_saliency",
    "prune",
    "shrink_off_diagonal",
    "sqrt_matvec",
    "svds",
    "trace_of_function",
    "xdiag",
    "xnystrace",
    "xtrace",
]
