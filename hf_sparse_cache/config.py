"""`SparseCacheConfig`: the settings of a handle as one object that can be saved, shared and pushed to the Hub."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any, ClassVar, Self

from .checks import MOST_ID, is_whole, shown, text
from .hub import Shareable
from .stats import parse_bytes, table


CONFIG_NAME = "sparse_cache_config.json"
EXACTNESS = ("replayable", "bitwise")
# Names of the placement policies, the default first; `planning.policies` has their classes. Here, so that help and
# completion need no numpy.
POLICY_NAMES = ("learned", "dp", "block", "balanced", "sqrt", "dyadic", "boundary", "last", "junction", "none")
STORAGES = ("exact", "bf16", "int8")
# The share that each keeps of float32 numbers where all of a state may be kept so: whole numbers, and a byte of scale
# for 32 or 16 neighbours (see `models.rounding`).
KEPT = {"exact": 1.0, "bf16": (2 + 1 / 32) / 4, "int8": (1 + 1 / 16) / 4}


def check_storage(storage: object) -> None:
    """Raises ValueError unless it is the name of a way to keep states."""
    if storage not in STORAGES:
        raise ValueError(f"storage must be 'exact', 'bf16' or 'int8', not {shown(storage)}.")


@dataclass(frozen=True)
class SparseCacheConfig(Shareable):
    """Settings of a `SparsePrefixCache`; the same names, defaults and errors as its keyword arguments, which are all
    but the last one.

    Args:
        max_memory: bytes that may be stored, as an integer or such as "2GiB"; None for no limit.
        max_checkpoints: most new checkpoints a prompt; None leaves it to the policy.
        exactness: "replayable": a prompt is cut only where a checkpoint is taken or resumed, or where pieces are
            faster; a resumed run equals stock `generate()` to rounding, and bit for bit a cold run over its segments.
            "bitwise": cuts follow from the prompt and the settings alone; a resumed run equals a cold run bit for bit.
        grid: bitwise: tokens between regular cuts. Replayable: tokens a piece, where pieces are faster. None for what
            suits the model and its device.
        cut_after: strings after which a prompt is always cut, such as "\\n\\nQuestion:"; needs a tokenizer.
        ambient: whether `generate()` on this model uses the handle without being given it, as in pipelines and agents.
        pieces: most tokens that one forward of a prefill may take, in replayable mode; None for no limit.
        policy: name of the placement policy.
        namespace: a tenant; nothing stored under one is ever matched from another.
        cut_tokens: what one more cut of a prefill costs, in tokens of prefill, which decides in replayable mode how
            many are worth it; None for what is usual on the model's device. `hf-sparse-cache tune` measures it.
        storage: how states, keys and values are kept: "exact", as they are; "bf16", in the bytes of bfloat16, half of
            those of float32; "int8", in about a quarter. What is kept is rounded, and a run goes on from the rounded
            values wherever something was kept, cold as well as warm: it stays repeatable bit for bit, and comes to lie
            a little away from stock `generate()` (see docs/memory.md).

    Raises:
        ValueError: A value is out of range; the message names the argument.
    """

    file_name: ClassVar[str] = CONFIG_NAME

    max_memory: int | str | None = "2GiB"
    max_checkpoints: int | None = None
    exactness: str = "replayable"
    grid: int | None = None
    policy: str = "learned"
    namespace: str = ""
    cut_after: tuple[str, ...] = ()
    pieces: int | None = None
    ambient: bool = False
    cut_tokens: float | None = None
    storage: str = "exact"

    def __post_init__(self) -> None:
        parse_bytes(self.max_memory)
        if self.exactness not in EXACTNESS:
            instead = "; 'replayable' took the place of 'numerical'" if self.exactness == "numerical" else ""
            raise ValueError(f"exactness must be 'replayable' or 'bitwise', not {shown(self.exactness)}{instead}.")
        check_storage(self.storage)
        if self.max_checkpoints is not None and not is_whole(self.max_checkpoints, 0):
            raise ValueError(f"max_checkpoints must be None or at least 0, not {shown(self.max_checkpoints)}.")
        if self.grid is not None and not is_whole(self.grid, 2, MOST_ID):
            raise ValueError(
                f"grid must be at least 2 tokens, not {shown(self.grid)}; leave it out for the family's own."
            )
        if self.pieces is not None and not is_whole(self.pieces, 2, MOST_ID):
            raise ValueError(f"pieces must be None or at least 2 tokens, not {shown(self.pieces)}.")
        if not isinstance(self.ambient, bool):
            raise ValueError(f"ambient must be True or False, not {shown(self.ambient)}.")
        cost: Any = self.cut_tokens
        if cost is not None and (isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost < inf):
            raise ValueError(f"cut_tokens must be None or a finite number, at least 0, not {shown(self.cut_tokens)}.")
        strings: Any = self.cut_after
        if isinstance(strings, str) or not all(isinstance(string, str) and string for string in strings):
            raise ValueError(
                f"cut_after must be strings of at least one character, such as ('\\n\\nQuestion:',), not "
                f"{shown(strings)}."
            )
        object.__setattr__(self, "cut_after", tuple(strings))
        text("policy", self.policy, "give the name of a placement policy")
        text("namespace", self.namespace, "give the name of a tenant that UTF-8 can hold")

    def to_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Settings from `to_dict`; unknown keys are ignored, missing ones have their defaults."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})

    def card(self) -> str:
        """A table of the settings and how to use them."""
        rows = table(("setting", "value"), [(name, f"`{value!r}`") for name, value in self.to_dict().items()])
        return (
            "# Settings of a sparse prefix cache\n\nFor `SparsePrefixCache` of hf_sparse_cache: exact prefix reuse "
            f"for recurrent and hybrid language models.\n\n{rows}\n\n```python\nfrom hf_sparse_cache import "
            'SparseCacheConfig, SparsePrefixCache\n\nconfig = SparseCacheConfig.from_pretrained("this repository or '
            'folder")\ncache = SparsePrefixCache(model, tokenizer, config=config)\n```\n'
        )
