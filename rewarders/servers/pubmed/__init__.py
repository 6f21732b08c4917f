"""A local PubMed: NCBI's esearch over any BEIR folder.

`Index.of_corpus(folder).search(query)` searches in the same process; `serve(settings)` and `run(settings)`
answer HTTP. Implemented: wire format and errors, Boolean operators from left to right, phrases, field tags,
dates, truncation. Not implemented: automatic term mapping and MeSH (tags of vocabularies search title and
abstract), proximity, PubMed's Best Match (`sort=relevance` is BM25).
"""

from rewarders.servers.hosting import SearchServerError
from rewarders.servers.pubmed.app import RunningServer, run, serve
from rewarders.servers.pubmed.index import Index, SearchResult
from rewarders.servers.pubmed.query import ParsedQuery, QuerySyntaxError, parse
from rewarders.servers.traffic import ServerSettings

__all__ = [
    "Index",
    "ParsedQuery",
    "QuerySyntaxError",
    "RunningServer",
    "SearchResult",
    "SearchServerError",
    "ServerSettings",
    "parse",
    "run",
    "serve",
]
