"""Shared set-up of the tests: one thread, and property-based tests that repeat and have no time limit."""

import torch
from hypothesis import settings

torch.set_num_threads(1)  # the suite runs in several processes; more threads make small matrices slower
settings.register_profile("suite", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("suite")
