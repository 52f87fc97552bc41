"""The study: every method on the same data, seeds and learning rates, one row a run, tables and plots from the rows.

plan -> runs (the finetune command, resumable) -> rows (JSON lines) -> report (tables, plots)
"""
