"""Conversion of HDR and wide-gamut video to SDR in BT.709, display-referred.

Transfer functions: ITU-R BT.2100-2, tables 4 (PQ) and 5 (HLG). Tone mapping: the EETF of ITU-R BT.2390-11,
section 5.4.1, on the largest of R, G and B, which keeps hue and saturation. Output: ITU-R BT.1886.
"""

from __future__ import annotations

from functools import cache

import torch
from av.video.reformatter import ColorPrimaries, ColorTrc
from torch import Tensor

HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
"""Transfer functions of HDR: PQ and HLG."""
SOURCE_PEAK = 1000.0
"""Luminance in cd/m2 that is mapped to SDR white: the nominal peak of HLG, and of most PQ masters."""
WHITE = 203.0
"""Luminance in cd/m2 of diffuse white in HDR (ITU-R BT.2408-7, table 1), the white level of SDR."""
PQ_M1, PQ_M2, PQ_C1, PQ_C2, PQ_C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
HLG_A, HLG_B, HLG_C = 0.17883277, 0.28466892, 0.55991073
HLG_GAMMA = 1.2
"""System gamma of the OOTF for a display of 1000 cd/m2."""
LUMINANCE = (0.2627, 0.6780, 0.0593)
"""Luminance of the primaries of BT.2020."""
TO_709 = {
    # ITU-R BT.2087-0, annex 2; and Display P3 (D65) by the same derivation.
    ColorPrimaries.BT2020: (
        (1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)
    ),
    ColorPrimaries.SMPTE432: (
        (1.2249, -0.2247, 0.0), (-0.0420, 1.0419, 0.0), (-0.0197, -0.0786, 1.0979)
    ),
}  # fmt: skip
"""Primaries -> matrix from their linear RGB to that of BT.709."""
GAMMA = 2.4
"""Exponent of BT.1886."""
LEVELS = 2**16
"""Number of entries of the lookup tables."""


def to_sdr(coded: Tensor, transfer: int, primaries: int) -> Tensor:
    """Convert coded RGB to SDR RGB of BT.709.

    Args:
        coded: float32 RGB in [0, 1], channels last.
        transfer: `ColorTrc` of the frame; any other than PQ and HLG is taken as SDR.
        primaries: `ColorPrimaries` of the frame; unspecified is BT.2020 in HDR and BT.709 in SDR.

    Returns:
        Float32 RGB in [0, 1], of the same shape as `coded`.
    """
    if transfer in HDR:
        light = _eotf(transfer)[(coded * (LEVELS - 1)).round().to(torch.int32)]
        if transfer == ColorTrc.ARIB_STD_B67:
            luminance = (light @ torch.tensor(LUMINANCE)).unsqueeze(-1)
            light = SOURCE_PEAK * luminance.clamp(min=1e-9).pow(HLG_GAMMA - 1) * light
        brightest = light.amax(dim=-1, keepdim=True)
        relative = light * _gain()[_gain_index(brightest)] / WHITE
        primaries = ColorPrimaries.BT2020 if primaries == ColorPrimaries.UNSPECIFIED else primaries
    else:
        relative = coded.pow(GAMMA)
    if primaries in TO_709:
        relative = relative @ torch.tensor(TO_709[ColorPrimaries(primaries)]).T
    return relative.clamp(0, 1).pow(1 / GAMMA)


@cache
def _eotf(transfer: int) -> Tensor:
    """Return a table of the light of each 16-bit code: display light of PQ in cd/m2, scene light of HLG in
    [0, 1].

    It is computed once, since pow is slow.
    """
    code = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    if transfer == ColorTrc.SMPTE2084:
        return _pq_to_light(code).float()
    return torch.where(code <= 0.5, code**2 / 3, (((code - HLG_C) / HLG_A).exp() + HLG_B) / 12).float()


def _gain_index(brightest: Tensor) -> Tensor:
    """Return the index into `_gain` for a brightest channel in cd/m2; finer in the dark, like PQ."""
    relative = (brightest / SOURCE_PEAK).clamp(max=1)
    return (relative.sqrt().sqrt() * (LEVELS - 1)).round().to(torch.int32)


@cache
def _gain() -> Tensor:
    """Return a table of the factors by which the EETF changes a pixel, by its brightest channel (BT.2390)."""
    brightest = SOURCE_PEAK * torch.linspace(0, 1, LEVELS, dtype=torch.float64) ** 4
    brightest = brightest.clamp(min=1e-4)
    peak, white = (_light_to_pq(torch.tensor(level)) for level in (SOURCE_PEAK, WHITE))
    code, max_lum = _light_to_pq(brightest) / peak, float(white / peak)
    knee = 1.5 * max_lum - 0.5
    t = (code - knee) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * max_lum
    )
    mapped = torch.where(code < knee, code, spline)
    return (_pq_to_light(mapped * peak) / brightest).float()


def _pq_to_light(code: Tensor) -> Tensor:
    """Apply the EOTF of PQ (BT.2100, table 4): code in [0, 1] -> light in cd/m2."""
    root = code.pow(1 / PQ_M2)
    return 10000 * ((root - PQ_C1).clamp(min=0) / (PQ_C2 - PQ_C3 * root)).pow(1 / PQ_M1)


def _light_to_pq(light: Tensor) -> Tensor:
    """Apply the inverse EOTF of PQ (BT.2100, table 4): light in cd/m2 -> code in [0, 1]."""
    power = (light / 10000).pow(PQ_M1)
    return ((PQ_C1 + PQ_C2 * power) / (1 + PQ_C3 * power)).pow(PQ_M2)
