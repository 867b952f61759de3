"""What a Kronecker-factored matrix is to be, as its constructors are told."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from curvlinops.curvature.kronecker.plan import Options
from curvlinops.curvature.kronecker.types import FisherType, KFACType

Member = TypeVar("Member", bound=StrEnum)


@dataclass(frozen=True)
class Settings:
    """Checked arguments.

    Attributes:
        fisher_type: Which matrix is approximated.
        mc_samples: Number of samples.
        seed: Their seed.
        num_positions: Loss terms that a datum is said to have.
        terms: Which gradients of a datum go together in an empirical Fisher.
        of_blocks: What the blocks depend on.
    """

    fisher_type: FisherType
    mc_samples: int
    seed: int
    num_positions: int | None
    terms: str
    of_blocks: Options

    @staticmethod
    def checked(
        fisher_type: FisherType | str,
        mc_samples: int,
        seed: int,
        kfac_approx: KFACType | str,
        num_per_example_loss_terms: int | None,
        separate_weight_and_bias: bool,
        terms: str,
        unsupported: str,
    ) -> Settings:
        """The settings, from arguments by their public names.

        Raises:
            ValueError: If one is not understood, or has no meaning beside another.
        """
        kind = _member(FisherType, fisher_type, "fisher_type")
        if kind == FisherType.MC and mc_samples == 0:
            raise ValueError("mc_samples: expected at least one sample; fisher_type='type-2' is the exact matrix.")
        if kind != FisherType.MC and mc_samples != 1:
            raise ValueError(f"mc_samples={mc_samples} has no meaning with fisher_type={str(kind)!r}: only with 'mc'.")
        if kind != FisherType.EMPIRICAL and terms == "datum":
            raise ValueError(f"terms='datum' has no meaning with fisher_type={str(kind)!r}: only with 'empirical'.")
        if unsupported not in ("diagonal", "error"):
            raise ValueError(f"unsupported: expected 'diagonal' or 'error', got {unsupported!r}.")
        blocks = Options(
            joins_biases=not separate_weight_and_bias,
            reduces=_member(KFACType, kfac_approx, "kfac_approx") == KFACType.REDUCE,
            has_gradients=kind != FisherType.FORWARD_ONLY,
            is_strict=unsupported == "error",
        )
        return Settings(kind, mc_samples, seed, num_per_example_loss_terms, terms, blocks)


def _member(kind: type[Member], value: str, argument: str) -> Member:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{argument}: expected one of {[str(m) for m in kind]}, got {value!r}.") from None
