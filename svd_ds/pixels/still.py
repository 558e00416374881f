"""Reading of still images as they are shown: the only place that decodes an image file with Pillow.

Orientation, transparency, bit depth and colour profile are applied here, so that all readers of images agree.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from svd_ds.small_files import read_regular

ORIENTATION = 0x0112
"""EXIF tag of the orientation of the stored rows and columns (CIPA DC-008, 4.6.5)."""
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FORMATS = ("JPEG", "JPEG2000", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Allowed formats. For some others Pillow starts a program (EPS) or opens further files."""
MAX_PIXELS = 89_478_485
"""Largest number of pixels of an image or frame: the limit at which Pillow warns of a decompression bomb, a
quarter GiB of RGB. A frame of 8K video has 33 million."""
HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
PHOTOMETRIC, WHITE_IS_ZERO = 0x0106, 0
"""TIFF tag of the photometric interpretation, and its value if 0 is white."""
SRGB_GAMMA = 1 / 2.2
SAME_GAMMA = 0.05
"""Relative difference of a gAMA chunk from the gamma of sRGB that makes no visible change."""
BACKGROUND = 255
"""Level of the white background on which transparent pixels are composited, as in browsers."""


class TooLargeError(ValueError):
    """Error of a file that is not decoded because it claims frames with too many pixels."""


def too_large(height: int, width: int, max_pixels: int) -> TooLargeError:
    """Make the error of a file whose frames have too many pixels."""
    return TooLargeError(
        f"the file claims {height} x {width} pixels, but at most {max_pixels} are allowed: it is not decoded"
    )


def is_still(content: bytes) -> bool:
    """Return True if a file begins like a JPEG, PNG or WebP image."""
    return content.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (
        content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    )


def read_still(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file as it is shown.

    The EXIF orientation is applied, transparent pixels are composited on white, 16 bits a channel are scaled
    to 8, and an embedded colour profile is converted to sRGB. An animation gives its first frame.

    Args:
        source: path or bytes of the file.
        max_pixels: largest allowed number of pixels; a file that claims more is not decoded.

    Returns:
        uint8 sRGB, (H, W, 3).

    Raises:
        ValueError: the file is not an image that can be read; the caller adds its name.
        OSError: the file cannot be opened.
    """
    content = source if isinstance(source, bytes) else read_regular(source)
    try:
        with _open_image(content) as image:
            if image.width * image.height > max_pixels:
                raise too_large(image.height, image.width, max_pixels)
            _scale_transparency(image)
            image.load()
            orientation = _orientation(image)
            shown = _to_srgb(_to_eight_bits(image))
        if orientation in TRANSPOSITIONS:
            shown = shown.transpose(TRANSPOSITIONS[orientation])
        return np.array(shown)
    except TooLargeError:
        raise
    # Pillow's decoders raise SyntaxError, struct.error, DecompressionBombError and others on damaged files.
    except Exception as error:
        raise ValueError(f"it cannot be read as an image ({_reason(error, content)})") from error


def _open_image(content: bytes) -> Image.Image:
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
        return Image.open(io.BytesIO(content), formats=FORMATS)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        # The pixels are intact even if the EXIF block is damaged.
        return 1


def _scale_transparency(image: Image.Image) -> None:
    """Scale the transparent colour of a 16-bit PNG to 8 bits, as Pillow does with the pixels."""
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and any("RGB;16" in str(tile) for tile in getattr(image, "tile", ())):
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert an image to a mode of 8 bits a channel; Pillow itself would clip 16-bit grey to white.

    Raises:
        ValueError: the range of the pixel values is unknown.
    """
    is_pgm = image.mode == "I" and image.format == "PPM"
    if not (image.mode.startswith("I;16") or is_pgm):
        if image.mode in ("I", "F"):
            raise ValueError(f"the range of its pixels, of mode {image.mode!r}, is not known")
        return image
    levels_HW = np.asarray(image).astype(np.uint32)
    if image.format == "TIFF" and image.getexif().get(PHOTOMETRIC) == WHITE_IS_ZERO:
        # Pillow inverts images of 8 bits only.
        levels_HW = 65535 - levels_HW
    grey = Image.fromarray(((levels_HW * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(levels_HW == transparent, 0, 255).astype(np.uint8)))
    if profile := image.info.get("icc_profile"):
        grey.info["icc_profile"] = profile
    return grey


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image to sRGB by its profile or gamma, composited on white."""
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma", 0.0)
    alpha: Image.Image | None = None
    if image.has_transparency_data:
        # A grey profile applies to grey images only, and no profile applies to the alpha channel.
        is_grey = image.mode in ("L", "LA", "La")
        image = image.convert("LA" if is_grey else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if is_grey else "RGB")
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if profile:
        image = _apply_profile(image, profile)
    elif gamma and "srgb" not in image.info and abs(gamma / SRGB_GAMMA - 1) > SAME_GAMMA:
        image = _apply_gamma(image.convert("RGB"), gamma)
    shown = image.convert("RGB")
    if alpha is not None:
        shown.putalpha(alpha)
        background = Image.new("RGBA", shown.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
        shown = Image.alpha_composite(background, shown).convert("RGB")
    return shown


def _apply_gamma(image: Image.Image, gamma: float) -> Image.Image:
    """Convert an RGB image with the gamma of a PNG's gAMA chunk to that of sRGB, as browsers do."""
    return image.point([round(255 * (level / 255) ** (SRGB_GAMMA / gamma)) for level in range(256)] * 3)


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an image to sRGB by its colour profile; unchanged if the profile does not match its mode."""
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(embedded).startswith("sRGB"):
            return image
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, embedded, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image
    return converted or image


def _reason(error: Exception, content: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        if content[4:8] == b"ftyp" and content[8:12] in HEIC:
            return "it is HEIC; convert it to JPEG or PNG"
        return f"its format is unknown: it must be one of {', '.join(FORMATS)}"
    return " ".join(str(error).split()) or type(error).__name__
