"""From chat messages to the token ids of a prompt, by the model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from common.messages import ChatMessage


class PromptEncoder(Protocol):
    """Turns chat messages into prompt token ids with the model's own chat template."""

    def __call__(self, messages: Sequence[ChatMessage]) -> list[int]: ...


class PromptTokenizer:
    """The tokenizer of a Hugging Face folder."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)

    def chat(self, messages: Sequence[ChatMessage], response_prefix: str = "") -> list[int]:
        """Ids of a chat; `response_prefix` opens the answer.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        chat = [{"role": message.role, "content": message.content} for message in messages]
        rendered = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return self.text(rendered + response_prefix)

    def text(self, text: str) -> list[int]:
        """Ids of a prompt that is rendered already."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_encoder(model_dir: Path, response_prefix: str = "") -> PromptEncoder:
    """The tokenizer of a Hugging Face folder as a `PromptEncoder`; `response_prefix` opens the answer."""
    tokenizer = PromptTokenizer(model_dir)
    return lambda messages: tokenizer.chat(messages, response_prefix)
