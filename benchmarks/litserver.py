"""LitServe with its batching, around the same stock engine. `python -m benchmarks.litserver PORT`."""

import os
import sys
from typing import Any

import litserve

from benchmarks.stock import Request, Stock


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Batches of up to 32 requests that arrive within 20 ms."""

    def setup(self, device: str) -> None:
        self._stock = Stock(os.environ["BENCH_CHECKPOINT"], os.environ["BENCH_ROOT"], int(os.environ["BENCH_THREADS"]))

    def decode_request(self, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        return request

    def batch(self, inputs: list[Request]) -> list[Request]:
        return inputs

    def predict(self, batch: list[Request], **_: Any) -> list[str]:
        return self._stock.answer(batch)

    def unbatch(self, output: list[str]) -> list[str]:
        return output

    def encode_response(self, output: str, **_: Any) -> dict[str, str]:
        return {"text": output}


if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=32, batch_timeout=0.02), accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
