"""The search carried out: what it does with its time, and what it says of what it did not get to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeward_models.hunt import _Hunt, search_targets, share
from edgeward_models.progress import silent
from edgeward_models.quantise import QuantiseRequest, make_study, open_source
from edgeward_models.ranking import rank
from edgeward_models.schemes import TARGETS, Scheme
from edgeward_models.study import Study, check_tests, float_s, held_out
from edgeward_models.trials import Judged
from edgeward_models.workspace import Workspace
from edgeward_runtime import resources
from edgeward_wire.errors import Rejected
from models import search_models
from runtime import builders

HERE = next(target for target in TARGETS.values() if target.arch == resources.machine())


def studied(home: Path, **how: object) -> Study:
    """The study of a small network."""
    model = home / "net.onnx"
    if not model.exists():
        search_models.beside(search_models.heavy(model))
    request = QuantiseRequest(model, **{"budget_s": 3.0, **how})  # type: ignore[arg-type]
    return make_study(open_source(request, Workspace(home / "work"), home, silent), time.monotonic())


def tried(study: Study) -> _Hunt:
    """A search that has tried the base, which is twice as fast as FP32, whatever else the machine did."""
    hunt = _Hunt(study, HERE)
    hunt._try(hunt.target.schemes[:1])
    (one,) = hunt.found
    hunt.found = [replace(one, measured=replace(one.measured, ratio=0.5, ratio_high=0.6))]
    return hunt


# --- layers


def test_a_ranking_that_was_cut_off_goes_on_in_the_next_run(tmp_path: Path) -> None:
    study, scheme = studied(tmp_path), HERE.schemes[0]
    assert rank(study, scheme, time.monotonic() - 1) == []
    found = rank(study, scheme, time.monotonic() + 600)
    assert sorted(one.name for one in found) == sorted(study.names)
    assert rank(study, scheme, time.monotonic() - 1) == found


def test_layers_that_were_not_reached_are_not_reported_as_measured(tmp_path: Path) -> None:
    def slow(what: str, done: int, total: int) -> None:
        if what == "layer by layer":
            time.sleep(1.1)  # a ranking has a second at least

    study = replace(studied(tmp_path), progress=slow)
    hunt = tried(study)
    hunt.end = time.monotonic()
    hunt._rank()
    told = hunt.report()
    assert len(told.layers) < len(study.names)
    assert all(layer["macs_share"] > 0 for layer in told.layers)
    assert f"{len(told.layers)} of {len(study.names)} layers were ranked" in " ".join(told.notes)
    assert [layer.name for layer in hunt.space.layers] == list(study.names)


# --- time


def test_the_time_for_the_finals_is_kept_free(tmp_path: Path) -> None:
    study = studied(tmp_path, budget_s=100.0)
    few = replace(study, effort=replace(study.effort, test=1))
    assert _Hunt(few, HERE).end == pytest.approx(few.deadline - 10.0)
    each = float_s(study)
    many = replace(study, effort=replace(study.effort, test=round(60 / each)))
    hunt = _Hunt(many, HERE)
    assert hunt.end == pytest.approx(many.deadline - 1.6 * 60 - 2 * hunt.finals_goal_s, abs=2 * each)


def test_one_walk_is_enough_once_the_time_is_up(tmp_path: Path) -> None:
    study = replace(studied(tmp_path), deadline=time.monotonic() - 1)
    hunt = tried(study)
    (one,) = hunt.found
    hunt.found.append(replace(one, measured=replace(one.measured, scheme=Scheme("static", weights="s7"))))
    hunt.study = replace(study, must=replace(study.must, sqnr_db=150.0, agreement=None))
    hunt.found = [replace(one, measured=replace(one.measured, sqnr_db=200.0)) for one in hunt.found]
    hunt._settle()
    assert hunt.chosen is None
    assert sorted(bool(one.measured.excluded) for one in hunt.found) == [False, True]
    assert any("The budget ended" in note for note in hunt.notes)


@pytest.mark.parametrize(("done", "left_s"), [(0, 30.0), (1, 60.0)])
def test_targets_that_can_be_measured_have_their_shares_of_the_time(
    done: int, left_s: float, tmp_path: Path
) -> None:
    study = replace(studied(tmp_path), budget_s=100.0, deadline=1060.0)
    mine = share(study, 1000.0, 2, done)
    assert (mine.budget_s, mine.deadline) == (50.0, 1000.0 + left_s)
    assert share(study, 1090.0, 2, done).deadline == 1090.0


def test_the_second_target_has_time_to_search_too(tmp_path: Path) -> None:
    said: list[str] = []
    study = replace(studied(tmp_path), progress=lambda what, *_: said.append(what))
    study = replace(study, deadline=time.monotonic() + 30.0, budget_s=6.0)
    ends = []
    for k in range(2):
        mine = share(study, time.monotonic(), 2, k)
        ends.append(_Hunt(mine, HERE).end - time.monotonic())
    assert ends[1] > ends[0] > 0
    first, second = search_targets(study, [TARGETS["cuda"], HERE])
    assert (first.target, first.here, second.target, second.here) == ("cuda", False, HERE.name, True)


# --- what is not finite


def rows_with(home: Path, mark: Callable[[np.ndarray], None]) -> Path:
    """Pictures as rows; `mark` changes those that test (the odd ones)."""
    rows = np.random.default_rng(0).random((12, 3, 32, 32)).astype(np.float32)
    mark(rows[1::2])
    np.savez(home / "rows.npz", image=rows)
    return home / "rows.npz"


def spoil(rows: np.ndarray) -> None:
    rows[2] = 3e38  # finite, and not after the first convolution


def test_what_float_cannot_do_on_a_test_sample_is_refused_before_the_search(tmp_path: Path) -> None:
    search_models.heavy(tmp_path / "net.onnx")
    builders.labels_file(tmp_path / "labels.txt")
    builders.sidecar_file(tmp_path / "net.toml")
    study = studied(tmp_path, samples=rows_with(tmp_path, spoil))
    with pytest.raises(Rejected, match=r"net\.onnx is not finite on test sample \d, in float"):
        check_tests(study)
    with pytest.raises(Rejected, match=r"not finite on test sample \d, in float"):
        held_out(study, study.whole, study.float_plan, 6)
    with pytest.raises(Rejected, match=r"not finite on test sample \d, in float"):
        search_targets(study, [HERE])


def test_what_a_candidate_did_on_a_test_sample_is_its_reason(tmp_path: Path) -> None:
    study = studied(tmp_path)
    hunt = tried(study)
    # As if it had been so the last time: what was tested is found again.
    assert hunt.found[0].file is not None
    held_out(study, hunt.found[0].file, hunt.plan, study.effort.test)
    (kept,) = (path for path in study.work.directory.glob("tested-*.json"))
    key = kept.with_name(kept.name + ".sha256")
    Workspace(tmp_path / "other").json("x", {}, Judged("Output logits is not finite on sample 7.").plain)
    made = next((tmp_path / "other").glob("x-*.json"))
    kept.write_bytes(made.read_bytes())
    key.write_bytes(made.with_name(made.name + ".sha256").read_bytes())
    hunt._settle()
    assert hunt.chosen is None
    assert hunt.found[0].measured.excluded == (
        "It passed while searching, but not on the test samples: Output logits is not finite on sample 7."
    )
