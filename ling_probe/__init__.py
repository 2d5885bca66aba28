"""See, test and change what a Ling 2.0 mixture of experts routes where."""

__version__ = "0.1.0"
