"""The configuration: what loads, what is refused, and how the refusal helps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from common.config import Config, ConfigError, load_config, to_yaml
from common.config.reference import reference


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text("learner: {steps: 3, lr: 0.001}\nsampling: {group_size: 4}\n")
    return path


def test_file_and_overrides_are_merged_and_the_name_comes_from_the_file(config_file: Path) -> None:
    config = load_config(config_file, ["learner.steps=7", "search.quota.requests=3", "model.path=null"])
    assert config.learner.steps == 7
    assert config.learner.lr == 0.001
    assert config.sampling.group_size == 4
    assert config.search.quota is not None
    assert config.search.quota.requests == 3
    assert config.run.name == "tiny"


def test_without_a_file_everything_has_its_default() -> None:
    config = load_config(None, ["learner.steps=7"])
    assert config.learner.steps == 7
    assert config.run.name == "unnamed"
    with pytest.raises(ConfigError, match=r"^overrides: learner\.steps"):
        load_config(None, ["learner.steps=0"])


def test_resolved_yaml_reads_back_to_the_same_config(config_file: Path, tmp_path: Path) -> None:
    changes = ["task.reward.kind=metric", "task.metrics=[recall@10]", "task.options={role: me}"]
    config = load_config(config_file, changes)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load_config(resolved) == config


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("learner.max_stalenes=2", "learner.max_staleness"),
        ("lerner.steps=2", "learner"),
        ("actor.engin=vllm", "actor.engine"),
        ("group_size=4", "sampling.group_size"),
        ("search.quota.request=4", "search.quota.requests"),
    ],
)
def test_an_unknown_key_names_the_closest_valid_one(config_file: Path, override: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{hint}'"):
        load_config(config_file, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learner: [1", "not valid YAML"),
        ("- 1\n", "must be a mapping"),
        ("learner: {steps: many}", "learner.steps"),
        ("learner: {steps: 0}", "learner.steps"),
        ("sampling: {group_size: 1}", "set it to 2 or more"),
    ],
)
def test_broken_files_give_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.advantage=gae"], r"needs values: set algorithm\.critic=separate"),
        (["algorithm.critic=shared"], r"grpo reads no values: set algorithm\.critic=none"),
        (["sampling.group_size=1"], "compares samples of one prompt: set it to 2 or more"),
        (
            ["sampling.group_size=1", "algorithm.advantage=reinforce_plus_plus", "algorithm.filter_zero_variance=true"],
            r"set algorithm\.filter_zero_variance=false",
        ),
        (["algorithm.loss=gspo"], r"set algorithm\.denominator=sequence_mean"),
        (["algorithm.kl_in=reward", "algorithm.kl_coef=0"], "set kl_coef above 0"),
        (["algorithm.kl_estimator=k1"], "use k2, k3 or k3"),
        (["algorithm.kl_estimator=k3+", "algorithm.kl_in=reward"], "set k3 or k1"),
        (["algorithm.critic_warmup_steps=1"], "there is no critic"),
        (["algorithm.critic_lambda=1"], "there is no critic: set it to null"),
        (["algorithm.whitening=group"], r"or set algorithm\.whitening=step"),
        (
            [
                "sampling.group_size=1",
                "algorithm.advantage=gae",
                "algorithm.critic=shared",
                "algorithm.whitening=group",
            ],
            r"sampling\.group_size of 2 or more",
        ),
        (["algorithm.critic_epochs=2"], r"set algorithm\.critic=separate"),
        (
            ["algorithm.advantage=gae", "algorithm.critic=shared", "algorithm.critic_epochs=2"],
            r"or algorithm\.critic_epochs=1",
        ),
        (
            ["algorithm.advantage=gae", "algorithm.critic=shared", "algorithm.critic_warmup_steps=3"],
            r"leaves none of learner\.steps=3",
        ),
        (["algorithm.importance_low=1.5"], r"algorithm\.importance_low"),
        (["algorithm.importance_cap=0.9"], r"algorithm\.importance_cap"),
        (["algorithm.dual_clip=1"], r"algorithm\.dual_clip"),
        (["learner.processes=6", "learner.replicas=4"], "6 cannot be 4 equal replicas: choose a multiple"),
    ],
)
def test_choices_that_do_not_go_together_say_what_to_set(config_file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(config_file, overrides)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "filters", "estimator"),
    [
        ([], True, "k3"),
        (["algorithm.filter_zero_variance=false"], False, "k3"),
        (["algorithm.advantage=gae", "algorithm.critic=separate", "algorithm.kl_in=reward"], False, "k1"),
        (["algorithm.advantage=reinforce_plus_plus", "sampling.group_size=1"], False, "k3"),
        (["algorithm.kl_in=reward", "algorithm.kl_estimator=k3"], True, "k3"),
    ],
)
def test_defaults_that_follow_from_other_choices(
    config_file: Path, overrides: list[str], filters: bool, estimator: str
) -> None:
    algorithm = load_config(config_file, overrides).algorithm
    assert (algorithm.filters_zero_variance, algorithm.chosen_kl_estimator) == (filters, estimator)


def published_algorithms() -> dict[str, dict[str, dict[str, object]]]:
    """The rows of the table in docs/algorithms.md as sections of a configuration, by the algorithm's name."""
    page = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    table = page.split("## Published algorithms as configs")[1].split("##")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ") and "`" in line]
    algorithms: dict[str, dict[str, dict[str, object]]] = {}
    for name, settings in rows:
        sections = algorithms.setdefault(name.strip(), {"algorithm": {}, "learner": {}, "sampling": {}})
        for span in re.findall(r"`([^`]*: [^`]*)`", settings):
            for key, value in yaml.safe_load("{" + span + "}").items():
                (section,) = (title for title in sections if key in Config.model_fields[title].annotation.model_fields)
                sections[section][key] = value
    return algorithms


@pytest.mark.parametrize("sections", published_algorithms().values(), ids=published_algorithms().keys())
def test_the_published_algorithms_of_the_docs_are_valid(sections: dict[str, dict[str, object]]) -> None:
    algorithm = Config.model_validate(sections).algorithm
    assert algorithm.model_dump(include=set(sections["algorithm"])) == {
        key: type(getattr(algorithm, key))(value) for key, value in sections["algorithm"].items()
    }


def test_missing_file_and_malformed_override(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_config(config_file, ["learner.steps"])
    with pytest.raises(ConfigError, match="not a section"):
        load_config(config_file, ["learner.steps.more=1"])


def test_every_key_has_a_description() -> None:
    def undocumented(model: type, prefix: str = "") -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            if not field.description:
                missing.append(prefix + name)
            if hasattr(field.annotation, "model_fields"):
                missing += undocumented(field.annotation, f"{prefix}{name}.")
        return missing

    assert undocumented(Config) == []


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text() == reference(), "run: python -m common.config.reference > docs/config.md"
