"""Rewarders: turn generated text into scores by asking real search engines."""
