"""A model of 115 thousand random weights with a real tokenizer, for tests that need a model in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PAD = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SENTENCES = (
    "Aspirin lowers the risk of stroke in adults with atrial fibrillation.",
    "Does exercise improve sleep quality in older patients with insomnia?",
    "A randomized trial of metformin against placebo for type 2 diabetes.",
    '{"query": "(aspirin OR acetylsalicylic acid) AND stroke NOT children"}',
    '{"query": "metformin AND (diabetes OR glucose) AND trial"}',
    "system user assistant You rewrite a request into a search query.",
)


def build_tiny_tokenizer(vocab: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few biomedical sentences; the answer tags are single, non-special added tokens.

    Args:
        vocab: the size aimed at, added tokens included. At least 264: 256 bytes, 4 tags, 3 special tokens, 1 merge.
    """
    if vocab < 264:
        raise ValueError(f"vocab is {vocab}: a byte-level vocabulary with the chat and answer tags needs 264")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(TAGS),
        min_frequency=1,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    # Not special: decoding with skip_special_tokens=True must keep the tags, or no answer could be parsed.
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def build_tiny_model(
    path: Path, seed: int = 0, vocab: int = 512, tied: bool = True, family: str = "qwen2", **changes: Any
) -> Path:
    """Writes a random model (2 layers, width 64, 2 heads, fp32) and its tokenizer.

    Args:
        path: folder to write; made if it is not there.
        seed: of the weights; equal seeds give equal bytes. The caller's random state is left as it was.
        vocab: rows of the embedding; the tokenizer never has more tokens than this.
        tied: the output head is the embedding; else it has weights of its own.
        family: the model_type of transformers, such as qwen2, qwen3, llama.
        changes: of the configuration.

    Returns:
        ``path``, loadable with ``AutoModelForCausalLM`` and ``AutoTokenizer``.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tiny_tokenizer(vocab)
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
        # Wider than the usual 0.02, so that the next-token distribution is far from uniform and a wrong
        # temperature or a wrong weight shows in the log-probabilities.
        "initializer_range": 0.2,
        "eos_token_id": tokenizer.convert_tokens_to_ids(TURN_END),
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
        "bos_token_id": None,
    }
    config = AutoConfig.for_model(family, **settings | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomize_constants(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _randomize_constants(model: torch.nn.Module) -> None:
    """Biases start at 0 and norms at 1 in every fresh model: a test could not see that one was not loaded."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * (0.2 if name.endswith("bias") else 0.1))
