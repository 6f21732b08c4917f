"""A local ClinicalTrials.gov: /studies and /version of API v2 over a folder of study records, or any BEIR folder.

`serve(settings)` and `run(settings)` answer HTTP; `Index.of_corpus(folder)` searches in the same process. Implemented:
wire format and errors, paging, all `query.*`, ids, status and advanced filters, projection, order by relevance, dates
and numbers, and Essie (see `essie` for its limits: no synonyms, no SEARCH[Location], no DISTANCE). Not implemented:
CSV, single studies, geographic and aggregation filters; relevance is BM25 with the service's field weights.
"""

from rewarders.servers.ctgov.app import RunningServer, ServerSettings, run, serve
from rewarders.servers.ctgov.essie import parse
from rewarders.servers.ctgov.index import Index, Search, SortKey
from rewarders.servers.ctgov.lexemes import EssieError

__all__ = ["EssieError", "Index", "RunningServer", "Search", "ServerSettings", "SortKey", "parse", "run", "serve"]
