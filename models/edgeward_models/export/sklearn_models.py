"""Fitted scikit-learn estimators become ONNX files. The only importer of scikit-learn and skl2onnx.

Invariants: one float32 input `features` of shape (batch, features), whatever it was fitted on; a classifier's
only output is `probabilities` (or `scores` where it has none), one column a class, and its class names
are written beside the file; no ZipMap, no strings in the graph. Others keep what they give: `variable`
of a regressor or a transformer, `label` and `scores` of an outlier detector or a clustering.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import skl2onnx
import sklearn
from skl2onnx.common.data_types import FloatTensorType
from sklearn import base
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from edgeward_models.export import document, inputs
from edgeward_models.export.faults import code_fault, sklearn_fault
from edgeward_models.export.features import range_of
from edgeward_models.export.inputs import Array, InputSpec
from edgeward_models.export.publish import Candidate, Subject, check_labels, publish, read_labels
from edgeward_models.export.report import ExportOptions, ExportReport
from edgeward_models.export.verify import Step, Trial
from edgeward_models.progress import Progress, silent
from edgeward_runtime.sessions import NotLoaded, RunFailed, open_exact
from edgeward_wire.errors import Rejected

INPUT = "features"
MAX_FEATURES = 1 << 20
ROWS = 256
"""Rows to verify with; a tree that is wrong at one threshold shows only on some."""
SINGLE_ROWS = 4
_ML_OPSET = 3
_PROBABILITIES = "probabilities"
_SCORES = "scores"


def is_estimator(value: Any) -> bool:
    """Whether it is one of scikit-learn's."""
    return isinstance(value, base.BaseEstimator)


def export_sklearn(
    estimator: Any,
    out: Path,
    options: ExportOptions | None = None,
    *,
    source: str = "",
    progress: Progress = silent,
) -> ExportReport:
    """Export a fitted classifier, regressor, transformer, outlier detector, clustering or pipeline, verified.

    The report's `out` is None when the file's outputs differ from the estimator's; then nothing is written.

    Raises:
        Rejected: it is not fitted, or skl2onnx has no converter for a part of it.
        Unavailable: a file cannot be read or written.
    """
    options = options or ExportOptions()
    spec, kind = _spec(estimator), _kind(estimator)
    _check_options(options, spec, kind)
    progress("running the model", 0, 1)
    rows, evidence, known = _rows(estimator, spec, options)
    step = _reference(estimator, kind, rows)
    labels = (read_labels(options.labels) or kind.labels) if kind.classifier else None
    if kind.classifier:
        check_labels(labels, next(iter(step.expected.values())).shape)
    task = options.task or ("classification" if kind.classifier else "tensor")
    return publish(
        Subject(
            source=source or type(estimator).__name__,
            candidates=[Candidate("skl2onnx", _Job(estimator, spec, kind, step, options).convert)],
            trials=[
                *(Trial(f"row {k}", 1, (_part(step, k),)) for k in range(min(SINGLE_ROWS, len(rows)))),
                Trial(f"a batch of {len(rows)}", len(rows), (step,)),
            ],
            evidence=evidence,
            classifier=kind.classifier,
            labels=labels,
            declared={"task": task, **kind.declared, **options.declared},
            versions={"scikit-learn": sklearn.__version__, "skl2onnx": skl2onnx.__version__},
            notes=tuple(_remarks(step, kind, options, known)),
        ),
        out,
        options,
        progress,
    )


def _check_options(options: ExportOptions, spec: InputSpec, kind: _Kind) -> None:
    """Raises Rejected for what only other models have a use for: it would change nothing."""
    said = {
        "--exporter": options.exporter != "auto",
        "--input": options.inputs,
        "--output": options.output_names,
        "--state": options.states,
        "--labels": options.labels and not kind.classifier,
    }
    given = [option for option, value in said.items() if value]
    if given:
        raise Rejected(
            f"{given[0]} says nothing about this estimator: it takes {INPUT}, N × {spec.sized(1)[1]}, and"
            f" gives {', '.join(kind.outputs)}.",
            f"Leave out {', '.join(given)}.",
        )


# --- what an estimator is


@dataclass(frozen=True)
class _Kind:
    """What an estimator gives: the graph's outputs, and the method that each stands for."""

    outputs: dict[str, str]
    classes: tuple[Any, ...] = ()

    @property
    def classifier(self) -> bool:
        return bool(self.classes)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(str(one) for one in self.classes)

    @property
    def declared(self) -> dict[str, Any]:
        """That probabilities are not to be squeezed again, and scores are."""
        if not self.classifier:
            return {}
        return {
            "outputs": {
                name: {"activation": "none" if name == _PROBABILITIES else "softmax"} for name in self.outputs
            }
        }


def _spec(estimator: Any) -> InputSpec:
    if not is_estimator(estimator):
        raise Rejected(f"This is a {type(estimator).__name__}, not an estimator of scikit-learn.")
    try:
        check_is_fitted(estimator)
        count = int(estimator.n_features_in_)
    except (NotFittedError, AttributeError, TypeError) as error:
        raise Rejected(
            f"The {type(estimator).__name__} is not fitted, or does not say how many features it takes.",
            "Call its fit() first, with rows of numbers.",
        ) from error
    if not 1 <= count <= MAX_FEATURES:
        raise Rejected(f"The estimator takes {count} features; 1 to {MAX_FEATURES} are possible.")
    return InputSpec(INPUT, (None, count))


def _kind(estimator: Any) -> _Kind:
    if base.is_classifier(estimator):
        classes = getattr(estimator, "classes_", None)
        if not isinstance(classes, np.ndarray) or classes.ndim != 1 or len(classes) < 2:
            raise Rejected(
                "The classifier answers several questions at once, or knows one class only.",
                "Export one estimator for each question.",
            )
        if hasattr(estimator, "predict_proba"):
            return _Kind({_PROBABILITIES: "predict_proba"}, tuple(classes.tolist()))
        if getattr(_last(estimator), "decision_function_shape", "ovr") == "ovo" and len(classes) > 2:
            raise Rejected(
                "The classifier scores pairs of classes, not classes.",
                "Set decision_function_shape='ovr' on it; it need not be fitted again.",
            )
        return _Kind({_SCORES: "decision_function"}, tuple(classes.tolist()))
    if base.is_regressor(estimator):
        return _Kind({"variable": "predict"})
    if base.is_outlier_detector(estimator):
        return _Kind({_SCORES: "decision_function", "label": "predict"})
    if hasattr(estimator, "predict") and hasattr(estimator, "transform"):
        return _Kind({_SCORES: "transform", "label": "predict"})
    if hasattr(estimator, "transform"):
        return _Kind({"variable": "transform"})
    raise Rejected(
        f"A {type(estimator).__name__} neither predicts nor transforms new rows.",
        "Export an estimator that does (KMeans instead of DBSCAN, say).",
    )


def _last(estimator: Any) -> Any:
    return estimator.steps[-1][1] if hasattr(estimator, "steps") else estimator


# --- the estimator's own answers


def _rows(estimator: Any, spec: InputSpec, options: ExportOptions) -> tuple[Array, str, bool]:
    """(rows of float32, where they come from, whether they lie where the estimator was fitted)."""
    if options.samples is not None:
        read = inputs.read_samples(options.samples, [spec], ROWS)
        return np.concatenate([feeds[INPUT] for feeds in read]), options.samples.name, True
    reach = range_of(estimator, int(spec.sized(1)[1]))
    return reach.draw(ROWS, np.random.default_rng(options.seed)), "noise", reach.known


def _reference(estimator: Any, kind: _Kind, rows: Array) -> Step:
    """What the estimator gives for these rows, shaped as the graph's outputs are. Raises Rejected."""
    expected: dict[str, Array] = {}
    table = _table(estimator, rows)
    try:
        with _hushed():
            for name, method in kind.outputs.items():
                answer = getattr(estimator, method)(table)
                dense = answer.toarray() if hasattr(answer, "toarray") else answer
                expected[name] = _shaped(estimator, kind, name, np.asarray(dense))
            predicted = np.asarray(estimator.predict(table)) if kind.classifier else None
    except Exception as error:  # a step of somebody else's pipeline raises what it likes
        raise Rejected(
            code_fault(f"The estimator does not run on rows of {rows.shape[1]} numbers", error),
            "Encode text before the model, and fit it on numbers; or give rows that suit it with --samples.",
        ) from error
    classes = None
    if predicted is not None:
        index = {one: k for k, one in enumerate(kind.classes)}
        classes = np.array([index.get(one, -1) for one in predicted.tolist()])
    return Step({INPUT: rows}, expected, classes)


def _table(estimator: Any, rows: Array) -> Any:
    """In double precision, as people run it; as a data frame where it was fitted on one."""
    names = getattr(estimator, "feature_names_in_", None)
    if names is not None:
        with contextlib.suppress(ImportError):
            import pandas  # type: ignore[import-untyped, unused-ignore]  # whoever fitted on a frame has it

            return pandas.DataFrame(rows.astype(np.float64), columns=list(names))
    return rows.astype(np.float64)


def _shaped(estimator: Any, kind: _Kind, name: str, answer: Array) -> Array:
    if kind.classifier and answer.ndim == 1:  # of two classes only the second one's score
        return np.stack([-answer, answer], axis=1)
    if answer.ndim == 1 and not (name == "label" and not base.is_outlier_detector(estimator)):
        return answer[:, None]
    return answer


def _part(step: Step, k: int) -> Step:
    """One row of a step."""
    return Step(
        {name: array[k : k + 1] for name, array in step.feeds.items()},
        {name: array[k : k + 1] for name, array in step.expected.items()},
        None if step.classes is None else step.classes[k : k + 1],
    )


def _remarks(step: Step, kind: _Kind, options: ExportOptions, known: bool) -> Iterator[str]:
    if options.samples is None and not known:
        yield "nothing tells where the features lie: verified with values up to 100; --samples is better."
    if not kind.classifier or step.classes is None:
        return
    seen = len(set(step.classes.tolist()))
    if seen < len(kind.classes):
        yield f"the rows reach {seen} of {len(kind.classes)} classes: give --samples that reach them all."
    best = next(iter(step.expected.values())).argmax(axis=1)
    other = int((best != step.classes).sum())
    if other:
        yield (
            f"predict() differs from the estimator's own best score on {other} of {len(best)} rows;"
            " a device takes the best score."
        )
    if _PROBABILITIES not in kind.outputs:
        yield "the classifier has no probabilities: a device shows its scores after a softmax."


# --- conversion


@dataclass(frozen=True)
class _Job:
    """One estimator for skl2onnx."""

    estimator: Any
    spec: InputSpec
    kind: _Kind
    step: Step
    options: ExportOptions

    def convert(self, raw: Path) -> Sequence[str]:
        """Write the estimator to `raw`. Raises NotExported."""
        kind = self.kind
        model = self._model()
        document.keep_outputs(model, [_PROBABILITIES] if kind.classifier else list(kind.outputs))
        document.name_batch(model)
        onnx.save(model, str(raw))
        if kind.classifier and _PROBABILITIES not in kind.outputs:
            document.rename_output(model, _PROBABILITIES, _SCORES)
            if len(kind.classes) == 2:
                document.two_columns(model, _SCORES, _score_column(raw, self.step))
            onnx.save(model, str(raw))
        return []

    def _model(self) -> Any:
        """With one input, or joined from one for each column where the estimator insists on their names."""
        count = int(self.spec.sized(1)[1])
        names = [str(name) for name in getattr(self.estimator, "feature_names_in_", ())]
        try:
            return self._converted([(INPUT, FloatTensorType([None, count]))])
        except Exception as error:  # converters share no base: RuntimeError, NameError, AttributeError...
            if not names or len(set(names)) != count:
                raise sklearn_fault(error) from error
        try:
            model = self._converted([(name, FloatTensorType([None, 1])) for name in names])
        except Exception as error:  # as above
            raise sklearn_fault(error) from error
        document.join_columns(model, INPUT, names)
        return model

    def _converted(self, columns: list[Any]) -> Any:
        opset = min(self.options.target_opset, skl2onnx.__max_supported_opset__)
        one = self.estimator
        how: dict[str, Any] = {"initial_types": columns, "target_opset": {"": opset, "ai.onnx.ml": _ML_OPSET}}
        with _hushed():
            if self.kind.classifier:
                with contextlib.suppress(NameError):  # said of those that have no ZipMap to switch off
                    return skl2onnx.convert_sklearn(one, options={id(one): {"zipmap": False}}, **how)
            return skl2onnx.convert_sklearn(one, **how)


def _score_column(raw: Path, step: Step) -> int | None:
    """Which column of the file is the second class's score; None when both are there in their order.

    skl2onnx writes one column for some estimators, and two in the other order for others.
    """
    try:
        session = open_exact(raw)
        try:
            written = session.run({INPUT: step.feeds[INPUT]})[0]
        finally:
            session.close()
    except (NotLoaded, RunFailed):
        return None  # verification says so
    expected = next(iter(step.expected.values()))
    if written.ndim == 2 and written.shape[1] == 1:
        return 0
    swapped = written.shape == expected.shape and np.allclose(
        written[:, ::-1], expected, rtol=1e-3, atol=1e-3
    )
    return 0 if swapped else None


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Both libraries warn about attributes that they rename, and about arrays in place of data frames."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning, RuntimeWarning):
            warnings.simplefilter("ignore", category)
        yield


def load_pickle(path: Path) -> Any:
    """What joblib or pickle wrote. It runs code that is in the file: call it on trusted files only.

    Raises Rejected.
    """
    import joblib  # type: ignore[import-untyped, unused-ignore]  # comes with scikit-learn

    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")  # of a scikit-learn of another version: verification decides
            return joblib.load(path)
    except ModuleNotFoundError as error:
        raise Rejected(
            f"{path.name} needs the module {error.name}, in which its classes are defined.",
            "Run it where that module can be imported.",
        ) from error
    except Exception as error:  # unpickling runs somebody else's code
        raise Rejected(
            code_fault(f"{path.name} cannot be read", error),
            "Save it again, with the version of scikit-learn that is installed here.",
        ) from error
