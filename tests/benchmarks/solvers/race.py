"""Contenders in turn, so that whatever else happens on the machine falls on all of them alike."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from tests.benchmarks import measure
from tests.benchmarks.jobs import Job

Answer = dict[str, Any]
Contender = Callable[[], Answer]
"""Runs once, and answers with the seconds ``cpu`` and ``wall`` and what else there is to say."""

SLOW_SECONDS = 3.0
"""A first round that takes longer than this is counted: what it loads no longer matters."""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        repeats: Measured rounds at most.
        seconds: Time after which no further round starts.
    """

    repeats: int
    seconds: float


def contender(run: Callable[[], Any], facts: Callable[[Any], Answer]) -> Contender:
    """A contender of this process: ``run`` is timed, ``facts`` of what it returned are not."""

    def measured() -> Answer:
        found: list[Any] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not converge shows in the figures
            seconds = measure.timed(Job(lambda _: found.append(run())), "cpu")
        return {**seconds, **facts(found[0])}

    return measured


def race(contenders: dict[str, Contender], effort: Effort, first: dict[str, Answer] | None = None) -> dict[str, Answer]:
    """Run all contenders in turn, in rounds.

    Args:
        contenders: What is compared.
        effort: How often.
        first: The answers of a first round, where there has been one.

    Returns:
        For each contender its facts, medians of the seconds, and as ``ratio`` the median over the rounds of its CPU
        time in units of the first contender's.
    """
    start, base = time.monotonic(), next(iter(contenders))
    first = {label: run() for label, run in contenders.items()} if first is None else first
    is_slow = sum(answer["cpu"] for answer in first.values()) > SLOW_SECONDS or effort.repeats == 1
    rounds = [first] if is_slow else []
    while len(rounds) < effort.repeats and (not rounds or time.monotonic() - start < effort.seconds):
        rounds.append({label: run() for label, run in contenders.items()})
    for label, answer in first.items():
        answer["cpu"] = median(r[label]["cpu"] for r in rounds)
        answer["wall"] = median(r[label]["wall"] for r in rounds)
        answer["ratio"] = median(r[label]["cpu"] / r[base]["cpu"] for r in rounds)
        answer["rounds"] = len(rounds)
    return first
