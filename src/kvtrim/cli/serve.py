"""`serve`: an OpenAI-compatible server of one model and its documents."""

import os
from contextlib import ExitStack
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
    from kvtrim.methods.keep import Keep as Amount

    try:
        bound = Amount.parse(memory)
    except UsageError:
        bound = None
    if bound is None or bound.kind != "bytes":
        raise UsageError(f"--memory {memory}: write a size, such as 8GiB")
    try:
        import uvicorn

        from kvtrim.serve.app import application
        from kvtrim.serve.front import Front
        from kvtrim.serve.guard import is_loopback
        from kvtrim.serve.metrics import log_to_stderr
        from kvtrim.serve.scheduler import Limits
        from kvtrim.serve.service import Defaults, Service
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
    limits = Limits(memory=int(bound.amount), batch=batch, queue=queue)
    defaults = Defaults(method, keep, compress_above, deadline)
    config: dict[str, Any] = {
        "host": host,
        "port": port,
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": 30,
        "timeout_keep_alive": 30,
        "limit_concurrency": max(256, 4 * (batch + queue)) * (replicas or 1),
    }
    loading = model, device, dtype, threads, allow_untested
    if replicas is None:
        loaded, tokenizer = options.load(*loading)
        service = Service(model, loaded, tokenizer, shelf, limits, defaults)
        log_to_stderr()
        _run(uvicorn.Server(uvicorn.Config(application(service, api_key), **config)), service.id)
        return
    ray_app = _ray_app()
    setup = ray_app.Setup(shelf.folder.absolute(), limits, defaults, *loading, folder=os.getcwd())
    log_to_stderr()
    with ExitStack() as stack:
        with output.busy(f"starting {replicas} replicas"):
            cluster = stack.enter_context(ray_app.Cluster(setup, replicas, ray_address))
        app = Front(cluster, api_key, deadline, long=compress_above)
        config |= {"lifespan": "off", "ws": "none"}
        _run(uvicorn.Server(uvicorn.Config(app, **config)), setup.id)


def _ray_app() -> ModuleType:
    try:
        from kvtrim.serve import ray_app
    except ImportError as error:
        raise UsageError(
            f"replicas need {error.name or 'ray'}, which is not installed: "
            "pip install 'kvtrim[replicas]'"
        ) from None
    return ray_app


def _run(server: "object", name: str) -> None:
    """Serve until told to stop, and say where once requests are answered."""
    import asyncio

    own: Any = server

    async def main() -> None:
        serving = asyncio.ensure_future(own.serve())
        while not own.started and not serving.done():
            await asyncio.sleep(0.02)
        if own.started:
            host, port = own.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            typer.echo(f"kvtrim: serving {name} at http://{shown}:{port}/ (API under /v1)")
        await serving

    asyncio.run(main())
