"""Exports a swapped model for other runtimes, and serves the swapped model itself over HTTP.

    python examples/export_and_serve.py [--port 8000]

Expect: the exported program agrees with the model ("holds N aten convolutions and nothing of convext's"), then a server
answers eight requests from four threads at once, each as the model itself would. Ten seconds of a core. With --port it
goes on serving: POST 1x3x224x224 float32 as bytes, get {"class": ..., "probability": ...}.
"""

import argparse
import json
import tempfile
import threading
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
import torchvision
from torch import nn

import convext

SHAPE = 1, 3, 224, 224


def answer(model: nn.Module, body: bytes) -> dict:
    x = torch.frombuffer(bytearray(body), dtype=torch.float32).reshape(SHAPE)
    with torch.inference_mode():
        probability, index = model(x).softmax(1).max(1)
    return {"class": index.item(), "probability": probability.item()}


def export(model: nn.Module) -> None:
    """Writes the model as a program of torch.export, reads it back and compares."""
    x = torch.randn(SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "mobilenet_v2.pt2")
        torch.export.save(torch.export.export(model, (x,)), file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of buffers that it does not write
            program = torch.export.load(file)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("convext" in target for target in called)
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-3, atol=1e-3)
    convolutions = sum("conv" in target for target in called)
    print(f"exported: holds {convolutions} aten convolutions and nothing of convext's, and agrees with the model")


def serve(model: nn.Module, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reply = json.dumps(answer(model, self.rfile.read(int(self.headers["Content-Length"])))).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, help="go on serving there")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = convext.swap(torchvision.models.mobilenet_v2()).eval()
    export(model)

    server = serve(model, options.port or 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"

    def ask(image: torch.Tensor) -> dict:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(address, data=image.numpy().tobytes()) as response:
            return json.load(response)

    images = list(torch.randn(8, *SHAPE))
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(ask, images))
    expected = [answer(model, image.numpy().tobytes()) for image in images]
    assert [reply["class"] for reply in replies] == [other["class"] for other in expected]
    print(f"served: {len(replies)} requests at {address}, each answered as the model itself would")
    if options.port:
        thread.join()
    server.shutdown()


if __name__ == "__main__":
    main()
