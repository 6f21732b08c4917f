"""Fetching the raw files of a data set: resumable, checked, noted in a manifest."""
