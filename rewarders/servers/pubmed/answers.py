"""The bodies of esearch answers, in JSON and XML, as NCBI writes them (recorded answers of 2020 to 2026)."""

from __future__ import annotations

import json
from typing import Any
from xml.sax.saxutils import escape

from rewarders.servers.pubmed.index import SearchResult

_HEADER = {"type": "esearch", "version": "0.3"}
_DOCTYPE = (
    '<?xml version="1.0" encoding="UTF-8" ?>\n'
    '<!DOCTYPE eSearchResult PUBLIC "-//NLM//DTD esearch 20060628//EN" '
    '"https://eutils.ncbi.nlm.nih.gov/eutils/dtd/20060628/esearch.dtd">\n'
)
NO_ITEMS = "No items found."


def rate_limit_body(identity: str, count: int, limit: int) -> str:
    """The body of status 429; `identity` is the API key, or the client's address if it sent none."""
    body = {"error": "API rate limit exceeded", "api-key": identity, "count": str(count), "limit": str(limit)}
    return _dump(body)


def invalid_key_body(api_key: str) -> str:
    """The body of status 400 for a key that cannot be one."""
    return _dump({"error": "API key invalid", "api-key": api_key, "type": "invalid", "status": "unknown"})


def json_error(message: str) -> str:
    return _dump({"header": _HEADER, "esearchresult": {"ERROR": message}}) + "\n"


def xml_error(message: str) -> str:
    return f"{_DOCTYPE}<eSearchResult>\n\t<ERROR>{escape(message)}</ERROR>\n</eSearchResult>\n"


def json_count(result: SearchResult) -> str:
    return _dump({"header": _HEADER, "esearchresult": {"count": str(result.count)}}) + "\n"


def xml_count(result: SearchResult) -> str:
    return f"{_DOCTYPE}<eSearchResult>\n\t<Count>{result.count}</Count>\n</eSearchResult>\n"


def json_result(result: SearchResult, retstart: int, messages: list[str]) -> str:
    """Numbers are strings, `retmax` counts the ids returned, empty error and warning lists are left out."""
    answer: dict[str, Any] = {
        "count": str(result.count),
        "retmax": str(len(result.ids)),
        "retstart": str(retstart),
        "idlist": result.ids,
        "translationset": [],
        "querytranslation": result.translation,
    }
    errors = _errors(result)
    if any(errors.values()):
        answer["errorlist"] = errors
    warnings = _warnings(result, messages)
    if any(warnings.values()):
        answer["warninglist"] = warnings
    return _dump({"header": _HEADER, "esearchresult": answer}) + "\n"


def xml_result(result: SearchResult, retstart: int, messages: list[str]) -> str:
    ids = "".join(f"<Id>{escape(document_id)}</Id>\n" for document_id in result.ids)
    return (
        f"{_DOCTYPE}<eSearchResult><Count>{result.count}</Count><RetMax>{len(result.ids)}</RetMax>"
        f"<RetStart>{retstart}</RetStart>{f'<IdList>{chr(10)}{ids}</IdList>' if ids else '<IdList/>'}"
        f"<TranslationSet/><QueryTranslation>{escape(result.translation)}</QueryTranslation>"
        f"{_xml_list('ErrorList', _ERROR_TAGS, _errors(result))}"
        f"{_xml_list('WarningList', _WARNING_TAGS, _warnings(result, messages))}</eSearchResult>\n"
    )


_ERROR_TAGS = {"phrasesnotfound": "PhraseNotFound", "fieldsnotfound": "FieldNotFound"}
_WARNING_TAGS = {
    "phrasesignored": "PhraseIgnored",
    "quotedphrasesnotfound": "QuotedPhraseNotFound",
    "outputmessages": "OutputMessage",
}


def _errors(result: SearchResult) -> dict[str, list[str]]:
    return {
        "phrasesnotfound": list(result.phrases_not_found),
        "fieldsnotfound": list(result.fields_not_found),
    }


def _warnings(result: SearchResult, messages: list[str]) -> dict[str, list[str]]:
    return {
        "phrasesignored": list(result.phrases_ignored),
        "quotedphrasesnotfound": list(result.quoted_phrases_not_found),
        "outputmessages": messages if result.count else [*messages, NO_ITEMS],
    }


def _xml_list(name: str, tags: dict[str, str], entries: dict[str, list[str]]) -> str:
    inner = "".join(f"<{tags[key]}>{escape(text)}</{tags[key]}>" for key, texts in entries.items() for text in texts)
    return f"<{name}>{inner}</{name}>" if inner else ""


def _dump(body: dict[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
