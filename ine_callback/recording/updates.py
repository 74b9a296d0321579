"""When directions are refreshed and the curvature is updated: steps, nothing else."""

from __future__ import annotations

from ine_callback.curvature.intervals import curvature_interval, refresh_interval


class Updates:
    """Counts the steps to the next refresh and the next curvature update.

    Args:
        refresh_every: Steps between refreshes; None: ever more.
        curvature_every: Steps between curvature updates; None: ever more.

    Attributes:
        refreshed_at: Steps taken before the directions were made.
        saved_at: Steps taken before a state was last saved: a resumed run makes its directions anew there, so this one
            does too.
        next_curvature_update: The step of the next curvature update.
    """

    def __init__(self, refresh_every: int | None, curvature_every: int | None) -> None:
        self._refresh_every, self._curvature_every = refresh_every, curvature_every
        self.refreshed_at = self.saved_at = self.next_curvature_update = 0

    def refresh_due(self, step: int) -> bool:
        """Whether the directions are to be made anew before a step."""
        interval = refresh_interval(self.refreshed_at, self._refresh_every)
        return self.saved_at > self.refreshed_at or step - self.refreshed_at >= interval

    def curvature_due(self, step: int) -> bool:
        """Whether a step updates the curvature."""
        return step >= self.next_curvature_update

    def curvature_steps(self, step: int) -> int:
        """How many steps a step's curvature update stands for; 0: it makes none."""
        return curvature_interval(step, self._curvature_every) if self.curvature_due(step) else 0

    def end_step(self, step: int) -> None:
        """Called when a step is taken."""
        if self.curvature_due(step):
            self.next_curvature_update = step + curvature_interval(step, self._curvature_every)
