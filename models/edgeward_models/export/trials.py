"""What an exported file is tried with: examples, samples and noise, each beside the model's own outputs.

Invariants: a model is a function of arrays here, whatever framework it comes from; it must answer the same
inputs twice alike, with finite numbers, or there is nothing to hold a file against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeward_models.export import inputs
from edgeward_models.export.inputs import Array, Feeds, InputSpec
from edgeward_models.export.naming import check_names, output_names
from edgeward_models.export.report import OTHER_BATCH, STATE_STEPS, TRIALS, ExportOptions
from edgeward_models.export.verify import Step, Trial, fault_of
from edgeward_wire.errors import Rejected

Model = Callable[[Feeds], list[tuple[str, Array]]]
"""Every output with the name that the model gives it ("" for none)."""


@dataclass(frozen=True)
class Taken:
    """The inputs in the order of the forward method, and an example of each with a batch of one (if open)."""

    specs: tuple[InputSpec, ...]
    examples: Feeds
    given: bool
    """Whether somebody gave the examples; else they are noise."""


def taken_of(arrays: Mapping[str, Array], parameters: Sequence[str], options: ExportOptions) -> Taken:
    """The inputs as the options and the examples say. Raises Rejected when neither says anything."""
    if options.inputs:
        specs = _ordered(options.inputs, parameters)
    elif arrays:
        specs = tuple(inputs.like(name, array) for name, array in arrays.items())
    else:
        first = parameters[0] if parameters else "x"
        raise Rejected(
            "Nothing says what goes into the module.",
            f"Say it for each input: --input {first}=1x3x224x224:float32",
        )
    if options.dynamic_batch and not any(spec.open_axis is not None for spec in specs):
        specs = tuple(spec.opened() for spec in specs)
    rng = np.random.default_rng(options.seed)
    chosen: Feeds = {}
    for k, spec in enumerate(specs):
        given = arrays.get(spec.name, list(arrays.values())[k] if len(arrays) == len(specs) else None)
        chosen[spec.name] = (
            inputs.one_of(spec, given)
            if given is not None and _fits(spec, given)
            else inputs.noise(spec, 1, rng)
        )
    return Taken(specs, chosen, given=bool(arrays))


def _fits(spec: InputSpec, example: Array) -> bool:
    if example.ndim != len(spec.shape) or str(example.dtype) != spec.dtype:
        return False
    return inputs.one_of(spec, example).shape == spec.sized(1)


def _ordered(specs: Sequence[InputSpec], parameters: Sequence[str]) -> tuple[InputSpec, ...]:
    """In the order of the forward method where the names are its own, else as they were given."""
    names = [spec.name for spec in specs]
    check_names(names)
    if set(names) <= set(parameters):
        return tuple(sorted(specs, key=lambda spec: parameters.index(spec.name)))
    return tuple(specs)


def name_outputs(
    model: Model, taken: Taken, options: ExportOptions
) -> tuple[tuple[str, ...], dict[str, tuple[int | None, ...]]]:
    """The outputs' names, and their shapes with None where the batch is."""
    first, again = model(taken.examples), model(taken.examples)
    names = output_names([name for name, _ in first], [s.name for s in taken.specs], options.output_names)
    if not all(np.array_equal(a, b, equal_nan=True) for (_, a), (_, b) in zip(first, again, strict=True)):
        raise Rejected(
            "The module gives other outputs for the same inputs.",
            "Take out what is random in eval mode (dropout with training=True, noise, sampling).",
        )
    for name, (_, array) in zip(names, first, strict=True):
        fault = fault_of(name, array, array)
        if fault:
            raise Rejected(fault, "Give inputs that it is made for (--samples), or repair the module.")
    shapes: dict[str, tuple[int | None, ...]] = {n: a.shape for n, (_, a) in zip(names, first, strict=True)}
    if any(spec.open_axis is not None for spec in taken.specs):
        larger = model({s.name: inputs.join(s, [taken.examples[s.name]] * OTHER_BATCH) for s in taken.specs})
        for name, (_, one), (_, many) in zip(names, first, larger, strict=True):
            shapes[name] = tuple(a if a == b else None for a, b in zip(one.shape, many.shape, strict=False))
    return names, shapes


def make_trials(
    model: Model, taken: Taken, names: Sequence[str], options: ExportOptions
) -> tuple[list[Trial], str]:
    """The examples (or samples), noise like them, another batch where it is open, and states in sequence."""
    rng = np.random.default_rng(options.seed + 1)
    specs, like = taken.specs, taken.examples if taken.given else {}

    def drawn() -> Feeds:
        return {s.name: inputs.noise(s, 1, rng, like.get(s.name)) for s in specs}

    sources = [spec for spec in specs if spec.name not in options.states]
    if options.samples is not None:
        rows = inputs.read_samples(options.samples, sources, TRIALS * STATE_STEPS)
        evidence = options.samples.name
        feeds = [{**drawn(), **row} for row in rows[:TRIALS]]
    else:
        rows, evidence = [], "noise"
        feeds = [taken.examples, *(drawn() for _ in range(TRIALS))]

    def step(one: Feeds) -> Step:
        return Step(one, dict(zip(names, (array for _, array in model(one)), strict=True)))

    trials = [Trial(f"input {k}", 1, (step(one),)) for k, one in enumerate(feeds)]
    if any(spec.open_axis is not None for spec in specs):
        many = [feeds[k % len(feeds)] for k in range(OTHER_BATCH)]
        joined = {s.name: inputs.join(s, [one[s.name] for one in many]) for s in specs}
        trials.append(Trial(f"a batch of {OTHER_BATCH}", OTHER_BATCH, (step(joined),)))
    if options.states:
        trials.append(_sequence(step, [*rows, *(drawn() for _ in range(STATE_STEPS))], taken, names, options))
    return trials, evidence


def _sequence(
    step: Callable[[Feeds], Step],
    feeds: Sequence[Feeds],
    taken: Taken,
    names: Sequence[str],
    options: ExportOptions,
) -> Trial:
    """Eight steps with the state carried on, from zero, as a device does it."""
    shapes = {spec.name: spec for spec in taken.specs}
    for into, source in options.states.items():
        if into not in shapes or source not in names:
            raise Rejected(
                f"The state {into}={source} names no input and output of the module.",
                f"It has the inputs {', '.join(shapes)} and the outputs {', '.join(names)}.",
            )
    state = {n: np.zeros(shapes[n].sized(1), shapes[n].dtype) for n in options.states}
    steps = []
    for one in feeds[:STATE_STEPS]:
        steps.append(step({**one, **state}))
        state = {into: steps[-1].expected[source] for into, source in options.states.items()}
    return Trial(f"{len(steps)} steps with their state", 1, tuple(steps), options.states)


def remarks(taken: Taken, options: ExportOptions) -> list[str]:
    """What a person should know of the inputs."""
    fixed = [s for s in taken.specs if s.open_axis is None and s.shape and s.shape[0] != 1]
    if fixed and len(taken.specs) == 1:
        return [f"the batch is fixed at {fixed[0].shape[0]}; a device runs one frame at a time."]
    return []
