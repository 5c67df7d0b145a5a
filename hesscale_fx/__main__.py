"""``python -m hesscale_fx``, also installed as ``hesscale-fx``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from hesscale_fx.cli import cli
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.exit("The command line needs click: pip install 'hesscale_fx[cli]'")
    cli(prog_name="hesscale-fx")


if __name__ == "__main__":
    main()
