"""Callbacks: curriculum, entropy monitoring, rollout logs, progress and reports."""
