r"""
Exact solves with a low-rank Fisher matrix
==========================================

Natural gradients, Laplace approximations and merged networks ask for the solution of a damped system,
:math:`(F + \delta I)\, x = b`, with the Fisher matrix :math:`F` of a network. Its size is the number of parameters,
which is large. Its rank is not: a Monte-Carlo Fisher matrix of :math:`N` data with one sample each is
:math:`F = U U^\top` with :math:`N` columns, and Woodbury's identity

.. math::

    (U U^\top + \delta I)^{-1} = \tfrac{1}{\delta} \left( I - U (\delta I + U^\top U)^{-1} U^\top \right)

needs a matrix of :math:`N \times N` only. The columns are not formed for this: the inputs and output gradients of the
layers determine them, and all inner products between them.
"""

# %%
# A trained network
# -----------------
#
# 26,122 parameters, trained on 1000 handwritten digits.

from time import perf_counter

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from curvlinops import CGInverseLinearOperator, FisherMCLinearOperator

torch.manual_seed(0)
torch.set_num_threads(1)  # for matrices as small as these, more threads cost more than they give
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
loss_function = nn.CrossEntropyLoss()


def new_network():
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))


def train(network, idx, num_epochs):
    """Train a network in place on the data at these indices."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(num_epochs):
        for batch in idx[torch.randperm(len(idx))].split(64):
            optimizer.zero_grad()
            loss_function(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return network


def fisher_of(network, idx):
    data = [(images[batch], labels[batch]) for batch in idx.split(250)]
    return FisherMCLinearOperator(network, loss_function, dict(network.named_parameters()), data)


shuffled = torch.randperm(len(images))
training, test = shuffled[:1000], shuffled[1000:]
network = train(new_network(), training, num_epochs=5)
F = fisher_of(network, training)

# %%
# What will it cost?
# ------------------
#
# Before the first product, an operator tells what its products take: in forward passes over the data, of which a
# gradient takes three, and in memory. The star marks the way that the operator takes as it is. ``F.linearize()`` would
# keep the factors of the layers, which also are what the low-rank form is made of.

print(F.cost())

# %%
# The same system, solved twice
# -----------------------------
#
# The right-hand side is the gradient, the damping a hundredth of the largest eigenvalue.


def timed(function):
    start = perf_counter()
    result = function()
    return result, perf_counter() - start


A, seconds_record = timed(F.to_low_rank)
eigenvalues, seconds_gram = timed(A.eigenvalues)
gradient = torch.cat([g.flatten() for g in F.gradient_and_loss()[0]])
damping = 1e-2 * eigenvalues[-1].item()
exact, seconds_exact = timed(lambda: A.damped(damping).inverse() @ gradient)

cg = CGInverseLinearOperator(F.damped(damping), rtol=1e-5)
iterated, seconds_cg = timed(lambda: cg @ gradient)


def residual(x):
    return ((F @ x + damping * x - gradient).norm() / gradient.norm()).item()


print(A)
print(f"columns {seconds_record:.2f} s, inner products and spectrum {seconds_gram:.2f} s")
print(f"exact solve      {seconds_exact:.2f} s, relative residual {residual(exact):.0e}")
print(
    f"conjugate grads. {seconds_cg:.2f} s, relative residual {residual(iterated):.0e}, "
    f"{int(cg.info.num_iterations)} iterations"
)
print(f"relative difference {((exact - iterated).norm() / exact.norm()).item():.0e}")

# %%
# One system at a large damping is no contest: conjugate gradients need few products for it. The picture changes with
# the damping. The smaller it is, the more iterations are needed, while the low-rank form has done its work and spends
# the same on each. (In single precision both residuals grow as the damping shrinks.)

dampings = [damping * 10.0**-k for k in range(3)]
times = {"conjugate gradients": [], "low rank, columns known": []}
for damping_k in dampings:
    iterative = CGInverseLinearOperator(F.damped(damping_k), rtol=1e-4, max_iter=2000)
    _, seconds = timed(lambda: iterative @ gradient)  # noqa: B023
    times["conjugate gradients"].append(seconds)
    x, seconds = timed(lambda: A.damped(damping_k).inverse() @ gradient)  # noqa: B023
    times["low rank, columns known"].append(seconds)
    print(f"damping {damping_k:.1e}: {int(iterative.info.num_iterations):4d} iterations of conjugate gradients")

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.semilogy(eigenvalues.flip(0).clamp(min=1e-9), color="#0072B2")
left.set_xlabel("index")
left.set_ylabel("eigenvalue")
left.set_title(f"All {len(eigenvalues)} eigenvalues that are not zero")
for (name, seconds), color, marker in zip(times.items(), ["#D55E00", "#0072B2"], "os"):
    right.loglog(dampings, seconds, marker + "-", color=color, label=name)
right.invert_xaxis()
right.set_xlabel("damping")
right.set_ylabel("seconds a solve")
right.set_title("Time of a solve")
right.legend()
for ax in (left, right):
    ax.grid(alpha=0.3, which="both")
plt.show()

# %%
# Two tasks, merged exactly
# -------------------------
#
# Two networks start from one initialisation. One learns the digits 0 to 4, the other 5 to 9. Close to its own
# parameters :math:`\theta_t`, the loss of each grows like
# :math:`\tfrac{1}{2} (\theta - \theta_t)^\top F_t (\theta - \theta_t)`. The sum of the two parabolas, and of
# :math:`\tfrac{1}{2} \delta \lVert \theta - \bar\theta \rVert^2` about the mean of the two for the directions that
# neither cares about, is least at the solution of
#
# .. math::
#
#     (F_1 + F_2 + \delta I)\, \theta = F_1 \theta_1 + F_2 \theta_2 + \delta\, \bar\theta .
#
# A sum of low-rank matrices is low rank again, so this has an exact solution, too. The inner products between the
# columns are found once, for the first damping, and any number of others may be tried.

halves = [training[labels[training] < 5], training[labels[training] >= 5]]
torch.manual_seed(1)
start = parameters_to_vector(new_network().parameters()).detach()
thetas, fishers = [], []
for idx in halves:
    specialist = new_network()
    vector_to_parameters(start.clone(), specialist.parameters())
    train(specialist, idx, num_epochs=20)
    thetas.append(parameters_to_vector(specialist.parameters()).detach())
    fishers.append(fisher_of(specialist, idx).to_low_rank())


def accuracy(theta):
    other = new_network()
    vector_to_parameters(theta.clone(), other.parameters())
    with torch.no_grad():
        right = other(images[test]).argmax(1) == labels[test]
    return right.float().mean().item()


def parabolas(theta):
    return sum((theta - theta_t) @ (F_t @ (theta - theta_t)) / 2 for F_t, theta_t in zip(fishers, thetas)).item()


mean = sum(thetas) / 2
total = sum(fishers)
print(total)
print(f"{'':<16}{'parabolas':>10}{'residual':>10}{'accuracy':>10}{'seconds':>9}")
print(f"{'mean':<16}{parabolas(mean):>10.1e}{'':>10}{accuracy(mean):>10.3f}")
weighted = sum(F_t @ theta for F_t, theta in zip(fishers, thetas))
for delta in [1.0, 1e-1, 1e-2, 1e-3]:
    right_hand_side = weighted + delta * mean
    merged, seconds = timed(lambda: total.damped(delta).inverse() @ right_hand_side)  # noqa: B023
    gap = total @ merged + delta * merged - right_hand_side
    relative = (gap.norm() / right_hand_side.norm()).item()
    print(f"damping {delta:<8g}{parabolas(merged):>10.1e}{relative:>10.0e}{accuracy(merged):>10.3f}{seconds:>9.2f}")

# %%
# The merged parameters are the minimum that they should be: the smaller the damping, the lower the parabolas.
# Whether a network is better for it is another question. On all ten digits these do not beat the mean. A parabola is an
# approximation close by, and one sample a datum is a rough estimate of its curvature.
# :ref:`The example on merging <sphx_glr_gallery_plot_2_model_merging.py>` uses the full Fisher matrices of a smaller
# network and does gain.
