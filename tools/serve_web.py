"""Serve a web page that upscales images in the browser, with a network that tools/export_onnx.py exported.

    npm install --prefix tools/web
    python tools/serve_web.py --model smsr_x2.onnx

Then open http://localhost:8000. If the network was exported with --masks, the page also shows where it computes.

Browsers run WebAssembly in several threads only on pages that are isolated from other sites, which takes the two
headers below. If you host the page on another server, it must send them too.
"""

import functools
import http.server
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from option import Parser, port
from program import InputError, run_program

FOLDER = Path(__file__).resolve().parent / "web"
SAMPLE = FOLDER.parents[1] / "testsets/benchmark/Sample/LR_bicubic/X2/chelsea.png"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files in FOLDER, the network as model.onnx, and a small photograph as sample.png."""

    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
    }

    def __init__(self, *args, model: Path):
        self.model = model
        super().__init__(*args, directory=str(FOLDER))

    def translate_path(self, path: str) -> str:
        files = {"/model.onnx": self.model, "/sample.png": SAMPLE}
        return str(files[path]) if path in files else super().translate_path(path)

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *args) -> None:
        pass


def build_server(model: Path, port: int = 8000) -> http.server.ThreadingHTTPServer:
    """A server of the page that only this machine can reach; port 0 chooses a free one. Raises InputError."""
    if not model.is_file():
        raise InputError(f"--model {model}: no such file; export a network with tools/export_onnx.py")
    if b"smsr_scale" not in model.read_bytes():  # checked here because the page cannot read the metadata
        raise InputError(f"--model {model}: has no metadata smsr_scale; export it with tools/export_onnx.py")
    if not (FOLDER / "node_modules/onnxruntime-web").is_dir():
        raise InputError(f"{FOLDER}: onnxruntime-web is not installed; npm install --prefix tools/web")
    try:
        return http.server.ThreadingHTTPServer(("localhost", port), functools.partial(Handler, model=model))
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror}; choose another") from None


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE.onnx", help="exported network")
    parser.add_argument("--port", type=port, default=8000, help="port to listen on")
    args = parser.parse_args(argv)
    with build_server(args.model, args.port) as server:
        print(f"http://localhost:{args.port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run_program(main)
