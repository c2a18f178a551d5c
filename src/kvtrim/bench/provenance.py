"""What a figure was measured on: versions, processor, threads, commit; and memory peaks."""

import ast
import ctypes
import gc
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvtrim.version import VERSION

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton", "kvpress")
_PACKAGES += ("wonderwords", "rouge", "rapidfuzz")  # make prompts and scores


def provenance(device: torch.device) -> dict[str, Any]:
    """Everything about the place and the code that a reader of a figure needs."""
    return {
        "kvtrim": VERSION,
        "code": _code(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "device": _device_name(device),
        "device_type": device.type,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@dataclass
class Peak:
    """Bytes above what was in use when the measurement began; None where it cannot be told."""

    bytes: int | None = None
    base: int | None = None  # what was in use


@contextmanager
def peak_memory(device: torch.device, base: int | None = None) -> Iterator[Peak]:
    """Measure the peak inside the block: CUDA's allocator, or the process's resident memory.

    It counts from what is in use when the block begins, or from `base`, an earlier peak's.

    On Linux the kernel's high-water mark is reset first, and the C library is told to take every
    larger block from the kernel and to give it back, so that gaps in its heap do not count. That
    costs time: do not time what runs inside. Elsewhere the peak of the block cannot be told from
    that of the process, and None is reported.
    """
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        peak.base = torch.cuda.memory_allocated(device) if base is None else base
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - peak.base
        return
    with _exact_heap():
        resettable = _reset_high_water_mark()
        peak.base = _status("VmRSS") if base is None else base
        yield peak
        top = _status("VmHWM")
    if resettable and peak.base is not None and top is not None:
        peak.bytes = max(0, top - peak.base)


@contextmanager
def _exact_heap() -> Iterator[None]:
    """Make glibc keep no freed memory: blocks above 256 KiB are mapped and unmapped one by one."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "malloc_trim"):
        yield
        return
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    libc.malloc_trim(0)
    libc.mallopt(mmap_threshold, 1 << 18)
    try:
        yield
    finally:
        libc.mallopt(mmap_threshold, 1 << 25)  # where its own adjustment ends up


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    """A line of /proc/self/status in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(name + ":")]
    return int(found[0]) * 1024 if found else None


def _code() -> str:
    """Hash of kvtrim's own source, which a commit with later edits does not tell."""
    root, total = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git in the folder of this file; None outside of a checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or device.type


def outside(names: Iterable[str]) -> dict[str, str]:
    """For every `module:ATTRIBUTE` of one's own the hash of its source, and of the modules beside
    it that it imports, so that a record tells one version from another in every process.
    """
    found = {}
    for name in sorted(names):
        module = sys.modules.get(name.partition(":")[0]) if ":" in name else None
        file = getattr(module, "__file__", None)
        if file is not None:
            total = hashlib.sha256()
            for path in _with_imports(Path(file).resolve()):
                total.update(path.name.encode() + path.read_bytes())
            found[name] = total.hexdigest()[:16]
    return found


def _with_imports(file: Path) -> list[Path]:
    """A module's file and those in its folder that it imports, also through each other."""
    known, left = {file}, [file]
    while left:
        for node in ast.walk(ast.parse(left.pop().read_bytes())):
            names = [each.name for each in getattr(node, "names", [])]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module or ''}.{name}" for name in names)]
            elif not isinstance(node, ast.Import):
                continue
            for name in names:
                parts = [part for part in name.split(".") if part]
                for first in range(len(parts)):  # the folder may be a package, or on the path
                    place = file.parent.joinpath(*parts[first:])
                    there = {place.with_suffix(".py"), place / "__init__.py"} - known
                    new = [path for path in there if path.is_file()]
                    known.update(new)
                    left += new
    return sorted(known)
