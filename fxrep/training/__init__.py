"""The training side: branches for a network to train with, and what trains their sum without them."""

from __future__ import annotations

from fxrep.training.derivation import target
from fxrep.training.expansion import Expansion, expand
from fxrep.training.live import online
from fxrep.training.optimizer import RepOptimizer
from fxrep.training.search import constant_scales, hyper_search, scales_of

__all__ = ["Expansion", "RepOptimizer", "constant_scales", "expand", "hyper_search", "online", "scales_of", "target"]
