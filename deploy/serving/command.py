"""`deepretrieval serve`: a model over HTTP until it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.config import Config
from deploy.errors import LaunchError
from deploy.model_choice import (
    MODEL_HELP,
    REWRITING_KEYS,
    add_endpoint_arguments,
    add_key_flags,
    flag_overrides,
    model_of,
    rewriting_config,
)
from deploy.models import ModelSource, read_key

if TYPE_CHECKING:
    from deploy.rewriting.rewriter import AsyncRewriter
    from deploy.serving.limits import App

DEFAULT_PORT: Final = 8000
MOST_BYTES: Final = 4 << 20
MOST_WAITING: Final = 1024
KEY_VARIABLE: Final = "DEEPRETRIEVAL_SERVE_KEY"
_DRAIN_S: Final = 10

logger = logging.getLogger(__name__)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register it with the command line."""
    parser = commands.add_parser(
        "serve", help="a model over HTTP: /rewrite, /search, OpenAI's /v1, and a page to try it"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="CONFIG|RUN key=value",
        help="one per task that is served, the first is the default; then dotted overrides of all of them",
    )
    parser.add_argument("--model", help=f"{MODEL_HELP}; default: that of the first run or config")
    add_endpoint_arguments(parser)
    add_key_flags(parser, REWRITING_KEYS, "the same as {}=…, of the first")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (set a key)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"0: a free one; default: {DEFAULT_PORT}")
    parser.add_argument("--no-search", action="store_true", help="start no engine: rewriting only")
    parser.add_argument(
        "--serve-key-file", metavar="FILE", help=f"key that clients must send (mode 0600); default: ${KEY_VARIABLE}"
    )
    parser.add_argument(
        "--max-waiting", type=int, default=MOST_WAITING, help=f"requests at once; default: {MOST_WAITING}"
    )
    parser.add_argument("--max-bytes", type=int, default=MOST_BYTES, help=f"of a body; default: {MOST_BYTES}")
    parser.set_defaults(handler=_serve, words_anywhere=True)


def _serve(arguments: argparse.Namespace) -> int:
    configs, source = _chosen(arguments)
    key = read_key(arguments.serve_key_file, KEY_VARIABLE)
    with _listening(arguments.host, arguments.port) as listener:
        asyncio.run(_run(arguments, configs, source, key, listener))
    return 0


def _chosen(arguments: argparse.Namespace) -> tuple[list[Config], ModelSource]:
    targets = [Path(word) for word in arguments.overrides if "=" not in word]
    common = [word for word in arguments.overrides if "=" in word]
    flags = flag_overrides(arguments, REWRITING_KEYS)
    search = not arguments.no_search
    first = targets[0] if targets else None
    configs = [rewriting_config(arguments.model or "", first, [*flags, *common], search)]
    configs += [rewriting_config("", target, common, search) for target in targets[1:]]
    return configs, model_of(arguments, first, configs[0])


def _listening(host: str, port: int) -> socket.socket:
    """Bound before a model is loaded for minutes.

    Raises:
        LaunchError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise LaunchError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    return listener


async def _run(
    arguments: argparse.Namespace, configs: Sequence[Config], source: ModelSource, key: str, listener: socket.socket
) -> None:
    from deploy.rewriting.rewriter import AsyncRewriter

    async with AsyncRewriter(source, configs, search=not arguments.no_search, statistics=True) as rewriter:
        app = await _app(rewriter, arguments, key)
        address, port = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        print(f"Serving {source.name} ({rewriter.generator.name}) at http://{shown}:{port}/", flush=True)
        if not key and address not in ("127.0.0.1", "::1"):
            logger.warning(
                "anybody who reaches this address can use the model: set %s or --serve-key-file", KEY_VARIABLE
            )
        await _serve_until_stopped(app, listener, rewriter)


async def _app(rewriter: AsyncRewriter, arguments: argparse.Namespace, key: str) -> App:
    from deploy.serving.app import make_app
    from deploy.serving.openai_routes import openai_app

    openai = await openai_app(rewriter)
    return make_app(rewriter, openai, key=key, max_bytes=arguments.max_bytes, max_waiting=arguments.max_waiting)


async def _serve_until_stopped(app: App, listener: socket.socket, rewriter: AsyncRewriter) -> None:
    """Until SIGINT or SIGTERM, after which requests under way are finished; or until the model is gone.

    Raises:
        LaunchError: the model is gone.
    """
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_DRAIN_S, lifespan="off")
    )
    problem: list[str] = []

    async def watch() -> None:
        while True:
            await asyncio.sleep(1)
            if found := await rewriter.generator.problem():
                problem.append(found)
                server.should_exit = True
                return

    watching = asyncio.create_task(watch())
    with contextlib.suppress(KeyboardInterrupt):
        await server.serve(sockets=[listener])
    watching.cancel()
    if problem:
        raise LaunchError(f"the model is gone: {problem[0]}; start the server again")
