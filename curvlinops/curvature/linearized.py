"""A curvature matrix whose per-batch products are kept, so that the forward does not run again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.risk.batches import read_batch, tensors_of
from curvlinops.risk.columns import Piece, column_by_column, in_chunks
from curvlinops.risk.empirical_risk import BatchSum
from curvlinops.risk.linearization import Engine, Use
from curvlinops.risk.memory import default_budget, num_bytes

if TYPE_CHECKING:
    from curvlinops.curvature.base import CurvatureLinearOperator
