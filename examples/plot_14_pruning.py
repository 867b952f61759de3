r"""
Pruning: which weights can a network spare?
===========================================

At a minimum of the loss, taking a weight away costs what the curvature says. With :math:`Q` the inverse curvature,
setting :math:`\theta_q` to zero raises the loss by :math:`\theta_q^2 / (2 Q_{qq})`, if all other weights move by
:math:`-Q_{:q} \, \theta_q / Q_{qq}` to make up for it. This is the optimal brain surgeon of `Hassibi and Stork (1992)
<https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html>`_, and with a whole set
of weights at once it needs :math:`Q` for nothing but products and its diagonal. So any inverse will do. Here five of
them prune a network that was trained on digits:

* the identity: the smallest weights go, and none moves;
* the inverse of the GGN's diagonal: another order, but still none moves;
* the inverse of KFAC, which knows how the weights of a layer depend on each other;
* the inverse of a Monte-Carlo Fisher matrix of low rank, which knows this of all weights;
* an inverse that was learnt from products with the GGN.
"""

# %%
# A trained network
# -----------------
#
# The curvature is that of the loss with the weight decay it was trained with, so the damping that belongs to it is
# known. But all are approximations, and another damping may suit them better: each method takes the one of a few that
# is best on validation data.

import json
import os
from copy import deepcopy
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from curvlinops import (
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    IdentityLinearOperator,
    KFACLinearOperator,
    LearnedInverseLinearOperator,
    prune,
)

FULL = os.environ.get("CURVLINOPS_EXAMPLES") == "full"  # else the settings are small, and the script is fast
SEEDS = range(3) if FULL else range(1)
DAMPINGS = [1e-3, 1e-4] if FULL else [1e-3]
SPARSITIES = [0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98] if FULL else [0.5, 0.8, 0.9]
FIT_STEPS = 1000 if FULL else 200
STEPS = 8
WEIGHT_DECAY = 1e-3

torch.set_num_threads(1)  # for matrices as small as these, more threads cost more than they give
digits = load_digits()
images, labels = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
loss_function = nn.CrossEntropyLoss()


def trained(training):
    """A network of 2260 weights at a minimum of its loss."""
    network = nn.Sequential(nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 10)).double()
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        decay = WEIGHT_DECAY / 2 * sum(p.square().sum() for p in network.parameters())
        risk = cross_entropy(network(images[training]), labels[training]) + decay
        risk.backward()
        return risk

    optimizer.step(closure)
    return network


def accuracy(network, indices):
    """Share of the digits that the network gets right."""
    with torch.no_grad():
        return (network(images[indices]).argmax(1) == labels[indices]).double().mean().item()


# %%
# Five inverses
# -------------
#
# The curvatures are computed once; each gives an inverse for every damping. The learned inverse is fitted anew instead,
# by Adam, at one product with the GGN a step.


def inverses(network, training):
    """For each method, a function from the damping to the inverse curvature."""
    params = dict(network.named_parameters())
    problem = network, loss_function, params, [(images[training], labels[training])]
    diagonal = GGNDiagonalLinearOperator(*problem)
    kfac = KFACLinearOperator(*problem, fisher_type="type-2", separate_weight_and_bias=False)
    low_rank = FisherMCLinearOperator(*problem).to_low_rank()
    ggn = GGNLinearOperator(*problem)

    def learned(damping):
        Q = LearnedInverseLinearOperator(params, damping=damping, lr=1e-2)
        Q.fit(ggn, FIT_STEPS, precondition=True)
        return Q.frozen()

    return {
        "magnitude": lambda damping: IdentityLinearOperator(ggn.domain),
        "diagonal": diagonal.inverse,
        "KFAC": lambda damping: kfac.inverse(damping, use_exact_damping=True),
        "low rank": lambda damping: low_rank.damped(damping).inverse(),
        "learned": learned,
    }


# %%
# Pruning
# -------
#
# ``prune`` changes the network that it is given, so each gets a copy. All weights, biases too, are ranked together. For
# each inverse: only the order of the weights; the others making up for those that go; and this in eight steps, with the
# rest ranked anew in between.

WAYS = {
    "order only": {"compensate": False},
    "one step": {},
    f"{STEPS} steps": {"steps": STEPS},
}


def curve(network, Q, options, indices):
    """The accuracies of a network on several parts of the data, for all sparsities ``[sparsity, part]``."""
    rows = []
    for sparsity in SPARSITIES:
        pruned = deepcopy(network)
        prune(pruned, Q, sparsity, rtol=1e-3, **options)
        rows.append([accuracy(pruned, part) for part in indices])
    return torch.tensor(rows)


def run(seed):
    """Test accuracies of the network, and of each method and way at the damping that is best on validation data."""
    torch.manual_seed(seed)
    training, validation, test = torch.randperm(len(labels)).split([1000, 300, 497])
    network = trained(training)
    found = {}
    for method, inverse in inverses(network, training).items():
        known = [inverse(damping) for damping in (DAMPINGS if method != "magnitude" else [1.0])]
        for way, options in WAYS.items():
            curves = [curve(network, Q, options, [validation, test]) for Q in known]
            found[method, way] = max(curves, key=lambda table: table[:, 0].mean())[:, 1]
    return accuracy(network, test), found


results = [run(seed) for seed in SEEDS]
dense = sum(accuracy for accuracy, _ in results) / len(results)
means = {key: torch.stack([found[key] for _, found in results]).mean(0) for key in results[0][1]}

# %%
# Results
# -------

print(f"accuracy on held-out digits in percent; networks: {len(results)}; not pruned: {100 * dense:.1f}\n")
print("share of zeros            " + "".join(f"{sparsity:7.0%}" for sparsity in SPARSITIES))
for (method, way), accuracies in means.items():
    if method not in ("magnitude", "diagonal") or way == "order only":
        print(f"{method:10s} {way:14s} " + "".join(f"{100 * accuracy:7.1f}" for accuracy in accuracies.tolist()))

# %%
# What wins is not the order: by itself, that of a curvature does little for a network here, and over three networks it
# is about as often worse than the order by magnitude as better. But once the other weights make up for those that go,
# KFAC spares four fifths of the weights at a cost of two percent. It does best, although it knows of no dependence
# between layers; the Fisher matrix of low rank knows of it, but from one sample a datum. The learned inverse, of the
# same structure as KFAC, comes close to it only with a longer fit. At nine tenths, the steps matter as much as the
# choice of the inverse.
#
# The figure of the page :doc:`../howto/pruning` is that of three networks, with more shares of zeros, two dampings and
# a fit of 1000 steps.

middle = SPARSITIES.index(0.8)
assert means["KFAC", f"{STEPS} steps"][middle] > means["magnitude", "order only"][middle] + 0.05
assert means["KFAC", "one step"][middle] > means["KFAC", "order only"][middle]

# %%
COLOURS = {
    "magnitude": "grey",
    "diagonal": "tab:orange",
    "KFAC": "tab:blue",
    "low rank": "tab:green",
    "learned": "tab:red",
}
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
for method, colour in COLOURS.items():
    left.plot(SPARSITIES, 100 * means[method, f"{STEPS} steps"], "o-", color=colour, label=method)
left.set_title(f"Five inverses, {STEPS} steps")
for way, style in zip(WAYS, (":", "--", "-")):
    right.plot(SPARSITIES, 100 * means["KFAC", way], style, color=COLOURS["KFAC"], marker="o", label=f"KFAC, {way}")
    right.plot(
        SPARSITIES, 100 * means["learned", way], style, color=COLOURS["learned"], marker="o", label=f"learned, {way}"
    )
right.set_title("What the others' moves and the steps bring")
for axis in (left, right):
    axis.axhline(100 * dense, color="black", linewidth=0.8)
    axis.set_xlabel("share of zeros")
    axis.legend()
left.set_ylabel("accuracy [%]")

if FULL:
    folder = Path(__file__).parent.parent / "docs" / "applications"
    fig.savefig(folder / "pruning.png", dpi=110)
    table = {", ".join(key): [round(share, 4) for share in values.tolist()] for key, values in means.items()}
    numbers = {"networks": len(results), "not pruned": round(dense, 4), "sparsities": SPARSITIES, "accuracy": table}
    (folder / "pruning.json").write_text(json.dumps(numbers, indent=1) + "\n")
