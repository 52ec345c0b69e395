"""What benchmarks/compare.py is made of: runs, their records, aggregation over seeds, tables and the picture."""
