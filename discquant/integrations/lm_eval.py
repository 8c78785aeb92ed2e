# SPDX-License-Identifier: Apache-2.0
"""`python -m discquant.integrations.lm_eval ...`: lm-eval's own command line, quantized folders on packed layers."""

from __future__ import annotations

import sys

from discquant.environment import variable
from discquant.errors import ConfigError, UserError


def main() -> None:
    """Register the packed loader, then hand over to lm-eval with the same arguments.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ConfigError("lm-eval is not installed: pip install lm-eval[hf]") from error
    from discquant.integrations.transformers_quantizer import register

    register()
    cli_evaluate()


def console() -> None:
    """`main`, with a user's error as one line and exit status 2; what lm-eval raises itself is its own."""
    try:
        main()
    except UserError as error:
        if variable("DISCQUANT_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    console()
