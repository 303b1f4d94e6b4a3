"""`python -m daemon`, and the `watchkeeper` command.

Light on purpose: what runs before anything else must not wait for imports.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line; exits the process."""
    from daemon.core_dumps import forbid_core_dumps

    # Before a secret is in this process's memory.
    forbid_core_dumps()
    from daemon.cli import app

    app()


if __name__ == "__main__":
    main()
