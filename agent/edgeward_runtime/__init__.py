"""Where inputs come from, how they are prepared, and how a model runs on them.

Invariant: nobody's device calls home. ONNX Runtime 1.29 and newer send telemetry about models and machines
from Linux by default; its switch is read once, before the library is first loaded, so it is set here,
where every way into the runtime passes (docs/adr/0001).
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
