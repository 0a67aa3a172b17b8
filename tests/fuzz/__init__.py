"""Seeded hostile input against a running platform, judged answer by answer.

    seeds + heads, bodies, documents, streams -> cases      requests that are wrong in one way
    frames -> cases                                         sockets that are wrong in one way
    cases -> wire -> answers                                what was sent, and what came back of it
    bystander, processes                                    what the others noticed of it
    campaign -> report                                      faults, with the bytes that show them

`python -m tests.fuzz` runs it. A case depends on the seed and its number only, so that each fault
can be shown again: `python -m tests.fuzz --seed S --case N`.
"""
