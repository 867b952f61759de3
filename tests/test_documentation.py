"""The code blocks of the README and of the pages run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_code_blocks_run() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "run_snippets.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
