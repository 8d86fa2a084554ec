"""The command line. It knows the runtime and the values, and no engine."""

from __future__ import annotations

from collections.abc import Sequence

INTERRUPTED = 130
"""What shells give for a program that SIGINT ended: 128 + 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (None: this process's) and give the exit status. Never raises for what a user did."""
    try:
        from cloche.cli.descriptors import fill_closed, flush

        fill_closed()
        # On first use, so that an interrupt while modules load ends quietly too.
        import click

        from cloche.cli.commands import cloche

        try:
            status = cloche.main(None if argv is None else list(argv), prog_name="cloche", standalone_mode=False)
        except click.ClickException as exc:
            exc.show()
            return exc.exit_code
        except click.Abort:
            return INTERRUPTED
        finally:
            flush()
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
