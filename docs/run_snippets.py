"""Run the Python blocks of the pages, each page from top to bottom; exits 1 if one fails.

Usage: ``python docs/run_snippets.py [page ...]``, by default all pages and the README. Blocks of the class ``not-run``
are left out.
"""

import re
import sys
import textwrap
import traceback
from pathlib import Path

DOCS = Path(__file__).parent
RST_BLOCK = re.compile(r"^\.\. code-block:: python\n((?:    :.*\n)*)\n((?:(?:    .*)?\n)+)", re.MULTILINE)
MARKDOWN_BLOCK = re.compile(r"^```python()\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(page):
    """Yield (line number, code) for each block that is to be run."""
    text = page.read_text()
    for match in (MARKDOWN_BLOCK if page.suffix == ".md" else RST_BLOCK).finditer(text):
        if "not-run" not in match[1]:
            yield text[: match.start(2)].count("\n"), textwrap.dedent(match[2])


def run(page):
    """Run a page's blocks in one namespace; return whether all went well."""
    namespace = {"__name__": "__main__"}
    for line, code in snippets(page):
        try:
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        except Exception:
            traceback.print_exc()
            return False
    return True


if __name__ == "__main__":
    skipped = {"_build", "gallery"}
    pages = [p for p in sorted(DOCS.rglob("*.rst")) if not skipped & set(p.relative_to(DOCS).parts)]
    pages = [Path(argument) for argument in sys.argv[1:]] or [*pages, DOCS.parent / "README.md"]
    failed = [str(page) for page in pages if not run(page)]
    print("failed: " + " ".join(failed) if failed else f"{len(pages)} pages: all blocks ran")
    sys.exit(bool(failed))
