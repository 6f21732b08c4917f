"""`docs/config.md`, generated: `python -m common.config.reference > docs/config.md`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from common.config.schema import Config

HEADER = """# Configuration

One YAML file per run, sections as below; `section.key=value` on the command line overrides it. An unknown key is an
error that names the closest valid one. `deepretrieval train CONFIG --dry-run` prints the resolved configuration.

This page is generated from `common/config/schema.py`: `python -m common.config.reference > docs/config.md`.
"""


def reference() -> str:
    """The whole page."""
    sections = [_section(name, field) for name, field in Config.model_fields.items()]
    return HEADER + "".join(sections)


def _section(name: str, field: FieldInfo) -> str:
    model = _model(field.annotation)
    assert model is not None
    rows = "".join(_rows(model, name))
    purpose = " ".join((model.__doc__ or "").split())
    return f"\n## {name}\n\n{purpose}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n{rows}"


def _rows(model: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        nested = _model(field.annotation)
        if nested is not None and field.default_factory is not None:
            rows += _rows(nested, f"{prefix}.{name}")
            continue
        default = "" if field.default in (None, "") else _plain(field.default)
        description = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{prefix}.{name}` | {_type(field.annotation)} | {default or '–'} | {description} |\n")
        if nested is not None:
            rows += _rows(nested, f"{prefix}.{name}")
    return rows


def _model(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return "section" if issubclass(annotation, BaseModel) else annotation.__name__
    if get_origin(annotation) is tuple:
        return "list"
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " \\| ".join(f"`{part}`" for part in parts)
    return " or ".join("null" if part is type(None) else _type(part) for part in parts)


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"`{[list(item) if isinstance(item, tuple) else item for item in value]}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(reference(), end="")
