"""Peak memory: many columns cost their own result, not more activations; a lean product little more than a gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Each product runs in a fork of its own, whose peak the parent is told when it ends. Forks of one fresh process share
# what importing costs, so that the differences between them are those of the products.
SCRIPT = """
import json, os, sys
import torch
from torch import nn
from curvlinops import GGNLinearOperator, HessianLinearOperator

torch.set_num_threads(1)
torch.manual_seed(0)
KINDS = {"Hessian": HessianLinearOperator, "GGN": GGNLinearOperator}

def deep(width, depth):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Linear(16, width), nn.Tanh(), *layers, nn.Linear(width, 10))

# Networks of some ten thousand parameters with activations of half a MiB and of four MiB, several of each.
CASES = {"balanced": (deep(64, 6), 2048), "huge": (deep(64, 8), 16384)}

def build(kind, case, num_data=None, **options):
    model, size = CASES[case]
    size = num_data or size
    data = [(torch.rand(size, 16), torch.randint(10, (size,)))] * 2
    options = {"check_deterministic": False, **options}
    return KINDS[kind](model, nn.CrossEntropyLoss(), list(model.parameters()), data, **options), model, data

def peak(kind, case, num_columns, way="streamed", **options):
    child = os.fork()
    if child == 0:
        A, model, data = build(kind, case, **options)
        if way == "gradient":
            for X, y in data:
                nn.functional.cross_entropy(model(X), y).backward()
        elif way != "nothing":
            A = A.linearize(max_memory=0) if way == "lean" else A
            A @ (torch.ones(A.shape[1]) if num_columns is None else torch.ones(A.shape[1], num_columns))
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    return usage.ru_maxrss / 1024

for kind in KINDS:  # what torch loads at first use
    A, model, data = build(kind, "balanced", 2, check_deterministic=True)
    for operator in (A, A.linearize(), A.linearize(0)):
        for columns in (1, 2, 17):
            operator @ torch.ones(A.shape[1], columns)
    nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
print(json.dumps({name: peak(*args, **options) for name, (args, options) in json.loads(sys.argv[1]).items()}))
"""

#: What is freed goes back to the system, so that peaks are of what was held at one time.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
#: Parameters of the networks in the script, and MiB of one activation.
NUM_PARAMS = {"balanced": 17 * 64 + 6 * 65 * 64 + 65 * 10}
ACTIVATION = {"balanced": 0.5}

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork, and kibibytes of Linux"
)


def peaks(**measurements: Any) -> dict[str, float]:
    """Peaks in MiB, each measured with the arguments of ``peak`` in the script, as pairs of a list and a dict."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(measurements)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **GIVE_BACK},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


def numbers(count: int, case: str) -> float:
    """MiB of so many vectors of parameters."""
    return count * NUM_PARAMS[case] * 4 / 2**20


@pytest.mark.parametrize("case", NUM_PARAMS)
@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
def test_many_columns_take_their_own_memory(kind: str, case: str) -> None:
    """64 columns take 3 D 64 numbers more than one: the question, its columns laid out one by one, and the sum.

    With more than one column there is a tape as well, and 'auto' takes up to 16 columns together after the first.
    """
    found = peaks(
        one=([kind, case, 1], {}),
        few=([kind, case, 17], {}),
        many=([kind, case, 64], {}),
        alone=([kind, case, 64], {"chunk_size": 1}),
    )
    allowed = numbers(3 * 64, case)
    assert found["alone"] - found["one"] <= allowed + 8 * ACTIVATION[case], (found, allowed)
    assert found["many"] - found["few"] <= allowed, (found, allowed)


def test_columns_together_take_memory_for_each() -> None:
    """That is what the chunks are for."""
    found = peaks(auto=(["Hessian", "balanced", 64], {}), together=(["Hessian", "balanced", 64], {"chunk_size": 64}))
    assert found["together"] - found["auto"] > 5 * numbers(64, "balanced"), found


@pytest.mark.parametrize("columns", [None, 1])
def test_a_lean_product_takes_little_more_than_a_gradient(columns: int | None) -> None:
    found = peaks(
        nothing=(["GGN", "huge", 1, "nothing"], {}),
        gradient=(["GGN", "huge", 1, "gradient"], {}),
        lean=(["GGN", "huge", columns, "lean"], {}),
        streamed=(["GGN", "huge", columns], {}),
    )
    over = {name: value - found["nothing"] for name, value in found.items()}
    assert over["gradient"] > 20, "the network is too small to tell"
    assert over["lean"] <= 2.5 * over["gradient"], over
    assert over["lean"] < over["streamed"], over
