"""What to show of a document besides its id: its title, and where it can be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

from common.config import Config
from common.data.beir import CORPUS_FILE, read_corpus

# Titles are kept in memory; of larger corpora none are shown.
_MOST_BYTES: Final = 4 << 30
_PUBLIC: Final = {
    "eutils.ncbi.nlm.nih.gov": "https://pubmed.ncbi.nlm.nih.gov/{}/",
    "clinicaltrials.gov": "https://clinicaltrials.gov/study/{}",
}


def public_url(config: Config, document: str) -> str:
    """Where a document of a public engine can be read; "" for one of our own corpora."""
    host = urlsplit(config.search.url or "").hostname or ""
    template = next((form for name, form in _PUBLIC.items() if host == name or host.endswith(f".{name}")), None)
    return "" if template is None else template.format(quote(document, safe=""))


class Titles:
    """Titles of the documents of a BEIR folder, read when the first is asked for.

    Raises DataError from `of` where the corpus has a broken line.
    """

    def __init__(self, corpus: Path) -> None:
        self._file = corpus / CORPUS_FILE
        self._titles: dict[str, str] | None = None

    def of(self, ids: Sequence[str]) -> list[str]:
        """Title of each, "" where there is none. Takes seconds the first time."""
        if self._titles is None:
            self._titles = self._read()
        return [self._titles.get(each, "") for each in ids]

    def _read(self) -> dict[str, str]:
        if not self._file.is_file() or self._file.stat().st_size > _MOST_BYTES:
            return {}
        return {document.id: document.title for document in read_corpus(self._file.parent) if document.title}
