"""The HTTP API, one subject a file. A route parses, asks one service, and answers a wire type."""
