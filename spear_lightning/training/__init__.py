"""Module, data module and what belongs to an update."""
