"""Which matrix is approximated, and how positions that share a weight are treated."""

from __future__ import annotations

from enum import StrEnum


class FisherType(StrEnum):
    """Which columns the loss factor S has; each member equals its string.

    Attributes:
        TYPE2: Those of the exact square root of the loss's Hessian: approximates the GGN.
        MC: Would-be gradients at sampled targets: the Monte-Carlo Fisher.
        EMPIRICAL: Actual gradients: the empirical Fisher.
        FORWARD_ONLY: None; output gradients are taken to be white, so that only inputs count.

    >>> FisherType.TYPE2 == "type-2"
    True
    """

    TYPE2 = "type-2"
    MC = "mc"
    EMPIRICAL = "empirical"
    FORWARD_ONLY = "forward-only"


class KFACType(StrEnum):
    """How KFAC treats positions (tokens, patches) at which a datum uses the same weight; each equals its string.

    Attributes:
        EXPAND: Each position is as a datum of its own.
        REDUCE: Inputs are averaged and output gradients summed over the positions of a datum.

    >>> KFACType("reduce") is KFACType.REDUCE
    True
    """

    EXPAND = "expand"
    REDUCE = "reduce"
