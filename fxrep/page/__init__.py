"""A report as one page that needs nothing else: no fx, no torch, no network."""

from fxrep.page.render import document
from fxrep.page.scene import Box, Edge, Picture, Scene, Summand

__all__ = ["Box", "Edge", "Picture", "Scene", "Summand", "document"]
