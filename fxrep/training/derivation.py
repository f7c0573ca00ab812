"""From constant-scale branches to the plain network that trains as they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxrep import kernel as K
from fxrep.api import Examples, aim_of, bind_examples, check_model, finished
from fxrep.certify import Region
from fxrep.copying import structural_copy
from fxrep.errors import FxrepError, Illegal, Refusal
from fxrep.evaluation import Doubles
from fxrep.islands import unchanged_report
from fxrep.pipeline import Pipeline
from fxrep.plan import Decision, Legal
from fxrep.refolding import Architecture
from fxrep.report import Report
from fxrep.trace import Traced, trace, untraceable
from fxrep.training.linear import Linear, names_of
from fxrep.training.rules import Rule, derive

READS_MODE = "its forward reads self.training, and a graph has one mode only"
TRAINS = "a target is derived from a network as it trains, and this one"
NORMS = "one batch norm after the sum (fxrep.hyper_search), or frozen ones: eval(), requires_grad_(False)"


def target(model: nn.Module, example_inputs: Examples = None) -> nn.Module:
    """The plain network that trains, with `RepOptimizer`, as the branches of `model` do.

    Wherever branches with one trainable operator and constant factors are summed, W' = Σ L_i(W_i) + c: it starts at
    the sum (rule of initialisation), and `.rules` say what its gradient is multiplied by (rule of iteration; Ding et
    al., arXiv 2205.15242). Everything else is kept, and trains as it did.

    Args:
        model: in training mode; it is not touched. What is frozen (`requires_grad=False`, buffers, numbers, a batch
            norm in eval mode) is a constant; a batch norm in training mode stays a layer.
        example_inputs: as for `reparameterize`.

    Returns:
        A `torch.fx.GraphModule` in training mode, with a `Report` at `.report` and a tuple of rules at `.rules`.

    Raises:
        FxrepError: `model` is no module, or not in training mode.
    """
    rules: list[Rule] = []

    def write(pipeline: Pipeline) -> tuple[GraphModule, Report]:
        tell_of_norms(pipeline, NORMS)
        while refused := [*by_present_values(pipeline), *_tied(pipeline)]:
            pipeline.decline(refused)
        collapsed, report = pipeline.rewrite()
        rules.extend(_rules(pipeline, collapsed))
        return collapsed, report

    result = rewritten_as_it_trains(model, example_inputs, TRAINS, Linear, write)
    result.rules = tuple(rules)  # type: ignore[assignment]
    return result


def rewritten_as_it_trains(
    model: nn.Module,
    example_inputs: Examples,
    told: str,
    legal: Callable[[nn.Module], Legal],
    write: Callable[[Pipeline], tuple[GraphModule, Report]],
) -> nn.Module:
    """What `write` makes of the network in its training mode, or a copy where its own forward must stay.

    `legal` gives, for the traced root, the check of a recipe. Raises FxrepError, with what is `told`, for a model in
    eval mode.
    """
    model = check_model(model)
    if not model.training:
        raise FxrepError(f"{told} is in eval mode; call train()")
    examples = bind_examples(model, example_inputs)
    before = Architecture.of(model)
    traced = _trace_as_it_trains(model, examples)
    if isinstance(traced, Refusal):
        root = structural_copy(model)
        result = finished(root, root, model, before, unchanged_report(type(model).__name__, root, traced))
    else:
        aim = aim_of(model.parameters())
        line = Pipeline(type(model).__name__, traced, examples, aim, legal=legal(traced.root), trains=True)
        written, report = write(line)
        result = finished(written, traced.root, model, before, _told_of_kept(report, traced))
    return _restore_modes(result, model)


def _told_of_kept(report: Report, traced: Traced) -> Report:
    """The report with the modules that keep their own forward."""
    kept = tuple(untraceable(path, reason) for path, reason in traced.kept.items())
    return replace(report, refusals=(*kept, *report.refusals))


def _trace_as_it_trains(model: nn.Module, examples: dict[str, Any]) -> Traced | Refusal:
    """The graph with every module in the mode that it has. Modules whose forward does something else in eval mode keep
    it; refused where the outermost one does."""
    whole: dict[str, str] = {}
    while True:
        root, resting = structural_copy(model), structural_copy(model)
        for new, old in zip(root.modules(), model.modules(), strict=True):
            new.training = old.training
        with torch.enable_grad():
            traced, in_eval = (trace(net, examples, trains=True, whole=whole) for net in (root, resting))
        if isinstance(traced, Refusal) or isinstance(in_eval, Refusal):
            return traced if isinstance(traced, Refusal) else in_eval
        pairs = zip_longest(traced.graph.nodes, in_eval.graph.nodes)
        apart = next((pair for pair in pairs if _call(pair[0]) != _call(pair[1])), None)
        if apart is None:
            return traced
        reader = next((name for name in _around(*apart) if name not in whole), "")
        if not reader:
            hint = "use modules such as nn.Dropout, which know theirs"
            return Refusal(type(model).__name__, "not-traceable", READS_MODE, hint)
        kind = type(root.get_submodule(reader))
        whole |= {name: READS_MODE for name, m in root.named_modules() if type(m) is kind and m.training}
        whole[reader] = READS_MODE


def _call(node: Node | None) -> str:
    return "" if node is None else f"{node.op} {node.target} {node.args} {node.kwargs}"


def _around(*nodes: Node | None) -> list[str]:
    """The modules around all the nodes, innermost first, the root not among them."""
    paths = [[path for path, _ in node.meta.get("nn_module_stack", {}).values()] if node else [] for node in nodes]
    return [path for path in reversed(paths[0]) if path and all(path in others for others in paths)]


def by_present_values(pipeline: Pipeline) -> Iterator[Refusal]:
    """The decisions that would not hold for other numbers of what trains, such as padding over a bias that is zero."""
    terms: dict[str, Region] = {}
    for decision in pipeline.plan.decisions.values():
        doubles = _Elsewhere()
        try:
            region = pipeline.region(decision, terms, doubles)
        except Illegal:
            continue  # the pipeline will say so
        refusal = pipeline.certify(region, doubles)
        if decision.node not in pipeline.nodes:
            terms[decision.node] = region
        if refusal is not None:
            fact = f"with other numbers in what trains, {refusal.reason}"
            yield Refusal(decision.at, "holds-by-value", fact)


class _Elsewhere(Doubles):
    """Leaf values with everything that trains moved away from where it is."""

    as_stored = False

    def of(self, tensor: Tensor) -> Tensor:
        known = id(tensor) in self._of
        value = super().of(tensor)
        if known or not tensor.requires_grad:
            return value
        generator = torch.Generator().manual_seed(len(self._of))
        moved = value + torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        self._of[id(tensor)] = tensor, moved
        return moved


def tell_of_norms(pipeline: Pipeline, hint: str) -> None:
    """Of batch norms in training mode, those in a branch keep a sum apart; the others are where they belong."""
    readings = pipeline.readings
    summed = {s for form in readings.forms.values() if len(form.sources) > 1 for s in form.sources}
    told = {
        name: replace(r, reason=f"{r.reason}, in a branch", hint=hint) if r.code == "batch-statistics" else r
        for name, r in readings.refusals.items() if r.code != "batch-statistics" or name in summed
    }  # fmt: skip
    pipeline.readings = replace(readings, refusals=told)


def _tied(pipeline: Pipeline) -> Iterator[Refusal]:
    """The decisions over a parameter that something else reads too: its gradient would be only a part."""
    ledger, names = pipeline.ledger(), names_of(pipeline.traced.root)
    for decision in pipeline.plan.decisions.values():
        shared = [t for t in _trained(decision) if ledger.is_read_elsewhere(t)]
        if shared:
            fact = f"{names.get(id(shared[0]), 'a parameter')} is read elsewhere too, and trains by both gradients"
            yield Refusal(decision.at, "tied-parameters", fact)


def _trained(decision: Decision) -> list[Tensor]:
    kernels = [k for e in decision.recipe.emits for k in e.kernels]
    return [leaf.tensor for leaf in K.leaves(*kernels) if leaf.tensor.requires_grad]


def _rules(pipeline: Pipeline, collapsed: GraphModule) -> Iterator[Rule]:
    """One rule a decision in which something trains; what nothing trains is frozen."""
    paths = pipeline.names()
    made = dict(collapsed.named_parameters())
    for decision in pipeline.plan.decisions.values():
        emits = [e for e in decision.recipe.emits if e.stores]
        names = [
            f"{paths[id(e)]}.{kind}"
            for e in emits for kind, kernel in zip(("weight", "bias"), e.kernels, strict=True) if kernel is not None
        ]  # fmt: skip
        kernels = [k for e in emits for k in e.kernels if k is not None]
        for name, kernel in zip(names, kernels, strict=True):
            made[name].requires_grad_(any(leaf.tensor.requires_grad for leaf in K.leaves(kernel)))
        if _trained(decision):
            yield derive(emits, names, [tuple(made[n].shape) for n in names])


def _restore_modes(result: nn.Module, model: nn.Module) -> nn.Module:
    """The result as it trains: new layers in training mode, kept ones in the mode that they had."""
    result.train()
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in result.named_modules():
        module.training = modes.get(name, True)
    return result
