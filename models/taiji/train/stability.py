"""What a run does about bad steps: spikes of the loss are told, non-finite steps are skipped."""

import math

from pydantic import BaseModel


class SpikeDetector(BaseModel):
    """Tells a loss that stands more than `sigma` deviations above its running mean.

    Mean and variance are exponential averages over about 100 steps; a spike does not enter them,
    and nothing is told before 100 steps. Part of a checkpoint, so that a resumed run tells the
    same.
    """

    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0

    def is_spike(self, loss: float, sigma: float) -> bool:
        deviation = math.sqrt(self.variance)
        if self.seen >= 100 and loss > self.mean + sigma * deviation:
            return True
        rate = max(0.01, 1 / (self.seen + 1))
        change = loss - self.mean
        self.mean += rate * change
        self.variance = (1 - rate) * (self.variance + rate * change * change)
        self.seen += 1
        return False
