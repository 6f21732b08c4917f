"""A BERT of random weights, small corpora, and what an encoder should give, computed one text at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [
    *("aspirin", "stroke", "trial", "placebo", "insulin", "glucose", "heart", "risk", "older", "adults", "children"),
    *("sleep", "exercise", "tumour", "cell", "gene", "protein", "mice", "therapy", "dose", "cohort", "blood"),
    *("pressure", "kidney", "liver", "virus", "vaccine", "immune", "response", "query", "passage", ":", ".", "a"),
]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def build_tiny_bert(folder: Path, seed: int = 0, positions: int = 48) -> Path:
    """Two layers of 32 numbers, a vocabulary of whole words."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=positions,
        initializer_range=0.5,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def reference_vectors(folder: Path, texts: Iterable[str], pooling: str, normalize: bool) -> np.ndarray:
    """Every text alone, without padding, pooled by numpy."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=model.config.max_position_embeddings)["input_ids"]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        vectors.append(vector / np.linalg.norm(vector) if normalize else vector)
    return np.stack(vectors)


def random_texts(count: int, seed: int = 0, longest: int = 70) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, longest))) for _ in range(count)]


def write_corpus(folder: Path, documents: dict[str, str]) -> Path:
    """Ids to texts; a text with a | has a title before it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for name, text in documents.items():
            title, _, rest = text.rpartition("|")
            file.write(json.dumps({"_id": name, "title": title, "text": rest}) + "\n")
    return folder
