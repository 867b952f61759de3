r"""
Spectra before and after training
=================================

How curved is the loss of a network, and in how many directions? The eigenvalues of its Hessian answer that. For a
network that classifies, they look alike again and again: a great many close to zero, the bulk, and a few large ones
apart from it, the outliers. Their number goes with that of the classes (`Sagun, Evci, Güney, Dauphin and Bottou, 2017
<https://arxiv.org/abs/1706.04454>`_; `Papyan, 2019 <https://arxiv.org/abs/1901.08244>`_).

This script looks at one network on handwritten digits three times: before training, after some, and after a lot. Two
tools are enough, and both need products :math:`A v` alone. ``eigsh`` finds the largest eigenvalues one by one.
Stochastic Lanczos quadrature finds the density of all of them, without any one in particular.
"""

# %%
# Three networks
# --------------

from copy import deepcopy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import (
    GGNLinearOperator,
    HessianLinearOperator,
    eigsh,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
)
from curvlinops.plotting import plot_spectral_density

torch.manual_seed(0)
torch.set_num_threads(1)  # for matrices as small as these, more threads cost more than they give
digits = load_digits()
X, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
data = DataLoader(TensorDataset(X, y), batch_size=600)
loss_function = nn.CrossEntropyLoss()
C = 10  # classes


def train(network, num_epochs):
    """A copy of the network, trained."""
    network = deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(num_epochs):
        for X_batch, y_batch in data:
            optimizer.zero_grad()
            loss_function(network(X_batch), y_batch).backward()
            optimizer.step()
    return network


start = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, C))
networks = {"before training": start}
networks["after 50 epochs"] = train(start, 50)
networks["after 200 epochs"] = train(networks["after 50 epochs"], 150)

for stage, network in networks.items():
    with torch.no_grad():
        loss, accuracy = loss_function(network(X), y), (network(X).argmax(1) == y).double().mean()
    print(f"{stage:16s}  loss {loss:.3f}, accuracy {accuracy:.3f}")

# %%
# The largest eigenvalues
# -----------------------
#
# The Hessian is the sum of the generalised Gauss-Newton matrix (GGN), which has no negative eigenvalues, and a rest
# that is small where the data are fitted well. ``eigsh`` returns what it found together with the residuals
# :math:`\lVert A v - \lambda v \rVert`; each value lies within its residual of a true eigenvalue.

matrices = {
    "GGN": {
        stage: GGNLinearOperator(net, loss_function, dict(net.named_parameters()), data)
        for stage, net in networks.items()
    },
    "Hessian": {
        stage: HessianLinearOperator(net, loss_function, dict(net.named_parameters()), data)
        for stage, net in networks.items()
    },
}
D = matrices["GGN"]["before training"].shape[0]
num_eigenvalues = 25
largest = {}
for name, stages in matrices.items():
    for stage, A in stages.items():
        found = eigsh(A, k=num_eigenvalues, which="LA", tol=1e-4)
        assert found.converged.all()
        largest[name, stage] = found.values.flip(0)
        shown = "  ".join(f"{value:.2f}" for value in largest[name, stage][:11])
        print(f"{name:8s} {stage:16s} {found.num_matvecs:4d} products:  {shown} ...")

# %%
# Where do the outliers end? Where the next eigenvalue is smallest beside the one before it. Counted like that, the GGN
# has as many outliers as there are classes, less one: the probabilities of a datum sum to one, so shifting all its
# logits by the same amount changes nothing. This holds before training, too: that is the structure of the problem and
# not what the network has learnt. Once it fits nearly every digit, few are left that pull at all, and the outliers
# dissolve into the bulk.


def count_outliers(values):
    return int((values[:-1] / values[1:]).argmax()) + 1


for stage in networks:
    values = largest["GGN", stage]
    k = count_outliers(values)
    print(f"GGN {stage:16s}: the largest gap is a factor of {values[k - 1] / values[k]:.1f}, below eigenvalue {k}")
for stage in ("before training", "after 50 epochs"):
    assert count_outliers(largest["GGN", stage]) == C - 1
gaps = [float(values[C - 2] / values[C - 1]) for values in (largest["GGN", stage] for stage in networks)]
assert gaps[0] > gaps[1] > gaps[2]

styles = {"GGN": ("#0072B2", "o"), "Hessian": ("#D55E00", "s")}
fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
for ax, stage in zip(axes, networks):
    for name, (colour, marker) in styles.items():
        ax.semilogy(range(1, num_eigenvalues + 1), largest[name, stage], marker, color=colour, label=name, mfc="none")
    ax.axvline(C - 0.5, color="0.4", linestyle=":", label=f"{C} classes, less one")
    ax.set_title(stage)
    ax.set_xlabel("index")
    ax.grid(alpha=0.3)
axes[0].set_ylabel("eigenvalue")
axes[0].legend()
plt.show()

# %%
# All of them
# -----------
#
# The network has 2410 parameters, so that the largest eigenvalues are one in a hundred. The density shows the others:
# :math:`p(\lambda)` is the share of eigenvalues per unit of :math:`\lambda`, here the average of 10 runs of 40
# products. The band is twice its standard error. The stems are the eigenvalues from above, each of which the density
# sees as a small peak; its area is one part in 2410, in the mean over runs.

densities = {}
for stage, A in matrices["GGN"].items():
    densities[stage] = lanczos_approximate_spectrum(A, ncv=40, num_repeats=10, return_stderr=True)
    grid, density, _ = densities[stage]
    assert abs(torch.trapezoid(density, grid) - 1) < 1e-3

fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
for ax, stage in zip(axes, networks):
    plot_spectral_density(*densities[stage], eigenvalues=largest["GGN", stage][: C - 1], ax=ax)
    ax.set_title(f"GGN {stage}")
plt.show()

# %%
# A density can be integrated, also over a part of the axis. Between the outliers and the bulk of the first two networks
# there is room for a boundary; the density above it, times the number of parameters, is the number of outliers.

for stage in ("before training", "after 50 epochs"):
    grid, density, _ = densities[stage]
    values = largest["GGN", stage]
    boundary = (values[C - 2] * values[C - 1]).sqrt()
    above = grid >= boundary
    count = D * torch.trapezoid(density[above], grid[above])
    print(f"GGN {stage:16s}: {count:.1f} of {D} eigenvalues above {boundary:.2f}, by the density")
    assert abs(count - (C - 1)) < 3

# %%
# Negative curvature
# ------------------
#
# The Hessian has negative eigenvalues as well. On a logarithmic axis the two signs become two curves. Before training
# they nearly coincide: about as many directions lead down as up, but for the outliers. Training removes most of the
# negative curvature.

fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
negative_mass = {}
for ax, (stage, A) in zip(axes, matrices["Hessian"].items()):
    grid, density, stderr = lanczos_approximate_log_spectrum(
        A, ncv=50, num_repeats=6, split_signs=True, return_stderr=True, epsilon=1e-5
    )
    plot_spectral_density(grid, density, stderr, ax=ax)
    ax.set_title(f"Hessian {stage}")
    curved = grid > 1e-2  # what is smaller is flat in single precision and to a Lanczos run of 50 steps
    negative_mass[stage] = [float(torch.trapezoid(part[curved], grid[curved])) for part in density]
plt.show()

for stage, (negative, positive) in negative_mass.items():
    lowest = eigsh(matrices["Hessian"][stage], k=1, which="SA", tol=1e-3).values.item()
    print(
        f"{stage:16s}: eigenvalues below -0.01: {100 * negative:4.1f} %, above 0.01: {100 * positive:4.1f} %, "
        f"the lowest {lowest:.4f}"
    )
shares = [negative for negative, _ in negative_mass.values()]
assert shares[0] > shares[1] > shares[2]
