"""What can be collapsed of a module that cannot be traced as a whole."""

from fxrep.islands.collapse import Begin, Islands, unchanged_report

__all__ = ["Begin", "Islands", "unchanged_report"]
