# SPDX-License-Identifier: Apache-2.0
"""`python -m discquant.integrations.lm_eval ...`: lm-eval's own command line, quantized folders on packed layers."""

from __future__ import annotations

from discquant.errors import ConfigError


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


if __name__ == "__main__":
    main()
