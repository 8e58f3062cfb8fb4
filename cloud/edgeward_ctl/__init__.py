"""`agent-ctl`, the operator's command line: bundle, sign here, publish, and watch it arrive."""
