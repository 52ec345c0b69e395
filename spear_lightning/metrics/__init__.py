"""Metrics, loggers, intervals and evaluation."""
