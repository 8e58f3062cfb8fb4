"""The cache of verdicts: a miss costs time, a wrong hit would cost the truth."""

from __future__ import annotations

import os
from pathlib import Path

from agent.models import manifest, row, verdict
from edgeward_agent.trial import MAX_VERDICTS, Verdicts

KEY, OTHER = "1" * 64, "2" * 64
MODEL = row(manifest()).model.sha256


def test_a_verdict_is_found_only_under_its_own_key_and_model(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path / "verdicts")
    assert verdicts.get(KEY, MODEL) is None
    made = verdict(manifest(), KEY)
    verdicts.put(made)
    assert verdicts.get(KEY, MODEL) == made
    assert verdicts.get(KEY, "0" * 64) is None
    os.rename(tmp_path / f"verdicts/{KEY}.json", tmp_path / f"verdicts/{OTHER}.json")
    assert verdicts.get(OTHER, MODEL) is None, "a renamed file is not another verdict"


def test_what_does_not_count_is_made_again(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path)
    verdicts.put(verdict(manifest(), KEY).model_copy(update={"provisional": True}))
    assert verdicts.get(KEY, MODEL) is None
    verdicts.put(verdict(manifest(), KEY).model_copy(update={"chosen": None}))
    assert verdicts.get(KEY, MODEL) is None
    (tmp_path / f"{KEY}.json").write_bytes(b"{")
    assert verdicts.get(KEY, MODEL) is None
    verdicts.put(verdict(manifest(), KEY))
    verdicts.forget(KEY)
    verdicts.forget(KEY)
    assert verdicts.get(KEY, MODEL) is None


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path)
    for n in range(MAX_VERDICTS + 5):
        verdicts.put(verdict(manifest(), f"{n:064x}"))
        os.utime(tmp_path / f"{n:064x}.json", (n, n))
    assert len(list(tmp_path.iterdir())) <= MAX_VERDICTS + 1
    assert verdicts.get(f"{MAX_VERDICTS + 4:064x}", MODEL) is not None
