"""Files run sample by sample, and what each run is worth beside the other's.

Invariants: constants are fed and states carried as the device does it, a labelled sample starting anew;
an output that is not finite never leaves this module.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_models.answers import Detections, Outputs, Reading
from edgeward_models.evaluation import Row
from edgeward_models.items import Sample
from edgeward_models.metrics import Figure, average
from edgeward_models.similarity import energies, sqnr_interval
from edgeward_models.tallies import Tally
from edgeward_runtime.ports import constants, initial_states, next_states
from edgeward_runtime.sessions import RunFailed, Session
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected

Array = npt.NDArray[Any]


class Runner:
    """One file, run sample by sample."""

    def __init__(self, session: Session, contract: Contract, name: str) -> None:
        self._session, self._contract, self._name = session, contract, name
        self._ports = [port.name for port in session.outputs]
        missing = {port.name for port in contract.results} - set(self._ports)
        if missing:
            raise Rejected(f"{name} has no output {min(missing)!r}, as the other file has.")
        self._fixed = constants(contract)
        self.begin()

    def begin(self) -> None:
        """The next sample is the first of a series."""
        self._states = initial_states(self._contract)

    def run(self, sample: Sample) -> Outputs:
        """The results. Raises Rejected when it fails, or one is not finite."""
        if sample.item.label >= 0:
            self.begin()  # labelled samples have nothing to do with one another
        try:
            values = self._session.run({**self._fixed, **self._states, **sample.feeds})
        except RunFailed as error:
            raise Rejected(
                f"{self._name} does not run on {sample.item.name}. {error.what}",
                "Are its inputs those of the other file, and is the sidecar right?",
            ) from error
        outputs = dict(zip(self._ports, values, strict=True))
        self._states = next_states(self._contract, outputs)
        results = {port.name: outputs[port.name] for port in self._contract.results}
        for name, value in results.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise Rejected(
                    f"Output {name} of {self._name} is not finite on {sample.item.name}.",
                    "Check the preprocessing; a quantised file may need other ranges or float layers.",
                )
        return results

    def close(self) -> None:
        """Free the model."""
        self._session.close()


class Pass:
    """What all samples of one stream gave."""

    def __init__(self, contract: Contract, how: Reading, tally: Tally | None) -> None:
        self._how, self.tally = how, tally
        self._compared = [port.name for port in contract.results if port.dtype.startswith("float")]
        self._energies: list[list[tuple[float, float]]] = []
        self._agreement: list[float | None] = []
        self.count = 0

    def look(self, sample: Sample, mine: Outputs, theirs: Outputs | None) -> None:
        """One more."""
        self.count += 1
        answer = self._how.read(mine, sample)
        reference = self._how.read(theirs, sample) if theirs is not None else None
        if self.tally is not None:
            self.tally.add(sample.item, answer, reference)
        if theirs is None:
            return
        for name in self._compared:
            if mine[name].shape != theirs[name].shape:
                raise Rejected(
                    f"Output {name} has the shape {mine[name].shape},"
                    f" and {theirs[name].shape} in the float file.",
                    "Are they the same model?",
                )
        self._energies.append([energies(a, b) for a, b in self._pieces(theirs, mine)])
        self._agreement.append(self._how.agree(reference, answer))

    def _pieces(self, theirs: Outputs, mine: Outputs) -> list[tuple[Array, Array]]:
        """The float file's outputs and these; a detector's boxes and scores apart."""
        if not isinstance(self._how, Detections):
            return [(theirs[name], mine[name]) for name in self._compared]
        cut = self._how.cut
        return [
            piece
            for name in self._compared
            for piece in zip(cut(name, theirs[name]), cut(name, mine[name]), strict=True)
        ]

    def rows(self, seed: int) -> list[Row]:
        """Agreement and SQNR."""
        rows = []
        agreed = [value for value in self._agreement if value is not None]
        if agreed:
            rows.append(Row("agreement", self._how.title, "share", average(agreed, seed)))
        if self._compared:
            value, interval = sqnr_interval(self._energies, seed)
            rows.append(Row("sqnr", "SQNR", "dB", Figure(value, interval, len(self._energies))))
        return rows

    def notes(self) -> list[str]:
        """What the figures do not say."""
        silent_ones = sum(value is None for value in self._agreement)
        if not silent_ones:
            return []
        return [f"On {silent_ones} of {self.count} samples neither model finds anything."]
