"""Peak memory: many columns cost their own result, not more activations."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
# 11 thousand parameters, and half a MiB for an activation.
model = nn.Sequential(nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10))
data = [(torch.rand(1024, 16), torch.randint(10, (1024,)))] * 2
kinds = {"Hessian": HessianLinearOperator, "GGN": GGNLinearOperator}

def peak(kind, num_columns, **options):
    child = os.fork()
    if child == 0:
        options = {"check_deterministic": False, **options}
        A = kinds[kind](model, nn.CrossEntropyLoss(), list(model.parameters()), data, **options)
        A @ torch.ones(A.shape[1], num_columns)
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    return usage.ru_maxrss / 1024

D = sum(p.numel() for p in model.parameters())
for kind in kinds.values():  # what torch loads at first use
    A = kind(model, nn.CrossEntropyLoss(), list(model.parameters()), [(data[0][0][:2], data[0][1][:2])])
    A @ torch.ones(D, 1), A @ torch.ones(D, 2)
peaks = {
    kind: {
        **({"one by one": [peak(kind, 1, chunk_size=1), peak(kind, 64, chunk_size=1)]} if kind == "GGN" else {}),
        "auto": [peak(kind, 8), peak(kind, 64)],
        "together": peak(kind, 64, chunk_size=64),
    }
    for kind in json.loads(sys.argv[1])
}
print(json.dumps({"peaks": peaks, "result": D * 64 * 4 / 2**20}))
"""


#: What is freed goes back to the system, so that peaks are of what was held at one time.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork, and kibibytes of Linux")
def test_peak_memory_does_not_grow_with_the_columns_beyond_the_result() -> None:
    """64 columns take at most four results more than one chunk; all at once take far more."""
    kinds = ["Hessian", "GGN"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(kinds)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **GIVE_BACK},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    result = found["result"]
    for kind in kinds:
        peaks = found["peaks"][kind]
        together = peaks.pop("together")
        for chunks, (few, many) in peaks.items():
            assert many - few <= 4 * result, f"{kind}, {chunks}: {few:.0f} and {many:.0f} MiB, result {result:.0f} MiB"
        assert together - peaks["auto"][1] > 5 * result, f"{kind}: columns cost nothing here, {together}, {peaks}"
