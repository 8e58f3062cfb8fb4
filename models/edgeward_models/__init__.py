"""From an ONNX file to a bundle: what can be read of it, and what a device needs beside it."""
