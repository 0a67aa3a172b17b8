"""Four questions about the platform, each answered by trying it.

    crowd      what happens when 1000 clients hit /infer?
    latency    can jobs be batched without losing the latency SLA?
    retries    how are failed jobs retried and monitored?
    pressure   can you follow the system under pressure?

Each scenario is a module with the same three names: `QUESTION`; `measure`, which starts a platform
of its own, drives it and returns what it saw as a document for JSON; and `answer`, which says it in
sentences. `drawings` draws the documents. `python -m bench.scenarios` does it all.
"""
