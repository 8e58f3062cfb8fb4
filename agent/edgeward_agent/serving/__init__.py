"""Local serving: HTTP in a process of its own, tensors to the runners through shared memory.

    client → HTTP (server, app) → link ⇢ shared memory ⇢ runner (in_runner) → between two live frames

`python -m edgeward_agent.serving --fd N`, a child of the daemon (`supervising`). Bodies are parsed here, so
that no request holds the interpreter lock of the runner. The HTTP server is the standard library's: uvicorn
and starlette would bring five packages to every device for six routes, an event loop gains nothing where a
model takes one request at a time, and threads let a JSON body be parsed while another request runs.
"""
