"""What the warm start of each family of tasks teaches: queries of words, with operators or without, or SQL."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Literal

from transformers import PreTrainedTokenizerFast

from common.data.beir import CORPUS_FILE, read_corpus
from common.data.rows import read_requests
from common.tasks import Row, Task
from learner.warm_start.examples import PLAIN_STRUCTURES, STRUCTURES, ExampleSampler, Sampler, sentences
from learner.warm_start.induction import BEGINNINGS
from learner.warm_start.sql_examples import SqlExamples, pieces_of
from learner.warm_start.tokenizer import PIECES, QUERY_CLOSING, QUERY_OPENING, train_tokenizer

AnswerForm = Literal["boolean", "words", "sql"]
SENTENCES: Final = 12_000  # enough to meet a corpus's words; more only costs tokenization
_STRUCTURES: Final = {"boolean": STRUCTURES, "words": PLAIN_STRUCTURES}


class Family:
    """Texts of a corpus and what to teach about them.

    Args:
        corpus: its documents, where it has any, and the requests of its training split are read, never judgments;
            of reference queries (SQL) the shapes.
        form: what answers look like.
        task: says what a prompt says of a row, and under which key an answer stands.
    """

    def __init__(self, corpus: Path, form: AnswerForm, task: Task) -> None:
        self._form = form
        self._rows = training_rows(corpus)
        self._requests = [task.request(row) for row in self._rows]
        self._texts = documents_of(corpus)
        self._opening = f'{{"{task.answer_key}": "'
        self._own_pieces: tuple[str, ...] = pieces_of(self._rows) if form == "sql" else ()

    @property
    def beginnings(self) -> Sequence[str]:
        """Pieces after which a word may begin."""
        return (*BEGINNINGS, self._opening, ", ", *self._own_pieces) if self._form == "sql" else BEGINNINGS

    def tokenizer(self, vocabulary: int) -> PreTrainedTokenizerFast:
        """A tokenizer for documents, requests and answers."""
        pieces = [self._opening if piece == QUERY_OPENING else piece for piece in PIECES]
        return train_tokenizer(
            [*self._texts, *self._requests], vocabulary, list(dict.fromkeys([*pieces, *self._own_pieces]))
        )

    def sampler(self, tokenizer: PreTrainedTokenizerFast, reasoning: bool) -> Sampler:
        """What to learn from."""
        if self._form == "sql":
            return SqlExamples(
                tokenizer,
                self._rows,
                self._requests,
                reasoning=reasoning,
                opening=self._opening,
                closing=QUERY_CLOSING,
            )
        pool = [sentence for text in self._texts for sentence in sentences(text)]
        step = max(1, len(pool) // SENTENCES)
        texts = [*pool[::step], *self._requests * 2]
        return ExampleSampler(tokenizer, texts, reasoning=reasoning, structures=_STRUCTURES[self._form])


def training_rows(corpus: Path) -> list[Row]:
    """Requests of the split `train`; none where the corpus has no such split."""
    there = (corpus / "rows" / "train.jsonl", corpus / "qrels" / "train.tsv")
    return read_requests(corpus, "train") if any(path.is_file() for path in there) else []


def documents_of(corpus: Path) -> list[str]:
    """Titles with texts; none where the corpus is no collection of texts (databases, study records)."""
    if not (corpus / CORPUS_FILE).is_file():
        return []
    return [f"{document.title} {document.text}" for document in read_corpus(corpus)]


def content_files(corpus: Path) -> Iterable[Path]:
    """The files that decide what is learned from a corpus, in a fixed order."""
    names = (CORPUS_FILE, "queries.jsonl", "rows/train.jsonl")
    return (path for name in names if (path := corpus / name).is_file())
