"""RepOptimizer: the gradients of a target preconditioned, around any SGD or AdamW of torch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fxrep.errors import FxrepError
from fxrep.training.rules import Output, Rule

KEY = "multipliers"  # in the state dict
TENSORS = ("multiplier", "scale", "offset")


class RepOptimizer(Optimizer):
    """Trains a `fxrep.target` as its branches would train under the same optimizer.

        SGD     g ← Σ L_i L_iᵀ g before weight decay, momentum and Nesterov: equal to the branches, step by step
        AdamW   m, v of Σ|L_i|⊙g, and the step multiplied by Σ|L_i|: equal where one branch falls on an entry, else up
                to eps (Adam divides by √v + eps, and each branch would have had an eps of its own)

    The branches that it equals are all decayed alike, the identity's scale too. (Ding et al., arXiv 2205.15242.)

    Gradients are preconditioned for the step and then given back as they were, so that accumulation and a missing
    `zero_grad` mean what they mean for the branches. `torch.nn.utils.clip_grad_norm_` would measure other gradients
    than the branches have: use this object's `clip_grad_norm_`.

    Args:
        optimizer: an SGD or AdamW over the target's parameters. Do not step it by itself.
        target: what `fxrep.target` gave; behind DistributedDataParallel, still the target itself.

    Raises:
        FxrepError: another kind of optimizer or network; AdamW where a fixed operator follows a trainable one.
    """

    def __init__(self, optimizer: Optimizer, target: nn.Module) -> None:
        rules = getattr(target, "rules", None)
        if not isinstance(rules, tuple):
            kind = type(target).__name__
            raise FxrepError(f"{kind} has no rules; pass what fxrep.target gave, not a copy or a wrapper of it")
        if not isinstance(optimizer, (SGD, AdamW)):
            raise FxrepError(f"{type(optimizer).__name__} is neither SGD nor AdamW, whose steps the theory covers")
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self._adopt()
        named, held = dict(target.named_parameters()), {id(p) for g in optimizer.param_groups for p in g["params"]}
        if not any(id(p) in held for p in named.values()):
            raise FxrepError("the optimizer holds no parameter of the target; build it over target.parameters()")
        ruled = [r for r in rules if any(id(named[o.name]) in held for o in r.outputs)]
        self.rules: list[Rule] = copy.deepcopy(ruled)
        self.ruled = {o.name: named[o.name] for r in self.rules for o in r.outputs}
        self._check_adam()
        self._fit()

    def _fit(self) -> None:
        """Brings the multipliers to the dtype and the device that the target has now."""
        for output in self._outputs():
            parameter = self.ruled[output.name]
            for key in TENSORS:
                if (tensor := getattr(output, key)) is not None:
                    setattr(output, key, tensor.to(parameter))

    def _check_adam(self) -> None:
        full = next((r for r in self.rules if r.fold is not None), None)
        if full is not None and isinstance(self.optimizer, AdamW):
            raise FxrepError(
                f"a fixed operator follows what trains in {full.outputs[0].name}, and Adam's step is not linear in the "
                "gradient; use SGD"
            )

    def _adopt(self) -> None:
        """Shares the state and the groups of the wrapped optimizer, so that schedulers and scalers see them."""
        self.state, self.param_groups = self.optimizer.state, self.optimizer.param_groups

    @property
    def multipliers(self) -> dict[str, Tensor]:
        """By the target's parameter: the diagonal of Σ L_i L_iᵀ, what the paper calls GradMult."""
        return {o.name: o.multiplier for o in self._outputs() if o.multiplier is not None}

    def _outputs(self) -> Iterator[Output]:
        return (o for r in self.rules for o in r.outputs)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer on preconditioned gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._fit()
        around = self._adam_step if isinstance(self.optimizer, AdamW) else self._sgd_step
        with torch.no_grad(), around():
            self.optimizer.step()
        return loss

    @contextmanager
    def _sgd_step(self) -> Iterator[None]:
        """P g, less what weight decay would take from the part of the kernel that nothing trains."""
        gradients = {name: g for rule in self.rules for name, g in self._preconditioned(rule).items()}
        groups = self._groups()
        for output in self._outputs():
            group = groups.get(output.name, {})
            if output.offset is not None and output.name in gradients and group.get("weight_decay"):
                sign = 1 if group.get("maximize") else -1
                spared = sign * group["weight_decay"] * output.offset
                gradients[output.name] = gradients[output.name] + spared
        with self._lent(gradients):
            yield

    @contextmanager
    def _adam_step(self) -> Iterator[None]:
        """W ← (W - λw(W - c)) - Σ|L_i|⊙step, with moments of Σ|L_i|⊙g."""
        given = {o.name: (o, p.grad) for o in self._outputs() if (p := self.ruled[o.name]).grad is not None}
        before = {name: self.ruled[name].clone() for name in given}
        with self._lent({name: known(o.scale) * known(gradient) for name, (o, gradient) in given.items()}):
            yield
        groups = self._groups()
        for name in given.keys() & groups.keys():  # what no group holds did not step
            output, parameter, group = given[name][0], self.ruled[name], groups[name]
            decay = group["lr"] * group["weight_decay"]
            decayed = before[name] * (1 - decay)
            parameter.sub_(decayed).mul_(known(output.scale)).add_(decayed)
            if output.offset is not None:
                parameter.add_(decay * output.offset)

    @contextmanager
    def _lent(self, gradients: dict[str, Tensor]) -> Iterator[None]:
        """The parameters with other gradients for as long as the context lasts."""
        own = {name: self.ruled[name].grad for name in gradients}
        try:
            for name, gradient in gradients.items():
                self.ruled[name].grad = gradient
            yield
        finally:
            for name, kept in own.items():
                self.ruled[name].grad = kept

    def _preconditioned(self, rule: Rule) -> dict[str, Tensor]:
        parameters = [self.ruled[o.name] for o in rule.outputs]
        if all(p.grad is None for p in parameters):
            return {}
        if rule.fold is None:
            present = [(o, p.grad) for o, p in zip(rule.outputs, parameters, strict=True) if p.grad is not None]
            return {o.name: known(o.multiplier) * g for o, g in present}
        given = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
        found = zip(rule.outputs, parameters, rule.fold.precondition(given), strict=True)
        return {o.name: g for o, p, g in found if p.requires_grad}

    def _groups(self) -> dict[str, dict[str, Any]]:
        """The parameter group of each ruled parameter."""
        of = {id(p): group for group in self.param_groups for p in group["params"]}
        return {name: of[id(p)] for name, p in self.ruled.items() if id(p) in of}

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clips by the norm that the gradients of the branches would have, √(gᵀ Σ L_i L_iᵀ g + …), and returns it."""
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        ruled = {id(p) for p in self.ruled.values()}
        squares = [known(p.grad).square().sum() for p in held if id(p) not in ruled]
        for rule in self.rules:
            for name, gradient in self._preconditioned(rule).items():
                own = self.ruled[name].grad
                squares += [] if own is None else [(own * gradient).sum()]
        if not squares:
            return torch.zeros(())
        norm = torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in held:
            known(parameter.grad).mul_(factor.to(parameter.device))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and the multipliers by the names of the target's parameters."""
        return {**self.optimizer.state_dict(), KEY: {name: dict(entry) for name, entry in self._entries().items()}}

    def _entries(self) -> dict[str, dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        for rule in self.rules:
            for output in rule.outputs:
                tensors = {key: getattr(output, key) for key in TENSORS}
                entries[output.name] = {key: t for key, t in tensors.items() if t is not None}
            if rule.fold is not None:
                entries[rule.outputs[0].name]["constants"] = list(rule.fold.constants.values())
        return entries

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises FxrepError for a state without multipliers, or with those of another network."""
        entries = state_dict.get(KEY)
        if entries is None:
            raise FxrepError("the state has no multipliers: a plain optimizer wrote it, and its momenta are others")
        self._check_entries(entries)
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != KEY})
        self._adopt()
        for rule in self.rules:
            for output in rule.outputs:
                for key in TENSORS:
                    setattr(output, key, entries[output.name].get(key))
            if rule.fold is not None:
                constants = entries[rule.outputs[0].name]["constants"]
                rule.fold.constants.update(zip(rule.fold.constants, constants, strict=True))
        self._fit()

    def _check_entries(self, entries: dict[str, dict[str, Any]]) -> None:
        mine = self._entries()
        if entries.keys() != mine.keys():
            other = sorted(entries.keys() ^ mine.keys())
            raise FxrepError(f"the state is of another target: {', '.join(other[:4])} is in one of them only")
        for name, entry in entries.items():
            shapes = [
                {k: tuple(v.shape) for k, v in e.items() if k in ("multiplier", "scale")} for e in (entry, mine[name])
            ]
            if shapes[0] != shapes[1]:
                raise FxrepError(f"the state is of another target: {name} has {shapes[0]}, here {shapes[1]}")

    def __getstate__(self) -> dict[str, Any]:
        raise FxrepError("a RepOptimizer is not pickled or copied; save its state_dict()")


def known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
