r"""
Which data made it say so?
==========================

A network mistakes one digit for another. Which of the training data are to blame, and which would have helped? One
could leave out each in turn and train again. Influence functions (`Koh and Liang, 2017
<https://arxiv.org/abs/1703.04730>`_) answer for all of them at once, to first order. At a minimum :math:`\theta` of the
regularised risk

.. math::

    L(\theta) = \frac{1}{N} \sum_n \ell_n(\theta) + \frac{\lambda}{2} \lVert \theta \rVert^2 ,

leaving out datum :math:`n` moves the minimum by about :math:`\tfrac{1}{N} H^{-1} \nabla \ell_n`, with :math:`H` the
Hessian of :math:`L`. Hence the loss of a test digit changes by

.. math::

    I_n = \frac{1}{N} \nabla \ell_\text{test}^\top H^{-1} \nabla \ell_n .

One linear system, :math:`H s = \nabla \ell_\text{test}`, and one inner product for each datum: that is all. This script
does it, checks the answer by training again, and asks what damping, which most use of influence functions adds to
:math:`H`, does to it.
"""

# %%
# A network at a minimum
# ----------------------
#
# 600 digits to train, double precision, and L-BFGS until the gradient is zero to seven digits: the formula holds at a
# minimum.

from copy import deepcopy
from time import perf_counter

import matplotlib.pyplot as plt
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from curvlinops import (
    CGInverseLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    damping_path,
    eigsh,
)
from curvlinops.plotting import plot_convergence

torch.manual_seed(0)
torch.set_num_threads(1)  # for matrices as small as these, more threads cost more than they give
digits = load_digits()
images, labels = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
training, test = torch.randperm(len(labels)).split([600, len(labels) - 600])
X, y, N = images[training], labels[training], len(training)
L2 = 1e-2


def minimise(network, weights, max_iter):
    """Train a network in place, with these weights of the data; the largest entry of the gradient."""
    parameters = list(network.parameters())
    options = {"history_size": 50, "tolerance_grad": 1e-7, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(parameters, max_iter=max_iter, **options)

    def closure():
        optimizer.zero_grad()
        risk = (weights * cross_entropy(network(X), y, reduction="none")).sum() / N
        risk = risk + L2 / 2 * sum(p.square().sum() for p in parameters)
        risk.backward()
        return risk

    optimizer.step(closure)
    closure()
    return max(p.grad.abs().max().item() for p in parameters)


network = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
largest_entry = minimise(network, torch.ones(N), max_iter=3000)
assert largest_entry < 1e-6
with torch.no_grad():
    test_losses = cross_entropy(network(images[test]), labels[test], reduction="none")
    guesses = network(images[test]).argmax(1)
accuracy = (guesses == labels[test]).double().mean()
print(f"largest entry of the gradient {largest_entry:.0e}, accuracy on {len(test)} test digits {accuracy:.3f}")

# %%
# The digit in question is a near miss: of those that the network gets wrong, the one with the smallest loss.

wrong = torch.nonzero(guesses != labels[test]).flatten()
question = wrong[test_losses[wrong].argmin()]
image, label, guess = images[test[question]], labels[test[question]], guesses[question]
print(f"a {label} that the network takes for a {guess}, with loss {test_losses[question]:.2f}")


def loss_of_question(net):
    return cross_entropy(net(image.unsqueeze(0)), label.unsqueeze(0))


params = dict(network.named_parameters())
gradient = dict(zip(params, torch.autograd.grad(loss_of_question(network), list(params.values()))))

# %%
# One linear system
# -----------------
#
# ``l2`` adds the regularisation's part to the Hessian. Its eigenvalues say that this is a minimum, and how hard the
# system is: conjugate gradients need the more iterations, the farther the two ends lie apart.

H = HessianLinearOperator(network, nn.CrossEntropyLoss(), params, [(X, y)], l2=L2)
ends = eigsh(H, k=2, which="BE").values
print(f"eigenvalues of the Hessian from {ends[0]:.1e} to {ends[1]:.1e}")
assert ends[0] > 0

inverse = CGInverseLinearOperator(H)
s = inverse @ gradient  # a dictionary, as the gradient is
iterations, residual = int(inverse.info.num_iterations), float(inverse.info.residual_norm)
print(f"conjugate gradients: {iterations} iterations, relative residual {residual:.0e}")
assert inverse.info.converged.all()

# %%
# The inner products with all gradients are one product with the Jacobian: :math:`\nabla \ell_n = J_n^\top (p_n - e_n)`,
# with the predicted probabilities :math:`p_n` and the one-hot label :math:`e_n`.

J = JacobianLinearOperator(network, params, [(X, y)])
with torch.no_grad():
    output_gradients = network(X).softmax(1) - one_hot(y, 10)


def influences(solution):
    """How much the loss of the digit in question would change without each of the training data."""
    Js = J @ torch.cat([solution[name].flatten() for name in params])
    return (Js.reshape(N, 10) * output_gradients).sum(1) / N


predicted = influences(s)
order = predicted.argsort()
harmful, helpful = order[:5], order.flip(0)[:5]
print("without the most helpful the loss changes by", "  ".join(f"{x:+.3f}" for x in predicted[helpful]))
print("without the most harmful                by  ", "  ".join(f"{x:+.3f}" for x in predicted[harmful]))

# %%
# Most of the helpful ones have the true label, most of the harmful ones the label that the network falls for. But
# not all: a label is not all there is to a digit.

print(f"labels of the helpful: {y[helpful].tolist()}, of the harmful: {y[harmful].tolist()}")
assert (y[helpful] == label).sum() >= 4
assert (y[harmful] == guess).sum() >= 3

fig, axes = plt.subplots(2, 6, figsize=(9, 3.6), layout="constrained")
for ax in axes[:, 0]:
    ax.imshow(image.reshape(8, 8), cmap="gray_r")
axes[0, 0].set_title(f"in question:\na {label}, taken for a {guess}", fontsize="medium")
axes[1, 0].set_visible(False)
for row, (name, group) in enumerate({"helpful": helpful, "harmful": harmful}.items()):
    for ax, n in zip(axes[row, 1:], group):
        ax.imshow(images[training[n]].reshape(8, 8), cmap="gray_r")
        ax.set_title(f"{name}: a {y[n]}\n{predicted[n]:+.3f}", fontsize="medium")
for ax in axes.flat:
    ax.set_xticks([])
    ax.set_yticks([])
plt.show()

# %%
# Is it true?
# -----------
#
# Leave out one of these ten, train again to the new minimum, and look.

before = loss_of_question(network).item()
actual = []
for n in [*helpful.tolist(), *harmful.tolist()]:
    weights = torch.ones(N)
    weights[n] = 0
    retrained = deepcopy(network)
    minimise(retrained, weights, max_iter=150)
    actual.append(loss_of_question(retrained).item() - before)
actual = torch.tensor(actual, dtype=torch.float64)
shown = predicted[torch.cat([helpful, harmful])]
correlation = torch.corrcoef(torch.stack([shown, actual]))[0, 1]
slope = (shown @ actual / (shown @ shown)).item()
print(f"correlation of prediction and truth {correlation:.3f}; the truth is {slope:.2f} times the prediction")
assert (shown.sign() == actual.sign()).all()
assert correlation > 0.95

# %%
# Signs and order are right, at the price of one solve in place of ten trainings, or of 600. The sizes are too small:
# these are the ten data that matter most, whose absence changes the Hessian as well, and the formula leaves that out.

fig, ax = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
ax.axline((0, 0), slope=1, color="0.5", linestyle="--", label="prediction = truth")
ax.plot(shown[:5], actual[:5], "o", color="#0072B2", label="helpful")
ax.plot(shown[5:], actual[5:], "s", color="#D55E00", label="harmful")
ax.set_xlabel("predicted change of the loss")
ax.set_ylabel("change of the loss after training again")
ax.grid(alpha=0.3)
ax.legend()
plt.show()

# %%
# The damping path
# ----------------
#
# Larger networks are not trained to a minimum, and their Hessian is damped, :math:`H + \delta I`, to make the system
# solvable. How much damping is harmless? All dampings share one Krylov space, so that ``damping_path`` solves for 16 of
# them with the products of the smallest, and one more each to verify the solution.

dampings = torch.logspace(-4, 1, 16).tolist()
begin = perf_counter()
path = damping_path(H, gradient, dampings)
seconds_path = perf_counter() - begin

begin, separate = perf_counter(), {}
for damping in dampings:
    inverse = CGInverseLinearOperator(H.damped(damping))
    inverse @ gradient
    separate[damping] = inverse.info
seconds_separate = perf_counter() - begin
num_separate = [info.num_matvecs for info in separate.values()]
print(f"the smallest damping alone:   {num_separate[0]:4d} products")
print(f"all 16 by one path:           {path.num_matvecs:4d} products, {seconds_path:.1f} s")
print(f"all 16, one after the other:  {sum(num_separate):4d} products, {seconds_separate:.1f} s")
assert all(info.converged.all() for info in path.info)
assert path.num_matvecs < 1.3 * num_separate[0]
assert path.num_matvecs < sum(num_separate) / 3

# %%
# What do they do to the answer? The rank correlation with the influences without damping says how much of the order is
# left, and the overlap how many of the ten most influential data are still among them.

ranks, overlaps = [], []
top = set(predicted.abs().topk(10).indices.tolist())
for solution in path.solutions:
    damped = influences(solution)
    ranks.append(spearmanr(predicted, damped).statistic)
    overlaps.append(len(top & set(damped.abs().topk(10).indices.tolist())))
print("damping  rank correlation  of the top ten")
for damping, rank, overlap in list(zip(dampings, ranks, overlaps))[::3]:
    print(f"{damping:7.0e}  {rank:16.3f}  {overlap:14d}")
assert ranks[0] > 0.99
assert ranks[-1] < 0.5

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.semilogx(dampings, ranks, "o-", color="#0072B2", label="rank correlation, all data")
left.semilogx(dampings, [k / 10 for k in overlaps], "s--", color="#D55E00", label="share of the top ten that is kept")
left.axvspan(ends[0], L2, color="0.5", alpha=0.15, label="λmin of the Hessian to λ")
left.set_xlabel("damping δ")
left.set_ylabel("agreement with δ = 0")
left.set_ylim(0, 1.05)
left.grid(alpha=0.3)
left.legend(loc="lower left")
chosen = {f"δ = {dampings[i]:.0e}": separate[dampings[i]] for i in (0, 6, 9, 12)}
plot_convergence(chosen, rtol=1e-8, attainable=False, ax=right)
right.set_title("solves for one damping each")
plt.show()

# %%
# Damping below the smallest eigenvalue changes next to nothing. Above it, one flat direction after the other is damped
# away, the systems become easy, and the order is lost: in the end the answer is that of
# :math:`\tfrac{1}{\delta} \nabla \ell_\text{test}^\top \nabla \ell_n`, which knows no curvature. The most influential
# data keep their places for longer than the rest.
