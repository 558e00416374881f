"""HDR and wide-gamut video as SDR in BT.709, display-referred.

Transfer functions: ITU-R BT.2100-2, tables 4 (PQ) and 5 (HLG). Tone mapping: the EETF of ITU-R BT.2390-11,
section 5.4.1, on the largest of R, G and B, which keeps hue and saturation. Output: ITU-R BT.1886.
"""

from __future__ import annotations

import torch
from av.video.reformatter import ColorPrimaries, ColorTrc
from torch import Tensor

HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
"""Transfers of HDR: PQ and HLG."""
SOURCE_PEAK = 1000.0
"""cd/m2 that become SDR's white: HLG's nominal peak, and that of most PQ masters."""
WHITE = 203.0
"""cd/m2 of diffuse white in HDR (ITU-R BT.2408-7, table 1): SDR's white level."""
PQ_M1, PQ_M2, PQ_C1, PQ_C2, PQ_C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
HLG_A, HLG_B, HLG_C = 0.17883277, 0.28466892, 0.55991073
HLG_GAMMA = 1.2
"""Of the OOTF for a display of 1000 cd/m2."""
LUMINANCE = (0.2627, 0.6780, 0.0593)
"""Of BT.2020's primaries."""
TO_709 = {
    # ITU-R BT.2087-0, annex 2; and Display P3 (D65) by the same derivation.
    ColorPrimaries.BT2020: (
        (1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)
    ),
    ColorPrimaries.SMPTE432: (
        (1.2249, -0.2247, 0.0), (-0.0420, 1.0419, 0.0), (-0.0197, -0.0786, 1.0979)
    ),
}  # fmt: skip
"""Matrices from linear RGB of other primaries to that of BT.709."""
GAMMA = 2.4
"""Of BT.1886."""


def to_sdr(coded: Tensor, transfer: int, primaries: int) -> Tensor:
    """Convert coded RGB to SDR RGB of BT.709.

    Args:
        coded: float32 RGB in [0, 1], channels last.
        transfer: `ColorTrc` of the frame; other than PQ and HLG is taken as SDR.
        primaries: `ColorPrimaries` of the frame; unspecified is BT.2020 in HDR and BT.709 in SDR.

    Returns:
        Float32 RGB in [0, 1], of the same shape.
    """
    if transfer in HDR:
        light = _pq_to_light(coded) if transfer == ColorTrc.SMPTE2084 else _hlg_to_light(coded)
        relative = _tone_mapped(light) / WHITE
        primaries = ColorPrimaries.BT2020 if primaries == ColorPrimaries.UNSPECIFIED else primaries
    else:
        relative = coded.pow(GAMMA)
    if primaries in TO_709:
        relative = relative @ torch.tensor(TO_709[ColorPrimaries(primaries)]).T
    return relative.clamp(0, 1).pow(1 / GAMMA)


def _tone_mapped(light: Tensor) -> Tensor:
    """cd/m2 up to SOURCE_PEAK -> cd/m2 up to WHITE, each pixel scaled as a whole."""
    brightest = light.amax(dim=-1, keepdim=True).clamp(1e-4, SOURCE_PEAK)
    peak, white = (_light_to_pq(torch.tensor(level)) for level in (SOURCE_PEAK, WHITE))
    code, most = _light_to_pq(brightest) / peak, float(white / peak)
    knee = 1.5 * most - 0.5
    t = (code - knee) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * most
    )
    mapped = torch.where(code < knee, code, spline)
    return light * (_pq_to_light(mapped * peak) / brightest)


def _pq_to_light(code: Tensor) -> Tensor:
    root = code.pow(1 / PQ_M2)
    return 10000 * ((root - PQ_C1).clamp(min=0) / (PQ_C2 - PQ_C3 * root)).pow(1 / PQ_M1)


def _light_to_pq(light: Tensor) -> Tensor:
    power = (light / 10000).pow(PQ_M1)
    return ((PQ_C1 + PQ_C2 * power) / (1 + PQ_C3 * power)).pow(PQ_M2)


def _hlg_to_light(code: Tensor) -> Tensor:
    scene = torch.where(code <= 0.5, code**2 / 3, (((code - HLG_C) / HLG_A).exp() + HLG_B) / 12)
    luminance = (scene @ torch.tensor(LUMINANCE)).unsqueeze(-1)
    return SOURCE_PEAK * luminance.clamp(min=1e-9).pow(HLG_GAMMA - 1) * scene
