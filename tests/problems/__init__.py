"""The table of problems: small empirical risks in float64 that between them meet every form the package accepts.

A problem states by itself how its data reach its model (``forward``), so that the oracles need no help from the
package. Each call of ``Problem.make`` builds everything anew from a fixed seed: the package and the oracle get equal
values but share no tensor.

Tags: ``core`` runs all laws, not only the comparison with the truth; ``no_fisher`` has a loss without Fisher matrices;
``classes`` is cross-entropy, whose Monte-Carlo draws the oracle repeats; ``sequence`` has several positions a datum;
``order`` cannot be cut anew into batches; ``generic`` has a loss the package does not know; ``cut`` has a part that is
cut off from derivatives; ``closure`` has a model that holds its parameters out of reach, of which no copy can be made;
``refused`` may be refused, but must not be wrong.
"""

from tests.problems import forms, layers, losses, models, rows, sequences, uses
from tests.problems.table import Instance, Params, Problem

PROBLEMS: dict[str, Problem] = {}
for _module in (models, sequences, rows, layers, uses, forms, losses):
    assert not PROBLEMS.keys() & _module.TABLE.keys()
    PROBLEMS |= _module.TABLE

#: The problems of models whose layers, rows or uses of parameters are out of the ordinary.
LAYERED = [name for module in (sequences, rows, layers, uses) for name in module.TABLE]

__all__ = ["LAYERED", "PROBLEMS", "Instance", "Params", "Problem"]
