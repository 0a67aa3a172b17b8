"""Start MLServer: write its two settings files, then run `mlserver start` on them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from bench.peers.forward import MAX_BATCH_DELAY_MS, MAX_BATCH_SIZE, PORT

folder = Path(os.environ["MLSERVER_FOLDER"])
settings = {"host": "127.0.0.1", "http_port": PORT, "grpc_port": 0, "metrics_endpoint": None}
model = {
    "name": "bench",
    "implementation": "bench.peers.mlserver.model.Model",
    "max_batch_size": MAX_BATCH_SIZE,
    "max_batch_time": MAX_BATCH_DELAY_MS / 1000,
}
(folder / "settings.json").write_text(json.dumps(settings))
(folder / "model-settings.json").write_text(json.dumps(model))
mlserver = str(Path(sys.executable).with_name("mlserver"))
os.execv(mlserver, [mlserver, "start", str(folder)])
