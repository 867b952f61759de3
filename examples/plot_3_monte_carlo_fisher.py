r"""
The Fisher matrix by sampling
=============================

For the cross-entropy loss the Fisher matrix equals the generalised Gauss-Newton matrix (GGN). With the network's
Jacobian :math:`J_n` at datum :math:`n` and its predicted probabilities :math:`p_n`, both are

.. math::

    G = \frac{1}{N} \sum_n J_n^\top (\operatorname{diag}(p_n) - p_n p_n^\top) J_n
      = \frac{1}{N} \sum_n \mathbb{E}_{\hat y \sim p_n}
        \left[ J_n^\top (p_n - e_{\hat y}) (p_n - e_{\hat y})^\top J_n \right] .

The expectation invites sampling: draw :math:`M` labels :math:`\hat y` for each datum *from the model's own prediction*
and average. The result is the Monte-Carlo Fisher matrix. It needs :math:`M` vectors a datum where the GGN needs as many
as there are classes, which matters when there are many classes. How good is it?
"""

# %%
# A network and its GGN
# ---------------------
#
# The network is small, with 334 parameters on digits reduced to 4 × 4 pixels, so that all matrices can be written down.

import math

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import avg_pool2d

from curvlinops import FisherMCLinearOperator, GGNLinearOperator

torch.manual_seed(0)
torch.set_num_threads(1)  # for matrices as small as these, more threads cost more than they give
digits = load_digits()
X = avg_pool2d(torch.tensor(digits.images[:300], dtype=torch.float32)[:, None] / 16, 2).flatten(1)
data = [(X, torch.tensor(digits.target[:300]))]

model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10))
loss_function = nn.CrossEntropyLoss()
params = dict(model.named_parameters())

optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(100):
    optimizer.zero_grad()
    loss_function(model(data[0][0]), data[0][1]).backward()
    optimizer.step()

G = GGNLinearOperator(model, loss_function, params, data).to_dense()
print("GGN", tuple(G.shape))

# %%
# The sampled matrices
# --------------------
#
# A Monte-Carlo operator is *one* matrix, fixed by its seed: every product with it uses the same samples, and the global
# random state has no part in it. Another seed gives another, independent estimate.


def fisher(mc_samples, seed):
    # The model and the data are the same each time: one check that they repeat is enough.
    return FisherMCLinearOperator(
        model, loss_function, params, data, mc_samples=mc_samples, seed=seed, check_deterministic=False
    ).to_dense()


assert torch.equal(fisher(4, seed=1), fisher(4, seed=1))
assert not torch.equal(fisher(4, seed=1), fisher(4, seed=2))

num_samples = [4**k for k in range(6)]
seeds = range(10)
errors = torch.tensor(
    [[(fisher(M, seed) - G).norm() / G.norm() for seed in seeds] for M in num_samples], dtype=torch.float64
)

print("samples   relative error (mean over seeds)")
for M, error in zip(num_samples, errors.mean(1)):
    print(f"{M:7d}   {error:.4f}")

# %%
# The error falls like :math:`1/\sqrt M`, as that of any average of independent samples: for one more digit, a hundred
# times the samples. A single sample a datum does better than one may fear, because the sum over the data averages, too.

ratio = errors[-1].mean() / errors[0].mean()
slope = math.log(ratio) / math.log(num_samples[-1] / num_samples[0])
print(f"measured: error proportional to M to the power of {slope:.2f}")

fig, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
ax.fill_between(num_samples, errors.amin(1), errors.amax(1), color="#0072B2", alpha=0.25, linewidth=0)
ax.loglog(num_samples, errors.mean(1), "o-", color="#0072B2", label=f"mean and range over {len(seeds)} seeds")
guide = errors[0].mean() / torch.tensor(num_samples).sqrt()
ax.loglog(num_samples, guide, "--", color="black", label=r"$1/\sqrt{M}$")
ax.set_xlabel("samples per datum $M$")
ax.set_ylabel(r"$\Vert F_M - G \Vert_F \,/\, \Vert G \Vert_F$")
ax.set_title("Monte-Carlo Fisher against the exact GGN")
ax.grid(alpha=0.3, which="both")
ax.legend()
plt.show()

# %%
# What the error looks like
# -------------------------
#
# The entries of the last layer's block (absolute values), class by class, the biases last. One sample already gives the
# large entries; the small ones need more.

last = slice(16 * 12 + 12, None)
matrices = {"$M = 1$": fisher(1, 0), "$M = 30$": fisher(30, 0), "$M = 1000$": fisher(1000, 0), "exact": G}
vmax = G[last, last].abs().max().item()
fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
for ax, (title, F) in zip(axes, matrices.items()):
    image = ax.imshow(F[last, last].abs(), norm=LogNorm(vmin=1e-4 * vmax, vmax=vmax), cmap="cividis")
    ax.set_title(title)
    ax.set_xticks([])
    ax.set_yticks([])
fig.colorbar(image, ax=axes, label="absolute value", shrink=0.9, pad=0.01)
plt.show()
