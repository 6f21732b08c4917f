"""Rewriting from Python: `from deepretrieval import Rewriter` (docs/rewriting.md).

What is exported here is the public interface; the other packages are the system behind it.
"""

from __future__ import annotations

from deepretrieval.rewriter import Rewriter
from deploy.rewriting.results import Found, Hit, Rewrite
from deploy.rewriting.rewriter import AsyncRewriter, NotPossible
from deploy.rewriting.task_rewriter import Wish

__all__ = ["AsyncRewriter", "Found", "Hit", "NotPossible", "Rewrite", "Rewriter", "Wish"]
