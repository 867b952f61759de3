r"""
Learning five tasks in turn
===========================

A network that is trained on one task and then on another forgets the first. Elastic weight consolidation (EWC;
`Kirkpatrick et al., 2017 <https://arxiv.org/abs/1612.00796>`_) lets it learn the second while a penalty keeps it close
to where it was, in the directions that the first task needs:

.. math::

    \min_\theta \; \ell_\text{new}(\theta) + \frac{s}{2} \sum_t (\theta - \theta_t)^\top F_t (\theta - \theta_t) .

:math:`F_t` is the Fisher matrix of task :math:`t` at the parameters :math:`\theta_t` that were learnt for it. Four
answers to the question what to keep of it are compared here:

- nothing (fine-tuning);
- its diagonal, one for each task (EWC);
- its diagonal, summed over the tasks around the latest parameters (online EWC; `Schwarz et al., 2018
  <https://arxiv.org/abs/1805.06370>`_);
- a Kronecker product for each layer, summed in the same way (`Ritter, Botev and Barber, 2018
  <https://arxiv.org/abs/1805.07810>`_).
"""

# %%
# Two sequences of tasks
# ----------------------
#
# *Pairs*: is it a 0 or a 1, a 2 or a 3, and so on. Each pair has two outputs of the network for itself, a head, and all
# of them share the hidden layers. *Permuted*: all ten digits, with the pixels in another order for each task, and the
# same outputs for all.

import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from curvlinops import EWC, KFACLinearOperator, diagonal_fisher

FULL = os.environ.get("CURVLINOPS_EXAMPLES") == "full"  # else the settings are small, and the script is fast
NUM_RUNS = {"pairs": 5, "permuted": 5} if FULL else {"pairs": 2, "permuted": 1}
NUM_TASKS, WIDTH, NUM_TRAINING, NUM_VALIDATION, EPOCHS = 5, 128, 1000, 300, 10 if FULL else 8
LEARNING_RATES = {"pairs": 1e-2, "permuted": 1e-3}

torch.set_num_threads(1)  # for matrices as small as these, more threads cost more than they give
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)


def sequence(name, seed):
    """The tasks: the data of its parts, and the outputs that are theirs."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    parts = dict(
        zip(("training", "validation", "test"), order.tensor_split([NUM_TRAINING, NUM_TRAINING + NUM_VALIDATION]))
    )
    tasks = []
    for t in range(NUM_TASKS):
        if name == "pairs":
            own = {part: chosen[labels[chosen] // 2 == t] for part, chosen in parts.items()}
            data, head = {part: (images[i], labels[i] % 2) for part, i in own.items()}, slice(2 * t, 2 * t + 2)
        else:
            pixels = torch.randperm(64, generator=generator)
            data, head = {part: (images[i][:, pixels], labels[i]) for part, i in parts.items()}, slice(0, 10)
        tasks.append((data, head))
    return tasks


# %%
# Four ways to go on
# ------------------
#
# The penalty is added to the loss, and after each task its Fisher matrix is taken note of. For the diagonal there is a
# function that knows about heads; KFAC gets the network as a function that gives the outputs of one head. What it is
# made of are the expectations over the network's own labels, not those of the data.


def consolidate(ewc, method, network, X, y, head):
    if method == "Kronecker EWC":

        def outputs(params, X):
            return functional_call(network, params, (X,))[:, head]

        params = dict(network.named_parameters())
        ewc.consolidate(KFACLinearOperator(outputs, nn.CrossEntropyLoss(), params, [(X, y)], fisher_type="type-2"))
    else:
        fisher = diagonal_fisher(network, nn.CrossEntropyLoss(), None, (X, y), kind="true", output_slice=head)
        ewc.consolidate(fisher)


def learn(name, method, strength, seed, part="test"):
    """Learn the tasks of a sequence in turn; accuracies ``[i, j]`` of task j after task i."""
    tasks = sequence(name, seed)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    ewc = EWC(network, strength=strength, mode="multi" if method == "EWC" else "online")
    accuracies = torch.zeros(NUM_TASKS, NUM_TASKS)
    for i, (data, head) in enumerate(tasks):
        X, y = data["training"]
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATES[name])
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(y)).split(64):
                optimizer.zero_grad()
                loss = cross_entropy(network(X[batch])[:, head], y[batch]) + ewc.penalty()
                loss.backward()
                optimizer.step()
        if method != "fine-tuning" and i < NUM_TASKS - 1:
            consolidate(ewc, method, network, X, y, head)
        with torch.no_grad():
            for j, (other, its_head) in enumerate(tasks):
                Z, truth = other[part]
                accuracies[i, j] = (network(Z)[:, its_head].argmax(1) == truth).float().mean()
    return accuracies


def summary(accuracies):
    """Mean accuracy in the end, right after each task was learnt, and what the first four lost since their best."""
    end, learnt = accuracies[-1], accuracies.diagonal()
    lost = (accuracies.amax(0) - end)[:-1]
    return torch.stack([end.mean(), learnt.mean(), lost.mean()])


# %%
# How strong?
# -----------
#
# The strength decides between keeping the old and learning the new. With the full settings it is chosen by the mean
# accuracy in the end, on validation data of all tasks, for each method on its own: more than one knows when the tasks
# really come in turn. The small settings take over what was found.

METHODS = ("fine-tuning", "EWC", "online EWC", "Kronecker EWC")
CANDIDATES = {"pairs": (30.0, 100.0, 300.0, 1000.0, 3000.0), "permuted": (3.0, 10.0, 30.0, 100.0)}
strengths = {
    "pairs": {"EWC": 300.0, "online EWC": 300.0, "Kronecker EWC": 30.0},
    "permuted": {"EWC": 30.0, "online EWC": 30.0, "Kronecker EWC": 10.0},
}
if FULL:
    for name, chosen in strengths.items():
        for method in METHODS[1:]:
            scores = {s: summary(learn(name, method, s, 100, "validation"))[0].item() for s in CANDIDATES[name]}
            chosen[method] = max(scores, key=scores.get)
            print(f"{name:9s} {method:14s}", ", ".join(f"{s:g}: {score:.3f}" for s, score in scores.items()))

# %%
# What is left in the end
# -----------------------

matrices, table = {}, {}
for name, chosen in strengths.items():
    print(f"\n{name:15s} strength   in the end   when learnt   forgotten")
    for method in METHODS:
        runs = [learn(name, method, chosen.get(method, 0.0), seed) for seed in range(NUM_RUNS[name])]
        matrices[name, method] = torch.stack(runs).mean(0)
        found = torch.stack([summary(run) for run in runs])
        table[name, method] = found.mean(0)
        end, learnt, lost = found.mean(0).tolist()
        spread = f" ± {found[:, 0].std():.3f}" if len(runs) > 1 else ""
        print(f"{method:15s} {chosen.get(method, 0.0):8g}   {end:.3f}{spread}   {learnt:.3f}   {lost:.3f}")

# %%
# Fine-tuning learns every task and loses a part of the pairs, and most of the permuted digits, where the tasks share
# their outputs. All three penalties forget less. With the full settings the Kronecker products are ahead by little
# with the pairs and by far with the permuted digits: they know which combinations of parameters matter, and hold on to
# the old without standing in the way of the new. The diagonals take every parameter for important or not on its own.
# With the permuted pixels they would have to be so strong, to protect the first tasks, that there is too little left to
# learn with, and at the strength that is best in the end they forget more than half as much as fine-tuning. Whether
# there is one Fisher matrix for each task or one running sum makes less of a difference than the runs differ by.

for name in strengths:
    end, _, lost = ({method: table[name, method][k].item() for method in METHODS} for k in range(3))
    assert all(lost[method] < 0.85 * lost["fine-tuning"] for method in METHODS[1:]), lost
    assert lost["Kronecker EWC"] < 0.4 * lost["fine-tuning"], lost
assert end["Kronecker EWC"] > max(end["EWC"], end["online EWC"]) + 0.1, end  # of the permuted digits

fig, axes = plt.subplots(2, 4, figsize=(12, 6.2), layout="constrained", sharex=True, sharey=True)
for row, name in zip(axes, strengths):
    for ax, method in zip(row, METHODS):
        shown = matrices[name, method].clone()
        shown[torch.ones_like(shown).triu(1).bool()] = torch.nan  # not learnt yet
        image = ax.imshow(shown, vmin=0, vmax=1, cmap="cividis")
        for i in range(NUM_TASKS):
            for j in range(i + 1):
                value = shown[i, j].item()
                ax.text(
                    j, i, f"{100 * value:.0f}", ha="center", va="center", color="white" if value < 0.55 else "black"
                )
        ax.set_title(f"{name}: {method}\n{100 * table[name, method][0]:.1f} % in the end", fontsize="medium")
        ax.set_xticks(range(NUM_TASKS), range(1, NUM_TASKS + 1))
        ax.set_yticks(range(NUM_TASKS), range(1, NUM_TASKS + 1))
    row[0].set_ylabel("after task")
for ax in axes[1]:
    ax.set_xlabel("accuracy on task [%]")
fig.colorbar(image, ax=axes, shrink=0.6, label="accuracy")

if FULL:
    folder = Path(__file__).parents[1] / "docs" / "applications"
    folder.mkdir(exist_ok=True)
    fig.savefig(folder / "ewc.png", dpi=110)
    numbers = {
        name: {
            method: {
                "strength": chosen.get(method, 0.0),
                **dict(zip(("in the end", "when learnt", "forgotten"), table[name, method].tolist())),
                "accuracies": matrices[name, method].tolist(),
            }
            for method in METHODS
        }
        for name, chosen in strengths.items()
    }
    (folder / "ewc.json").write_text(json.dumps(numbers, indent=1) + "\n")
plt.show()
