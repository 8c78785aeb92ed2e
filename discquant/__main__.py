# SPDX-License-Identifier: Apache-2.0
"""`python -m discquant`."""

from discquant.cli import main

main()
