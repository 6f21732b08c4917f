"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# How long one example takes says nothing on a machine that does something else too.
settings.register_profile("project", deadline=None)
settings.load_profile("project")
