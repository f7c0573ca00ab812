"""What fxrep says when it says no: one exception for users, one for the algebra, one record for the report."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class FxrepError(Exception):
    """Base of every error that fxrep raises on purpose; the message names the thing, the fact and the way out."""


class Unusable(FxrepError):
    """What the caller named cannot be used: a missing file, a package that is not installed, an unknown name."""


#: Every refusal code and what it means. A reader or the algebra may use no other: a typo fails at import or at once.
CODES: dict[str, str] = {
    "batch-statistics": "a normalisation uses the statistics of the batch, which are not constants",
    "broadcast": "an operand would broadcast, so the operator is not one convolution per channel",
    "certificate-failed": "the fold did not reproduce the sub-graph it replaces: a bug in fxrep or in a reader",
    "costs-more": "the merged operator is predicted slower than the parts, or has more to do",
    "device-mismatch": "the parameters live on different devices",
    "dtype-unknown": "the folded weights would be constants of a dtype that nothing tells",
    "dynamic-padding": "the padding depends on the input's size",
    "holds-by-value": "the fold holds for the present numbers of what trains, and not for others",
    "hooked": "a forward hook looks at, or may change, the module's input or output",
    "layout": "the operands act on different channel axes",
    "metadata": "the size of the value is read, and no value that is kept has that size",
    "mutation": "the value is written in place while another reader may still see it",
    "net-pad": "the branches' kernels cannot be aligned: pad_lo + pad_hi - dilation*(kernel-1) differs",
    "non-finite": "zeros in the merged kernel would turn an infinity into nan, and `strict` was asked for",
    "not-affine": "the op is not an affine map of its input",
    "not-traceable": "the forward cannot be traced symbolically",
    "pad-value": "the padding value is not what the operator gives outside its input",
    "not-expandable": "the block has no branches for a convolution of this kind",
    "padding-mode": "two different paddings meet in one operator",
    "pads-over-bias": "zero padding meets a map that is not zero outside its input",
    "pads-over-taps": "padding cuts through taps that the composed operator would compute",
    "parameters-not-linear": "the merged kernel is not linear in the parameters that train",
    "pool-border": "the average divides by a varying count at the border",
    "rank-unknown": "the number of dimensions decides the channel axis, and it is not known",
    "random": "the op draws random numbers",
    "reached-into": "a forward that is not traced may do more with the module than call it",
    "reader-failed": "the reader of the op raised an exception: a bug in the reader",
    "shape-unknown": "the sizes that decide the meaning of the op are not known",
    "shared": "the value has other readers, and computing it for each costs more",
    "stride": "the branches have different strides",
    "tied-parameters": "a parameter that trains is read in more than one place",
    "transposed": "a transposed convolution does not compose with this operator",
    "unsupported-options": "the op is called with options that have no affine reading",
}


#: What lets it through, where the reason at hand knows nothing better.
HINTS: dict[str, str] = {
    "batch-statistics": "track_running_stats=True, and eval()",
    "broadcast": "give both operands one size",
    "certificate-failed": "this is a bug in fxrep or in a reader; the model was left as it is here",
    "costs-more": "example_inputs, or the profile of the device it will run on, sharpen the prediction",
    "device-mismatch": "move the model to one device first",
    "dtype-unknown": "give all parameters one dtype",
    "dynamic-padding": "write the padding as a number",
    "holds-by-value": "drop the bias, or freeze it",
    "hooked": "remove the hook before deployment",
    "layout": "transpose in the model, so that both act on one axis",
    "metadata": "read the size from the network's input",
    "mutation": "assign to a new name instead of writing in place",
    "net-pad": "pad every branch by half its kernel",
    "non-finite": "strict=False, if no input holds inf or nan",
    "not-traceable": "it runs as it is; a forward that does not branch on values can be traced",
    "pad-value": "pad with the value of the bias, or not at all",
    "not-expandable": "another block, or `where` to leave it out",
    "padding-mode": "use one padding mode in the region",
    "pads-over-bias": "pad with the bias value before it, or padding=0",
    "pads-over-taps": "pad once, before the first of the two, and none at the second",
    "parameters-not-linear": "freeze all but one of the operators in sequence, or normalise after the sum",
    "pool-border": "count_include_pad=True, ceil_mode=False",
    "random": "training=self.training, so that eval() turns it off",
    "rank-unknown": "pass example_inputs",
    "reached-into": "in the forward around it, call it and do nothing else with it",
    "reader-failed": "this is a bug in the reader; the op was left as it is",
    "shape-unknown": "write the sizes as numbers, or read them from x.shape",
    "shared": "nothing to mend: every reader would need a copy of the layer",
    "stride": "give the branches one stride",
    "tied-parameters": "give each layer a weight of its own",
    "transposed": "only pointwise operators merge with a transposed convolution",
    "unsupported-options": "leave the option out, or register a reader of your own",
}

#: What is true of every activation is told nobody: only ops that could have been merged are in a report.
UNTOLD = frozenset({"not-affine"})


def _check_code(code: str) -> None:
    if code not in CODES:
        raise ValueError(f"unknown refusal code {code!r}; the codes are: {', '.join(sorted(CODES))}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f": did you mean {' or '.join(close)}?" if close else ""


def no_file(path: Path) -> str:
    """That there is none, where it was looked for, and what lies there that is called alike."""
    beside = [str(path.parent / file.name) for file in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"there is no file {path} (looked from {Path.cwd()}){did_you_mean(str(path), beside)}"


class Illegal(Exception):
    """An operation of the algebra that would not be equal; carries a code of `CODES`, the reason and a way out."""

    def __init__(self, code: str, reason: str, hint: str = "") -> None:
        _check_code(code)
        super().__init__(f"[{code}] {reason}")
        self.code, self.reason, self.hint = code, reason, hint


@dataclass(frozen=True)
class Refusal:
    """One opportunity declined: at which node, by which rule, why, and what lets it through (if empty: of `HINTS`)."""

    node: str
    code: str
    reason: str
    hint: str = ""

    def __post_init__(self) -> None:
        _check_code(self.code)
        object.__setattr__(self, "hint", self.hint or HINTS.get(self.code, ""))

    def __str__(self) -> str:
        return f"{self.node}: refused [{self.code}] {self.reason}" + (f" Hint: {self.hint}" if self.hint else "")
