"""The part of our code that runs inside vLLM's worker process: weight loading, and dying with the actor.

vLLM imports this module in each worker and mixes ``PolicyWorker`` into its worker class
(``worker_extension_cls``). With one worker that is the engine-core process itself.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

ACTOR_PID = "DEEPRETRIEVAL_ACTOR_PID"
ENGINE_THREADS = "DEEPRETRIEVAL_ENGINE_THREADS"
FALLBACK_POLL_S = 0.5


watched_actor = 0  # the process whose death ends this one; 0: none


class PolicyWorker:
    """Methods that ``AsyncLLM.collective_rpc`` calls by name."""

    if TYPE_CHECKING:

        def reload_weights(self, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
            """vLLM's layer-wise reload, which this class finds in the worker it is mixed into."""

        def get_model(self) -> Module:
            """The worker's model."""

    def load_policy(self, path: str) -> None:
        """Replaces the model's weights by those of a safetensors file with Hugging Face names.

        ``model.load_weights`` called directly would write past vLLM's repacked layers; its own layer-wise
        reload unpacks, loads and repacks one layer after the other, in place.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt", device="cpu") as file:
            self.reload_weights(weights_iterator=((name, file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118
        repack_shared_weights(self.get_model())

    def watched_actor(self) -> int:
        """The process with which this worker dies."""
        return watched_actor


def repack_shared_weights(model: Module) -> None:
    """Packs anew, on a CPU, the weights of layers that the reload passes over because another layer owns them.

    That is an output head tied to the input embeddings: vLLM (0.32) gives it the new values and goes on
    multiplying with the copy that oneDNN packed at the start, so the policy's head would stay that of version 0.
    """
    layer: Any
    for layer in model.modules():
        # Layers that own their weight have dropped it after packing.
        if hasattr(layer, "cpu_linear") and layer.weight.numel():
            layer.quant_method.process_weights_after_loading(layer)


def die_with_actor(pid: int) -> None:
    """Ends this process as soon as process ``pid`` is gone, however it went.

    A thread waits, because PR_SET_PDEATHSIG fires on the death of the parent's *thread*, and because the actor
    is the worker's grandparent where vLLM starts several workers.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)
    except (AttributeError, OSError):  # no pidfd: not Linux, or older than 5.3
        pidfd = -1
    threading.Thread(target=_wait_for_death, args=(pid, pidfd), name="die-with-actor", daemon=True).start()


def _wait_for_death(pid: int, pidfd: int) -> None:
    if pidfd >= 0:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
    else:
        while _alive(pid):
            threading.Event().wait(FALLBACK_POLL_S)
    os._exit(1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _adopt_process() -> None:
    """Prepares the worker process; does nothing in the actor itself and where no actor has set the variables."""
    global watched_actor
    actor = int(os.environ.get(ACTOR_PID, "0"))
    if actor in (0, os.getpid()):
        return
    watched_actor = actor
    die_with_actor(actor)
    with suppress(ValueError):  # only the main thread may do these two
        # Ctrl-C reaches the whole process group; it is the actor that closes its engine, after the last result.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # A forked process would write its signals into the actor's event loop.
        signal.set_wakeup_fd(-1)
    if threads := int(os.environ.get(ENGINE_THREADS, "0")):
        import torch

        torch.set_num_threads(threads)
        # vLLM compiles small sampling kernels even in eager mode: 5 to 20 s of C++ compiler before the first
        # token, which a CPU run never earns back.
        torch.compiler.set_stance("force_eager")


_adopt_process()
