"""Hypothesis profiles: `quick` unless HYPOTHESIS_PROFILE names another."""

import os

from hypothesis import HealthCheck, Phase, settings

#: On CI a failing network is shown as it was drawn: making it smaller takes minutes, and its seed reproduces it.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate] + ([] if os.environ.get("CI") else [Phase.target, Phase.shrink])
#: Networks are built, collapsed and run: no example is fast, and how fast is no matter of correctness.
LENIENT = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "phases": PHASES,
}

settings.register_profile("quick", max_examples=80, derandomize=bool(os.environ.get("CI")), **LENIENT)
settings.register_profile("deep", max_examples=20_000, print_blob=True, **LENIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
