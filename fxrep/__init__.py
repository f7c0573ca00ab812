"""fxrep: collapse any PyTorch network's affine regions into the single convolutions they equal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fxrep.api import explain, reparameterize
    from fxrep.calibration import calibrate
    from fxrep.conversion import Conversion, convert, load_weights
    from fxrep.equalization import Equalization, equalize
    from fxrep.errors import FxrepError, Refusal
    from fxrep.readers import reader
    from fxrep.refolding import refold
    from fxrep.report import Report
    from fxrep.training import (
        Expansion,
        RepOptimizer,
        constant_scales,
        expand,
        hyper_search,
        online,
        scales_of,
        target,
    )
    from fxrep.verification import Verdict, verify

_HOMES = {
    "calibrate": "fxrep.calibration",
    "Conversion": "fxrep.conversion", "convert": "fxrep.conversion", "load_weights": "fxrep.conversion",
    "Equalization": "fxrep.equalization", "equalize": "fxrep.equalization",
    "explain": "fxrep.api", "reparameterize": "fxrep.api", "FxrepError": "fxrep.errors", "Refusal": "fxrep.errors",
    "reader": "fxrep.readers", "refold": "fxrep.refolding", "Report": "fxrep.report",
    "Verdict": "fxrep.verification", "verify": "fxrep.verification",
    "Expansion": "fxrep.training", "RepOptimizer": "fxrep.training", "constant_scales": "fxrep.training",
    "expand": "fxrep.training", "hyper_search": "fxrep.training", "online": "fxrep.training",
    "scales_of": "fxrep.training", "target": "fxrep.training",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names are imported at their first use, so that `fxrep --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fxrep' has no attribute {name!r}; it offers {', '.join(sorted(_HOMES))}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


__all__ = [
    "Conversion",
    "Equalization",
    "Expansion",
    "FxrepError",
    "Refusal",
    "RepOptimizer",
    "Report",
    "Verdict",
    "__version__",
    "calibrate",
    "constant_scales",
    "convert",
    "equalize",
    "expand",
    "explain",
    "hyper_search",
    "load_weights",
    "online",
    "reader",
    "refold",
    "reparameterize",
    "scales_of",
    "target",
    "verify",
]  # fmt: skip
