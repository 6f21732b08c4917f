"""PubMed search field tags and what each of them can search here.

Source: PubMed User Guide, "Search field tags". Our documents have a title, an abstract, an id and a
publication date. Tags of controlled vocabulary (MeSH and the like) search title and abstract instead, which
is an approximation; tags of data that the corpus does not have (author, journal, language ...) are known, and
match nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

TITLE = "title"
ABSTRACT = "abstract"


class FieldKind(Enum):
    """What a tag searches."""

    TEXT = "text"
    DATE = "date"
    ID = "id"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Field:
    """A search field: its name in query translations, its kind, and the columns it searches."""

    label: str
    kind: FieldKind = FieldKind.TEXT
    columns: tuple[str, ...] = (TITLE, ABSTRACT)


ALL_FIELDS = Field("All Fields")
TITLE_FIELD = Field("Title", columns=(TITLE,))
TITLE_ABSTRACT_FIELD = Field("Title/Abstract")
FILTER_FIELD = Field("Filter", FieldKind.ABSENT, ())
PUBLICATION_DATE = Field("Date - Publication", FieldKind.DATE, ())

# Label of a field: its tags. The label itself is a tag too.
_TEXT = {
    "All Fields": ("all",),
    "Title/Abstract": ("tiab",),
    "Text Word": ("tw", "text words", "text"),
    "MeSH Terms": ("mh", "mesh", "mesh term"),
    "MeSH Major Topic": ("majr", "mesh major topics"),
    "MeSH Subheading": ("sh", "subheading"),
    "Supplementary Concept": ("nm", "substance name"),
    "Other Term": ("ot", "keyword", "keywords", "author keywords"),
    "Transliterated Title": ("tt",),
}
_DATES = {
    "Date - Publication": ("dp", "pdat", "publication date", "date of publication", "ppdat", "epdat"),
    "Date - Entry": ("edat", "entry date"),
    "Date - Create": ("crdt", "create date"),
    "Date - Completion": ("dcom", "completion date"),
    "Date - MeSH": ("mhda", "mesh date"),
    "Date - Modification": ("lr", "modification date"),
}
_IDS = {"UID": ("uid", "pmid")}
_ABSENT = {
    "Affiliation": ("ad",),
    "Article Identifier": ("aid",),
    "Author": ("au",),
    "Author - First": ("1au", "first author name"),
    "Author - Full": ("fau", "full author name"),
    "Author - Identifier": ("auid", "author identifier"),
    "Author - Last": ("lastau", "last author name"),
    "Book": ("book",),
    "Conflict of Interest Statements": ("cois",),
    "Corporate Author": ("cn",),
    "EC/RN Number": ("rn",),
    "Editor": ("ed",),
    "Filter": ("filter", "sb", "subset"),
    "Grants and Funding": ("gr", "grant number"),
    "Investigator": ("ir",),
    "ISBN": ("isbn",),
    "Issue": ("ip",),
    "Journal": ("ta", "jour"),
    "Language": ("la", "lang"),
    "Location ID": ("lid",),
    "NLM Unique ID": ("jid",),
    "Pagination": ("pg",),
    "Personal Name as Subject": ("ps",),
    "Pharmacological Action": ("pa",),
    "Place of Publication": ("pl",),
    "Publication Type": ("pt", "ptyp"),
    "Publisher": ("pubn",),
    "Secondary Source ID": ("si",),
    "Volume": ("vi",),
}


def _tag_table() -> dict[str, Field]:
    fields = [(Field(label), tags) for label, tags in _TEXT.items()]
    for kind, table in ((FieldKind.DATE, _DATES), (FieldKind.ID, _IDS), (FieldKind.ABSENT, _ABSENT)):
        fields += [(Field(label, kind, ()), tags) for label, tags in table.items()]
    fields.append((TITLE_FIELD, ("ti",)))
    return {_key(name): field for field, tags in fields for name in (field.label, *tags)}


def _key(tag: str) -> str:
    """Case and spaces of a tag are ignored."""
    return "".join(tag.split()).lower()


_FIELD_OF_TAG = _tag_table()


def field_of(tag: str) -> Field | None:
    """The field that a tag (without its brackets) names, or None if PubMed knows no such tag.

    A suffix that asks for no explosion (`mh:noexp`) is dropped, since nothing is exploded here.
    """
    return _FIELD_OF_TAG.get(_key(tag).removesuffix(":noexp"))
