"""The command line. Nothing here imports torch before a verb needs it."""

__all__ = ["main"]


def main() -> None:
    """Entry point of the command ``tutelage`` and of ``python -m tutelage``."""
    from tutelage.cli.app import app

    app(prog_name="tutelage")
