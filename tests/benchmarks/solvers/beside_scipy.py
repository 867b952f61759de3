"""Eigenpairs of a GGN and solves with an indefinite Hessian, beside SciPy's through ``to_scipy()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg as scipy_linalg
import torch
from torch import Tensor

from curvlinops import HessianLinearOperator, MINRESInverseLinearOperator, eigsh
from curvlinops.operators.base import LinearOperator
from tests.benchmarks.solvers import problems
from tests.benchmarks.solvers.plan import EIGEN_TOLERANCE, RESIDUAL, Plan
from tests.benchmarks.solvers.race import Answer, contender, race
from tests.benchmarks.solvers.single import ggn

NUM_PAIRS = 10
NUM_VECTORS = 2 * NUM_PAIRS + 30
"""The basis that ours has by default, for SciPy as well where it is asked to."""
SCIPY_TOLERANCES = [1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11, 1e-12]


class Counted(scipy_linalg.LinearOperator):
    """An operator of SciPy that counts its products."""

    def __init__(self, operator: LinearOperator) -> None:
        self._inner = operator.to_scipy()
        self.products = 0
        super().__init__(self._inner.dtype, self._inner.shape)

    def _matvec(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.products += 1
        return self._inner.matvec(x)


def eigenpairs(plan: Plan) -> Answer:
    """The largest eigenpairs in float64 and float32; residuals are taken in float64 for the same parameters."""
    trained, rows = problems.trained(plan.wide), []
    for dtype in (torch.float64, torch.float32):
        problem = problems.converted(trained, dtype)
        exact, G = problem.doubled(), ggn(problem)

        def told(found: tuple[Any, Any, int], exact: Any = exact) -> Answer:
            values, vectors, products = found
            pairs = zip(torch.as_tensor(values).double().tolist(), torch.as_tensor(vectors).double().T, strict=True)
            residuals = [float((problems.ggn_product(exact, v) - w * v).norm() / (w * v.norm())) for w, v in pairs]
            return {"products": products, "residual": max(residuals), "values": [float(value) for value in values]}

        def ours(G: LinearOperator = G) -> tuple[Any, Any, int]:
            found = eigsh(G, NUM_PAIRS, "LA", tol=EIGEN_TOLERANCE)
            return found.values, found.vectors, found.num_matvecs

        def arpack(is_kept: bool, ncv: int | None = None, G: LinearOperator = G) -> Callable[[], tuple[Any, Any, int]]:
            def work() -> tuple[Any, Any, int]:
                counted = Counted(G.linearize() if is_kept else G)
                start = np.random.default_rng(0).standard_normal(G.shape[0])
                pairs = scipy_linalg.eigsh(counted, NUM_PAIRS, which="LA", tol=EIGEN_TOLERANCE, ncv=ncv, v0=start)
                return *pairs, counted.products

            return work

        contenders = {
            "ours": contender(ours, told),
            "streamed": contender(arpack(False), told),
            "kept": contender(arpack(True), told),
            "kept_large": contender(arpack(True, NUM_VECTORS), told),
        }
        row = {"dtype": str(dtype).removeprefix("torch."), "sides": race(contenders, plan.effort)}
        print(describe(row["dtype"], row["sides"]), flush=True)
        rows.append(row)
    return {"network": plan.wide, "facts": problems.facts(trained), "rows": rows}


def indefinite(plan: Plan) -> Answer:
    """Solves with a damped Hessian that may have eigenvalues of both signs."""
    problem = problems.trained(plan.network, plan.num_data // 2, num_batches=2)
    H = HessianLinearOperator(problem.model, problem.loss, problem.params, problem.data, check_deterministic=False)
    rows = []
    b = problems.right_sides(problem)["gradient"]
    ends = eigsh(H, 2, "BE", tol=1e-3).values.tolist()
    for damping in plan.indefinite_dampings:
        row = {"damping": damping, "smallest": ends[0] + damping, "largest": ends[1] + damping}
        row |= _solves(plan, problem, H, damping, b)
        print(describe(f"{damping:g}, eigenvalues from {row['smallest']:.2g}", row["sides"]), flush=True)
        rows.append(row)
    return {"network": plan.network, "facts": problems.facts(problem), "rows": rows}


def _solves(plan: Plan, problem: Any, H: LinearOperator, damping: float, b: Tensor) -> Answer:
    def told(found: tuple[Any, int]) -> Answer:
        x = torch.as_tensor(found[0])
        residual = problems.residual(problems.hessian_product, problem, damping, x, b)
        return {"products": found[1], "residual": residual}

    def ours() -> tuple[Tensor, int]:
        inverse = MINRESInverseLinearOperator(H.damped(damping), rtol=RESIDUAL, max_iter=plan.max_iter)
        x = inverse @ b
        assert inverse.info is not None
        return x, inverse.info.num_matvecs

    def scipy(is_kept: bool, rtol: float) -> Callable[[], tuple[Any, int]]:
        def work() -> tuple[Any, int]:
            counted = Counted((H.linearize() if is_kept else H).damped(damping))
            x, _ = scipy_linalg.minres(counted, b.numpy(), rtol=rtol, maxiter=plan.max_iter)
            return x, counted.products

        return work

    rtol, contenders = None, {"ours": contender(ours, told)}
    for asked in SCIPY_TOLERANCES:
        answer = contender(scipy(True, asked), told)()
        if answer["residual"] <= RESIDUAL:
            rtol = asked
            contenders["streamed"] = contender(scipy(False, asked), told)
            contenders["kept"] = contender(scipy(True, asked), told)
            break
        if answer["products"] >= plan.max_iter - 1:
            break
    return {"scipy_rtol": rtol, "sides": race(contenders, plan.effort)}


def describe(title: str, sides: dict[str, Answer]) -> str:
    """Say in one line what was measured."""
    words = [f"{k} {s['products']} products, {s['cpu']:.2f} s, residual {s['residual']:.1e}" for k, s in sides.items()]
    return f"  {title}: " + "; ".join(words)
