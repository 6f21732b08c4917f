"""A BEIR folder of a few abstracts, for tests that search."""

from __future__ import annotations

import json
from pathlib import Path

DOCUMENTS = {
    "d1": ("Aspirin and stroke", "Aspirin lowers the risk of stroke in adults."),
    "d2": ("Exercise and sleep", "Exercise improves sleep in older patients."),
    "d3": ("Metformin", "Metformin against placebo for diabetes in adults."),
    "d4": ("", "Aspirin after surgery."),
}


def write_corpus(folder: Path) -> Path:
    """Documents alone: who rewrites has no judged requests."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"_id": each, "title": title, "text": text}) for each, (title, text) in DOCUMENTS.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    return folder
