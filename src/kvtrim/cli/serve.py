"""`serve`: an OpenAI-compatible server of one model and its documents."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.errors import UsageError

Host = Annotated[str, typer.Option(help="Where to listen. Others than this machine need a key.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="KVTRIM_API_KEY", help="Asked of every client (as OpenAI's is)."
    ),
]
MemoryBound = Annotated[str, typer.Option("--memory", help="Most that all caches may take: 8GiB.")]
Keep = Annotated[
    str, typer.Option("--keep", help="Budget of documents and long messages, as in `ask`.")
]
Above = Annotated[
    int,
    typer.Option(
        min=0, help="Tokens of a conversation's first message above which it is compressed."
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Requests that decode together.")]
Queue = Annotated[int, typer.Option(min=1, help="Requests that may wait; more get a 429.")]
Replicas = Annotated[
    int | None,
    typer.Option(min=1, help="Servers on Ray, behind one address (extra: replicas)."),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        help="A running Ray cluster that this machine is part of: auto. Default: a new one, here.",
    ),
]
Deadline = Annotated[float, typer.Option(min=1, help="Seconds that a request may take in all.")]


def serve(
    library: options.Library = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Key = None,
    memory: MemoryBound = "8GiB",
    method: options.Method = "auto",
    keep: Keep = "25%",
    compress_above: Above = 2048,
    batch: Batch = 32,
    queue: Queue = 64,
    deadline: Deadline = 600.0,
    replicas: Replicas = None,
    ray_address: Address = None,
    model: options.Model = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    allow_untested: options.AllowUntested = False,
) -> None:
    """Serve a model and its documents: OpenAI's API under /v1, a page at /."""
    options.request(method, keep, None, None, "error")
    bound = options.parse_size(memory, f"--memory {memory}: write a size, such as 8GiB")
    try:
        import uvicorn

        from kvtrim.serve.front import Front
        from kvtrim.serve.guard import is_loopback
        from kvtrim.serve.limits import Defaults, Limits
        from kvtrim.serve.log import log_to_stderr
    except ImportError as error:
        raise UsageError(
            f"serving needs {error.name}, which is not installed: pip install 'kvtrim[serve]'"
        ) from None
    if api_key is None and not is_loopback(host):
        raise UsageError(
            f"--host {host} lets other machines in: give --api-key (or KVTRIM_API_KEY), or leave "
            "--host out"
        )
    if api_key is not None and len(api_key) < 8:
        raise UsageError("--api-key: give at least 8 characters")
    if ray_address is not None and replicas is None:
        raise UsageError("--ray-address is for --replicas: say how many")
    shelf = options.library_in(library)
    limits = Limits(memory=bound, batch=batch, queue=queue)
    defaults = Defaults(method, keep, compress_above, deadline)
    config: dict[str, Any] = {
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": 30,
        "timeout_keep_alive": 30,
        "limit_concurrency": max(256, 4 * (batch + queue)) * (replicas or 1),
    }
    loading = model, device, dtype, threads, allow_untested
    ray_app: Any = None if replicas is None else _ray_app()
    with ExitStack() as stack:
        sockets = stack.enter_context(_bind(host, port))  # before minutes of loading
        if replicas is None:
            from kvtrim.serve.app import application  # what a front of replicas does without
            from kvtrim.serve.service import Service

            loaded, tokenizer = options.load(*loading)
            service = Service(model, loaded, tokenizer, shelf, limits, defaults)
            log_to_stderr()
            app: Any = application(service, api_key)
            name = service.id
        else:
            folder = shelf.folder.absolute()
            setup = ray_app.Setup(folder, limits, defaults, *loading, folder=os.getcwd())
            log_to_stderr()
            with output.busy(f"starting {replicas} replicas"):
                cluster = stack.enter_context(ray_app.Cluster(setup, replicas, ray_address))
            app = Front(cluster, api_key, deadline, long=compress_above)
            config |= {"lifespan": "off", "ws": "none"}
            name = setup.id
        _run(uvicorn.Server(uvicorn.Config(app, **config)), name, sockets)


@contextmanager
def _bind(host: str, port: int) -> Iterator[list[socket.socket]]:
    """The sockets of an address.

    Raises:
        UsageError: it is none of this machine's, or is taken.
    """
    kinds: dict[str, Any] = {"type": socket.SOCK_STREAM, "flags": socket.AI_PASSIVE}
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        try:
            for family, kind, number, _, address in socket.getaddrinfo(host, port, **kinds):
                one = stack.enter_context(socket.socket(family, kind, number))
                if os.name == "posix":
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                taken = sockets[0].getsockname()[1] if sockets else port  # 0: one for all
                one.bind((address[0], taken, *address[2:]))
                sockets.append(one)
        except OSError as error:
            raise _refusal(host, port, error) from None
        yield sockets


def _refusal(host: str, port: int, error: OSError) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        return UsageError(
            f"port {port} is in use: stop what listens there, or choose another (--port; 0: any "
            "that is free)"
        )
    return UsageError(f"cannot listen at {host}, port {port}: {error.strerror}")


def _ray_app() -> ModuleType:
    try:
        from kvtrim.serve import ray_app
    except ImportError as error:
        raise UsageError(
            f"replicas need {error.name or 'ray'}, which is not installed: "
            "pip install 'kvtrim[replicas]'"
        ) from None
    return ray_app


def _run(server: "object", name: str, sockets: list[socket.socket]) -> None:
    """Serve until told to stop, and say where once requests are answered."""
    import asyncio

    own: Any = server
    host, port = sockets[0].getsockname()[:2]

    async def main() -> None:
        serving = asyncio.ensure_future(own.serve(sockets))
        while not own.started and not serving.done():
            await asyncio.sleep(0.02)
        if own.started:
            shown = f"[{host}]" if ":" in host else host
            typer.echo(f"kvtrim: serving {name} at http://{shown}:{port}/ (API under /v1)")
        await serving

    try:
        asyncio.run(main())
    except OSError as error:  # another one began to listen there since
        raise _refusal(host, port, error) from None
