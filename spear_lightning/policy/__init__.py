"""The language model that acts."""
