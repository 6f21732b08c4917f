"""The warm start: tokenizer, examples, start weights and the cached folder, all at a size that takes seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from common.data.beir import read_corpus, read_split
from common.data.worlds.publications import build_world
from learner.warm_start import build
from learner.warm_start.build import WarmStartSettings, warm_start
from learner.warm_start.examples import PLAIN_STRUCTURES, ExampleSampler, content_words, is_clean_copy, sentences
from learner.warm_start.induction import write_induction_circuit
from learner.warm_start.pretrain import Budget, ModelShape, Schedule, new_model, pretrain
from learner.warm_start.tokenizer import PIECES, prompt_ids, train_tokenizer

TINY = WarmStartSettings(width=32, heads=2, vocabulary=600, steps=4, minutes=1.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of width 32 gain nothing from a second thread, and on a busy machine wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_THREADS", 1)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm") / "world"
    return build_world(folder, seed=0, documents=240, train_requests=40, test_requests=20)


@pytest.fixture(scope="module")
def texts(corpus: Path) -> list[str]:
    return [f"{document.title} {document.text}" for document in read_corpus(corpus)]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    return train_tokenizer(texts, vocabulary=600)


@pytest.fixture(scope="module")
def built(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return warm_start(corpus, tmp_path_factory.mktemp("models"), TINY)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="ascii"), max_size=60))
def test_every_ascii_text_survives_encoding(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=False) == text


def test_the_format_is_few_tokens_and_a_word_the_same_everywhere(tokenizer: PreTrainedTokenizerFast) -> None:
    assert all(len(tokenizer(piece).input_ids) == 1 for piece in PIECES)
    word = tokenizer("serum").input_ids
    answer = tokenizer('<answer>{"query": "(serum OR serum) AND serum"}</answer>').input_ids
    assert len(answer) == 8 + 3 * len(word)
    joined = [answer[i : i + len(word)] for i in range(len(answer))]
    assert joined.count(word) == 3


def test_a_saved_folder_loads_as_the_same_tokenizer(built: Path, texts: list[str]) -> None:
    loaded = AutoTokenizer.from_pretrained(built)
    direct = PreTrainedTokenizerFast.from_pretrained(built)
    for text in [*texts[:60], '<think>a b</think><answer>{"query": "(a OR b) AND p53-x"}</answer>']:
        ids = loaded(text).input_ids
        assert ids == direct(text).input_ids
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert prompt_ids(loaded, "a request") == loaded("<|user|>a request<|assistant|>").input_ids


def test_a_vocabulary_too_small_is_refused(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="give at least 512"):
        train_tokenizer(texts, vocabulary=300)


@pytest.mark.parametrize("reasoning", [False, True])
def test_every_example_from_a_text_is_a_clean_copy(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], reasoning: bool
) -> None:
    pool = [sentence for text in texts for sentence in sentences(text)]
    sampler = ExampleSampler(tokenizer, pool, reasoning=reasoning, random_share=0.0)
    requests = {tuple(source.prompt): source.text for source in sampler.sources}
    rng = random.Random(0)
    for _ in range(300):
        example = sampler.draw(rng)
        answer = tokenizer.decode(example.response, skip_special_tokens=True)
        assert is_clean_copy(answer, requests[tuple(example.prompt)], reasoning=reasoning), answer
        assert example.response[-1] == tokenizer.eos_token_id
        assert not is_clean_copy(answer, "nothing of it", reasoning=reasoning)


def test_engines_without_operators_get_words_alone(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    pool = [sentence for text in texts for sentence in sentences(text)]
    sampler = ExampleSampler(tokenizer, pool, reasoning=False, random_share=0.0, structures=PLAIN_STRUCTURES)
    sources = {tuple(source.prompt): source for source in sampler.sources}
    rng = random.Random(0)
    for _ in range(200):
        example = sampler.draw(rng)
        answer = tokenizer.decode(example.response, skip_special_tokens=True)
        assert sampler.is_clean(answer, sources[tuple(example.prompt)]), answer
        query = json.loads(answer.removeprefix("<answer>").removesuffix("</answer>"))["query"]
        assert 2 <= len(query.split()) <= 4
        assert not set("()") & set(query)
        assert not {"AND", "OR"} & set(query.split())


@pytest.mark.parametrize(
    "answer",
    [
        '<answer>{"query": "serum AND stranger"}</answer>',
        '<answer>{"query": "(serum"}</answer>',
        '<answer>{"query": ""}</answer>',
        '<answer>{"query": "serum"}',
        '<think>serum</think><answer>{"query": "serum"}</answer>',
    ],
)
def test_an_answer_that_is_no_clean_copy_is_told_apart(answer: str) -> None:
    assert not is_clean_copy(answer, "serum levels", reasoning=False)


def test_content_words_leave_out_function_words_and_joiners() -> None:
    assert content_words("The serum AND the plasma of 12 women with p53") == ["serum", "plasma", "women", "p53"]


def test_texts_with_too_few_words_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="give a larger corpus"):
        ExampleSampler(tokenizer, ["of the", ""], reasoning=False)


def test_the_start_weights_look_at_the_previous_token(tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model(tokenizer, ModelShape(width=128, heads=4), seed=0)
    write_induction_circuit(model, tokenizer, seed=0)
    model.set_attn_implementation("eager")
    ids = torch.randint(20, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        attention = model(ids, output_attentions=True).attentions[0]
    previous = attention[:, :2].diagonal(offset=-1, dim1=-2, dim2=-1)
    assert float(previous[..., 1:].min()) > 0.9


def test_a_model_without_room_for_the_circuit_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model(tokenizer, ModelShape(layers=1, width=32, heads=2, feed_forward=64), seed=0)
    with pytest.raises(ValueError, match="two layers of at least two heads"):
        write_induction_circuit(model, tokenizer, seed=0)


def test_pretraining_lowers_the_loss_and_repeats_by_seed(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    sampler = ExampleSampler(tokenizer, texts[:1] + sentences(" ".join(texts)), reasoning=False)

    def trained(steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        losses: list[float] = []
        model = new_model(tokenizer, ModelShape(width=32, heads=2, feed_forward=64), seed=1)
        pretrain(
            model,
            tokenizer,
            sampler,
            seed=1,
            budget=Budget(steps=steps, check_every=10),
            schedule=Schedule(batch=8, warmup_steps=5, final_steps=1),
            progress=lambda share, text: losses.append(float(text.split("loss ")[1].split(",")[0])),
        )
        return losses, model.state_dict()

    losses, weights = trained(60)
    _, again = trained(60)
    assert losses[-1] < losses[0] - 1.0
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_folder_is_whole_and_loads(built: Path, corpus: Path) -> None:
    names = {path.name for path in built.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    model = AutoModelForCausalLM.from_pretrained(built)
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = torch.tensor([prompt_ids(tokenizer, read_split(corpus, "test")[0].text)])
    assert model(prompt).logits.shape == (1, prompt.shape[1], len(tokenizer))
    assert json.loads((built / "warm_start.json").read_text())["vocabulary"] == 600


def test_a_model_that_the_time_limit_cut_short_is_recorded_and_warned_of_at_every_use(
    built: Path, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = json.loads((built / "warm_start.json").read_text())
    assert (record["steps_done"], record["cut_short"]) == (4, False)
    hurried = WarmStartSettings(width=32, heads=2, vocabulary=600, steps=1000, minutes=1e-6)
    reported: list[str] = []
    folder = warm_start(corpus, tmp_path, hurried, lambda share, text: reported.append(text))
    record = json.loads((folder / "warm_start.json").read_text())
    assert record["cut_short"]
    assert record["steps_done"] < 1000
    assert "cut short by the limit" in reported[-1]
    assert warm_start(corpus, tmp_path, hurried) == folder
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert len(warnings) == 2
    assert all("raise model.warm_start.minutes" in warning for warning in warnings)


def test_it_is_built_once_per_corpus_and_settings(built: Path, corpus: Path) -> None:
    reported: list[float] = []
    assert warm_start(corpus, built.parent, TINY, lambda share, text: reported.append(share)) == built
    assert reported == []  # found, not built
    other = warm_start(corpus, built.parent, WarmStartSettings(width=32, heads=2, vocabulary=600, steps=2, seed=1))
    assert other != built
    assert not list(built.parent.glob(".*"))  # nothing unfinished is left
