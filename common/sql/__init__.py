"""Comparing the results of two SQL queries: pure functions over tables, no database."""
