"""From a framework's model to an ONNX file that is proven to give the same outputs.

    export_torch(module, example_inputs, out, options)      torch_models.py, needs edgeward[torch]
    export_sklearn(estimator, out, options)                 sklearn_models.py, needs edgeward[sklearn]
    export_ultralytics(checkpoint, out, options)            ultralytics_models.py, needs that package
    export_source("package.module:callable", out, options)  dispatch.py, whatever it is

All four end in publish.py: what the framework wrote is cleaned (document.py), run by ONNX Runtime beside
the framework's own outputs (verify.py), and moved to its place only when they agree. Nothing here
imports a framework before it is needed.
"""
