"""The cloud: who is released what, who should run it, and what came of it.

One process serves the registry (TUF and blobs), enrolment, rollouts and telemetry, and supervises the broker.
It signs assignments and freshness; it holds no key that can release a model.
"""
