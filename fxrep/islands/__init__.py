"""What can be collapsed of a module that cannot be traced as a whole."""

from fxrep.islands.collapse import Begin, Islands, only_called, unchanged_report

__all__ = ["Begin", "Islands", "only_called", "unchanged_report"]
