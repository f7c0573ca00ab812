"""Cross-layer range equalisation: each channel's scale moved from what writes it into what reads it."""

from fxrep.equalization.door import Equalization, Link, equalize

__all__ = ["Equalization", "Link", "equalize"]
