"""The scales that kernels take: float32, and times log2(e), where both are neither 0 nor infinite."""

import math

SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = (2 - 2.0**-23) * 2.0**127 * math.log(2)
