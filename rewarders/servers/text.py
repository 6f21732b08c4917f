"""Normalization of text to search words: the same for documents and queries."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"[^\W_]+")

# The stopwords of PubMed (NLM, PubMed User Guide, "Stopwords"). They are left out of untagged, unquoted
# queries. PubMed knows operators in upper case only: in lower case they are stopwords, `or` and `not`
# included.
_STOPWORD_TEXT = """
a about again all almost also although always among an and another any are as at be because been before
being between both but by can could did do does done due during each either enough especially etc for found
from further had has have having here how however i if in into is it its itself just kg km made mainly make
may mg might ml mm most mostly must nearly neither no nor not obtained of often on or our overall perhaps
pmid quite rather really regarding seem seen several should show showed shown shows significantly since so
some such than that the their theirs them then there therefore these they this those through thus to upon
use used using various very was we were what when which while with within without would
"""
STOPWORDS = frozenset(_STOPWORD_TEXT.split())


def search_words(text: str) -> list[str]:
    """Split text into search words: maximal runs of letters and digits, in lower case, without accents.

    Compatibility forms are folded (NFKD), so that `µm`, `μm` and `fi` as a ligature match their plain
    spelling.
    """
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        text = "".join(character for character in decomposed if not unicodedata.combining(character))
    return _WORD.findall(text.casefold())
