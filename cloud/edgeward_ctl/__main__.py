"""The entry point of `agent-ctl`: it says which extra is missing, since its own libraries come with one."""

import sys


def main() -> None:
    """Run agent-ctl, or say what to install."""
    try:
        from edgeward_ctl.cli import main as run
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library.startswith("edgeward"):
            raise
        sys.stderr.write(f"error: agent-ctl needs a library that is not installed: {library}.\n")
        sys.stderr.write("next: pip install 'edgeward[ctl]'\n")
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
