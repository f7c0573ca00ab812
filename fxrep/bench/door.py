"""The benchmark: every form under every engine is made ready, then all of them take turns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fxrep.bench.engines import ENGINES, here
from fxrep.bench.forms import FORMS
from fxrep.bench.memory import peak_bytes
from fxrep.bench.result import BASE, Bench, Row
from fxrep.bench.setting import Setting
from fxrep.errors import FxrepError, Unusable
from fxrep.stopwatch import Call, Times, threads, turns
from fxrep.verification.compare import leaves

MOST_COMPILED = 256  # of one class, beside each other; torch's own limit is for code that is compiled over and over
Step = Callable[[str], None]


@dataclass(frozen=True)
class _Ready:
    row: Row
    call: Call


def bench(
    models: Mapping[str, nn.Module],
    shapes: Sequence[tuple[int, ...]],
    setting: Setting | None = None,
    *,
    forms: Sequence[str] = tuple(FORMS),
    engines: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    step: Step = lambda _: None,
) -> Bench:
    """Times each model on an input of each shape, in every form under every engine, all in turn.

    `engines` are by default all that there are here. `options` go to `reparameterize`. `step` is told what comes next:
    once for each pair of a form and an engine, and `setting.rounds` times for each model and shape.

    Raises Unusable for a name that there is not, or where the original itself does not run.
    """
    setting = setting or Setting()
    for names, known in ((forms, FORMS), (engines or (), ENGINES)):
        unknown = [n for n in names if n not in known]
        if unknown:
            raise Unusable(f"there is no {unknown[0]!r}; there are {', '.join(known)}")
    chosen = engines or here(setting)
    rows: list[Row] = []
    with threads(setting.threads), torch._dynamo.config.patch(recompile_limit=MOST_COMPILED):
        for (name, model), shape in product(models.items(), shapes):
            case = _Case(name, model.eval(), shape, setting, dict(options or {}), step)
            rows += case.rows(forms, chosen)
            torch.compiler.reset()
    return Bench(setting.describe(), tuple(rows))


def steps_of(models: int, shapes: int, forms: int, engines: int, rounds: int) -> int:
    """How often `step` is called."""
    return models * shapes * (forms * engines + rounds)


class _Case:
    """One model at one size."""

    def __init__(
        self, name: str, model: nn.Module, shape: tuple[int, ...], setting: Setting, options: dict[str, Any], step: Step
    ) -> None:
        self.name, self.model, self.shape, self.setting = name, model, shape, setting
        self.options, self.step = options, step
        self.x = setting.input(shape)

    @torch.no_grad()
    def rows(self, forms: Sequence[str], engines: Sequence[str]) -> list[Row]:
        self.expected = self._original()
        found = [self._ready(form, engine) for form, engine in product(forms, engines)]
        ready = [each for each in found if isinstance(each, _Ready)]
        times = iter(self._timed([each.call for each in ready]))
        timed = [replace(f.row, times=next(times)) if isinstance(f, _Ready) else f for f in found]
        base = next((r.times for r in timed if (r.form, r.engine) == BASE), None)
        return [replace(r, ratio=r.times.to(base)) if r.times and base else r for r in timed]

    def _original(self) -> list[Tensor]:
        model = self.setting.placed(FORMS["original"](self.model, self.x, {}))
        try:
            return _tensors(self.setting.called(model, self.x)())
        except Exception as error:  # a forward may raise anything
            fact = f"{self.name} does not run on an input of {self.shape} in {self.setting.dtype}: {_told(error)}"
            raise Unusable(f"{fact}; give a shape or a dtype that fits") from error

    def _ready(self, form: str, engine: str) -> _Ready | Row:
        """The call that is to be timed, seen to give what the original gives; or why there is none."""
        self.step(f"{self.name}: {form}, {engine}")
        row = Row(self.name, self.shape, form, engine)
        why = ENGINES[engine].why_not(self.setting)
        if why:
            return replace(row, why=why)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._prepared(row)
        except Exception as error:  # other tools, and their compilers, may raise anything
            return replace(row, why=str(error) if isinstance(error, LookupError) else _told(error))

    def _prepared(self, row: Row) -> _Ready:
        example = self.x.float().cpu()
        module = self.setting.placed(FORMS[row.form](self.model, example, self.options).eval())
        engine = ENGINES[row.engine]
        call = engine.prepare(module, self.x, self.setting)
        error = _difference(_tensors(call()), self.expected)
        call()
        peak = peak_bytes(call, self.setting.device) if engine.is_torch else None
        return _Ready(replace(row, error=error, peak=peak), call)

    def _timed(self, calls: Sequence[Call]) -> Iterator[Times]:
        rounds = []
        for taken in turns(calls, self.setting.rounds, self.setting.device, self.setting.seconds):
            rounds.append(taken)
            self.step(f"{self.name}: round {len(rounds)}")
        for _ in range(self.setting.rounds - len(rounds)):
            self.step(f"{self.name}: time is up")
        yield from (Times(samples) for samples in zip(*rounds, strict=True))


def _tensors(outputs: Any) -> list[Tensor]:
    """Tensors and arrays among the outputs."""
    found = (leaf.value for leaf in leaves(outputs) if hasattr(leaf.value, "shape"))
    return [torch.as_tensor(value).detach().cpu().double() for value in found]


def _difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if [t.shape for t in got] != [t.shape for t in expected]:
        raise FxrepError("it gives outputs of other shapes than the original")
    return max((_relative(g, e) for g, e in zip(got, expected, strict=True)), default=0.0)


def _relative(got: Tensor, expected: Tensor) -> float:
    largest = float(expected.abs().max()) or 1.0
    return float((got - expected).abs().max()) / largest


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
