"""Serve the page that upscales images in a browser, with a network that tools/export_onnx.py exported.

    npm install --prefix tools/web
    python tools/serve_web.py --model smsr_x2.onnx

Then open http://localhost:8000. Threads of WebAssembly need pages that are isolated from others, which the two headers
here say; a server of your own must send them, too.
"""

import argparse
import functools
import http.server
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from option import Parser, port
from utility import InputError, run_program

FOLDER = Path(__file__).resolve().parent / "web"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of FOLDER, and the network as model.onnx."""

    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript", ".wasm": "application/wasm", ".onnx": "application/octet-stream",
    }  # fmt: skip

    def __init__(self, *args, model):
        self.model = model
        super().__init__(*args, directory=str(FOLDER))

    def translate_path(self, path):
        return str(self.model) if path == "/model.onnx" else super().translate_path(path)

    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *args):
        pass


def build_server(model, port=8000):
    """A server of the page on this machine alone; port 0: any that is free. Raises InputError."""
    if not model.is_file():
        raise InputError(f"--model {model}: no such file; make it with tools/export_onnx.py")
    if b"smsr_scale" not in model.read_bytes():  # of the metadata, which a page does not get to see
        raise InputError(f"--model {model}: was not made by tools/export_onnx.py; serve one that was")
    if not (FOLDER / "node_modules/onnxruntime-web").is_dir():
        raise InputError("onnxruntime-web is not installed; npm install --prefix tools/web")
    try:
        return http.server.ThreadingHTTPServer(("localhost", port), functools.partial(Handler, model=model))
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror}; choose another") from None


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE.onnx")
    parser.add_argument("--port", type=port, default=8000)
    args = parser.parse_args(argv)
    with build_server(args.model, args.port) as server:
        print(f"http://localhost:{args.port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run_program(main)
