"""Rows as a document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from tabulate import tabulate

from fxrep.zoo.kinds import KINDS
from fxrep.zoo.row import DIFFERENT, EQUAL, SHORT, Row

HEADINGS = ("network", "input", *KINDS, "MACs", "parameters", "timm leaves", "torch leaves", "error", "ratio", "status")
ABOUT = """\
Every network is built with random weights, random batch-norm statistics around those of real activations and no scale
at zero, and collapsed. Calls are counted where they run, below Python: before → after, or one number where nothing
changed. MACs and parameters (with floating-point buffers) likewise. *timm leaves* and *torch leaves* are the conv / bn
/ add calls after `timm`'s `reparameterize_model` and after `torch.fx.experimental.optimization.fuse`, or the exception
that they raise. *error* is the largest difference of the collapsed network in float64, relative to an output's largest
value; *ratio* the error of the collapsed network in float32 over the original's own. A row falls *short* if any of its
numbers is larger than before, if timm leaves fewer calls, or if a batch norm is left beside a convolution or linear
layer that could take it.
"""


def markdown(rows: Sequence[Row], command: str, names: Sequence[str] = ()) -> str:
    """The document: what was run, how far the goals are met, and a row a network; `names` that have none are told."""
    rows = sorted(rows, key=lambda row: row.name)
    made_by = Counter(row.versions for row in rows if row.versions)
    versions = [f"{version} ({count} networks)" for version, count in sorted(made_by.items())]
    missing = sorted({*names} - {row.name for row in rows})
    return "\n".join((
        "# The zoo",
        "",
        f"Made by `{command}` with {'; '.join(versions)}.",
        "",
        ABOUT,
        summary(rows),
        *([f"Not run: {', '.join(missing)}."] if missing else []),
        "",
        tabulate(goals(rows), ("goal", "networks"), tablefmt="github", disable_numparse=True),
        "",
        tabulate([_cells(row) for row in rows], HEADINGS, tablefmt="github", disable_numparse=True),
        "",
    ))  # fmt: skip


def summary(rows: Sequence[Row]) -> str:
    """How many networks are equal, fall short or fail."""
    found = Counter(row.status for row in rows)
    told = ((EQUAL, "equal, and nowhere short"), (SHORT, "equal, but short of a goal"), (DIFFERENT, "not equal"))
    counts = [f"{found[status]} {what}" for status, what in told]
    return f"{len(rows)} networks: {', '.join(counts)}, {found['failed']} failed."


def goals(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Of each goal, how many networks meet it, of how many it is asked of; and the sums of all that ran."""
    ran = [row for row in rows if not row.failed]
    tried = [row for row in ran if isinstance(row.timm, dict)]
    bn = [sum(counts["bn"] for counts in side) for side in ([r.before for r in ran], [r.after for r in ran])]
    met = (
        ("accepted", ran, rows),
        ("equal", [r for r in ran if r.is_equal], ran),
        ("no more calls of a kind, MACs or parameters than before", [r for r in ran if not r.more], ran),
        ("no more conv, bn or add than timm's own method leaves", [r for r in tried if not r.beaten], tried),
        ("no bn left beside a conv or linear that could take it", [r for r in ran if not r.left], ran),
    )
    counts = [(goal, f"{len(good)} of {len(asked)}") for goal, good, asked in met]
    return [*counts, ("bn calls", " → ".join(map(str, bn)))]


def _cells(row: Row) -> list[str]:
    name = row.name.replace(":", ": ")
    if row.failed:
        return [name, *[""] * (len(HEADINGS) - 2), f"failed: {_escaped(row.why)}"]
    counts = [_change(row.before[k], row.after[k], str) for k in KINDS]
    sizes = [_change(row.before[k], row.after[k], _rounded) for k in ("macs", "params")]
    status = f"{row.status}: {row.why}" if row.why else row.status
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return [
        name, row.input, *counts, *sizes, _others(row.timm), _others(row.fuse), f"{row.error:.0e}", ratio,
        _escaped(status),
    ]  # fmt: skip


def _change(before: int, after: int, told: Callable[[int], str]) -> str:
    texts = [told(n) for n in (before, after)]
    return texts[0] if before == after else " → ".join(texts)


def _rounded(number: int) -> str:
    """In millions, with three digits."""
    return f"{number / 1e6:.3g} M" if number >= 1e5 else str(number)


def _others(left: dict[str, int] | str) -> str:
    return left if isinstance(left, str) else " / ".join(str(n) for n in left.values())


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
