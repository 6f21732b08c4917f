"""What the prompts of all tasks have in common: how to answer, and what a search engine understands."""

from __future__ import annotations

from typing import Final, Literal

from common.tasks.answer import answer_text

Retriever = Literal["bm25", "bm25_boolean", "dense"]

_BETWEEN: Final = (
    'the answer between <answer> and </answer>, as a JSON object with the single key "{key}" and nothing around it:'
)
_REASONING: Final = (
    "First think about {think_about}, then answer. Put your thoughts between <think> and </think>, and after them "
    + _BETWEEN
)
_DIRECT: Final = "Answer at once, without explanation. Put " + _BETWEEN

RETRIEVERS: Final[dict[Retriever, str]] = {
    "bm25": """\
The search engine ranks texts by the words they share with the query (BM25), rare words above all. Word order, \
operators and parentheses mean nothing to it. Add words that a text worth finding would use, synonyms and names \
among them; leave out words that such texts do not use. A request that is good already may stay as it is.""",
    "bm25_boolean": """\
The search engine understands the operators AND, OR and NOT in capitals, parentheses for grouping and "quoted \
phrases", and ranks what matches by the words it shares with the query (BM25). Join synonyms with OR and what must \
all be there with AND. A request that is good already may stay as it is.""",
    "dense": """\
The search engine compares the meaning of the query with the meaning of each text; operators and parentheses mean \
nothing to it. Keep what is asked for, and add in plain language what a text worth finding would say. A request \
that is good already may stay as it is.""",
}


def answer_format(reasoning: bool, key: str, example: str, think_about: str) -> str:
    """How the answer has to look, in the words of the prompt; `common.tasks.answer` parses what it asks for."""
    form = (_REASONING if reasoning else _DIRECT).format(key=key, think_about=think_about)
    return f"{form}\n{answer_text(example, 'your thoughts' if reasoning else None, key)}"
