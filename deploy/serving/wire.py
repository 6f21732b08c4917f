"""Bodies of requests and answers; the OpenAPI document of the server is made from them."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy.rewriting.results import Found, Rewrite
from deploy.rewriting.rewriter import DEFAULT_TOP
from deploy.rewriting.searcher import MOST_HITS

MOST_REQUESTS: Final = 256
MOST_CHARACTERS: Final = 20_000

Text = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]


class _Body(BaseModel):
    """A misspelt key is an error: it would silently do nothing."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class RewriteBody(_Body):
    """`POST /rewrite`."""

    request: Text | None = None
    """One request; or several as `requests`."""
    requests: Annotated[list[Text], Field(min_length=1, max_length=MOST_REQUESTS)] | None = None
    task: str = ""
    """Name of a task, as `GET /tasks` lists them; "": the server's first."""
    n: Annotated[int, Field(ge=1, le=16)] = 1
    """Rewrites of every request; more than one needs a temperature above 0."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=8)] | None = None
    """Of a response, reasoning included; null: the server's own."""
    seed: int | None = None
    guided: bool = True
    """Hold the model to the form of an answer."""
    search: bool = False
    """Search for every query and return what it brings."""
    top: Annotated[int, Field(ge=1, le=MOST_HITS)] = DEFAULT_TOP
    """Results of every search."""
    database: str = ""
    """Of requests for SQL."""
    knowledge: Annotated[str, Field(max_length=MOST_CHARACTERS)] = ""
    """What belongs to a question for SQL."""
    max_date: str | None = None
    """YYYY, YYYY/MM or YYYY/MM/DD: nothing published later is found (dated tasks)."""
    stream: bool = False
    """Answer with one JSON line per rewrite, as each is there; `index` says of which request."""
    deltas: bool = False
    """With `stream`: before each rewrite also lines with its text as it is generated (`GrownText`). The text of the
    rewrite is what counts: a response that was cut is ended there."""

    @model_validator(mode="after")
    def _one_or_several(self) -> RewriteBody:
        if (self.request is None) == (self.requests is None):
            raise ValueError("give either request or requests")
        if self.deltas and not self.stream:
            raise ValueError("deltas are of a stream: set stream too")
        return self

    @property
    def texts(self) -> list[str]:
        """The requests."""
        return [self.request] if self.request is not None else list(self.requests or ())


class NumberedRewrite(Rewrite):
    """A rewrite, the number of its request, and its number among the rewrites of that request, both from 0."""

    index: int
    sample: int


class GrownText(BaseModel):
    """A line of a stream: what has been generated since the line before of the same `index` and `sample`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    index: int
    sample: int
    text: str
    anew: bool = False
    """Whether `text` takes the place of all before instead of going on from it: the response was ended where it was
    cut."""


class RewriteReply(BaseModel):
    """The rewrites, in the order of their requests."""

    model: str
    rewrites: list[NumberedRewrite]


class SearchBody(_Body):
    """`POST /search`."""

    query: Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)] | None = None
    """One query; or several as `queries`."""
    queries: Annotated[list[Text], Field(min_length=1, max_length=MOST_REQUESTS)] | None = None
    task: str = ""
    top: Annotated[int, Field(ge=1, le=MOST_HITS)] = DEFAULT_TOP
    database: str = ""
    max_date: str | None = None

    @model_validator(mode="after")
    def _one_or_several(self) -> SearchBody:
        if (self.query is None) == (self.queries is None):
            raise ValueError("give either query or queries")
        return self

    @property
    def texts(self) -> list[str]:
        """The queries."""
        return [self.query] if self.query is not None else list(self.queries or ())


class SearchReply(BaseModel):
    """What each query brought, in the order of the queries."""

    results: list[Found]


class TaskDescription(BaseModel):
    """One task that the model can be asked for."""

    name: str
    searchable: bool
    engine: str | None
    needs_database: bool
    pattern: str
    """Regular expression of an answer: for guided decoding through `/v1` (`structured_outputs`)."""


class TasksReply(BaseModel):
    """`GET /tasks`, the default first."""

    model: str
    openai: bool
    """Whether `/v1` is served (vLLM)."""
    tasks: list[TaskDescription]
