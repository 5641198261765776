"""Local copies of remote shards: http(s), what else fsspec knows (s3, gs, hf), and the output of `pipe:COMMAND`.

A copy has all bytes, or there is none: a download is written to a temporary file, compared with the length that the
server states, and renamed. One that fails begins again from the first byte.
"""

import os
import subprocess
import time
from pathlib import Path

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from shared.errors import UserError
from shared.index import fingerprint, locked

ATTEMPTS = 4  # to fetch a shard
STALLED = 60  # seconds without a byte after which a download by http has failed
PAUSE = 1.0  # seconds before the second attempt, four times as long before each further one


def is_remote(url: str) -> bool:
    return url.startswith("pipe:") or ("://" in url and not url.startswith("file:"))


def cached_path(url: str, folder: Path) -> Path:
    """Path of the local copy of a remote shard, as `fetch` writes it."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in url)[-100:]
    return folder / f"{fingerprint(url.encode())}-{name.removesuffix('.tar')}.tar"


def fetch(url: str, folder: Path) -> str:
    """Local path of a shard; a remote one is first copied to `folder`, by one process while others wait for it.

    UserError if it cannot be copied in ATTEMPTS attempts.
    """
    if not is_remote(url):
        return url.removeprefix("file:")
    folder.mkdir(parents=True, exist_ok=True)
    path = cached_path(url, folder)
    if path.exists():
        return str(path)
    with locked(path.with_suffix(".lock")):
        for left in folder.glob(f"{path.stem}.*.part"):  # by a killed process
            left.unlink(missing_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        for attempt in range(ATTEMPTS):
            if path.exists():  # fetched while this process waited
                break
            try:
                copy(url, part)
                os.replace(part, path)
            except Exception as error:  # fsspec's libraries have exceptions of their own
                part.unlink(missing_ok=True)
                hopeless = isinstance(error, (ImportError, ValueError, FileNotFoundError))
                if hopeless or attempt + 1 == ATTEMPTS:
                    reason = f"{type(error).__name__}: {error}".rstrip(": ")
                    raise UserError(f"shard {url} could not be fetched ({reason})") from error
                time.sleep(PAUSE * 4**attempt)
    return str(path)


def copy(url: str, path: Path) -> None:
    """Write the bytes of a URL into a file. OSError if the command fails or if fewer or more bytes came than stated."""
    if url.startswith("pipe:"):
        with open(path, "wb") as file:
            status = subprocess.run(url.removeprefix("pipe:"), shell=True, stdout=file).returncode
        if status:
            raise OSError(f"exit status {status}")
        return
    files, name = url_to_fs(url, **http_options() if url.startswith("http") else {})
    stated = Callback()
    files.get_file(name, str(path), callback=stated)
    if stated.size is not None and path.stat().st_size != stated.size:
        raise OSError(f"{path.stat().st_size:,} bytes came of {stated.size:,}")


def http_options() -> dict:
    """fsspec's options: no limit on a download's time, but on its silence; proxies of the environment; no compression,
    so that the stated length is that of the file."""
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=STALLED, sock_read=STALLED)
    return {"client_kwargs": {"trust_env": True, "timeout": timeout}, "headers": {"Accept-Encoding": "identity"}}
