"""No post-processing: the results of the contract as they came, for whoever reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from edgeward_runtime.sessions import Port
from edgeward_runtime.tasks.answer import Raw
from edgeward_runtime.tasks.view import View, place_of
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected


class Tensors:
    """Every output that is bound to `result`; states are left out."""

    def __init__(self, contract: Contract, outputs: Sequence[Port], labels: Sequence[str]) -> None:
        """Raises Rejected when the file lacks a result of the contract, or there is none."""
        if not contract.results:
            raise Rejected("No output of the model is a result: nothing would come out.")
        self._places = [(port.name, place_of(port, outputs)[0]) for port in contract.results]

    def __call__(self, outputs: Sequence[npt.NDArray[Any]], view: View) -> Raw:
        """(name, array) in the contract's order."""
        return Raw(tuple((name, outputs[at]) for name, at in self._places))
