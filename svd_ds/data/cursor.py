"""Position of a run in its data: two plain values, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cursor:
    """Point between two global steps; `Cursor(**asdict(cursor))` restores it from JSON."""

    next_ordinal: int
    """Next sample ordinal: the number of samples that all ranks together have read since the run began."""
    fingerprint: str
    """Fingerprint of the set of samples that the ordinals count; see `Index.fingerprint`."""

    def check(self, fingerprint: str, where: str) -> None:
        """Check that a run resumes on the data that it has read so far.

        Args:
            fingerprint: fingerprint of the data at `where`.
            where: name of the data in the error message.

        Raises:
            ValueError: the fingerprints differ.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the run has read {self.next_ordinal} samples of data with fingerprint {self.fingerprint}, "
                f"but the samples in {where} that are long and large enough have fingerprint {fingerprint}"
            )
