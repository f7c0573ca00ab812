"""From a model and a checkpoint to a file that was run and found equal."""

from fxrep.conversion.door import Conversion, convert
from fxrep.conversion.weights import load_weights

__all__ = ["Conversion", "convert", "load_weights"]
