"""How far the computation of a Kronecker-factored matrix has come, as plain tensors that can be saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvlinops.curvature.kronecker.blocks import Block
from curvlinops.curvature.kronecker.columns import KeptColumns
from curvlinops.curvature.kronecker.factored_blocks import EmbeddingBlock, KroneckerBlock
from curvlinops.curvature.kronecker.other_blocks import DiagonalBlock, ExactBlock, IdentityBlock
from curvlinops.risk.passes import Pass

#: Changes with the meaning of what is saved.
_VERSION = 1

#: The kinds by their names.
_KINDS: dict[str, type[Block]] = {
    kind.kind: kind for kind in (KroneckerBlock, EmbeddingBlock, ExactBlock, DiagonalBlock, IdentityBlock)
}


@dataclass
class Accumulation:
    """What is known after some mini-batches of some pass over the data.

    Attributes:
        blocks: The blocks, once the first mini-batch has shown them.
        kept: What finished passes left for each block, by name.
        num_passes: How many passes are finished.
        current: The sums of the pass that is under way.
        generator_states: The state of the random generator before each of the last mini-batches.
        is_done: Whether nothing is left to compute.
        columns: Columns that further passes need not compute again; they are not saved.
        fingerprint: Of the parameters at which the computation began.
    """

    blocks: list[Block] | None = None
    kept: list[dict[str, Tensor]] = field(default_factory=list)
    num_passes: int = 0
    current: Pass | None = None
    generator_states: dict[int, Tensor] = field(default_factory=dict)
    is_done: bool = False
    columns: KeptColumns = field(default_factory=KeptColumns)
    fingerprint: Tensor = field(default_factory=lambda: torch.empty(0))

    def note_generator(self, batch: int, generator: torch.Generator) -> None:
        """Remember the generator's state before a mini-batch; those long past are forgotten."""
        self.generator_states[batch] = generator.get_state()
        self.generator_states.pop(batch - 2, None)


def to_tensors(state: Accumulation, settings: Mapping[str, float], ranks: Mapping[str, float]) -> dict[str, Tensor]:
    """A flat dict of plain tensors, none of which shares memory with another.

    Args:
        state: What is saved.
        settings: What the matrix depends on, as numbers.
        ranks: Whose share of the data is summed, as numbers.
    """
    stage = {"version": _VERSION, "num_passes": state.num_passes, "is_done": int(state.is_done)}
    numbers = {**stage, **settings, **({} if state.is_done else ranks)}
    saved = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    kept = state.kept or [{} for _ in state.blocks or []]
    for number, (block, tensors) in enumerate(zip(state.blocks or [], kept, strict=True)):
        head = f"block.{number}.{block.kind}"
        saved[f"{head}.positions"] = torch.tensor(block.positions)
        saved[f"{head}.layout"] = torch.tensor(block.layout, dtype=torch.long)
        saved[f"{head}.shapes"] = torch.tensor([size for shape in block.shapes for size in shape], dtype=torch.long)
        saved[f"{head}.reason"] = torch.tensor(list(block.reason.encode()), dtype=torch.uint8)
        saved |= {f"{head}.{name}": tensor.clone() for name, tensor in tensors.items()}
    if not state.is_done and state.fingerprint.numel():
        saved["fingerprint"] = state.fingerprint.clone()
    if state.current is not None and state.current.num_batches:
        saved |= _saved_pass(state.current)
        if state.current.num_batches in state.generator_states:
            saved["pass.generator"] = state.generator_states[state.current.num_batches].clone()
    saved["num_entries"] = torch.tensor(float(len(saved) + 1), dtype=torch.float64)
    return {name: tensor.contiguous() for name, tensor in saved.items()}


def _saved_pass(found: Pass) -> dict[str, Tensor]:
    numbers = {"num_batches": found.num_batches, "num_data": found.num_data}
    saved = {f"pass.{name}": torch.tensor(number) for name, number in numbers.items()}
    saved["pass.denominator"] = found.denominator.clone()
    return saved | {f"pass.sum.{i}": tensor.clone() for i, tensor in enumerate(found.sums)}


def from_tensors(
    saved: Mapping[str, Tensor], settings: Mapping[str, float], ranks: Mapping[str, float], params: Sequence[Tensor]
) -> Accumulation:
    """Read what :func:`to_tensors` wrote.

    Args:
        saved: The tensors.
        settings: What the matrix is to depend on.
        ranks: Whose share of the data is to be summed, if it is not all.
        params: The parameters, for their shapes and their device.

    Raises:
        ValueError: If it was saved under other settings, does not fit the parameters, or lacks something.
    """
    try:
        return _read(saved, settings, ranks, params)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"The state is not what state_dict() gives, or not all of it: {error!r}.") from error


def _read(
    saved: Mapping[str, Tensor], settings: Mapping[str, float], ranks: Mapping[str, float], params: Sequence[Tensor]
) -> Accumulation:
    is_done = bool(saved.get("is_done", torch.zeros(())))
    expected = {"version": _VERSION, **settings, **({} if is_done else ranks), "num_entries": float(len(saved))}
    found = {name: float(saved[name]) if name in saved else None for name in expected}
    wrong = [
        f"{name} {found[name]} where {value} is expected" for name, value in expected.items() if found[name] != value
    ]
    if wrong:
        raise ValueError(f"The state was saved with other settings: {', '.join(wrong)}. Build the operator as then.")
    device = params[0].device
    heads = sorted(
        {".".join(n.split(".")[:3]) for n in saved if n.startswith("block.")}, key=lambda h: int(h.split(".")[1])
    )
    blocks, kept = [], []
    for head in heads:
        tensors = {n.removeprefix(f"{head}."): t for n, t in saved.items() if n.startswith(f"{head}.")}
        positions, layout = tensors.pop("positions").tolist(), tensors.pop("layout").tolist()
        sizes, reason = tensors.pop("shapes").tolist(), bytes(tensors.pop("reason").tolist()).decode()
        if max(positions) >= len(params):
            raise ValueError(f"The state has a parameter number {max(positions)}, but params has {len(params)}.")
        blocks.append(_KINDS[head.split(".")[2]].restored(positions, [params[i].shape for i in positions], layout))
        kept.append({name: tensor.to(device, copy=True) for name, tensor in tensors.items()})
        blocks[-1].reason = reason
        _check_fits(blocks[-1], kept[-1], sizes, params)
    if blocks and sorted(i for block in blocks for i in block.positions) != list(range(len(params))):
        raise ValueError("The state has blocks of other parameters than params.")
    state = Accumulation(blocks or None, kept if any(kept) else [], int(saved["num_passes"]))
    state.is_done = bool(saved["is_done"])
    state.current = _read_pass(saved, device)
    state.fingerprint = saved["fingerprint"].clone().cpu() if "fingerprint" in saved else state.fingerprint
    if state.current is not None and "pass.generator" in saved:
        state.generator_states = {state.current.num_batches: saved["pass.generator"].clone().cpu()}
    return state


def _check_fits(block: Block, kept: Mapping[str, Tensor], sizes: list[int], params: Sequence[Tensor]) -> None:
    """Refuse what was saved for parameters of another shape or precision."""
    expected = [size for shape in block.shapes for size in shape]
    dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    dtypes = {tensor.dtype for tensor in kept.values()}
    shapes_fit = all(name == "change" or tuple(t.shape) == block.shape_of(name) for name, t in kept.items())
    if sizes != expected or not dtypes <= {dtype} or not shapes_fit:
        raise ValueError(
            f"The state does not fit params {list(block.positions)}: it was saved for sizes {sizes} in "
            f"{[str(d) for d in dtypes]}, and they have sizes {expected} and need {dtype}."
        )


def _read_pass(saved: Mapping[str, Tensor], device: torch.device) -> Pass | None:
    if "pass.num_batches" not in saved:
        return None
    names = sorted((n for n in saved if n.startswith("pass.sum.")), key=lambda n: int(n.rsplit(".", 1)[1]))
    return Pass(
        [saved[name].to(device, copy=True) for name in names],
        saved["pass.denominator"].to(device, copy=True),
        num_data=int(saved["pass.num_data"]),
        num_batches=int(saved["pass.num_batches"]),
        are_ours=True,
    )


#: Entries of a parameter that its fingerprint weighs.
_NUM_SAMPLED = 2**14


def fingerprint_of(params: Sequence[Tensor]) -> Tensor:
    """Norms and weighted sums of the parameters ``[params, 2]``, by which changed ones are told."""
    rows = []
    for p in params:
        flat = p.detach().flatten()
        flat = flat if flat.dtype == torch.float64 else flat.float()
        some = flat[:: max(1, flat.numel() // _NUM_SAMPLED)]
        weights = torch.linspace(1.0, 2.0, some.numel(), dtype=flat.dtype, device=flat.device)
        rows.append(torch.stack([torch.linalg.vector_norm(flat), torch.dot(some, weights)]))
    return torch.stack(rows).double().cpu()


def is_same_fingerprint(one: Tensor, other: Tensor) -> bool:
    """Whether two fingerprints differ by no more than the rounding of sums."""
    return one.shape == other.shape and bool(((one - other).abs() <= 1e-5 * one[:, :1] + 1e-30).all())
