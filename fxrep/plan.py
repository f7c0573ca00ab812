"""What there is to decide, and what was decided: frozen values, no search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fxrep.equal import Equal
from fxrep.errors import Refusal
from fxrep.form import AffineForm
from fxrep.lower import Recipe
from fxrep.shapes import Shapes


@dataclass(frozen=True)
class Problem:
    """What there is to decide on: forms over direct operands in graph order, and who reads each value."""

    forms: Mapping[str, AffineForm]
    shapes: Shapes
    readers: Mapping[str, frozenset[str]]
    #: values that must be computed where they stand, with the code and reason why
    fixed: Mapping[str, tuple[str, str]]
    #: by value, the places in graph order where its memory may be written: no reader may move past one
    writes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    places: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    #: values that somebody reads who needs them contiguous, or would copy them
    dense: frozenset[str] = frozenset()
    #: values that may not store more numbers than what they replace does: nothing else makes up for them
    lean: frozenset[str] = frozenset()


#: Raises Illegal for a recipe that may not be taken.
Legal = Callable[[Recipe], None]


@dataclass(frozen=True)
class Decision:
    """One value and how it is computed; `inlined` are the values folded into it.

    It is computed `at` a place in the graph: that of the value, or, for a term that is no value of the graph, that of
    the value whose term it was.
    """

    node: str
    recipe: Recipe
    inlined: tuple[str, ...]
    at: str
    seconds_before: float
    seconds_after: float
    #: what was found equal by its numbers, without which it would not be legal
    equal: tuple[Equal, ...] = ()

    @property
    def replaced(self) -> tuple[str, ...]:
        """The nodes of the graph that it stands for."""
        return (*self.inlined, self.at)


@dataclass(frozen=True)
class Plan:
    """What to compute: `decisions` replace their nodes, `removed` are no longer computed, all else stays as it is.

    A decision may read the value of one that stands before it.
    """

    decisions: Mapping[str, Decision]
    removed: frozenset[str]
    refusals: tuple[Refusal, ...]
    seconds_before: float
    seconds_after: float

    def sources(self, node: str) -> list[str]:
        """The values of the graph that a decision reads, itself or through its terms."""
        found: dict[str, None] = {}
        for source in self.decisions[node].recipe.form.sources:
            is_term = source in self.decisions and self.decisions[source].at != source
            found |= dict.fromkeys(self.sources(source) if is_term else [source])
        return list(found)
