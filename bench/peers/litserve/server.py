"""LitServe: one worker process; a batch is a list of decoded requests."""

from typing import Any

import litserve

from bench.peers.forward import MAX_BATCH_DELAY_MS, MAX_BATCH_SIZE, PORT, answer_members, load


class Api(litserve.LitAPI):
    """The workload."""

    def setup(self, device: str) -> None:
        """Load it."""
        self._forward = load()

    # With an annotation of `request`, LitServe would not take it from the body.
    def decode_request(self, request) -> list[str]:  # type: ignore[no-untyped-def]
        """Return the texts of a body."""
        texts: list[str] = request["texts"]
        return texts

    def batch(self, inputs: list[list[str]]) -> list[list[str]]:
        """Keep the requests apart, because they may have any number of texts."""
        return inputs

    def predict(self, batch: list[list[str]]) -> list[dict[str, Any]]:
        """Answer one batch."""
        return answer_members(self._forward, batch)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return one answer for each request."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return the body of an answer."""
        return output


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH_SIZE, batch_timeout=MAX_BATCH_DELAY_MS / 1000)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning")
