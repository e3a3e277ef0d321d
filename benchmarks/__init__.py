"""Benchmarks of purestep beside what a user would pick instead. `python -m benchmarks.run`; see README.md."""
