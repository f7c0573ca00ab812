"""From a checkpoint to the weights of a model: whatever it is wrapped in, and told where it does not fit."""

from __future__ import annotations

import difflib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from fxrep.errors import Unusable, no_file
from fxrep.trees import on_meta

NAMES_TOLD = 3
DEPTH = 3  # of the mappings in a checkpoint that are looked into
COUNTER = "num_batches_tracked"  # that old checkpoints lack, and that eval mode never reads


@dataclass(frozen=True)
class Fit:
    """One reading of a checkpoint: the tensors of `entry`, with `strip` taken off their names or `add` put before."""

    entry: str
    tensors: Mapping[str, Tensor]
    strip: str
    add: str
    matched: int

    @property
    def is_average(self) -> bool:
        return "ema" in f"{self.entry}.{self.strip}".lower()

    def named(self) -> dict[str, Tensor]:
        """By the model's names: what does not bear the prefix is somebody else's."""
        inside = {name: t for name, t in self.tensors.items() if name.startswith(self.strip)}
        return {self.add + name[len(self.strip) :]: t for name, t in inside.items()}

    def __str__(self) -> str:
        return (
            " under ".join(filter(None, [f"names in {self.strip!r}" if self.strip else "", self.entry])) or "the file"
        )


def load_weights(
    model: nn.Module, file: str | Path, *, entry: str | None = None, ignore: Sequence[str] = (), trust: bool = False
) -> tuple[str, ...]:
    """Copies a checkpoint's weights into the model, all of them or none, and says what was done on the way.

    The mapping of the file is taken whose names fit best once a prefix that they share is taken off (`module.` of
    DistributedDataParallel, `_orig_mod.` of torch.compile, `model.` of a trainer); of two that fit alike, the one whose
    name says that it is an exponential moving average.

    Args:
        model: the module that is changed.
        file: `.safetensors`, or what `torch.save` wrote.
        entry: take this mapping of the file and no other, such as `model` or `state.ema`.
        ignore: patterns of names in the file to leave out, with their prefix or without it, such as `total_*` that
            the model does not have, or `model_ema.*` where the average is not what is wanted.
        trust: unpickle the file even if it holds code, which may do anything.

    Raises:
        Unusable: the file cannot be read as it is, or a name or shape does not fit.
    """
    _check_arguments(model, file)
    path, ignore = Path(file), [ignore] if isinstance(ignore, str) else ignore
    entries = [(name, _without(tensors, ignore)) for name, tensors in _entries(_read(path, trust))]
    fits = [fit for name, tensors in entries for fit in _fits(model, name, tensors)]
    if entry is not None:
        known = sorted({fit.entry for fit in fits})
        fits = [fit for fit in fits if fit.entry == entry]
        if not fits:
            raise Unusable(f"{path} has no entry {entry!r} with weights; it has {_listed(known) or 'none'}")
    best = max(fits, key=lambda fit: (fit.matched, fit.is_average), default=None)
    if best is None or not best.matched:
        raise Unusable(f"{path} holds no weights of {type(model).__name__}: {_unlike(model, best)}")
    given = best.named()
    _check_fit(model, path, {n: t for n, t in given.items() if not _matches(n, ignore)})
    model.load_state_dict(given, strict=False)  # strictness was judged above, with better words
    return tuple(_notes(path, best, fits))


def _check_arguments(model: object, file: object) -> None:
    if not isinstance(model, nn.Module) or not isinstance(file, (str, os.PathLike)):
        given = f"{type(model).__name__}, {type(file).__name__}"
        raise Unusable(f"got ({given}); load_weights(model, file) takes a module and the name of a checkpoint")
    empty = on_meta(dict(model.named_parameters()))
    if empty is not None:  # copying there does nothing, and torch only warns
        raise Unusable(
            f"{empty} is on meta, which holds no weights; give it memory first: model.to_empty(device='cpu')"
        )


def _read(path: Path, trust: bool) -> Any:
    if not path.is_file():
        raise Unusable(f"{path} is a folder" if path.is_dir() else no_file(path))
    _check_start(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is told below
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except UnpicklingError as error:
        if "nsupported" not in str(error) and "allowed" not in str(error):  # nothing that trust would mend
            raise Unusable(f"{path} is no checkpoint, or not all of it is there: {_reason(error)}") from None
        raise Unusable(
            f"{path} holds more than weights ({_reason(error)}), and reading that runs code of the file; if you trust "
            "whoever made it, say so: trust=True, or --trust on the command line"
        ) from None
    except Exception as error:  # a broken archive may raise anything, and so does a trusted class that is not there
        if "TorchScript" in str(error):
            raise Unusable(f"{path} is a TorchScript program; save the state_dict() of what it was made from") from None
        fact = f"{type(error).__name__}: {_reason(error)}"
        raise Unusable(f"{path} cannot be read as a checkpoint ({fact}); is all of it there?") from error


def _reason(error: Exception) -> str:
    """The one line of torch's message that tells the fact."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    fact = next((line for line in lines if "Unsupported" in line or "not an allowed global" in line), "")
    fact = fact.partition("WeightsUnpickler error:")[2].partition(". Please")[0].strip()
    return fact or (lines[-1][:160] if lines else "it ends too soon")


STARTS = {
    b"version https://git-lfs": "is a pointer of Git LFS: `git lfs pull` gets the file itself",
    b"<!doct": "is a web page: what was downloaded is not the file",
    b"<html": "is a web page: what was downloaded is not the file",
}


def _check_start(path: Path) -> None:
    """Tells what often lies where a checkpoint should. Raises Unusable."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise Unusable(f"{path} is empty")
    for begin, fact in STARTS.items():
        if start.lstrip().lower().startswith(begin):
            raise Unusable(f"{path} {fact}")


def _without(tensors: Mapping[str, Tensor], ignore: Sequence[str]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if not _matches(name, ignore)}


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise Unusable(
            f'{path} needs safetensors, which cannot be imported ({error}): pip install "fxrep[export]"'
        ) from None
    try:
        return load_file(path)
    except Exception as error:  # its errors share no base
        raise Unusable(f"{path} is no safetensors file: {error}") from error


def _entries(value: Any, path: str = "", depth: int = DEPTH) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The mappings of names to tensors in a checkpoint, a pickled module's among them."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if not isinstance(value, Mapping):
        return
    tensors = {name: t for name, t in value.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if tensors:
        yield path, tensors
    for name, inner in value.items() if depth else ():
        if isinstance(name, str):
            yield from _entries(inner, f"{path}.{name}" if path else name, depth - 1)


def _fits(model: nn.Module, entry: str, tensors: Mapping[str, Tensor]) -> Iterator[Fit]:
    """The entry with each prefix that brings a name of it to one of the model, or the other way round."""
    wanted = set(model.state_dict())
    strips = Counter(name[: len(name) - len(tail)] for name in tensors for tail in _tails(name) if tail in wanted)
    adds = Counter(name[: len(name) - len(tail)] for name in wanted for tail in _tails(name) if tail in tensors)
    yield from (Fit(entry, tensors, prefix, "", count) for prefix, count in strips.items())
    yield from (Fit(entry, tensors, "", prefix, count) for prefix, count in adds.items() if prefix)
    if not strips and not adds:
        yield Fit(entry, tensors, "", "", 0)


def _tails(name: str) -> list[str]:
    """a.b.c -> a.b.c, b.c, c."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _check_fit(model: nn.Module, path: Path, given: Mapping[str, Tensor]) -> None:
    wanted = model.state_dict()
    missing = [n for n in wanted if n not in given and n.rpartition(".")[2] != COUNTER]
    foreign = [n for n in given if n not in wanted]
    shapes = [n for n in wanted if n in given and given[n].shape != wanted[n].shape]
    facts = [
        _told("the file lacks", [f"{n}{_nearest(n, foreign)}" for n in missing]),
        _told("the model lacks", [f"{n}{_nearest(n, missing)}" for n in foreign]),
        _told("of another shape are", [f"{n} {_shapes(given[n], wanted[n])}" for n in shapes]),
    ]
    if not any(facts):
        return
    way_out = "build the model with the options that it was trained with"
    if not missing and not shapes:
        way_out += f", or leave these names out: ignore=[{foreign[0]!r}], or --ignore on the command line"
    raise Unusable(f"{path} does not fit {type(model).__name__}: {'; '.join(filter(None, facts))}; {way_out}")


def _told(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return f"{what} {', '.join(names[:NAMES_TOLD])}{more}" if names else ""


def _nearest(name: str, others: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, others, n=1)
    return f" (nearest: {close[0]})" if close else ""


def _shapes(given: Tensor, wanted: Tensor) -> str:
    return f"({tuple(given.shape)}, the model's {tuple(wanted.shape)})"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name or "the top level" for name in names)


def _unlike(model: nn.Module, fit: Fit | None) -> str:
    if fit is None:
        return "there is no mapping of names to tensors in it"
    theirs, ours = list(fit.tensors)[:NAMES_TOLD], list(model.state_dict())[:NAMES_TOLD]
    return f"its names are such as {', '.join(theirs)}, the model's such as {', '.join(ours)}"


def _notes(path: Path, best: Fit, fits: Sequence[Fit]) -> Iterator[str]:
    if best.entry:
        yield f"{path}: took the entry {best.entry}"
    if best.strip or best.add:
        change = f"without the prefix {best.strip!r}" if best.strip else f"with the prefix {best.add!r}"
        yield f"{path}: names {change} are the model's"
    equal = [f for f in fits if f.matched == best.matched and f is not best]
    if equal and best.is_average:
        one_entry = best.entry == equal[0].entry and best.strip
        way = f"--ignore '{best.strip}*'" if one_entry else f"--entry {equal[0].entry}" if equal[0].entry else "--entry"
        yield f"{path}: took the moving average, {best}, and not {equal[0]}, which fits as well ({way} takes that)"
    outside = [name for name in best.tensors if not name.startswith(best.strip)]
    if outside:
        yield f"{path}: {_told('left out', outside)}"
