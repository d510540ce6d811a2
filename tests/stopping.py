"""A console that stops a training, for tests of runs that go on."""

import os
import signal

from dcgen_convert.core.console import Console


class Stopping(Console):
    """Sends SIGTERM before the last of ``steps`` steps of a training, which that step finishes.

    Args:
        steps: after which the training stops and has written a checkpoint.
        label: how the training's label begins.
    """

    def __init__(self, steps: int, label: str = "adapt") -> None:
        super().__init__("quiet")
        self.steps, self.label = steps, label

    def scalars(self, label, step, values):
        if label.startswith(self.label) and step == self.steps - 2:
            os.kill(os.getpid(), signal.SIGTERM)
