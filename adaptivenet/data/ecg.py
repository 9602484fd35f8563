"""`Electrocardiogram`: a long annotated recording."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Electrocardiogram"]


@dataclass(frozen=True, eq=False)
class Electrocardiogram:
    """One long recording with annotated beats; it has no split of its own.

    Attributes:
        name: honest name.
        signal: [samples, leads] int16 raw units.
        rate: samples a second.
        gain: raw units a millivolt.
        baseline: raw value of 0 mV.
        leads: name of each lead.
        annotation_sample: [annotations] int32 sample of each annotation.
        annotation_code: [annotations] uint8 WFDB code: 1 normal beat, 5 premature ventricular
            contraction, 8 atrial premature beat, 28 rhythm change.
        source: where it comes from.
        licence: terms of the data.
        sha256: fingerprint of the data as loaded.

    >>> zeros = np.full((4, 2), 1024, np.int16)
    >>> Electrocardiogram("toy", zeros, 360, 200, 1024, ("a", "b"), zeros, zeros).millivolts().max()
    np.float32(0.0)
    """

    name: str
    signal: np.ndarray
    rate: int
    gain: int
    baseline: int
    leads: tuple[str, ...]
    annotation_sample: np.ndarray
    annotation_code: np.ndarray
    source: str = ""
    licence: str = ""
    sha256: str = ""

    def millivolts(self) -> np.ndarray:
        """Return the signal as [samples, leads] float32 millivolts."""
        centred = self.signal.astype(np.float32) - np.float32(self.baseline)
        return centred / np.float32(self.gain)

    def __repr__(self) -> str:
        """One line: name, shape, rate and number of annotations."""
        return (
            f"Electrocardiogram({self.name!r}: {self.signal.shape} {self.signal.dtype} at "
            f"{self.rate} Hz, {len(self.annotation_sample)} annotations)"
        )
