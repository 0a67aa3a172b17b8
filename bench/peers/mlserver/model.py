"""MLServer: a custom runtime behind its adaptive batching, in its own process."""

from __future__ import annotations

from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse

from bench.peers.forward import load


class Model(MLModel):
    """The workload."""

    async def load(self) -> bool:
        """Load it."""
        self._forward = load()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer one batch, which arrives as one request of many rows."""
        texts = StringCodec.decode_input(payload.inputs[0])
        rows = self._forward(texts)
        if isinstance(rows[0], str):
            outputs = [StringCodec.encode_output("outputs", rows)]
        else:
            import numpy as np

            outputs = [NumpyCodec.encode_output("outputs", np.array(rows, np.float32))]
        # The name carries the size of the batch, because everything else is split with the rows.
        outputs[0].name = f"batch-{len(texts)}"
        return InferenceResponse(model_name=self.name, outputs=outputs)
