"""The original bakes a chat template into the prompt of every row, as text. Here it is taken out again.

Its prompts come in four shapes; each is a template around a system part, a user part and the beginning of the answer,
which the model goes on from. Taking a prompt apart and filling its template again gives the same text, character for
character: the released checkpoints can be asked with `published_text`, any other model through its own template with
`messages` and `prefix`. Nothing here is worded by us, and no wording of theirs is kept in this repository.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from common.tasks.row import ORIGINAL_PROMPT

# {shape: template}, tried in this order. Two leave the user's turn open: the answer begins inside it.
TEMPLATES: Final = {
    "chatml": "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    "<|im_start|>assistant\n{prefix}",
    "chatml_open": "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}\nAssistant: {prefix}",
    "llama_text": "<|begin_of_text|>System: {system}\nUser: {user}\nAssistant: {prefix}",
    "text": "{system}\nUser: {user}\nAssistant: {prefix}",
}
PLAIN: Final = "plain"


class OriginalPrompt(msgspec.Struct, frozen=True):
    """template: a key of `TEMPLATES`, or "plain" where none fits; then the whole text is the user's message.
    messages: chat messages with "role" and "content". prefix: the beginning of the answer."""

    template: str
    messages: tuple[dict[str, str], ...]
    prefix: str = ""


def take_apart(text: str) -> OriginalPrompt:
    """The parts of a baked prompt."""
    for shape, template in TEMPLATES.items():
        parts = _match(text, template)
        if parts is not None:
            system, user, prefix = parts
            messages = ({"role": "system", "content": system}, {"role": "user", "content": user})
            return OriginalPrompt(shape, messages, prefix)
    return OriginalPrompt(PLAIN, ({"role": "user", "content": text},))


def published_text(prompt: OriginalPrompt) -> str:
    """The text as it was published: what the released checkpoints were trained on."""
    if prompt.template == PLAIN:
        return prompt.messages[0]["content"]
    system, user = (message["content"] for message in prompt.messages)
    return TEMPLATES[prompt.template].format(system=system, user=user, prefix=prompt.prefix)


def prompt_of(metadata: dict[str, Any]) -> OriginalPrompt | None:
    """The prompt a row carries, None if it carries none. Raises ValueError for one that is none."""
    value = metadata.get(ORIGINAL_PROMPT)
    return None if value is None else msgspec.convert(value, OriginalPrompt)


def _match(text: str, template: str) -> tuple[str, str, str] | None:
    """System, user and prefix: the first place where the user begins, the last where the answer does."""
    opening, rest = template.split("{system}")
    to_user, rest = rest.split("{user}")
    to_answer = rest.removesuffix("{prefix}")
    if not text.startswith(opening):
        return None
    system, begins, rest = text[len(opening) :].partition(to_user)
    user, answers, prefix = rest.rpartition(to_answer)
    return (system, user, prefix) if begins and answers else None
