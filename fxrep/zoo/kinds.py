"""The kinds of calls that a row counts."""

KINDS = ("conv", "linear", "bn", "add", "mul", "pool")
