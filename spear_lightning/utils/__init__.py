"""Atomic files, random streams, HTTP."""
