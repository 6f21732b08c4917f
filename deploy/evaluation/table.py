"""The figures for people: methods as rows and metrics as columns, as the paper's tables have them; and a run file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from deploy.evaluation.records import QueryRecord
from deploy.evaluation.results import Figure, MethodResults, Results
from deploy.plots import baseline_label

_LENGTHS: Final = {"think_words": "think words", "query_words": "query words"}
_APART: Final = {
    "unavailable": "could not be scored, because engine or endpoint could not be asked: the same command tries again",
    "too_long": "have a prompt that does not fit: raise actor.max_model_len",
    "refused": "were refused by the endpoint",
    "unusable": "can never be scored: their own reference fails",
}


def markdown(results: Results) -> str:
    """table.md."""
    drawn = (
        "greedy" if results.temperature == 0 else f"{results.samples} samples at temperature {results.temperature:g}"
    )
    about = f"{results.task}, split {results.split}, engine {results.engine}"
    lines = [f"# {results.model}", "", f"{about}; {drawn}. Means over requests with 95 % bootstrap intervals.", ""]
    lines += _methods(results)
    if results.differences:
        lines += ["", f"{results.model} minus each baseline, request by request (* the interval leaves out 0):", ""]
        lines += _differences(results)
    notes = list(_notes(results.methods))
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def shown_methods(results: Results) -> dict[str, MethodResults]:
    """The model and the baselines; of `rarest_k` only the best, the smallest k on ties."""
    rarest = [name for name in results.methods if name.startswith("rarest")]
    best = max(rarest, key=lambda name: _mean(results.methods[name], results.metric), default=None)
    return {name: method for name, method in results.methods.items() if name not in rarest or name == best}


def run_lines(records: Sequence[QueryRecord], tag: str) -> Iterable[str]:
    """A TREC run file: `request Q0 document rank score tag`. The score falls with the rank, which is all trec_eval
    looks at; a request that counts in no figure is left out."""
    tag = "-".join(tag.split()) or "run"
    for record in records:
        ranking = list(dict.fromkeys(record.ranking or []))
        for rank, document in enumerate(ranking, start=1):
            yield f"{record.id} Q0 {document} {rank} {len(ranking) - rank + 1} {tag}\n"


def _methods(results: Results) -> list[str]:
    shown = shown_methods(results)
    lengths = [name for name in _LENGTHS if any(_mean(method, name) > 0 for method in shown.values())]
    best = [f"best@{results.samples} {results.metric}"] if results.samples > 1 else []
    heads = ["method", *results.quality, *best, "format", *(_LENGTHS[name] for name in lengths), "queries", "calls"]
    lines = [table_row(heads), table_row(["---", *["---:"] * (len(heads) - 1)])]
    for name, method in shown.items():
        cells = [figure_cell(method.metrics.get(metric)) for metric in results.quality]
        cells += [figure_cell(method.best.get(results.metric)) for _ in best]
        cells += [_plain(method.metrics.get("format"), 3), *(_plain(method.metrics.get(each), 1) for each in lengths)]
        label = f"**{name}**" if name == results.model else baseline_label(name)
        lines.append(table_row([label, *cells, str(method.queries), str(method.calls)]))
    return lines


def _differences(results: Results) -> list[str]:
    lines = [table_row(["baseline", *results.quality]), table_row(["---", *["---:"] * len(results.quality)])]
    for name in shown_methods(results):
        if found := results.differences.get(name):
            cells = [signed_cell(found.get(metric)) for metric in results.quality]
            lines.append(table_row([baseline_label(name), *cells]))
    return lines


def _notes(methods: Mapping[str, MethodResults]) -> Iterable[str]:
    for name, method in methods.items():
        for reason, count in method.apart.items():
            yield f"* {name}: {count} requests {_APART[reason]}; they are in no figure."
        if method.cut:
            yield f"* {name}: {method.cut} of {method.samples} answers reached sampling.max_tokens."
        if method.invalid:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(method.invalid.items()))
            yield f"* {name}: invalid answers, which count as 0: {reasons}."


def _mean(method: MethodResults, metric: str) -> float:
    found = method.metrics.get(metric)
    return -1.0 if found is None else found.mean


def figure_cell(figure: Figure | None) -> str:
    """A mean and its interval."""
    return "–" if figure is None else f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def signed_cell(figure: Figure | None) -> str:
    """A difference and its interval, with a star where that leaves out 0."""
    if figure is None:
        return "–"
    star = "*" if figure.low > 0 or figure.high < 0 else ""
    return f"{figure.mean:+.3f}{star} [{figure.low:+.3f}, {figure.high:+.3f}]"


def _plain(figure: Figure | None, digits: int) -> str:
    return "–" if figure is None else f"{figure.mean:.{digits}f}"


def table_row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
