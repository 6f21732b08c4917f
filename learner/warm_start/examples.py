"""What the warm start is taught: the format of an answer, and to copy words of a request into it. Nothing else.

Every example is a prompt and an answer whose query joins words picked at random from the prompt in a structure picked
at random. No example says which words or which structure find the relevant documents: judgments are never read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerFast

from learner.warm_start.tokenizer import QUERY_CLOSING, QUERY_OPENING, prompt_ids

# Shapes of a query with their share of the examples; letters stand for words, other pieces are written as they are.
# No single words: a policy that begins with them is rewarded for them first and stops trying anything else.
STRUCTURES: tuple[tuple[str, float], ...] = (
    ("a AND b", 0.06),
    ("a OR b", 0.10),
    ("a OR b OR c", 0.10),
    ("(a OR b) AND c", 0.18),
    ("a AND (b OR c)", 0.18),
    ("a OR (b AND c)", 0.12),
    ("(a AND b) OR c", 0.10),
    ("(a OR b) AND (c OR d)", 0.16),
)
# For engines to which operators mean nothing. The shorter ones leave out more, and begin less well.
PLAIN_STRUCTURES: tuple[tuple[str, float], ...] = (
    ("a b", 0.3),
    ("a b c", 0.4),
    ("a b c d", 0.3),
)
# Function words, which no query needs. Everything else with three signs or more counts as a content word.
FUNCTION_WORDS = frozenset(
    """about after against all also among and any are because been before being between both but can could did does
    during each either for from further had has have having her his how into its may might more most nor not off once
    only other our out over own per same should since some such than that the their them then there these they this
    those through too under until very was were what when where whether which while who whom whose why will with
    within without would you your""".split()  # noqa: SIM905 - a word list reads best as text
)
_WORD = re.compile(r"[^\W_]+")
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")
_SHORTEST_WORD = 3
LONGEST_PROMPT = 96  # tokens; longer texts would cost time and teach nothing that shorter ones do not


@dataclass(frozen=True, slots=True)
class Source:
    """A prompt to copy from: its request text, token ids, and the token ids of each content word in it."""

    text: str
    prompt: list[int]
    words: list[list[int]]


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt and of the response to learn, which ends with the end-of-text token."""

    prompt: list[int]
    response: list[int]


def content_words(text: str) -> list[str]:
    """Distinct content words of a text in order of appearance, spelled as they stand there."""
    words = dict.fromkeys(_WORD.findall(text))
    return [w for w in words if len(w) >= _SHORTEST_WORD and w.lower() not in FUNCTION_WORDS and w not in _RESERVED]


_RESERVED = frozenset(("AND", "OR", "NOT"))


def sentences(text: str) -> list[str]:
    """Cut a text after each full stop, question mark or exclamation mark."""
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]


def is_clean_copy(answer: str, request: str, *, reasoning: bool) -> bool:
    """Whether an answer is well-formed and its query holds nothing but words of the request, joined soundly."""
    match = _ANSWER[reasoning].fullmatch(answer)
    if match is None:
        return False
    query = match["query"]
    words = [word for word in _WORD.findall(query) if word not in _RESERVED]
    balanced = query.count("(") == query.count(")")
    return bool(words) and balanced and set(words) <= set(_WORD.findall(request))


_BODY = r'<answer>\{"query": "(?P<query>[^"<>]*)"\}</answer>'
_ANSWER = {False: re.compile(_BODY), True: re.compile(r"<think>[^<>]+</think>" + _BODY)}


class Sampler(Protocol):
    """What a warm start learns from. sources: the prompts, of which some are answered freely to measure progress."""

    sources: list[Source]

    def draw(self, rng: random.Random, longest_random_prompt: int = 24) -> Example:
        """One example."""

    def is_clean(self, answer: str, source: Source) -> bool:
        """Whether a freely sampled answer is as it was taught, right or wrong."""


class ExampleSampler:
    """Draws examples from texts and from bags of random words, reproducibly for one `random.Random`.

    Args:
        tokenizer: encodes the texts, through its own chat template.
        texts: sentences and requests; those with fewer than four content words are passed over.
        reasoning: put a think part of a few copied words before the answer.
        random_share: share of examples whose prompt is a random bag of words; they teach to copy any word anywhere.
        structures: of the queries, with their shares.

    Raises:
        ValueError: no text has four content words.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        texts: Iterable[str],
        *,
        reasoning: bool,
        random_share: float = 0.5,
        structures: Sequence[tuple[str, float]] = STRUCTURES,
    ) -> None:
        self._tokenizer = tokenizer
        self._reasoning = reasoning
        self._random_share = random_share
        self.sources = [source for text in texts if (source := self._source(text)) is not None]
        if not self.sources:
            raise ValueError("no text with four content words to learn copying from: give a larger corpus")
        self._pieces = {piece: self._encode(piece) for piece in (" ", " AND ", " OR ", "(", ")")}
        self._opening = self._encode("<answer>" + QUERY_OPENING)
        self._closing = [*self._encode(QUERY_CLOSING + "</answer>"), int(tokenizer.eos_token_id)]
        self._thinking = (self._encode("<think>"), self._encode("</think>"))
        self._structures = [_parse_structure(shape) for shape, _ in structures]
        self._weights = [share for _, share in structures]
        self._frame = (self._encode("<|user|>"), self._encode("<|assistant|>"))
        self._vocabulary = [list(w) for w in dict.fromkeys(tuple(w) for s in self.sources for w in s.words)]

    def draw(self, rng: random.Random, longest_random_prompt: int = 24) -> Example:
        """One example. `longest_random_prompt` counts the words of a random-token prompt."""
        if rng.random() < self._random_share:
            source = self._random_source(rng, longest_random_prompt)
        else:
            source = self.sources[rng.randrange(len(self.sources))]
        return Example(source.prompt, self._response(source.words, rng))

    def is_clean(self, answer: str, source: Source) -> bool:
        """Whether an answer is well-formed and made of the words of its prompt (`is_clean_copy`)."""
        return is_clean_copy(answer, source.text, reasoning=self._reasoning)

    def _response(self, words: Sequence[list[int]], rng: random.Random) -> list[int]:
        response: list[int] = []
        if self._reasoning:
            thought = rng.sample(words, k=min(len(words), rng.randint(1, 4)))
            response += self._thinking[0] + _joined(thought, self._pieces[" "]) + self._thinking[1]
        response += self._opening
        (structure,) = rng.choices(self._structures, self._weights)
        # In order of appearance: what comes next then depends on the last word alone, and no word comes twice.
        picked = [words[place] for place in sorted(rng.sample(range(len(words)), k=structure_words(structure)))]
        for part in structure:
            response += picked[part] if isinstance(part, int) else self._pieces[part]
        return response + self._closing

    def _random_source(self, rng: random.Random, longest: int) -> Source:
        words = rng.sample(self._vocabulary, k=rng.randint(4, min(longest, len(self._vocabulary))))
        prompt = self._frame[0] + _joined(words, self._pieces[" "]) + self._frame[1]
        return Source("", prompt, words)

    def _source(self, text: str) -> Source | None:
        prompt = prompt_ids(self._tokenizer, text)
        words = [self._encode(word) for word in content_words(text)]
        if len(words) < 4 or len(prompt) > LONGEST_PROMPT:
            return None
        return Source(text, prompt, words)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


def _joined(words: Sequence[list[int]], separator: list[int]) -> list[int]:
    ids: list[int] = []
    for place, word in enumerate(words):
        ids += (separator if place else []) + word
    return ids


def structure_words(structure: Sequence[int | str]) -> int:
    """How many words a parsed structure has."""
    return sum(isinstance(part, int) for part in structure)


def _parse_structure(shape: str) -> list[int | str]:
    """`(a OR b) AND c` -> ["(", 0, " OR ", 1, ")", " AND ", 2]."""
    parts = re.findall(r"\b[a-d]\b| (?:AND|OR) |[()]| ", shape)
    return ["abcd".index(part) if part in "abcd" else part for part in parts]
