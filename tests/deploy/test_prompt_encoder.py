"""What an actor asks its engine: the chat of the ticket, and the beginning of the answer where the task gives one."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from common.config import Config
from common.messages import ChatMessage
from deploy.roles import prompt_encoder
from tests.tiny_model import build_tiny_model


@pytest.mark.parametrize(
    ("options", "reasoning", "end"),
    [({}, True, ""), ({"prefill": True}, True, "<think>\n"), ({"prefill": True}, False, "<answer>\n")],
)
def test_the_prompt_ends_as_the_task_says(tmp_path: Path, options: dict[str, bool], reasoning: bool, end: str) -> None:
    model = build_tiny_model(tmp_path / "tiny", seed=0)
    config = Config.model_validate({"task": {"options": options, "reasoning": reasoning}})
    ids = prompt_encoder(config, model)([ChatMessage("user", "asthma in children")])
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = tokenizer.apply_chat_template(
        [{"role": "user", "content": "asthma in children"}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(ids) == plain + end
