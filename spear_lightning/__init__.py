"""SPEAR — self-imitation with progressive exploration — as a PyTorch Lightning app (arXiv 2509.22601)."""

__version__ = "0.1.0"
