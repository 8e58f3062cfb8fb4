"""The daemon on the device, and the children that do what may crash.

The daemon imports no numpy, cv2 or onnxruntime: `runner` and `qualify` do, in processes of their own.
"""
