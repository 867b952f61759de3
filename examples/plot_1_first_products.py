r"""
First products with a curvature matrix
======================================

The Hessian of a network with :math:`D` parameters has :math:`D^2` entries: too many to store. A product of it with a
vector costs no more than a few gradients. This script trains a small network on handwritten digits and shows what can
be done with products alone: in which formats a vector may come, how matrices are added and damped, and how SciPy finds
the largest eigenvalues of a matrix that nobody has written down.
"""

# %%
# A trained network
# -----------------

import matplotlib.pyplot as plt
import torch
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator

torch.manual_seed(0)
torch.set_num_threads(1)  # for matrices as small as these, more threads cost more than they give
digits = load_digits()
X, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
data = DataLoader(TensorDataset(X, y), batch_size=600)

model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
loss_function = nn.CrossEntropyLoss()

optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(30):
    for X_batch, y_batch in data:
        optimizer.zero_grad()
        loss_function(model(X_batch), y_batch).backward()
        optimizer.step()

with torch.no_grad():
    print(f"training loss {loss_function(model(X), y):.3f}, accuracy {(model(X).argmax(1) == y).double().mean():.3f}")

# %%
# The operators
# -------------
#
# Every curvature operator takes a model, a loss, parameters and data. Constructing one only makes checks; the work is
# done at each product, which passes over the data once, one mini-batch at a time.

params = dict(model.named_parameters())
H = HessianLinearOperator(model, loss_function, params, data)
G = GGNLinearOperator(model, loss_function, params, data)
E = EFLinearOperator(model, loss_function, params, data)
print(H)
print(G)
print(E)

# %%
# The loss is that of all the data at once, however they are cut into mini-batches. So is its gradient:

gradient, loss = G.gradient_and_loss()
print(f"loss {loss:.3f}")

# %%
# Vectors and their formats
# -------------------------
#
# A vector may be flat, as most numerical software likes it. Several vectors side by side make a matrix and share the
# work that does not depend on them.

D = G.shape[1]
v = torch.randn(D)
V = torch.randn(D, 5)
print("flat vector", tuple((G @ v).shape))
print("matrix     ", tuple((G @ V).shape))

# %%
# It may also have the shapes of the parameters: as a list in their order, or as a dictionary by their names. The answer
# comes in the format of the question. One more axis at the end stands for several vectors.

as_list = [torch.randn_like(p) for p in params.values()]
as_dict = {name: torch.randn(*p.shape, 5) for name, p in params.items()}
print("list", [tuple(Gv.shape) for Gv in G @ as_list])
print("dict", {name: tuple(GV.shape) for name, GV in (G @ as_dict).items()})

# %%
# Sums, multiples, damping
# ------------------------
#
# Operators are added, scaled and multiplied like matrices, without any work until a product is asked for. ``damped``
# adds a multiple of the identity.

mixed = 0.9 * G + 0.1 * E
difference = mixed @ v - (0.9 * (G @ v) + 0.1 * (E @ v))
print(f"sum of operators, sum of products: they differ by {difference.abs().max():.1e}")

damped = G.damped(1e-2)
difference = damped @ v - (G @ v + 1e-2 * v)
print(f"damping: differs by {difference.abs().max():.1e}")

# %%
# The block of some of the parameters is an operator of its own.

last_layer = G.block("2.*")
print(last_layer)

# %%
# Eigenvalues with SciPy
# ----------------------
#
# :py:meth:`to_scipy` gives a :py:class:`scipy.sparse.linalg.LinearOperator`. SciPy's Lanczos method ``eigsh`` then
# finds the largest eigenvalues from a few dozen products.

num_eigenvalues = 30
largest = {}
for name, A in {"Hessian": H, "GGN": G, "empirical Fisher": E}.items():
    largest[name] = eigsh(A.to_scipy(), k=num_eigenvalues, which="LA", tol=1e-3, return_eigenvectors=False)[::-1]
    print(f"{name:16s}", "  ".join(f"{value:.3f}" for value in largest[name][:6]), " ...")

# %%
# About as many eigenvalues as there are classes stand out. For these, the generalised Gauss-Newton matrix (GGN) comes
# close to the Hessian: the part of the Hessian that it leaves out is small where the data are fitted well. Further down
# that part shows. The empirical Fisher matrix is another matter: it is made of actual gradients, which nearly vanish
# for digits that the network classifies with confidence, and its eigenvalues are half as large or less.

styles = {"Hessian": ("#000000", "x"), "GGN": ("#0072B2", "o"), "empirical Fisher": ("#D55E00", "s")}
fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
for name, values in largest.items():
    colour, marker = styles[name]
    filled = {"markerfacecolor": "none"} if marker != "x" else {}
    ax.semilogy(range(1, num_eigenvalues + 1), values, marker, color=colour, label=name, **filled)
ax.set_xlabel("index")
ax.set_ylabel("eigenvalue")
ax.set_title(f"The {num_eigenvalues} largest of {D} eigenvalues")
ax.grid(alpha=0.3)
ax.legend()
plt.show()
