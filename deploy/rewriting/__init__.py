"""Rewriting for users: one model, its tasks, and what their engines return for the queries it writes."""
