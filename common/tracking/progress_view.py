"""The picture of a run: a pure function from `ProgressState` to something rich can print."""

from __future__ import annotations

from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.tracking.progress_state import (
    ProgressState,
    RoleStatus,
    duration,
    figure,
    quantity,
    share,
    sparkline,
)

_SPARK_WIDTH = 24
_RULER_WIDTH = 40
STATE_STYLE = {
    "starting": "cyan",
    "running": "green",
    "stalled": "yellow",
    "silent": "yellow",
    "stopped": "dim",
    "dead": "bold red",
}
_STAGES = ("rollout", "score", "train")


def render(state: ProgressState) -> RenderableType:
    """The whole display: phases of the roles before the first step, figures and curves after it."""
    parts: list[RenderableType] = [_steps_line(state)]
    if state.started:
        parts += [_learning(state), _flow(state)]
    elif state.heldout or state.baselines:
        parts.append(_ruler(state))
    parts.append(_roles(state))
    if state.warning:
        parts.append(Text.assemble(("! ", "bold yellow"), (plain(state.warning), "yellow")))
    return Panel(Group(*parts), title=_title(state), title_align="left", box=box.ROUNDED, border_style="blue")


def render_line(state: ProgressState) -> str:
    """The same in one line of plain text, for logs and pipes."""
    head = f"[{duration(state.elapsed_s)}]"
    if not state.started:
        phases = "; ".join(f"{plain(role.name)}: {_doing(role)}" for role in state.roles) or "starting"
        return " ".join([head, phases, _warning_tail(state)]).strip()
    latest = state.latest
    heldout = f"{state.heldout[-1][1]:.3f}" if state.heldout else "–"
    parts = [
        f"step {state.step}/{state.steps or '?'}",
        f"reward {figure(latest.get('reward/mean'))}",
        f"held-out {heldout}",
        f"staleness {_staleness(state)}",
        f"{quantity(latest.get('tokens/trained_per_s'))} tok/s",
        f"idle learner {share(latest.get('idle/learner'))} actor {share(latest.get('idle/actor'))}",
        "queues " + "/".join(_depth(state, stage) for stage in _STAGES),
        f"quota {share(latest.get('quota/utilisation'))}",
        f"left {duration(state.eta_s)}",
        *(f"{plain(role.name)} {plain(role.state)}: {_doing(role)}" for role in state.roles if _needs_a_look(role)),
    ]
    return " ".join([head, " | ".join(parts), _warning_tail(state)]).strip()


def plain(text: str) -> str:
    """`text` on one line without control characters, which could otherwise rewrite the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def _title(state: ProgressState) -> Text:
    title = Text(f" {plain(state.run) or 'run'} ", style="bold")
    for name in (state.engine, state.device):
        if name:
            title.append(f"· {plain(name)} ", style="not bold")
    return title


def _steps_line(state: ProgressState) -> RenderableType:
    line = Table.grid(padding=(0, 1))
    total = state.steps or 1
    done = min(state.step, total)
    bar = ProgressBar(total=total, completed=done, width=_RULER_WIDTH, complete_style="green")
    times = f"{duration(state.elapsed_s)} gone"
    if state.eta_s is not None:
        times += f" · {duration(state.eta_s)} left"
    line.add_row(Text(f"step {state.step}/{state.steps or '?'}", style="bold"), bar, Text(times, style="dim"))
    return line


def _learning(state: ProgressState) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=8)
    grid.add_column(style="bold", no_wrap=True, min_width=6, justify="right")
    grid.add_column(no_wrap=True)
    grid.add_column(style="dim", no_wrap=True)
    latest = state.latest
    rewards = [value for _, value in state.reward]
    invalid, value = share(latest.get("reward/invalid_share")), figure(latest.get(f"{state.metric}/train"))
    grid.add_row(
        "reward",
        figure(latest.get("reward/mean")),
        Text(sparkline(rewards, _SPARK_WIDTH), style="cyan"),
        Text(f"invalid {invalid} · {plain(state.metric)} {value}"),
    )
    evaluations = [value for _, value in state.heldout]
    grid.add_row(
        "held-out",
        f"{evaluations[-1]:.3f}" if evaluations else "–",
        Text(sparkline(evaluations, _SPARK_WIDTH), style="magenta"),
        Text(_heldout_note(state)),
    )
    return Group(grid, _ruler(state)) if state.heldout or state.baselines else grid


def _heldout_note(state: ProgressState) -> str:
    if not state.heldout:
        return f"{plain(state.metric)} not evaluated yet"
    step, value = state.heldout[-1]
    if not state.baselines:
        return f"{plain(state.metric)} at step {step}"
    beaten = sum(value > other for other in state.baselines.values())
    return f"step {step} · above {beaten}/{len(state.baselines)} baselines"


def _ruler(state: ProgressState) -> RenderableType:
    """A scale from 0 to the next tenth above every mark: baselines as letters, the policy as a diamond."""
    current = state.heldout[-1][1] if state.heldout else None
    marks = sorted(state.baselines.items(), key=lambda item: item[1])
    top = _scale_end([*state.baselines.values(), *([] if current is None else [current])])
    cells = ["─"] * (_RULER_WIDTH + 1)
    legend = []
    for letter, (name, value) in zip("abcdefghijkl", marks, strict=False):
        cells[_position(value, top)] = letter
        legend.append(Text(f"{letter} {plain(name)} {value:.3f}", style="dim"))
    ruler = Text("0 " + "".join(cells) + f" {top:.1f}", style="dim")
    if current is not None:
        at = _position(current, top)
        ruler = Text.assemble(
            ("0 " + "".join(cells[:at]), "dim"),
            ("◆", "bold magenta"),
            ("".join(cells[at + 1 :]) + f" {top:.1f}", "dim"),
        )
        legend.append(Text(f"◆ now {current:.3f}", style="magenta"))
    return Group(ruler, Columns(legend, padding=(0, 3)))


def _scale_end(values: list[float]) -> float:
    largest = max(values, default=0.0)
    if largest > 1.0:  # a user's metric
        return largest
    return min(1.0, max(1, int(largest * 10) + 1) / 10)


def _position(value: float, top: float) -> int:
    return min(_RULER_WIDTH, max(0, round(value / top * _RULER_WIDTH)))


def _flow(state: ProgressState) -> RenderableType:
    """Three lines that fit into 80 columns: pace and staleness, queues and quota, speeds and idle shares."""
    latest = state.latest
    return Group(
        _figures(
            ("staleness", _staleness(state)),
            ("outstanding", f"{quantity(latest.get('queue/outstanding'))} groups"),
            ("step takes", f"{figure(latest.get('timing/step_s'), 1)} s"),
        ),
        _figures(
            ("queues", " → ".join(f"{stage} {_depth(state, stage)}" for stage in _STAGES)),
            ("quota used", share(latest.get("quota/utilisation"))),
        ),
        _figures(
            ("tokens/s trained", quantity(latest.get("tokens/trained_per_s"))),
            ("generated", quantity(latest.get("tokens/generated_per_s"))),
            ("idle learner", share(latest.get("idle/learner"))),
            ("actor", share(latest.get("idle/actor"))),
        ),
    )


def _figures(*figures: tuple[str, str]) -> Text:
    line = Text()
    for label, value in figures:
        line.append(f"{label} ", style="dim").append(f"{value}   ")
    return line


def _staleness(state: ProgressState) -> str:
    latest = state.latest
    bound = latest.get("staleness/bound")
    limit = "" if bound is None else f" ≤ {bound:.0f}"
    mean, largest = figure(latest.get("staleness/mean"), 2), figure(latest.get("staleness/max"), 0)
    return f"mean {mean} max {largest}{limit}"


def _depth(state: ProgressState, stage: str) -> str:
    return quantity(state.latest.get(f"queue/{stage}"))


def _roles(state: ProgressState) -> RenderableType:
    """A row per role before the first step; then one line, and rows only for those that need a look."""
    if not state.roles:
        return Text("waiting for the roles to start" if not state.started else "", style="dim")
    if not state.started:
        return _role_table(state.roles)
    chips = [Text.assemble(("● ", STATE_STYLE.get(role.state, "")), plain(role.name)) for role in state.roles]
    troubled = tuple(role for role in state.roles if _needs_a_look(role))
    line: RenderableType = Columns(chips, padding=(0, 2))
    return Group(line, _role_table(troubled)) if troubled else line


def _role_table(roles: tuple[RoleStatus, ...]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for role in roles:
        bar: RenderableType = ""
        if role.fraction is not None:
            bar = ProgressBar(total=1.0, completed=role.fraction, width=24)
        table.add_row(
            Text(plain(role.name)),
            Text(plain(role.state), style=STATE_STYLE.get(role.state, "")),
            Text(_doing(role)),
            bar,
            Text("" if role.since_s is None else duration(role.since_s), style="dim"),
        )
    return table


def _doing(role: RoleStatus) -> str:
    if role.state in ("stalled", "silent") and role.waits_for:
        return f"waits for {plain(role.waits_for)}"
    phase = plain(role.phase or role.state)
    return phase if role.fraction is None else f"{phase} {share(role.fraction)}"


def _needs_a_look(role: RoleStatus) -> bool:
    return role.state in ("stalled", "silent", "dead", "starting")


def _warning_tail(state: ProgressState) -> str:
    return f"| warning: {plain(state.warning)}" if state.warning else ""
