"""Readers of the files in which the original's data sets are published: raw files -> `common.tasks.row.Row`."""
