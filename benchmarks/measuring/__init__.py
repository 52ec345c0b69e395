"""What ``benchmarks/memory.py`` is made of: training on synthetic rows in real processes, and counters of bytes."""
