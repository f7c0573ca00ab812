"""What a benchmark is run under."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fxrep.calibration import device_name, version_of
from fxrep.errors import Unusable

PACKAGES = ("torch", "timm", "torchvision", "onnxruntime", "openvino")
AUTOCAST = "autocast-"
#: What is computed in: weights and inputs cast, or float32 with `autocast-…`.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType({
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    f"{AUTOCAST}fp16": torch.float16, f"{AUTOCAST}bf16": torch.bfloat16,
})  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Device, dtype (a name of DTYPES), threads (None: as many as torch uses now), rounds, and seconds after which no
    further round begins."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: str = "fp32"
    threads: int | None = None
    rounds: int = 30
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise Unusable(f"there is no dtype {self.dtype!r}; there are {', '.join(DTYPES)}")

    @property
    def is_autocast(self) -> bool:
        return self.dtype.startswith(AUTOCAST)

    @property
    def stored(self) -> torch.dtype:
        """The dtype of weights and inputs."""
        return torch.float32 if self.is_autocast else DTYPES[self.dtype]

    def placed(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.stored)

    def input(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, self.stored)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, DTYPES[self.dtype]) if self.is_autocast else nullcontext()

    def called(self, function: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
        """The call that is timed."""
        if not self.is_autocast:
            return lambda: function(*inputs)

        def call() -> Any:
            with self.autocast():
                return function(*inputs)

        return call

    def describe(self) -> dict[str, Any]:
        """What there must be told for the numbers to mean anything."""
        known = {name: found for name in PACKAGES if (found := version_of(name))}
        threads = self.threads or torch.get_num_threads()
        return {"device": device_name(self.device), "dtype": self.dtype, "threads": threads, "versions": known}
