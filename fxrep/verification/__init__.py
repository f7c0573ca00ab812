"""Whether two models are equal: run beside each other, against the original in float64."""

from fxrep.verification.door import verify
from fxrep.verification.verdict import Comparison, Difference, Parting, Probe, Trial, Verdict

__all__ = ["Comparison", "Difference", "Parting", "Probe", "Trial", "Verdict", "verify"]
