"""vLLM's own OpenAI-compatible server, around the engine that this process runs already."""

from __future__ import annotations

import argparse
from typing import Any, Final

from actors.vllm_engine import VllmEngine
from deploy.generation import EngineGenerator
from deploy.rewriting.rewriter import AsyncRewriter
from deploy.serving.limits import App, Receive, Scope, Send, refuse

PREFIX: Final = "/v1/"


async def openai_app(rewriter: AsyncRewriter) -> App | None:
    """The routes below `/v1` for the model of a started rewriter; None where vLLM does not run it.

    Nothing else of vLLM's server is let through: its other routes steer the engine.
    """
    generator = rewriter.generator
    engine = generator.engine if isinstance(generator, EngineGenerator) else None
    if not isinstance(engine, VllmEngine):
        return None
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    client = engine.client
    arguments = _arguments(str(rewriter.model.folder), rewriter.model.name)
    tasks = await client.get_supported_tasks()
    app = build_app(arguments, tasks, client.model_config)
    await init_app_state(client, app.state, arguments, tasks)
    return _OnlyBelow(PREFIX, app)


def _arguments(model: str, name: str) -> argparse.Namespace:
    """What `vllm serve` would be told on its command line."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: Any = make_arg_parser(FlexibleArgumentParser())
    arguments: argparse.Namespace = parser.parse_args([])
    arguments.model = model
    arguments.served_model_name = [name]
    arguments.disable_log_stats = True
    return arguments


class _OnlyBelow:
    """Passes what is asked for below a path."""

    def __init__(self, prefix: str, app: App) -> None:
        self._prefix = prefix
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].startswith(self._prefix):
            await refuse(send, 404, f"there is nothing at {scope['path']}")
            return
        await self._app(scope, receive, send)


async def no_openai(scope: Scope, receive: Receive, send: Send) -> None:
    """In the place of vLLM's routes, where another engine runs."""
    if scope["type"] != "http":
        return
    if scope["path"].startswith(PREFIX):
        await refuse(send, 501, "the OpenAI-compatible endpoints are vLLM's, which does not run here: POST /rewrite")
    else:
        await refuse(send, 404, f"there is nothing at {scope['path']}")
