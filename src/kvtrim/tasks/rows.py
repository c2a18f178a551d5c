"""The rows of data sets, from a folder of files or from the Hugging Face Hub.

`reader(folder)` gives the function that a `Request` takes as `rows`. Which file or data set a name
stands for is a table, `tasks.sources.SOURCES`. A folder is never mixed with the Hub: what is not
in it is an error that says where to get it.
"""

import csv
import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from kvtrim.errors import UnknownNameError, UsageError
from kvtrim.files import parse
from kvtrim.tasks.sources import SOURCES, Hub, Row, Source

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".txt", ".txt.gz")
FOLDER = "KVTRIM_DATA"
_ESSAY = re.compile(r"^<<<ESSAY \d+ (\S+)>>>\n", re.MULTILINE)


def reader(folder: Path | str | None = None) -> "Rows":
    """The rows of a folder, by default of the one in KVTRIM_DATA, else of the Hub.

    Raises:
        UsageError: there is no such folder.
    """
    if folder is None:
        folder = os.environ.get(FOLDER) or None
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(
            f"no such folder of data: {folder}; give one with --data ({FOLDER}), "
            "or leave it out to read data sets from the Hugging Face Hub"
        )
    return Rows(None if folder is None else Path(folder))


class Rows:
    """The rows of data sets by name, each read once: `rows("gsm8k/test")`."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._read: dict[str, tuple[str, list[Row]]] = {}

    def __call__(self, name: str) -> list[Row]:
        """All rows of a data set.

        Raises:
            UsageError: unknown, not there, or damaged; says how to get it.
        """
        return self._find(name)[1]

    def fingerprint(self, name: str) -> dict[str, Any]:
        """What was read, for the record of a run: file or data set, number of rows, SHA-256."""
        origin, rows = self._find(name)
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return {"file": origin, "rows": len(rows), "sha256": digest.hexdigest()}

    def _find(self, name: str) -> tuple[str, list[Row]]:
        if name not in SOURCES:
            raise UnknownNameError("data set", name, SOURCES)
        if name not in self._read:
            source = SOURCES[name]
            self._read[name] = (
                _from_hub(name, source)
                if self.folder is None
                else _from_folder(name, source, self.folder)
            )
        return self._read[name]


def _from_folder(name: str, source: Source, folder: Path) -> tuple[str, list[Row]]:
    paths = [folder / f"{stem}{ending}" for stem in source.files for ending in ENDINGS]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        wanted = " or ".join(f"{stem}{ENDINGS[0]}" for stem in source.files)
        raise UsageError(
            f"{name} is not in {folder}: put {wanted} there (also as {', '.join(ENDINGS[1:])}). "
            f"{source.remedy}"
        )
    try:
        rows = source.adapt(_parse(path), path)
    except (AttributeError, LookupError, OSError, EOFError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as {name} ({type(error).__name__}: {error}); {source.remedy}"
        ) from error
    if not rows:
        raise UsageError(f"{path} has no rows; {source.remedy}")
    return path.relative_to(folder).as_posix(), rows


def _parse(path: Path) -> list[Row]:
    name = path.name.removesuffix(".gz")
    opened: Callable[..., Any] = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        if name.endswith(".jsonl"):
            return [_object(parse(line)) for line in file if line.strip()]
        if name.endswith(".csv"):
            return list(csv.DictReader(file))
        if name.endswith(".json"):
            value = parse(file.read())
            return [_object(one) for one in (value if isinstance(value, list) else [value])]
        return _essays(file.read())


def _object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"a row must be an object with fields, not {str(value)[:40]!r}")
    return value


def _essays(text: str) -> list[Row]:
    """A text as one row; where lines `<<<ESSAY nn name>>>` begin its parts, a row for each."""
    pieces = _ESSAY.split(text)
    names, texts = pieces[1::2] or ["text"], pieces[2::2] or pieces[:1]
    return [{"name": name, "text": text} for name, text in zip(names, texts, strict=True)]


def _from_hub(name: str, source: Source) -> tuple[str, list[Row]]:
    hub = source.hub
    if hub is None:
        raise UsageError(
            f"{name} comes from a file alone: put {source.files[0]}{ENDINGS[0]} into a folder and "
            f"give that as --data ({FOLDER}). {source.remedy}"
        )
    read = _from_archive if hub.archive else _from_datasets
    other = f". {source.without}" if source.without else ""
    try:
        return hub.name, source.adapt(read(hub), None)
    except ImportError:
        raise UsageError(
            "reading from the Hugging Face Hub needs datasets: pip install 'kvtrim[eval]'; or "
            f"give a folder with {source.files[0]}{ENDINGS[0]} as --data ({FOLDER}){other}"
        ) from None
    except Exception as error:  # whatever a network, a login or another version may raise
        raise UsageError(
            f"{name} could not be read from the Hub, data set {hub.name} "
            f"({type(error).__name__}: {error}); check the network, or download it and put "
            f"{source.files[0]}{ENDINGS[0]} into a folder for --data ({FOLDER}){other}"
        ) from error


def _from_datasets(hub: Hub) -> list[Row]:
    from datasets import load_dataset

    rows: Any = load_dataset(hub.path, hub.config, split=hub.split)
    return [dict(row) for row in rows]


def _from_archive(hub: Hub) -> list[Row]:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(hub.path, hub.archive, repo_type="dataset")
    with ZipFile(path) as archive, archive.open(hub.file) as file:
        return [_object(parse(line.decode())) for line in file if line.strip()]
