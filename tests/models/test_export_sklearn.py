"""Real estimators through skl2onnx: each file gives what the estimator gives, or there is no file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed here")
pytest.importorskip("skl2onnx", reason="skl2onnx is not installed here")

from sklearn import (
    base,
    calibration,
    cluster,
    compose,
    decomposition,
    ensemble,
    linear_model,
    multioutput,
    svm,
)
from sklearn.datasets import load_diabetes, load_iris
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MinMaxScaler,
    OneHotEncoder,
    PolynomialFeatures,
    StandardScaler,
)

from edgeward_models.bundle import BundleRequest, make_bundle
from edgeward_models.export.features import range_of
from edgeward_models.export.inputs import parse_input
from edgeward_models.export.report import ExportOptions, ExportReport
from edgeward_models.export.sklearn_models import export_sklearn, load_pickle
from edgeward_models.export.verify import Tolerance
from edgeward_runtime.sessions import open_exact
from edgeward_wire.errors import Rejected

IRIS, KINDS = load_iris(return_X_y=True)
NAMES = load_iris().target_names[KINDS]
BODIES, PROGRESS = load_diabetes(return_X_y=True)


def logistic() -> Any:
    return linear_model.LogisticRegression(max_iter=1000)


class Doubling(base.TransformerMixin, base.BaseEstimator):
    """A step of somebody's own."""

    def fit(self, rows: Any, _: Any = None) -> Doubling:
        self.n_features_in_ = rows.shape[1]
        return self

    def transform(self, rows: Any) -> Any:
        return rows * 2


def vectors(**how: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 1.9 renames probability
        return make_pipeline(StandardScaler(), svm.SVC(random_state=0, **how)).fit(IRIS, KINDS)


def columns() -> Any:
    parts = [("a", StandardScaler(), [0, 1]), ("b", MinMaxScaler(), slice(2, 4))]
    return make_pipeline(compose.ColumnTransformer(parts), logistic()).fit(IRIS, KINDS)


def forest() -> Any:
    return ensemble.RandomForestClassifier(8, random_state=0)


def run(path: Path, rows: Any) -> list[Any]:
    session = open_exact(path)
    try:
        return session.run({"features": np.asarray(rows, np.float32)})
    finally:
        session.close()


def exported(estimator: Any, tmp_path: Path, **how: Any) -> ExportReport:
    report = export_sklearn(estimator, tmp_path / "model.onnx", ExportOptions(**how))
    assert report.passed, report.verification.failure
    return report


CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "logistic, classes with names": lambda: logistic().fit(IRIS, NAMES),
    "logistic of two": lambda: logistic().fit(IRIS[:100], NAMES[:100]),
    "forest": lambda: forest().fit(IRIS, KINDS),
    "scaled forest": lambda: make_pipeline(StandardScaler(), forest()).fit(IRIS, NAMES),
    "boosted trees": lambda: ensemble.GradientBoostingClassifier(n_estimators=5).fit(IRIS, KINDS),
    "scaled support vectors": lambda: vectors(probability=True),
    "columns": columns,
}


@pytest.mark.parametrize("make", CLASSIFIERS.values(), ids=CLASSIFIERS.keys())
def test_a_classifier_gives_its_probabilities_and_its_labels(make: Callable[[], Any], tmp_path: Path) -> None:
    estimator = make()
    report = exported(estimator, tmp_path)
    assert [(p.name, p.dtype, p.shape) for p in report.facts.inputs] == [
        ("features", "float32", ("batch", 4))
    ]
    assert [(p.name, p.shape) for p in report.facts.outputs] == [
        ("probabilities", ("batch", len(estimator.classes_)))
    ]
    assert report.verification.batches == (1, 256)
    assert report.labels is not None
    assert report.labels.read_text().splitlines() == [str(one) for one in estimator.classes_]
    declared = json.loads(report.facts.metadata["edgeward"])
    assert (declared["task"], declared["labels"]) == ("classification", "model-labels.txt")
    # Off the measured grid: behind a scaler a value on a tree's threshold falls as it is rounded.
    rows = (IRIS[::17] + 0.03).astype(np.float32)
    np.testing.assert_allclose(
        run(tmp_path / "model.onnx", rows)[0], estimator.predict_proba(rows), rtol=1e-3, atol=1e-4
    )
    assert report.facts.operators.keys().isdisjoint({"ZipMap"})


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "make",
    [
        svm.SVC,
        svm.LinearSVC,
        linear_model.RidgeClassifier,
        linear_model.Perceptron,
        linear_model.SGDClassifier,
    ],
)
def test_a_classifier_without_probabilities_gives_one_score_a_class(
    make: Callable[[], Any], classes: int, tmp_path: Path
) -> None:
    """skl2onnx writes one column, two, or two in the wrong order, as the estimator is."""
    kept = classes + 1 > KINDS + 1
    estimator = make().fit(IRIS[kept], KINDS[kept])
    report = exported(estimator, tmp_path)
    assert [(p.name, p.shape) for p in report.facts.outputs] == [("scores", ("batch", classes))]
    best = run(tmp_path / "model.onnx", IRIS[kept])[0].argmax(axis=1)
    assert (best == estimator.predict(IRIS[kept].astype(np.float32))).mean() > 0.98
    assert any("no probabilities" in note for note in report.notes)


def test_columns_that_are_known_by_name_are_joined(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed here")
    table = pandas.DataFrame(IRIS, columns=["sepal length", "b", "c", "d"])
    parts = [("a", StandardScaler(), ["sepal length", "b"]), ("b", MinMaxScaler(), ["d"])]
    estimator = make_pipeline(compose.ColumnTransformer(parts), logistic()).fit(table, KINDS)
    report = exported(estimator, tmp_path)
    assert [(p.name, p.shape) for p in report.facts.inputs] == [("features", ("batch", 4))]
    assert report.facts.operators["Split"] == 1


OTHERS: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "boosted regressor": (
        lambda: ensemble.GradientBoostingRegressor(n_estimators=10).fit(BODIES, PROGRESS),
        {"variable": "predict"},
    ),
    "forest regressor": (
        lambda: ensemble.RandomForestRegressor(8).fit(BODIES, PROGRESS),
        {"variable": "predict"},
    ),
    "two targets": (
        lambda: linear_model.LinearRegression().fit(BODIES, np.c_[PROGRESS, -PROGRESS]),
        {"variable": "predict"},
    ),
    "transformer": (
        lambda: make_pipeline(StandardScaler(), decomposition.PCA(3)).fit(BODIES),
        {"variable": "transform"},
    ),
    "outliers": (
        lambda: ensemble.IsolationForest(n_estimators=8, random_state=0).fit(BODIES),
        {"scores": "decision_function", "label": "predict"},
    ),
    "clusters": (
        lambda: cluster.KMeans(3, n_init=1, random_state=0).fit(BODIES),
        {"scores": "transform", "label": "predict"},
    ),
}


@pytest.mark.parametrize(("make", "outputs"), OTHERS.values(), ids=OTHERS.keys())
def test_what_is_no_classifier_gives_what_it_gives(
    make: Callable[[], Any], outputs: dict[str, str], tmp_path: Path
) -> None:
    estimator = make()
    report = exported(estimator, tmp_path)
    assert report.labels is None
    assert [port.name for port in report.facts.outputs] == list(outputs)
    rows = BODIES[:9].astype(np.float32)
    for method, written in zip(outputs.values(), run(tmp_path / "model.onnx", rows), strict=True):
        expected = getattr(estimator, method)(rows.astype(np.float64))
        np.testing.assert_allclose(written.reshape(expected.shape), expected, rtol=1e-3, atol=1e-3)


def test_an_exported_classifier_becomes_a_bundle_as_it_is(tmp_path: Path) -> None:
    exported(logistic().fit(IRIS, NAMES), tmp_path)
    bundle = make_bundle(BundleRequest(tmp_path / "model.onnx"), tmp_path / "bundle")
    contract = bundle.manifest.contract
    assert contract.task == "classification"
    assert contract.results[0].activation == "none"
    assert bundle.manifest.labels is not None


# --- what tells a person something


def test_samples_and_where_they_come_from_are_told(tmp_path: Path) -> None:
    rows = tmp_path / "rows.npz"
    np.savez(rows, features=IRIS)
    report = exported(logistic().fit(IRIS, KINDS), tmp_path, samples=rows)
    assert report.verification.evidence == "rows.npz"
    assert report.verification.batches == (1, 150)
    assert report.verification.labels == (154, 154)
    assert report.notes == ()


def test_noise_that_proves_little_is_told(tmp_path: Path) -> None:
    report = exported(logistic().fit(IRIS, KINDS), tmp_path)
    assert any("--samples is better" in note for note in report.notes)
    biased = logistic().fit(IRIS, KINDS)
    biased.intercept_ += [1e6, 0, 0]
    notes = exported(biased, tmp_path).notes
    assert any("the rows reach 1 of 3 classes: give --samples" in note for note in notes)


def test_a_file_that_differs_is_not_left(tmp_path: Path) -> None:
    """skl2onnx casts what a one-hot encoder meets to whole numbers: other categories than scikit-learn's."""
    encoder = OneHotEncoder(handle_unknown="ignore")
    estimator = make_pipeline(encoder, logistic()).fit(IRIS.round(), KINDS)
    report = export_sklearn(estimator, tmp_path / "model.onnx", ExportOptions())
    assert not report.passed
    assert report.verification.worst is not None
    assert report.verification.worst.output == "probabilities"
    assert not list(tmp_path.iterdir())


def test_labels_of_one_s_own_are_written_where_their_number_is_right(tmp_path: Path) -> None:
    report = exported(logistic().fit(IRIS, KINDS), tmp_path, labels=("a", "b", "c"))
    assert report.labels is not None
    assert report.labels.read_text() == "a\nb\nc\n"
    with pytest.raises(Rejected, match="2 labels, but the model has 3 classes"):
        export_sklearn(logistic().fit(IRIS, KINDS), tmp_path / "m.onnx", ExportOptions(labels=("a", "b")))


def test_a_tolerance_that_is_too_tight_says_which_would_do(tmp_path: Path) -> None:
    tight = ExportOptions(tolerance=Tolerance(rtol=0, atol=1e-12))
    report = export_sklearn(logistic().fit(IRIS, KINDS), tmp_path / "m.onnx", tight)
    assert not report.passed
    assert "--atol" in report.advice


# --- refusals


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "not fitted": (linear_model.LogisticRegression, "is not fitted"),
    "not an estimator": (lambda: {"a": 1}, "is a dict, not an estimator"),
    "predicts nothing new": (lambda: cluster.DBSCAN().fit(IRIS), "neither predicts nor transforms"),
    "several questions": (
        lambda: multioutput.MultiOutputClassifier(logistic()).fit(IRIS, np.c_[KINDS, KINDS]),
        "several questions",
    ),
    "pairs of classes": (lambda: vectors(decision_function_shape="ovo"), "scores pairs of classes"),
    "a step of one's own": (
        lambda: make_pipeline(Doubling(), logistic()).fit(IRIS, KINDS),
        "Doubling has no counterpart in ONNX",
    ),
    "a function in columns": (
        lambda: make_pipeline(
            compose.ColumnTransformer([("f", FunctionTransformer(np.abs), [0, 1])]), logistic()
        ).fit(IRIS, KINDS),
        "FunctionTransformer runs Python code",
    ),
    "text": (
        lambda: make_pipeline(OneHotEncoder(), logistic()).fit(NAMES[:, None], KINDS),
        "does not run on rows of 1 numbers",
    ),
    "no converter": (
        lambda: make_pipeline(StandardScaler(), calibration.CalibratedClassifierCV(Guessing(), cv=2)).fit(
            IRIS, KINDS
        ),
        "Guessing",
    ),
}


class Guessing(base.ClassifierMixin, base.BaseEstimator):
    """A classifier of somebody's own."""

    def fit(self, rows: Any, kinds: Any) -> Guessing:
        self.classes_, self.n_features_in_ = np.unique(kinds), rows.shape[1]
        return self

    def predict_proba(self, rows: Any) -> Any:
        return np.full((len(rows), len(self.classes_)), 1 / len(self.classes_))

    def predict(self, rows: Any) -> Any:
        return np.full(len(rows), self.classes_[0])


@pytest.mark.parametrize(("make", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_exported_is_refused_by_name(
    make: Callable[[], Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(Rejected, match=told) as refused:
        export_sklearn(make(), tmp_path / "model.onnx", ExportOptions())
    assert refused.value.next_step or "dict" in told
    assert "\n" not in refused.value.what
    assert not list(tmp_path.iterdir())


def test_a_pickle_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x04(")
    with pytest.raises(Rejected, match=r"model\.pkl cannot be read"):
        load_pickle(path)
    path.write_bytes(b"cnowhere.at_all\nModel\n.")
    with pytest.raises(Rejected, match=r"needs the module nowhere"):
        load_pickle(path)


# --- where features lie


def reach(estimator: Any, rows: Any) -> float:
    """The share of rows that lie within the range that is known of an estimator."""
    found = range_of(estimator, rows.shape[1])
    assert found.known
    return float(((rows >= found.low) & (rows <= found.high)).all(axis=1).mean())


def test_fitting_leaves_the_range_of_the_features_behind() -> None:
    assert reach(StandardScaler().fit(IRIS), IRIS) > 0.6
    assert reach(MinMaxScaler().fit(IRIS), IRIS) == 1.0
    assert reach(make_pipeline("passthrough", StandardScaler(), logistic()).fit(IRIS, KINDS), IRIS) > 0.6
    assert reach(columns(), IRIS) > 0.6
    assert reach(forest().fit(IRIS, KINDS), IRIS) > 0.4
    assert range_of(ensemble.GradientBoostingRegressor(n_estimators=5).fit(IRIS, KINDS), 4).known
    assert reach(svm.SVC().fit(IRIS, KINDS), IRIS) > 0.4
    assert not range_of(logistic().fit(IRIS, KINDS), 4).known
    assert not range_of(make_pipeline(PolynomialFeatures(), logistic()).fit(IRIS, KINDS), 4).known


def test_noise_of_a_known_range_is_seeded_and_within_its_margin() -> None:
    found = range_of(MinMaxScaler().fit(IRIS), 4)
    first, again = (found.draw(200, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.dtype == np.float32
    margin = 0.11 * (IRIS.max(axis=0) - IRIS.min(axis=0))
    assert (first >= IRIS.min(axis=0) - margin).all()
    assert (first <= IRIS.max(axis=0) + margin).all()


@pytest.mark.parametrize(
    ("option", "how"),
    [
        ("--input", {"inputs": (parse_input("features=1x5"),)}),
        ("--output", {"output_names": ("scores",)}),
        ("--state", {"states": {"features": "probabilities"}}),
        ("--exporter", {"exporter": "dynamo"}),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    tmp_path: Path, option: str, how: dict[str, Any]
) -> None:
    with pytest.raises(Rejected, match=f"{option} says nothing about this estimator") as caught:
        export_sklearn(logistic().fit(IRIS, KINDS), tmp_path / "m.onnx", ExportOptions(**how))
    assert "features, N × 4" in caught.value.what
    assert not (tmp_path / "m.onnx").exists()


def test_labels_are_for_classifiers(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="--labels says nothing"):
        export_sklearn(StandardScaler().fit(IRIS), tmp_path / "m.onnx", ExportOptions(labels=("a", "b")))
