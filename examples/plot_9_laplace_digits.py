r"""
Knowing what it does not know
=============================

A network that has learnt the digits from 0 to 7 is shown an 8, or a 3 that lies on its side. It names one of its eight
classes, often with confidence. The Laplace approximation (`MacKay, 1992 <https://doi.org/10.1162/neco.1992.4.3.448>`_;
`Daxberger et al., 2021 <https://arxiv.org/abs/2106.14806>`_) turns the trained network into a distribution of networks,

.. math::

    \theta \sim \mathcal{N}\bigl(\theta_*, (K + \delta I)^{-1}\bigr) ,

with the curvature :math:`K` of the *sum* of the losses at the trained parameters :math:`\theta_*`, and the precision
:math:`\delta` of a prior :math:`\mathcal{N}(0, \delta^{-1} I)`. Where the data do not pin the parameters down, these
networks disagree, and the mean of their predictions is cautious.

:math:`K` would be the GGN, which has :math:`D^2` entries. Here the network is small enough for it, so that one can see
what KFAC, EKFAC and the diagonal make of it.
"""

# %%
# Eight of ten classes
# --------------------
#
# The network is trained with weight decay :math:`\lambda` beside the *mean* of the losses of :math:`N` data. Times
# :math:`N`, that is the sum of the losses with a prior of precision :math:`\delta = N \lambda`.

from functools import partial
from time import perf_counter

import matplotlib.pyplot as plt
import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy

from curvlinops import (
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    TensorLinearOperator,
)

torch.manual_seed(0)
torch.set_num_threads(1)  # for matrices as small as these, more threads cost more than they give
digits = load_digits()
images, labels = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
known, unknown = torch.nonzero(labels < 8).flatten(), torch.nonzero(labels >= 8).flatten()
training, test = known[torch.randperm(len(known))].split([900, len(known) - 900])
X, y, N = images[training], labels[training], len(training)
WEIGHT_DECAY = 2e-3

network = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)).double()
params = dict(network.named_parameters())
optimizer = torch.optim.LBFGS(network.parameters(), max_iter=200, tolerance_grad=1e-5, line_search_fn="strong_wolfe")


def closure():
    optimizer.zero_grad()
    risk = cross_entropy(network(X), y) + WEIGHT_DECAY / 2 * sum(p.square().sum() for p in params.values())
    risk.backward()
    return risk


optimizer.step(closure)
with torch.no_grad():
    accuracy = (network(images[test]).argmax(1) == labels[test]).double().mean()
print(f"accuracy on {len(test)} test digits of the known classes {accuracy:.3f}")
assert accuracy > 0.95

# %%
# Four curvatures
# ---------------
#
# With ``reduction="sum"`` the matrices have the scale that the posterior asks for; those of a loss with ``"mean"``
# would have to be multiplied by :math:`N`. Eight classes are few, so that ``fisher_type="type-2"``, one backward for
# each, costs little, and nothing is sampled: KFAC and EKFAC approximate the GGN itself.

loss_function = nn.CrossEntropyLoss(reduction="sum")
arguments = (network, loss_function, params, [(X, y)])


def timed(name, function):
    begin = perf_counter()
    result = function()
    print(f"{name:10s} {perf_counter() - begin:6.2f} s")
    return result


one_block = {"fisher_type": "type-2", "separate_weight_and_bias": False}  # for a weight and its bias
curvatures = {
    "GGN": timed("GGN", lambda: TensorLinearOperator(GGNLinearOperator(*arguments).to_dense())),
    "KFAC": timed("KFAC", lambda: KFACLinearOperator(*arguments, **one_block).compute()),
    "EKFAC": timed("EKFAC", lambda: EKFACLinearOperator(*arguments, **one_block).compute()),
    "diagonal": GGNDiagonalLinearOperator(*arguments),
}
D = curvatures["GGN"].shape[0]
print(f"{D} parameters")
print(curvatures["KFAC"].blocks)

# %%
# How confident a prior?
# ----------------------
#
# The same approximation gives the evidence, the probability of the training data under the prior,
#
# .. math::
#
#     \log p(\mathcal{D}) \approx - \sum_n \ell_n(\theta_*) - \frac{\delta}{2} \lVert \theta_* \rVert^2
#     + \frac{D}{2} \log \delta - \frac{1}{2} \log \det (K + \delta I) ,
#
# and its maximum a :math:`\delta` that no validation data were spent on. ``damped`` adds :math:`\delta I` exactly, and
# the log-determinant of what it gives has a closed form, which needs one eigendecomposition of each factor for all
# :math:`\delta`. (``K.inverse(damping=δ)`` alone damps the factors, which is not the same matrix.)

theta = torch.cat([p.detach().flatten() for p in params.values()])
with torch.no_grad():
    sum_of_losses = loss_function(network(X), y).item()
precisions = torch.logspace(-2, 2, 13, dtype=torch.float64)


def log_evidences(curvature):
    logdets = torch.stack([curvature.damped(delta).logdet() for delta in precisions.tolist()])
    return -sum_of_losses - precisions / 2 * theta.square().sum() + D / 2 * precisions.log() - logdets / 2


evidence = {name: timed(name, partial(log_evidences, curvature)) for name, curvature in curvatures.items()}
chosen = {name: precisions[values.argmax()].item() for name, values in evidence.items()}
print("maximum at", ", ".join(f"{delta:.1f} ({name})" for name, delta in chosen.items()))
print(f"weight decay was {N * WEIGHT_DECAY:.1f}")
assert all(0.1 < delta < 10 for delta in chosen.values())

# %%
# All four choose about what the network was trained with. The evidence itself is another matter: that of the diagonal
# is far too low, and that of KFAC and EKFAC lies between, since none of them knows how layers depend on each other.

delta = chosen["GGN"]
gaps = {name: (values.max() - evidence["GGN"].max()).item() for name, values in evidence.items()}
print("log evidence less that of the GGN:", ", ".join(f"{gap:.0f} ({name})" for name, gap in gaps.items()))
assert gaps["diagonal"] < gaps["KFAC"] < 0
assert gaps["diagonal"] < gaps["EKFAC"] < 0

# %%
# Uncertain predictions
# ---------------------
#
# Samples of the posterior go through the network that is linear in its parameters,
# :math:`f(\theta_*) + J (\theta - \theta_*)`, which is the one that the GGN belongs to (`Immer et al., 2021
# <https://arxiv.org/abs/2008.08711>`_). One product with the Jacobian takes all samples of all posteriors at once.

NUM_SAMPLES = 64
posteriors = {name: curvature.damped(delta).inverse() for name, curvature in curvatures.items()}
deviations = torch.cat([posterior.sample(NUM_SAMPLES) for posterior in posteriors.values()], dim=1)  # [D, 4 * 64]


def predictions(Z):
    """Probabilities of the classes: of the trained network, and the mean over each posterior."""
    J = JacobianLinearOperator(network, params, [(Z, torch.zeros(len(Z)))])
    with torch.no_grad():
        logits = network(Z)
    sampled = logits.unsqueeze(-1) + (J @ deviations).reshape(len(Z), 8, -1)
    means = [group.softmax(1).mean(2) for group in sampled.split(NUM_SAMPLES, dim=2)]
    return {"trained network": logits.softmax(1), **dict(zip(posteriors, means))}


def confidence(probabilities):
    return probabilities.amax(1).mean().item()


def mean_loss(probabilities):
    return -probabilities.log().gather(1, labels[test].unsqueeze(1)).mean().item()


# %%
# On digits of the known classes, all are right about equally often, the diagonal a little less. Of an eight or a nine
# the trained network is two thirds sure that it is something else; the means of the posteriors are a good deal more
# careful. The last column is the probability that of a known and an unknown digit the latter gets the lower confidence,
# and there the trained network is as good: what it lacks is not the order but the size.

of_known, of_unknown = predictions(images[test]), predictions(images[unknown])
is_unknown = [0] * len(test) + [1] * len(unknown)
told_apart = {}
print("                  accuracy  mean loss  confidence  on 8 and 9  told apart")
for name, inside in of_known.items():
    outside = of_unknown[name]
    told_apart[name] = roc_auc_score(is_unknown, -torch.cat([inside, outside]).amax(1))
    share_right = (inside.argmax(1) == labels[test]).double().mean()
    print(
        f"{name:16s} {share_right:9.3f}  {mean_loss(inside):9.3f}  {confidence(inside):10.3f}  "
        f"{confidence(outside):10.3f}  {told_apart[name]:10.3f}"
    )
    assert abs(share_right - accuracy) < 0.03
for name in posteriors:
    assert confidence(of_unknown[name]) < confidence(of_unknown["trained network"]) - 0.1
assert min(told_apart.values()) > 0.9

# %%
# Caution has its price, as the loss on the known digits shows: at this size of network and data, the linearised
# networks are less sure than they could be. It pays as soon as something is different. Turned digits are known classes
# in a form that nobody showed the network.

ANGLES = [0, 15, 30, 45, 60, 75, 90]
losses = {name: [] for name in of_known}
sureness = {name: [] for name in of_known}
shares_right = []
for angle in ANGLES:
    turned = rotate(images[test].reshape(-1, 8, 8).numpy(), angle, axes=(1, 2), reshape=False, order=1)
    found = predictions(torch.tensor(turned).reshape(-1, 64))
    shares_right.append((found["trained network"].argmax(1) == labels[test]).double().mean().item())
    for name, probabilities in found.items():
        losses[name].append(mean_loss(probabilities))
        sureness[name].append(confidence(probabilities))

print("at 60 degrees, the mean loss is", ", ".join(f"{values[4]:.1f} ({name})" for name, values in losses.items()))
for name in posteriors:
    assert losses[name][4] < losses["trained network"][4] - 0.5

styles = {
    "trained network": {"color": "0.4", "marker": "x"},
    "GGN": {"color": "black", "marker": "o"},
    "KFAC": {"color": "#0072B2", "marker": "s"},
    "EKFAC": {"color": "#009E73", "marker": "^", "linestyle": "--"},
    "diagonal": {"color": "#D55E00", "marker": "v"},
}
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
for name, values in evidence.items():
    left.semilogx(precisions, values, label=name, **styles[name])
left.axvline(N * WEIGHT_DECAY, color="0.5", linestyle=":", label="N · weight decay")
left.set_ylim(bottom=evidence["GGN"].max().item() - 2000)
left.set_xlabel("prior precision δ")
left.set_ylabel("log evidence")
for name in losses:
    middle.plot(ANGLES, losses[name], label=name, **styles[name])
    right.plot(ANGLES, sureness[name], label=name, **styles[name])
right.plot(ANGLES, shares_right, color="0.7", linewidth=4, label="share that is right")
middle.set_ylabel("mean loss of turned digits")
right.set_ylabel("mean confidence")
right.set_ylim(0, 1.05)
for ax in (middle, right):
    ax.set_xlabel("angle in degrees")
    ax.set_xticks(ANGLES)
for ax in (left, middle, right):
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
plt.show()

# %%
# How near is each to the truth that it stands for? The posterior variances of the test digits' logits tell, as ratios
# to those of the GGN.

J = JacobianLinearOperator(network, params, [(images[test], labels[test])])
spreads = (J @ deviations).reshape(len(test), 8, len(posteriors), NUM_SAMPLES).var(-1).mean(1)
correlations = {}
for k, name in enumerate(posteriors):
    ratio = (spreads[:, k] / spreads[:, 0]).median()
    correlations[name] = torch.corrcoef(spreads[:, [0, k]].log().T)[0, 1]
    print(f"{name:10s} ratio of variances {ratio:.2f}, correlation of their logarithms {correlations[name]:.2f}")
assert min(correlations["KFAC"], correlations["EKFAC"]) > 0.85

# %%
# KFAC and EKFAC, made in a small part of the time and held in a few small matrices, make predictions that are hard to
# tell from those of the GGN. The diagonal takes parameters that depend on each other for independent ones: its
# variances are too large, and on what the network knows it is the most timid of all.
