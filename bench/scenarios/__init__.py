"""Four questions about the platform, each answered by an experiment.

    crowd      what happens when 1000 clients hit /infer?
    latency    can jobs be batched without losing the latency SLA?
    retries    how are failed jobs retried and monitored?
    pressure   can you follow the system under pressure?

Each scenario is a module with the same three names: `QUESTION`; `measure`, which starts its own
platform, drives it and returns its observations as a JSON document; and `answer`, which summarises
them in sentences. `drawings` draws the documents. `python -m bench.scenarios` runs everything.
"""
