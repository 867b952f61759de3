r"""
Traces and diagonals by random products
=======================================

The trace of a curvature matrix says how curved a loss is in total, its diagonal how curved along each parameter. Both
exactly take as many products as there are parameters. Random vectors give estimates from a few dozen: since
:math:`\mathbb{E}[v v^\top] = I`,

.. math::

    \operatorname{tr}(A) = \mathbb{E}[v^\top A v] , \qquad \operatorname{diag}(A) = \mathbb{E}[v \circ A v] ,

which is Hutchinson's estimator. Its error falls as one over the root of the number of products. Curvature matrices have
a few large eigenvalues and many small ones. Hutch++, XTrace, XNysTrace and XDiag know how to use that: they find the
large ones first, and estimate only what is left. How much does that help at the same cost?
"""

# %%
# A matrix and its true trace
# ---------------------------
#
# A network of 1482 parameters, in double precision, so that the truth can be had: by as many products.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvlinops import (
    GGNLinearOperator,
    block_traces,
    hutchinson_diag,
    hutchinson_trace,
    hutchpp_trace,
    xdiag,
    xnystrace,
    xtrace,
)
from curvlinops.plotting import plot_block_traces, plot_estimates, plot_matrix

torch.manual_seed(0)
torch.set_num_threads(1)  # for matrices as small as these, more threads cost more than they give
digits = load_digits()
X, y = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
loss_function = nn.CrossEntropyLoss()
model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10)).double()

optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(60):
    for idx in torch.arange(len(X)).split(600):
        optimizer.zero_grad()
        loss_function(model(X[idx]), y[idx]).backward()
        optimizer.step()

params = dict(model.named_parameters())
G = GGNLinearOperator(model, loss_function, params, [(X, y)])
D = G.shape[0]
dense = G.to_dense()
diagonal, trace = dense.diagonal(), dense.trace()
print(f"trace {trace:.4f}, from {D} products")

# %%
# Estimates with error bars
# -------------------------
#
# All estimators take the number of products, so that they can be compared at equal cost, and with ``return_stderr``
# they also say how far off they may be. For Hutchinson's, that is a standard error. For the others it is an indication
# that may be wrong by a factor: their samples share a sketch, and what they share does not show.

estimators = {"Hutchinson": hutchinson_trace, "Hutch++": hutchpp_trace, "XTrace": xtrace, "XNysTrace": xnystrace}
costs = [12, 24, 48, 96]
estimates = {name: [estimate(G, cost, return_stderr=True) for cost in costs] for name, estimate in estimators.items()}
for name, found in estimates.items():
    print(f"{name:10s}", "  ".join(f"{value:7.3f} ± {error:.3f}" for value, error in found))

ax = plot_estimates(costs, estimates, truth=trace)
ax.set_title(f"Trace of the GGN, of size {D}")
plt.show()

# %%
# Are they right?
# ---------------
#
# One estimate proves nothing. Here are many, with different seeds, on the same matrix, which was written down above:
# estimators take tensors, too. The points are root mean squares of the true relative error, the
# lines those of the errors that the estimators claimed.

seeds = range(16)
true_errors, claimed_errors = {}, {}
for name, estimate in estimators.items():
    runs = [[estimate(dense, cost, seed=seed, return_stderr=True) for seed in seeds] for cost in costs]
    values = torch.tensor([[value for value, _ in row] for row in runs], dtype=torch.float64)
    errors = torch.tensor([[error for _, error in row] for row in runs], dtype=torch.float64)
    true_errors[name] = (values - trace).square().mean(1).sqrt() / trace
    claimed_errors[name] = errors.square().mean(1).sqrt() / trace

print("products  " + "  ".join(f"{cost:>8d}" for cost in costs))
for name, errors in true_errors.items():
    print(f"{name:10s}" + "  ".join(f"{error:8.1e}" for error in errors))

fig, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
for name, colour, marker in zip(estimators, ["#0072B2", "#D55E00", "#009E73", "#CC79A7"], "osD^"):
    ax.loglog(costs, true_errors[name], marker, color=colour, label=name)
    ax.loglog(costs, claimed_errors[name], "-", color=colour, linewidth=1)
guide = true_errors["Hutchinson"][0] * (costs[0] / torch.tensor(costs)).sqrt()
ax.loglog(costs, guide, ":", color="black", label="one over the root of the cost")
ax.set_xticks(costs, costs)
ax.minorticks_off()
ax.set_xlabel("number of products")
ax.set_ylabel("relative error (points), as claimed (lines)")
ax.set_title(f"Root mean squares over {len(seeds)} seeds")
ax.grid(alpha=0.3)
ax.legend()
plt.show()

# %%
# At 96 products, the three that look for large eigenvalues are more accurate by an order of magnitude. Hutchinson's
# estimator would need about the square of that as a factor to keep up, more products than the exact trace takes.

for name in ("Hutch++", "XTrace", "XNysTrace"):
    ratio = (true_errors["Hutchinson"][-1] / true_errors[name][-1]).item()
    print(f"{name:10s}: {ratio:5.1f} times as accurate as Hutchinson's, which would need {96 * ratio**2:,.0f} products")
    assert ratio > 4

# %%
# The claims of Hutchinson's, Hutch++ and XTrace are right to a factor of about two, too small rather than too large.
# XNysTrace claims less than it gives.

for name, claimed in claimed_errors.items():
    ratios = claimed / true_errors[name]
    print(f"{name:10s} claimed over true error: " + "  ".join(f"{ratio:4.1f}" for ratio in ratios))
    assert (ratios > 0.4).all()
    assert (ratios < (10 if name == "XNysTrace" else 2.5)).all()

# %%
# The diagonal
# ------------
#
# For the diagonal the difference is larger: the error of Hutchinson's estimate of an entry comes from all the others of
# its row, and a few large eigenvectors fill all rows.

print("products          " + "  ".join(f"{cost:>8d}" for cost in costs))
diagonal_errors = {}
for name, estimate in {"Hutchinson": hutchinson_diag, "XDiag": xdiag}.items():
    relative = torch.tensor(
        [[(estimate(dense, cost, seed=seed) - diagonal).norm() / diagonal.norm() for seed in seeds] for cost in costs]
    )
    diagonal_errors[name] = relative.square().mean(1).sqrt()
    print(f"{name:16s}  " + "  ".join(f"{error:8.1e}" for error in diagonal_errors[name]))
assert diagonal_errors["XDiag"][-1] < diagonal_errors["Hutchinson"][-1] / 5

fig, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
for ax, (name, estimate) in zip(axes, {"Hutchinson": hutchinson_diag, "XDiag": xdiag}.items()):
    found = estimate(G, 96)
    ends = [diagonal.max().item() * 1e-5, diagonal.max().item() * 2]
    ax.loglog(ends, ends, color="0.5", linewidth=1)
    is_positive = found > 0
    ax.loglog(diagonal[is_positive], found[is_positive], ".", color="#0072B2", markersize=3, label="positive")
    ax.loglog(diagonal[~is_positive], -found[~is_positive], "x", color="#D55E00", markersize=3, label="negative")
    ax.set_xlim(ends)
    ax.set_ylim(ends)
    ax.set_title(f"{name}, 96 products: {int((~is_positive).sum())} of {D} are negative")
    ax.set_xlabel("entry of the diagonal")
    ax.legend(title="estimate is")
    ax.grid(alpha=0.3)
axes[0].set_ylabel("absolute value of the estimate")
plt.show()

# %%
# Which layer carries the curvature?
# ----------------------------------
#
# The same products also give the trace of each diagonal block, that of one tensor of the parameters. Here, the first
# layer carries most. The standard errors hold against the exact traces:

traces = block_traces(G, num_matvecs=96, return_stderr=True)
exact = {name: part.sum() for (name, part) in zip(params, diagonal.split([p.numel() for p in params.values()]))}
for name, (value, error) in traces.items():
    off = abs(value - exact[name]) / error
    print(f"{name:9s} {value:7.3f} ± {error:.3f}, exactly {exact[name]:7.3f}: off by {off:.1f} standard errors")
    assert off < 3.5
assert exact["0.weight"] / trace > 0.5

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
plot_block_traces(traces, ax=left)
last_layers = G.block("2.*", "4.*")
plot_matrix(last_layers, ax=right)
right.set_title("entries of the two last layers")
plt.show()
