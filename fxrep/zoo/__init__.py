"""The zoo: whole libraries of networks, collapsed, compared and counted, into one table."""

from fxrep.zoo.names import default_names
from fxrep.zoo.row import Row
from fxrep.zoo.sweep import Limits, read_rows, sweep, write_rows
from fxrep.zoo.table import markdown, summary

__all__ = ["Limits", "Row", "default_names", "markdown", "read_rows", "summary", "sweep", "write_rows"]
