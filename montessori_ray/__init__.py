"""Montessori-Instruct (arXiv 2410.14208) on Ray: a teacher learns to write the data its student learns from."""

__version__ = "0.1.0"
