"""What an exporter's error message means: one sentence with the operator's name, and the next step.

Pure: text in, `NotExported` out, whatever the text is. The messages are those of PyTorch 2.6 to 2.13 and
skl2onnx 1.18 to 1.20; one that nobody knows is passed on as its first telling line.
"""

from __future__ import annotations

import re
from pathlib import PurePath

from edgeward_models.export.report import NotExported

MAX_REASON = 240
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_DISPATCH = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']*)'\)>")
_UNSUPPORTED = re.compile(r"Exporting the operator '([^']+)' to ONNX opset version (\d+) is not supported")
_SINCE = re.compile(r"Support for this operator was added in version (\d+)")
_TRANSLATING = re.compile(r"Error when translating node %?(\w+) .*?target=torch\.ops\.([\w.]+)", re.DOTALL)
_SUMMARY = re.compile(r"<class '([\w.]+)'>: (.+)")
_CALL = re.compile(r'File "([^"\n]+)", line (\d+), in (\w+)\n\s+(.+)')
_BATCH_FIXED = re.compile(
    r"ConstraintViolation|Constraints violated|specialized (?:it )?to be a constant|inferred to be a constant"
    r"|not all values of .* satisfy|marked .* as dynamic but"
)
_DATA = re.compile(r"GuardOnDataDependentSymNode|data-dependent|Could not guard|DynamicOutputShape")
_ADDRESS = re.compile(r"\s*(?:at )?0x[0-9a-fA-F]{6,}")
_NODE = re.compile(r"Unable to create node '(\w+)'")
_NO_CONVERTER = re.compile(r"(?:shape calculator|converter) for type '<class '([\w.<>]+)'>'")
_NO_CONVERTER_FOR = re.compile(
    r"(?:Unable|unable) to find (?:a )?(?:shape calculator|converter)[^']*'([^']+)'"
)


def torch_fault(error: BaseException, exporter: str) -> NotExported:
    """What made one of PyTorch's exporters fail."""
    text = _ANSI.sub("", _chain(error))
    operator = _operator(text)
    if operator:
        since = _SINCE.search(text)
        step = (
            f"Export with --opset {since[1]}."
            if since
            else "Write it with other operators, or take it out of the module and compute it elsewhere."
            if exporter == "dynamo"
            else "Use --exporter dynamo, or write it with other operators."
        )
        return NotExported(f"The operator {operator} has no counterpart in ONNX{_where(text)}.", step)
    if _BATCH_FIXED.search(text):
        return NotExported(
            f"The module fixes the length of a dimension that was to stay open{_where(text)}.",
            "Export without --dynamic-batch, or take sizes from x.shape where the module uses a number.",
        )
    if _DATA.search(text):
        return NotExported(
            f"The way through the module depends on the data{_where(text)}.",
            "Write it with torch.where or torch.cond, or make it scriptable (torch.jit.script)"
            " and use --exporter torchscript.",
        )
    if isinstance(error, ImportError) or "No module named 'onnxscript'" in text:
        missing = getattr(error, "name", None) or "onnxscript"
        return NotExported(
            f"The {exporter} exporter needs {missing}, which is not installed.",
            "pip install 'edgeward[ctl,models,torch]'",
        )
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return NotExported("There is not enough memory.", "Export on a larger machine.")
    return NotExported(
        f"{_telling(text, error)}{_where(text)}.",
        "Try the other exporter (--exporter), or simplify that part of the module.",
    )


def sklearn_fault(error: BaseException) -> NotExported:
    """What made skl2onnx refuse an estimator."""
    text = _ANSI.sub("", str(error))
    found = _NO_CONVERTER.search(text) or _NO_CONVERTER_FOR.search(text)
    if found:
        name = re.sub(r"^<class '|'>$", "", found[1]).replace("__main__.", "")
        return NotExported(
            f"{name} has no counterpart in ONNX: skl2onnx has no converter for it.",
            "Use an estimator of scikit-learn itself, or register a converter"
            " (skl2onnx.update_registered_converter) and call export_sklearn from Python.",
        )
    node = _NODE.search(text)
    if node:
        return NotExported(
            f"skl2onnx writes the operator {node[1]} in a way that the installed onnx refuses"
            f"{_because(error)}.",
            "Use another estimator (GradientBoosting instead of HistGradientBoosting, say).",
        )
    if "FunctionTransformer" in text:
        return NotExported(
            "A FunctionTransformer runs Python code, which ONNX cannot hold.",
            "Do that step before the model, or use a transformer of scikit-learn (e.g. PowerTransformer).",
        )
    if "string" in text.lower() or "StringTensorType" in text:
        return NotExported(
            f"The estimator takes text, and a device feeds numbers: {_first(text)}.",
            "Encode text columns before the model, and fit it on numbers.",
        )
    return NotExported(
        f"skl2onnx cannot convert it: {_first(text) or type(error).__name__}.",
        "Leave out the step that it names, or use another estimator.",
    )


def code_fault(what: str, error: BaseException) -> str:
    """An error of somebody else's code on one line, with the place where it happened."""
    place, trace = "", error.__traceback__
    while trace is not None:
        place = f" ({PurePath(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{what}: {type(error).__name__}: {_first(str(error)) or 'no message'}{place}."


def _because(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__
    return f" ({_first(str(cause))})" if cause is not None else ""


def _chain(error: BaseException) -> str:
    """The messages of an error and of what caused it; exporters wrap what they catch."""
    texts: list[str] = []
    one: BaseException | None = error
    while one is not None and len(texts) < 8:
        texts.append(f"<class '{type(one).__name__}'>: {one}" if texts else str(one))
        one = one.__cause__
    return "\n".join(texts)


def _operator(text: str) -> str:
    dispatch = _DISPATCH.search(text)
    if dispatch:
        name, overload = dispatch.groups()
        return name if overload in ("", "default") else f"{name}.{overload}"
    unsupported = _UNSUPPORTED.search(text)
    if unsupported:
        return unsupported[1].replace("::", ".")
    translating = _TRANSLATING.search(text)
    return translating[2].removesuffix(".default") if translating else ""


def _where(text: str) -> str:
    """The last place in somebody's own code that a message names."""
    places = [
        m
        for m in _CALL.finditer(text)
        if not re.search(r"(?:site|dist)-packages|/lib/python3|<frozen|<eval_with_key", m[1])
    ]
    if not places:
        return ""
    file, line, function, code = places[-1].groups()
    return f" ({PurePath(file).name}:{line} in {function}: {_cut(code, 80)})"


def _telling(text: str, error: BaseException) -> str:
    """The line of a long message that says something."""
    summaries = _SUMMARY.findall(text.partition("## Exception summary")[2] or text)
    if summaries:
        kind, line = summaries[0]
        return f"{kind.rpartition('.')[2]}: {_first(line)}"
    return f"{type(error).__name__}: {_first(text) or 'no message'}"


def _first(text: str) -> str:
    lines = (line.strip() for line in _ADDRESS.sub("", text).splitlines())
    return _cut(next((line for line in lines if line), ""), MAX_REASON).rstrip(".:")


def _cut(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
