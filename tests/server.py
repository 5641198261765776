"""A server of files on this machine whose first answers are faulty, for tests of downloads."""

import contextlib
import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


class Server(http.server.ThreadingHTTPServer):
    """`asked` counts the requests by path. The first `faulty` answers for each path are `fault`: "cut" closes the
    connection after half of the file, "stall" sends half and then nothing."""

    def __init__(self, folder: Path, fault: str, faulty: int):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fault, self.faulty, self.asked = folder, fault, faulty, Counter()
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, path = self.server, self.path.strip("/")
        server.asked[path] += 1
        if not (server.folder / path).is_file():
            return self.send_error(404)
        content = (server.folder / path).read_bytes()
        whole = server.asked[path] > server.faulty
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if whole else content[: len(content) // 2])
        self.wfile.flush()
        if not whole:
            if server.fault == "stall":
                server.over.wait(60)
            self.close_connection = True

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path, fault: str = "cut", faulty: int = 1) -> Iterator[Server]:
    """Context with a running `Server` of the files in a folder."""
    server = Server(folder, fault, faulty)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
