# SPDX-License-Identifier: Apache-2.0
"""Rotation of a model ahead of its grid: other weights, the same function, at no cost when it is served.

`rotate` writes the rotated model; what of a checkpoint turns how is in `places`, the arithmetic in `turn`.
"""

from discquant.formats.card import ROTATION as ROTATION
from discquant.rotation.model import rotate as rotate
