"""The commands that the documentation prints are commands: they parse, their configs exist and their keys are known."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from common.config import load_config
from deploy.cli import build_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PATTERN = re.compile(r"[|…\[\]]|\b(?:KIND|CONFIG)\b")  # of commands, rather than one
_READERS_OWN = "search.engine=library"  # what docs/own_engine.md has the reader add
_LINK = re.compile(r"\]\(((?!https?:)[^)#\s]+)(?:#([^)]*))?\)")


def commands_of(page: Path) -> list[list[str]]:
    """The words of every `deepretrieval …` in the code blocks of a page, without comments and prompts."""
    lines = [line for block in _BLOCK.findall(page.read_text()) for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        _, is_command, rest = re.sub(r"\s{2,}\S.*$| # .*$", "", line.strip()).partition("deepretrieval ")
        if is_command and not _PATTERN.search(rest) and not line.startswith("#"):
            found.append(shlex.split(rest))
    return found


COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}") for page in PAGES for words in commands_of(page)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_printed_command_is_one(words: list[str]) -> None:
    arguments, rest = build_parser().parse_known_args(words)
    assert not [word for word in rest if word.startswith("-") or "=" not in word]
    config = getattr(arguments, "config", None)
    if config and str(config).startswith("configs/"):
        overrides = [*getattr(arguments, "overrides", []), *rest]
        load_config(ROOT / config, [each for each in overrides if each != _READERS_OWN])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_somewhere(page: Path) -> None:
    missing = [target for target, _ in _LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not missing


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {target for target, _ in _LINK.findall((ROOT / "README.md").read_text())}
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= linked | {"docs/config.md"}
