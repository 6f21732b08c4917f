"""Actors: generate rollouts with the newest weights they hold, one engine each."""
