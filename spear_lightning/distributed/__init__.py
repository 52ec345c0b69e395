"""Collectives, failures of ranks, DeepSpeed."""
