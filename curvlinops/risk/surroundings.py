"""What must hold around a pass over the data, and is put back afterwards: settings, flags, random states."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlinops.risk.model import FunctionalModel

_ATTENTION_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


def any_attention_kernel() -> AbstractContextManager[None]:
    """For what is differentiated once, and not in forward mode: attention by the fastest kernel there is."""
    return sdpa_kernel(_ATTENTION_KERNELS)


@contextmanager
def differentiable(model: FunctionalModel) -> Iterator[None]:
    """Settings under which the model can be differentiated twice and in forward mode.

    Raises:
        NotImplementedError: Under autocast.
    """
    device = model.params[0].device
    if torch.is_autocast_enabled(device.type):
        raise NotImplementedError(
            f"autocast is active for {device.type}: its cache of cast weights does not work with forward mode. Leave "
            "the autocast block; for curvature in low precision cast model and data with .to(torch.bfloat16)."
        )
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            # The default attention kernel on the CPU has neither forward mode nor double backward.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if model.has_recurrence and device.type == "cuda":
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(_requiring_grad(model.params))
            stack.enter_context(_preserved_buffers(model))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _requiring_grad(params: Sequence[Tensor]) -> Iterator[None]:
    """Let the user's own tensors require gradients for a while: closures and users' subclasses read them."""
    frozen = [p for p in params if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def _preserved_buffers(model: FunctionalModel) -> Iterator[None]:
    """Put back the buffers of modules that a callable uses, which cannot be given copies of them."""
    buffers = [buffer for module in model.hidden_modules for buffer in module.buffers()]
    copies = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, kept in zip(buffers, copies, strict=True):
            if not torch.equal(buffer, kept):
                buffer.data.copy_(kept)


class RandomStates:
    """The global random states of torch, NumPy and Python, and the loader's own generators, as they are now."""

    def __init__(self, data: Any, device: torch.device) -> None:
        self._device = device
        self._generators = [(generator, generator.get_state()) for generator in _generators_of(data)]
        self._on_cpu = torch.get_rng_state()
        self._on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._of_numpy, self._of_python = np.random.get_state(), random.getstate()

    def restore(self) -> None:
        """Put them back."""
        for generator, state in self._generators:
            generator.set_state(state)
        torch.set_rng_state(self._on_cpu)
        if self._on_gpu is not None:
            torch.cuda.set_rng_state(self._on_gpu, self._device)
        np.random.set_state(self._of_numpy)
        random.setstate(self._of_python)


@contextmanager
def preserved_random_state(data: Any, device: torch.device) -> Iterator[None]:
    """Put back the random states at the end."""
    states = RandomStates(data, device)
    try:
        yield
    finally:
        states.restore()


def seed_everything(seed: int) -> None:
    """Set the global random states of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _generators_of(data: Any) -> list[torch.Generator]:
    batch_sampler = getattr(data, "batch_sampler", None)
    holders = [data, getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = {id(g): g for g in (getattr(h, "generator", None) for h in holders) if isinstance(g, torch.Generator)}
    return list(found.values())
