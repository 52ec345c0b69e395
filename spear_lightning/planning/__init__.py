"""``spear plan``: formulas for the memory and cost of a run, and what they say about a configuration."""
